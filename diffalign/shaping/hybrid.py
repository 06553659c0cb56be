"""Rules joined with models, and guards against rewards that grow with length (or saturation, text area, counts).

Papers: "Beyond Monolithic Rewards", 2025 (arXiv 2510.05283): a rule where one applies, a model where none does, and a
length term; "BalCapRL", 2026 (arXiv 2605.07394): `length_mask`.

Where we differ: `hybrid` blends by the confidence of the rule instead of switching; the published form of the length
term is not known to us, so `length_penalty` is our own: linear in the relative distance from a reference, and capped.
Any positive scalar can stand for the length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.shaping.groups import restored, statistics
from diffalign.shaping.references import real


def hybrid(rule: Tensor, model: Tensor, kappa: Tensor | float) -> Tensor:
    """kappa rule + (1 - kappa) model for rewards (N,) on one scale; at 0 or 1 the other may be NaN."""
    rule = real(rule)
    k = torch.as_tensor(kappa).to(rule).expand_as(rule)
    if not (k.isnan() | ((k >= 0) & (k <= 1))).all():
        raise ConfigError(
            f"kappa has values in [{float(k.min()):g}, {float(k.max()):g}], but a confidence is in [0, 1]."
        )
    by_rule, by_model = torch.where(k == 0, 0, k * rule), torch.where(k == 1, 0, (1 - k) * model.to(rule))
    return by_rule + by_model


def group_reference(s: Tensor, correct: Tensor, gid: Tensor) -> Tensor:
    """For every sample (N,) the mean of the scalar s over the correct samples of its group; NaN where none is."""
    found = statistics(torch.where(correct.bool(), real(s), torch.nan), gid)
    return restored(found.mean[found.index], s)


def length_penalty(s: Tensor, reference: Tensor, *, most: float = 0.5, tau: float = 1.0) -> Tensor:
    """-most min(1, |s / reference - 1| / tau) for scalars s (N,) of at least 0; 0 where the reference is NaN."""
    if not (most >= 0 and tau > 0):
        raise ConfigError(f"most is {most:g} and tau {tau:g}, but a penalty is at least 0 and its width above 0.")
    s = real(s)
    reference = reference.to(s).expand_as(s)
    off = (s - reference).abs()
    share = torch.where(off > 0, off / (reference.abs() * tau), off).clamp(max=1)  # 0 / 0 is no distance
    return torch.where(reference.isnan(), 0, -most * share)


def outside(ratio: Tensor, low: float = 0.5, high: float = 2.0) -> Tensor:
    """Which ratios to a reference lie outside [low, high]; if more than 30 % do, the bounds are wrong."""
    if not 0 <= low < high:
        raise ConfigError(f"the bounds are {low:g} and {high:g}, but 0 <= low < high is needed.")
    return (ratio < low) | (ratio > high)


def length_mask(
    members: Tensor, ratio: Tensor, masked: Sequence[int], *, low: float = 0.5, high: float = 2.0
) -> Tensor:
    """Rewards (N, K) with 0 in the columns `masked` of rows whose ratio (N,) lies outside [low, high].

    Mask preference rewards and leave verifiers alone. NaN stays NaN, and a ratio of NaN makes the masked columns NaN.
    """
    found = real(members).clone()
    at = list(masked)
    column = found[:, at]
    off = outside(ratio, low, high).unsqueeze(-1) & ~column.isnan()
    column = torch.where(off, 0, column)
    found[:, at] = torch.where(ratio.isnan().unsqueeze(-1), torch.nan, column)
    return found
