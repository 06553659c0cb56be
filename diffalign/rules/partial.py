"""Partial credit: a graded score of calls; gates, schedules, weights and masks that compose terms into one reward.

Cheng Qian et al.: "ToolRL: Reward is All Tool Learning Needs", 2025 (arXiv 2504.13958), its correctness score;
"Reasoning-SQL" (arXiv 2503.23157), an outcome that no sum of shaping terms outweighs; BalCapRL (arXiv 2605.07394), the
length-conditional mask; HARMO (arXiv 2510.05283), rule and model in one reward, and a length penalty.

Where we differ:
- No call wanted and none made is exact, +3; the published fraction is 0/0 there.
- Reasoning-SQL does not publish its weights: `dominant_weights` checks them or scales the shaping terms down.
- HARMO's penalty is not published in full: ours is -worst * clip(|s / s* - 1| / tolerance, 0, 1) with s* the mean over
  the correct samples of the group, and 0 for a group without one. Its hybrid is hard; ours blends by a confidence.
- A term that a gate or a mask shuts counts 0 even where it is NaN: what is not read cannot spoil the row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.errors import ConfigError

Call = tuple[str, Mapping[str, Any]]  # a name and its arguments
ROOM = 0.9  # a rescaled sum of shaping terms reaches this share of a correct outcome, so it never ties with one


def call_score(made: Sequence[Call] | None, wanted: Sequence[Call]) -> float:
    """ToolRL's correctness in [-3, 3]: +3 for exactly the wanted calls, -3 for none of them or for None (malformed)."""
    if made is None:
        return -3.0
    if not wanted:
        return -3.0 if made else 3.0
    names, asked = Counter(name for name, _ in made), Counter(name for name, _ in wanted)
    found = (names & asked).total() / (names | asked).total()
    unused = list(made)
    for name, arguments in wanted:
        same = [k for k, call in enumerate(unused) if call[0] == name]
        if same:
            best = max(same, key=lambda k: _likeness(unused[k][1], arguments))
            found += _likeness(unused.pop(best)[1], arguments)
    return 6 * found / (1 + sum(1 + len(arguments) for _, arguments in wanted)) - 3


def _likeness(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> float:
    """The Jaccard index of the keys plus the number of equal values."""
    shared, either = made.keys() & wanted.keys(), made.keys() | wanted.keys()
    return (len(shared) / len(either) if either else 1.0) + sum(bool(made[key] == wanted[key]) for key in shared)


def gated(term: Tensor, monitor: Tensor, at_least: float) -> Tensor:
    """`term` (B,) where `monitor` (B,) reaches the threshold, 0 where it does not, NaN where it is NaN."""
    return _kept(term, monitor >= at_least, monitor)


def length_mask(
    rewards: Tensor, ratio: Tensor, *, low: float = 0.5, high: float = 2.0, columns: Sequence[int] | None = None
) -> Tensor:
    """Rewards (B,) or (B, K) where low <= ratio (B,) <= high, bounds included, else 0; only `columns` are masked."""
    inside = (ratio >= low) & (ratio <= high)
    if rewards.ndim == 1:
        return _kept(rewards, inside, ratio)
    masked = _kept(rewards, inside[:, None], ratio[:, None])
    if columns is None:
        return masked
    chosen = torch.zeros(rewards.shape[1], dtype=torch.bool, device=rewards.device)
    chosen[list(columns)] = True
    return torch.where(chosen, masked, rewards)


def _kept(term: Tensor, keep: Tensor, monitor: Tensor) -> Tensor:
    return torch.where(monitor.isnan(), torch.nan, torch.where(keep, term, 0.0))


def group_reference(length: Tensor, correct: Tensor, group: Tensor) -> Tensor:
    """The mean length of the correct samples of each sample's group (N,), where known; NaN where the group has none."""
    same, correct = group[:, None] == group, correct & length.isfinite()  # (N, N), (N,)
    counted = (same & correct).to(length.dtype)
    return (counted @ length.where(correct, 0.0)) / counted.sum(1)


def length_penalty(length: Tensor, reference: Tensor, *, worst: float = 0.5, tolerance: float = 1.0) -> Tensor:
    """0 at the reference, -worst where `length` is off by `tolerance` times it or more; 0 without a reference."""
    off = (length - reference).abs() / (tolerance * reference.abs())
    off = torch.where(length == reference, 0.0, off).clamp(max=1)
    return torch.where(reference.isnan(), 0.0, -worst * off)


def hybrid(rule: Tensor, model: Tensor, confidence: Tensor | float) -> Tensor:
    """k * rule + (1 - k) * model with k the confidence in [0, 1]; the model alone where the rule or k is NaN.

    A side whose weight is 0 is not read, so it may be NaN.
    """
    k = torch.as_tensor(confidence, dtype=rule.dtype, device=rule.device).expand_as(rule)
    k = torch.where(rule.isnan() | k.isnan(), 0.0, k)
    return torch.where(k > 0, k * rule, 0.0) + torch.where(k < 1, (1 - k) * model, 0.0)


def progress(step: int, steps: int, kind: Literal["linear", "cosine"] = "linear") -> float:
    """How far a schedule of `steps` is at `step`, from 0 to 1 and 1 ever after; one of 0 steps never starts."""
    share = min(max(step / steps, 0.0), 1.0) if steps > 0 else 0.0
    return share if kind == "linear" else (1 - math.cos(math.pi * share)) / 2


def scheduled_weights(weights: Mapping[str, float], outcome: str | None, done: float) -> dict[str, float]:
    """Weights in which shaping fades: every term but the outcome is worth 1 - done of its own."""
    return {name: weight if name == outcome else weight * (1 - done) for name, weight in weights.items()}


def dominant_weights(
    weights: Mapping[str, float],
    outcome: str,
    ranges: Mapping[str, tuple[float, float] | None],
    *,
    rescale: bool = False,
) -> dict[str, float]:
    """Weights under which a correct outcome beats any sum of shaping terms, scaled down to it by `rescale`."""
    for name, weight in weights.items():
        if weight and ranges.get(name) is None:
            raise ConfigError(
                f"the range of the term '{name}' is unknown, so nothing can be said to outweigh it. "
                f"Give it bounds: {{{name}: [low, high]}}."
            )
    worth = {name: abs(weight) * _width(ranges.get(name)) for name, weight in weights.items()}
    best, rest = worth[outcome], sum(value for name, value in worth.items() if name != outcome)
    if weights[outcome] <= 0 or best == 0:
        raise ConfigError(
            f"the outcome '{outcome}' has weight {weights[outcome]:g}, so being correct pays nothing. "
            "Give it a positive weight."
        )
    if rest < best:
        return dict(weights)
    if not rescale:
        raise ConfigError(
            f"the shaping terms are worth up to {rest:g} together and a correct '{outcome}' only {best:g}, so a wrong "
            f"answer can win. Raise the weight of '{outcome}', lower the others, or set dominance to 'rescale'."
        )
    return {name: weight if name == outcome else weight * ROOM * best / rest for name, weight in weights.items()}


def _width(ends: tuple[float, float] | None) -> float:
    return ends[1] - ends[0] if ends else 0.0
