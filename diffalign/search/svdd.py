"""SVDD: at every step draw several next latents and go on with the one of the highest value.

Paper: "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding", Li et
al., 2024 (arXiv 2408.08252). As published, `temperature` 0 takes the best and a positive one draws from the softmax of
value / temperature; the last step is not selected.

Where we differ: the winner's prediction, made to score it, is used again for its own next step, so T steps of M
candidates cost 1 + (T - 1) M predictions; steps without noise have one candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.noise import case_noise, forked
from diffalign.search.chain import Chain
from diffalign.search.judge import Judge
from diffalign.search.resampling import multinomial, uniforms
from diffalign.search.values import CleanPrediction, Value


@dataclass(frozen=True, kw_only=True)
class SVDDConfig:
    """A local search: greedy or soft in each step, never looking back."""

    candidates: int = 0  # next latents per step; 1 is the plain sampler, 0 as many as the budget affords or else 20
    temperature: float = 0.0  # reward units per nat; 0 takes the best candidate

    def __post_init__(self) -> None:
        if self.candidates < 0:
            raise ConfigError(f"svdd.candidates is {self.candidates}. Use 1 or more, or 0 for what the budget affords.")
        if not self.temperature >= 0:
            raise ConfigError(f"svdd.temperature is {self.temperature}, but it cannot be negative. 0 takes the best.")


@dataclass(frozen=True, eq=False)
class SVDDResult:
    """One finished walk per case."""

    latents: Tensor  # (B, ...) on the CPU
    rewards: Tensor  # (B,) float32, NaN where invalid
    candidates: int  # per step
    chosen: Tensor  # (steps, B) number of the candidate taken; 0 where there was one only
    invalid: Tensor  # (B,) values and rewards that were NaN


def search(chain: Chain, judge: Judge, config: SVDDConfig = SVDDConfig(), *, value: Value | None = None) -> SVDDResult:
    """Walk every case to the end in lock-step, choosing among candidates after each step but the last."""
    value = value or CleanPrediction(judge)
    rows = list(range(len(chain.seeds)))
    count = config.candidates or judge.as_many_as(lambda n: _cost(chain, value, n), without_limits=20)
    nfe, scored = _cost(chain, value, count)
    judge.require(nfe=nfe * len(rows), scored=scored * len(rows), what=f"svdd with {count} candidates a step")
    chosen, invalid = [], torch.zeros(len(rows), dtype=torch.long)
    x = chain.first(chain.seeds, rows)
    prediction = chain.predict(x, 0, rows)
    for i in range(chain.length):
        step = chain.transition(x, prediction, i)
        n = count if step.std and i + 1 < chain.length else 1
        many = [row for row in rows for _ in range(n)]
        seeds = forked(chain.seeds, many, list(range(n)) * len(rows))
        if n > 1:
            step = chain.transition(x.repeat_interleave(n, 0), prediction.repeat_interleave(n, 0), i)
        x = step.sample(case_noise(seeds, x, "step", i) if step.std else None, dtype=x.dtype)
        if i + 1 < chain.length:
            prediction = chain.predict(x, i + 1, many)
        pick = torch.zeros(len(rows), dtype=torch.long)
        if n > 1:
            values = value(x, prediction, i + 1, many, seeds).view(len(rows), n)
            pick, invalid = _pick(values, config.temperature, chain, i), invalid + values.isnan().sum(1)
            index = (pick + n * torch.arange(len(rows))).to(x.device)
            x, prediction = x[index], prediction[index]
        chosen.append(pick)
    rewards = judge.leaf(x, rows)
    return SVDDResult(x.cpu(), rewards, count, torch.stack(chosen), invalid + rewards.isnan())


def _pick(values: Tensor, temperature: float, chain: Chain, i: int) -> Tensor:
    """The number (B,) of the candidate each case goes on with: NaN never wins, and the first stands in if all are."""
    held = values.double().nan_to_num(nan=-torch.inf)
    if temperature == 0:
        return held.argmax(1)
    return multinomial(held / temperature, uniforms(chain.seeds, 1, "pick", i))[:, 0]


def _cost(chain: Chain, value: Value, count: int) -> tuple[int, int]:
    """NFE and scored images of one case."""
    values = [value.cost(i) for i in range(1, chain.length)] if count > 1 else []
    nfe = chain.costs[0] + count * (sum(chain.costs[1:]) + sum(cost for cost, _ in values))
    return nfe, 1 + count * sum(scored for _, scored in values)
