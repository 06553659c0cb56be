"""Resampling: which particles of a weighted set live on, for many sets (B, K) at once.

Papers: "Improved particle filter for nonlinear problems", Carpenter, Clifford and Fearnhead, 1999 (systematic);
"Negative association, ordering and convergence of resampling methods", Gerber, Chopin and Whiteley, 2019
(arXiv 1707.01845; SSP). Where we differ: nowhere.

Weights stay logarithms in float64, and row b of the uniforms is drawn from case b's seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from diffalign.noise import case_generator

Scheme = Literal["systematic", "ssp", "multinomial"]
T = TypeVar("T")


def weights(log_w: Tensor) -> Tensor:
    """Normalised weights (B, K) float64; a set that is wholly -inf counts as equal weights."""
    log_w = log_w.double()
    lost = log_w.isneginf().all(1, keepdim=True)
    return torch.where(lost, 0.0, log_w).softmax(1)


def ess(log_w: Tensor) -> Tensor:
    """Effective size (B,) 1 / sum W^2: K for equal weights, 1 if one particle holds everything."""
    return 1 / (weights(log_w) ** 2).sum(1)


def log_mean_exp(log_w: Tensor) -> Tensor:
    """log of the mean unnormalised weight (B,): one factor of the evidence."""
    return log_w.double().logsumexp(1) - math.log(log_w.shape[1])


def uniforms(seeds: Sequence[int], count: int, *stream: str | int) -> Tensor:
    """Uniform numbers (B, count) float64 in [0, 1), row b from seed b alone."""
    rows = [torch.rand(count, generator=case_generator(seed, *stream), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def multinomial(log_w: Tensor, uniform: Tensor) -> Tensor:
    """Ancestors (B, n), each drawn on its own by inverse CDF at `uniform` (B, n)."""
    ladder = weights(log_w).cumsum(1)
    # right=True steps over rungs of height 0, so a particle without weight is never drawn
    return torch.searchsorted(ladder / ladder[:, -1:], uniform.contiguous(), right=True)


def systematic(log_w: Tensor, uniform: Tensor) -> Tensor:
    """Ancestors (B, K) at K evenly spaced positions that share one offset, `uniform` (B, 1)."""
    count = log_w.shape[1]
    return multinomial(log_w, (torch.arange(count) + uniform[:, :1]) / count)


def ssp(log_w: Tensor, uniform: Tensor) -> Tensor:
    """Ancestors (B, K) by the Srinivasan sampling process, with `uniform` (B, K).

    Everyone gets the whole part of K W children. The fractional shares then meet one by one: a pair whose shares
    stay below 1 leaves all to one of them, any other pair makes one child and keeps the rest.
    """
    size, count = log_w.shape
    expected = weights(log_w) * count
    children = expected.floor()
    shares, sets = expected - children, torch.arange(size)
    holder, held = torch.zeros(size, dtype=torch.long), shares[:, 0]
    for k in range(1, count):
        both = held + shares[:, k]
        small = both < 1
        stays = torch.where(small, held / both, (1 - shares[:, k]) / (2 - both))  # 0 / 0 is NaN: two empty shares
        ahead = uniform[:, k] < stays
        winner, loser = torch.where(ahead, holder, k), torch.where(ahead, k, holder)
        children[sets, winner] += (~small).double()
        holder, held = torch.where(small, winner, loser), torch.where(small, both, both - 1)
    children[sets, holder] += held.round()  # 0 or 1 but for rounding, since all shares add up to a whole number
    places = (torch.arange(count, dtype=torch.float64) + 0.5).expand(size, -1).contiguous()
    return torch.searchsorted(children.cumsum(1), places)


def resample(log_w: Tensor, scheme: Scheme, seeds: Sequence[int], *stream: str | int) -> Tensor:
    """Ancestors (B, K) of the sets `log_w` (B, K), set b drawn from seeds[b] alone."""
    uniform = uniforms(seeds, 1 if scheme == "systematic" else log_w.shape[1], *stream)
    return {"systematic": systematic, "ssp": ssp, "multinomial": multinomial}[scheme](log_w, uniform)


def gathered(held: T, index: Tensor) -> T:
    """`held` at `index` along the first dimension: a tensor, a list, or a mapping of them; anything else as it is."""
    if isinstance(held, Tensor):
        return held[index.to(held.device)]  # type: ignore[return-value]
    if isinstance(held, dict):
        return {key: gathered(value, index) for key, value in held.items()}  # type: ignore[return-value]
    if isinstance(held, list):
        return [held[k] for k in index.tolist()]  # type: ignore[return-value]
    return held
