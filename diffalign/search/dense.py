"""Dense step rewards: what each step of one generation adds to the reward of the image it is heading for.

Paper: "DenseGRPO: From Sparse to Dense Reward for Flow Matching Model Alignment", Deng, Yan, Mao, Wang, Liu, Gao, Sang,
2026 (arXiv 2601.20218): its dense reward. R_i is the reward of the latent of level i finished deterministically, and
the step from i to i + 1 earns R_{i+1} - R_i. The gains sum to the final reward minus R_0. Used here on one generation,
to show where a walk wins or loses; training reads the same definition.

Where we differ: levels count up from noise, where the paper's count down to 0. The completion may be any `Value`, or
the paper's with fewer steps; its authors warn that a single step hands blurry images to the reward. `every` and a
tight budget leave levels out; a gain then covers all the steps between two scored levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.noise import case_noise
from diffalign.search.chain import Chain
from diffalign.search.judge import Judge
from diffalign.search.values import Completion, Value


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    completion: int = 0  # steps that finish a latent; 0 walks every remaining level, the faithful and costly choice
    stochastic: bool = True  # walk with the chain's own noise; a deterministic walk with full completions gains nothing
    every: int = 1  # score every n-th level and the last; 1 gives each step its own gain
    keep_latents: bool = False  # return the latents of the scored levels

    def __post_init__(self) -> None:
        if self.completion < 0:
            raise ConfigError(f"dense.completion is {self.completion}; use 0 for all remaining steps, or at least 1.")
        if self.every < 1:
            raise ConfigError(f"dense.every is {self.every}, but only every 1st, 2nd, ... level can be scored.")


@dataclass(frozen=True, eq=False)
class DenseResult:
    """Rewards at S + 1 scored levels; S is the chain's length T if every level is scored."""

    levels: tuple[int, ...]  # (S + 1,) from 0, pure noise, to T, the image
    rewards: Tensor  # (B, S + 1) of the completions, the last of the image itself; NaN where invalid
    gains: Tensor  # (B, S) from one scored level to the next, NaN next to an invalid reward
    latents: Tensor | None = None  # (B, S + 1, ...) on the CPU


def dense(
    chain: Chain, judge: Judge, config: DenseConfig = DenseConfig(), *, value: Value | None = None
) -> DenseResult:
    """Walk each case once from its own noise and value it on the way by `value`, by default the config's completion.

    Completions are previews; the image at the end is the case's one leaf.
    """
    value = value or Completion(judge, config.completion or chain.length)
    levels, rows, seeds = _plan(chain, judge, config, value), list(range(len(chain.seeds))), list(chain.seeds)
    x = chain.first(seeds, rows)
    rewards: list[Tensor] = []
    latents: list[Tensor] = []
    for i in range(chain.length):
        prediction = chain.predict(x, i, rows)
        if i in levels:
            rewards.append(value(x, prediction, i, rows, seeds))
            latents += [x.cpu()] if config.keep_latents else []
        if not config.stochastic:
            x = chain.jump(x, prediction, i, i + 1)
            continue
        step = chain.transition(x, prediction, i)
        x = step.sample(case_noise(seeds, x, "step", i) if step.std else None, dtype=x.dtype)
    rewards.append(judge.leaf(x, rows, seeds))
    latents += [x.cpu()] if config.keep_latents else []
    table = torch.stack(rewards, 1)  # (B, S + 1)
    return DenseResult(levels, table, table.diff(dim=1), torch.stack(latents, 1) if latents else None)


def _plan(chain: Chain, judge: Judge, config: DenseConfig, value: Value) -> tuple[int, ...]:
    """The levels to score: every n-th and the last, with the smallest n from the config's on that fits the budget."""
    cases, length, walk = len(chain.seeds), chain.length, sum(chain.costs)

    def cost(levels: tuple[int, ...]) -> dict[str, int]:
        each = [value.cost(i) for i in levels[:-1]]
        return {"nfe": cases * (walk + sum(n for n, _ in each)), "scored": cases * (1 + sum(s for _, s in each))}

    strides = [(*range(0, length, every), length) for every in range(min(config.every, length), length + 1)]
    judge.require(**cost(strides[-1]), what="a walk valued at its start and its end")
    return next((levels for levels in strides if judge.affords(**cost(levels))), strides[-1])
