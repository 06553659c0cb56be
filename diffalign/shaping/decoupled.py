"""Several rewards as one advantage: each normalised before they are added, or after.

Paper: "GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization", S.-Y. Liu et
al., 2026 (arXiv 2601.05242). `gdpo` is its three steps: z-scores of each reward within its group, their weighted sum,
and one z-score over the batch. `joint` is what it compares with: the z-score of the weighted sum.

Where we differ: a reward that does not apply is NaN and leaves its weight to the others; replacing it by 0 before the
statistics, as the official code does, is `missing="zero"`. The deviation of a reward may have a floor, because a reward
that is nearly constant would otherwise be blown up to full strength.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.shaping.advantages import Floor, adv_batch, adv_grpo
from diffalign.shaping.references import real

Missing = Literal["renormalise", "invalid", "zero"]


def gdpo(
    members: Tensor,
    weights: Tensor,
    gid: Tensor,
    *,
    ddof: int = 1,
    eps: float = 1e-4,
    floor: Floor = 0.0,
    batch_norm: bool = True,
    missing: Missing = "renormalise",
) -> Tensor:
    """Advantages (N,) of rewards (N, K) with weights (K,): weights act on z-scores, so they need not fix units."""
    members = filled(members, missing)
    z = adv_grpo(members, gid, ddof=ddof, eps=eps, floor=floor)
    total = combine(torch.where(members.isnan(), torch.nan, z), weights, missing)
    return (adv_batch(total, ddof=1, eps=eps) if batch_norm else total).nan_to_num()


def joint(
    members: Tensor,
    weights: Tensor,
    gid: Tensor,
    *,
    ddof: int = 1,
    eps: float = 1e-4,
    floor: Floor = 0.0,
    missing: Missing = "invalid",
) -> Tensor:
    """Advantages (N,) of the weighted sum of rewards (N, K).

    A sample that lacks one is invalid: the sum of the rest is on another scale than the sums of its group, unless all
    members share one.
    """
    return adv_grpo(combine(members, weights, missing), gid, ddof=ddof, eps=eps, floor=floor)


def combine(members: Tensor, weights: Tensor, missing: Missing = "renormalise") -> Tensor:
    """Weighted sum (N,) of members (N, K); a member of weight 0 does not count.

    Of a missing member, `renormalise` gives the weight to the others, `invalid` makes the row NaN, `zero` counts a 0.
    """
    members = filled(members, missing)
    w = weights.to(members)
    if w.shape != members.shape[1:]:
        raise ConfigError(
            f"there are {members.shape[1:].numel()} rewards and {w.numel()} weights. Give each one weight."
        )
    counts = (w != 0) & ~members.isnan()
    total = torch.where(counts, members * w, 0).sum(-1)
    whole, present = w.abs().sum(), torch.where(counts, w.abs(), 0).sum(-1)
    if missing == "renormalise":
        complete = (counts | (w == 0)).all(-1)  # no rounding where nothing is missing
        total = torch.where(complete, total, total * whole / torch.where(present > 0, present, 1))
        return torch.where((present > 0) | complete, total, torch.nan)
    return torch.where(((w != 0) & ~counts).any(-1), torch.nan, total)


def filled(members: Tensor, missing: Missing) -> Tensor:
    """Members with 0 for what is missing if `missing` says so, else as they are."""
    members = real(members)
    return torch.where(members.isnan(), 0, members) if missing == "zero" else members
