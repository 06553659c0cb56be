"""Partial credit: terms with weights, gates, a schedule, and one outcome that no sum of the others outweighs.

ToolRL (arXiv 2504.13958): graded terms teach more than pass or fail, and weights that change smoothly more than ones
that jump. Reasoning-SQL (arXiv 2503.23157): the outcome stays dominant. GDPO (arXiv 2601.05242): a reward that is
easier than another counts only where that one is reached. The arithmetic: diffalign/rules/partial.py.

Where we differ: none of the papers publishes this composition; each rule is an option, and all are off by default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.registry import register_reward
from diffalign.rules import partial as rules
from diffalign.scoring import Ask, Composite, Score, make_reward

Ends = tuple[float, float]


@register_reward("partial")
class Partial(Composite):
    """The sum of weight x term over `terms` {name: reward}; every term is a part, and `<name>/open` shows its gate.

    `bounds` {name: [low, high]} brings a term to [0, 1] and clips it. `gates` {name: [other, at least]} lets it count
    only where the other term reaches the threshold, after its bounds. With `outcome`, `dominance` checks or rescales
    the weights of the others, which fade over `anneal` steps; set `step` on the object as training goes on.
    """

    def __init__(
        self,
        terms: dict[str, Any],
        weights: dict[str, float] | None = None,
        gates: dict[str, tuple[str, float]] | None = None,
        bounds: dict[str, tuple[float, float]] | None = None,
        outcome: str | None = None,
        dominance: Literal["off", "check", "rescale"] = "off",
        anneal: int = 0,
        schedule: Literal["linear", "cosine"] = "linear",
        step: int = 0,
    ) -> None:
        self.terms = {name: make_reward(spec) for name, spec in terms.items()}
        self.gates, self.bounds, self.outcome = gates or {}, bounds or {}, outcome
        self._check(weights or {}, dominance, anneal)
        self.rewards = list(self.terms.values())
        self.modality = self.shared_modality(self.rewards)
        self.weights = {name: (weights or {}).get(name, 1.0) for name in self.terms}
        if outcome is not None and dominance != "off":
            ends = {name: self._ends(name) for name in self.terms}
            self.weights = rules.dominant_weights(self.weights, outcome, ends, rescale=dominance == "rescale")
        self.anneal, self.schedule, self.step = anneal, schedule, step
        counted = [reward for name, reward in self.terms.items() if self.weights[name]]
        self.differentiable = all(reward.differentiable for reward in counted)
        self.range = self._range()

    @property
    def options(self) -> dict[str, Any]:
        """Everything that changes the score, the step as it is now."""
        return {
            "terms": list(self.terms),
            "weights": self.weights,
            "gates": self.gates,
            "bounds": self.bounds,
            "outcome": self.outcome,
            "anneal": self.anneal,
            "schedule": self.schedule,
            "step": self.step,
        }

    def weights_at(self, step: int) -> dict[str, float]:
        """The weight of each term once `step` steps are done."""
        return rules.scheduled_weights(self.weights, self.outcome, rules.progress(step, self.anneal, self.schedule))

    def through(self, media: Tensor, cases: Sequence[Case], ask: Ask) -> Score:
        found = {name: ask(reward, media, cases) for name, reward in self.terms.items()}
        place = next(iter(found.values())).total.device
        values = {name: self._bounded(name, score.total.to(place)) for name, score in found.items()}
        total, parts = torch.zeros(len(cases), device=place), {}
        for name, weight in self.weights_at(self.step).items():
            parts[name], counted = found[name].total, values[name]
            parts |= {f"{name}/{k}": part for k, part in found[name].parts.items() if k != self.terms[name].name}
            if name in self.gates:
                other, at_least = self.gates[name]
                counted = rules.gated(counted, values[other], at_least)
                parts[f"{name}/open"] = rules.gated(torch.ones_like(counted), values[other], at_least)
            if weight:
                total = total + weight * counted
        return Score(total, parts)

    def _bounded(self, name: str, value: Tensor) -> Tensor:
        if name not in self.bounds:
            return value
        low, high = self.bounds[name]
        return ((value - low) / (high - low)).clamp(0, 1)

    def _ends(self, name: str) -> Ends | None:
        """Where the term lies, its bounds and gate counted."""
        ends = (0.0, 1.0) if name in self.bounds else self.terms[name].range
        return (min(ends[0], 0.0), max(ends[1], 0.0)) if ends and name in self.gates else ends

    def _range(self) -> Ends | None:
        low = high = 0.0
        for name, weight in self.weights.items():
            ends = self._ends(name) if weight else (0.0, 0.0)
            if ends is None:
                return None
            worth = sorted(weight * end for end in ends)
            fades = self.anneal > 0 and name != self.outcome  # towards a weight of 0
            low += min(worth[0], 0.0) if fades else worth[0]
            high += max(worth[1], 0.0) if fades else worth[1]
        return low, high

    def _check(self, weights: dict[str, float], dominance: str, anneal: int) -> None:
        asked = {*weights, *self.gates, *self.bounds, *(other for other, _ in self.gates.values())}
        asked |= {self.outcome} if self.outcome is not None else set()
        if unknown := sorted(asked - set(self.terms)):
            raise ConfigError(f"partial speaks of the term '{unknown[0]}', but has: {', '.join(self.terms) or 'none'}.")
        if not self.terms or anneal < 0:
            raise ConfigError(
                f"partial has {len(self.terms)} terms and anneal {anneal}; it needs a term, and 0 steps or more."
            )
        if self.outcome is None and (dominance != "off" or anneal):
            raise ConfigError("partial fades and weighs terms against an outcome, and none is named. Set outcome.")
        for name, (low, high) in self.bounds.items():
            if not 0 < high - low < math.inf:
                raise ConfigError(
                    f"partial.bounds.{name} is {low:g} to {high:g}; the first is below the second, and both are finite."
                )
