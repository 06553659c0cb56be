"""Annealed exploration: wide at the noisy steps, where the layout is decided, and greedy at the late ones.

Paper: "Let it Calm: Exploratory Annealed Decoding for Verifiable RL", 2025 (arXiv 2510.05251); its temperature
max(1 + tau_max - exp(t / d), tau_min) of token t.

Where we differ: a walk from noise to media has no tokens and no temperature, so `Anneal` is a curve over the progress
u in [0, 1] of a run, and by default it bends so that it starts at `start` and ends at `end` exactly. The growth of d
with the training step and the untouched first ten tokens of the published code are left out.

Who follows it: `annealed` makes a sampler's noise scale follow (eta of `ddim`, a of `cps` or `flow_sde`); `local`
scales 1 - cosine over its rounds; `stepwise` scales epsilon and distance over the steps; `beam` scales the children.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffalign.budget import Budget
from diffalign.errors import ConfigError
from diffalign.noise import Kernel, Levels, Transition


@dataclass(frozen=True, kw_only=True)
class Anneal:
    """The scale max(1 + start - exp(rate u), end) at progress u."""

    start: float = 1.0  # scale at the first, noisiest step
    end: float = 0.1  # scale it never falls below
    decay: float | None = None  # share of the run per unit of the exponent; None reaches `end` with the last step

    def __post_init__(self) -> None:
        if not 0 <= self.end <= self.start < math.inf:
            raise ConfigError(
                f"anneal runs from start = {self.start} to end = {self.end}, but it must fall and stay at or above 0. "
                "Give start >= end >= 0."
            )
        if self.decay is not None and not self.decay > 0:
            raise ConfigError(f"anneal.decay is {self.decay}, but it is a share of the run above 0.")

    def at(self, progress: float) -> float:
        """The scale at a progress in [0, 1]."""
        if not 0 <= progress <= 1:
            raise ConfigError(f"the progress of a run lies in [0, 1], but got {progress}.")
        rate = math.log(1 + self.start - self.end) if self.decay is None else 1 / self.decay
        return max(1 + self.start - math.exp(min(rate * progress, 700.0)), self.end)

    def count(self, most: int, progress: float) -> int:
        """A number of branches scaled and rounded, at least 1."""
        return max(1, round(self.at(progress) * most))


def scale(anneal: Anneal | None, progress: float) -> float:
    """The scale at a progress; 1 without a schedule."""
    return 1.0 if anneal is None else anneal.at(progress)


def progress(i: int, length: int) -> float:
    """Progress of item i of `length`: 0 for the first, 1 for the last."""
    return min(i / (length - 1), 1.0) if length > 1 else 0.0


def spent_share(budget: Budget) -> float:
    """How much of its tightest limit a budget has spent; 0 without limits."""
    limits, spent = budget.limits, budget.spent()
    found = {name: getattr(limits, name) for name in spent}
    return min(max((spent[name] / limit for name, limit in found.items() if limit is not None), default=0.0), 1.0)


def annealed(make: Callable[[float], Kernel], anneal: Anneal) -> Kernel:
    """The kernel whose step i is `make(scale)`; rollout and replay must share it, for it sets their variance."""

    def step(levels: Levels, x: Tensor, prediction: Tensor, i: int) -> Transition:
        return make(anneal.at(progress(i, len(levels))))(levels, x, prediction, i)

    return step
