"""Values: what a reward promises of an unfinished latent, by its clean prediction or by finishing it on the side.

Follows: Feynman-Kac steering (Singhal et al., 2025, arXiv 2501.06848) for the clean prediction; "Sampling for Quality"
(2026, arXiv 2604.16453) for rollouts. Where we differ: the deterministic completion in a few steps is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.noise import case_noise, forked
from diffalign.search.judge import Judge


class Value(Protocol):
    """An estimate of the final reward of latents x (K, ...) at level i, whose prediction is at hand already."""

    def cost(self, i: int) -> tuple[int, int]:
        """NFE and scored images that one row costs at level i."""
        ...

    def __call__(self, x: Tensor, prediction: Tensor, i: int, rows: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Values (K,) float32 on the CPU, NaN where invalid; `seeds` (K,) give each row its own randomness."""
        ...


@dataclass(frozen=True)
class CleanPrediction:
    """The reward of the clean latent that the prediction points to; costs a decode and no model call."""

    judge: Judge

    def cost(self, i: int) -> tuple[int, int]:
        return 0, 1

    def __call__(self, x: Tensor, prediction: Tensor, i: int, rows: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return self.judge.preview(self.judge.chain.denoised(x, prediction, i), rows)


@dataclass(frozen=True)
class Completion:
    """The reward of the latent finished by `steps` deterministic steps; 1 step is the clean prediction."""

    judge: Judge
    steps: int = 2

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"a completion takes at least 1 step, but got {self.steps}.")

    def stops(self, i: int) -> list[int]:
        """The levels a completion from level i visits, the end included."""
        length = self.judge.chain.length
        count = min(self.steps, length - i)
        return [i + round((length - i) * k / count) for k in range(count + 1)]

    def cost(self, i: int) -> tuple[int, int]:
        return sum(self.judge.chain.costs[j] for j in self.stops(i)[1:-1]), 1

    def __call__(self, x: Tensor, prediction: Tensor, i: int, rows: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return self.judge.preview(self.finished(x, prediction, i, rows), rows)

    def finished(self, x: Tensor, prediction: Tensor, i: int, rows: Sequence[int]) -> Tensor:
        """Clean latents (K, ...) at the end of the deterministic walk."""
        chain, stops = self.judge.chain, self.stops(i)
        for here, there in pairwise(stops):
            if here != i:
                prediction = chain.predict(x, here, rows)
            x = chain.jump(x, prediction, here, there)
        return x


@dataclass(frozen=True)
class Rollouts:
    """The soft mean (1/strength) log mean exp(strength r) over `count` stochastic walks to the end."""

    judge: Judge
    count: int = 2
    strength: float = 1.0  # nats per unit of reward; 0 gives the plain mean

    def cost(self, i: int) -> tuple[int, int]:
        return self.count * sum(self.judge.chain.costs[i + 1 :]), self.count

    def __call__(self, x: Tensor, prediction: Tensor, i: int, rows: Sequence[int], seeds: Sequence[int]) -> Tensor:
        chain, n = self.judge.chain, self.count
        many = [row for row in rows for _ in range(n)]
        own = forked(seeds, [k for k in range(len(rows)) for _ in range(n)], list(range(1, n + 1)) * len(rows))
        walk, aim = x.repeat_interleave(n, 0), prediction.repeat_interleave(n, 0)
        for j in range(i, chain.length):
            if j > i:
                aim = chain.predict(walk, j, many)
            step = chain.transition(walk, aim, j)
            noise = case_noise(own, walk, "rollout", i, j) if step.std else None
            walk = step.sample(noise, dtype=walk.dtype)
        return soft_mean(self.judge.preview(walk, many).view(len(rows), n), self.strength)


def soft_mean(rewards: Tensor, strength: float) -> Tensor:
    """(1/strength) log mean exp(strength r) over the last dimension, NaN entries left out; all NaN gives NaN."""
    valid = ~rewards.isnan()
    count = valid.sum(-1).float()
    if strength == 0:
        return rewards.nan_to_num(0.0).sum(-1) / count
    held = torch.where(valid, strength * rewards, -math.inf)
    found = (held.logsumexp(-1) - count.log()) / strength
    return torch.where(count > 0, found, torch.nan)


def value_of(asked: Any, judge: Judge, strength: float) -> Value:
    """A value of unfinished latents: "clean", a number of completion steps, ("rollouts", n), or an object of ours."""
    if asked is None or asked == "clean":
        return CleanPrediction(judge)
    if isinstance(asked, int):
        return Completion(judge, asked)
    if isinstance(asked, tuple | list) and len(asked) == 2 and asked[0] == "rollouts":
        return Rollouts(judge, int(asked[1]), strength)
    if not callable(asked) or not hasattr(asked, "cost"):
        raise ConfigError(
            f"value is {asked!r}, but it is 'clean', a number of completion steps, ('rollouts', n), or an object with "
            "`cost(i)` and `__call__` as in diffalign.search.values."
        )
    found: Value = asked
    return found
