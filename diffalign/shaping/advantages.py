"""How much better than its group each sample is.

Papers: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", Shao et al., 2024 (arXiv
2402.03300): `adv_grpo`; "Understanding R1-Zero-Like Training: A Critical Perspective", Liu et al., 2025 (arXiv
2503.20783): `adv_dr`; "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in
LLMs", Ahmadian et al., 2024 (arXiv 2402.14740): `adv_rloo`; "Flow-GRPO: Training Flow Matching Models via Online RL",
Liu et al., 2025 (arXiv 2505.05470): `adv_global_std`; "Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable
Text-to-Image Reinforcement Learning", Wang et al., 2025 (arXiv 2508.20751): `win_rate`; "DAPO: An Open-Source LLM
Reinforcement Learning System at Scale", Yu et al., 2025 (arXiv 2503.14476): `group_filter`.

Where we differ: a group of one has the advantage 0, and so has a sample whose reward is NaN; the deviation has a floor
if one is given, and where it is 0 the advantage is 0 even if trimmed samples lie elsewhere; `adv_global_std` can pool
the variances within groups; win rates are not rounded; `group_filter` also takes rewards that are not 0 or 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.shaping.groups import Statistics, columns, joint_ids, restored, statistics
from diffalign.shaping.references import real

Trim = tuple[float, float]
Floor = float | Tensor


def adv_grpo(
    r: Tensor, gid: Tensor, *, ddof: int = 0, eps: float = 1e-4, floor: Floor = 0.0, trim: Trim = (0.0, 0.0)
) -> Tensor:
    """(r - mean) / (std + eps) within each group; the deviation is at least `floor`, a number or one per column."""
    found = statistics(r, gid, ddof=ddof, trim=trim)
    return scaled(r, found, found.std, eps=eps, floor=floor)


def adv_batch(r: Tensor, *, ddof: int = 0, eps: float = 1e-4, floor: Floor = 0.0) -> Tensor:
    """(r - mean) / (std + eps) over all rows of a column."""
    return adv_grpo(r, torch.zeros(len(r), dtype=torch.int64), ddof=ddof, eps=eps, floor=floor)


def adv_dr(r: Tensor, gid: Tensor, *, trim: Trim = (0.0, 0.0)) -> Tensor:
    """r - mean of its group: no prompt weighs more because its rewards hardly differ."""
    return restored(statistics(r, gid, trim=trim).gap.nan_to_num(), r)


def adv_rloo(r: Tensor, gid: Tensor) -> Tensor:
    """r minus the mean of the others in its group, which is G / (G - 1) (r - mean)."""
    found = statistics(r, gid)
    factor = found.count / (found.count - 1).clamp(min=1)
    return restored((found.gap * factor[found.index]).nan_to_num(), r)


def adv_global_std(
    r: Tensor, gid: Tensor, *, pooled: bool = False, ddof: int = 0, eps: float = 1e-4, floor: Floor = 0.0
) -> Tensor:
    """(r - mean of its group) / (std + eps), with one deviation for the whole batch.

    That of all rewards, into which the distance between prompts enters too; or, `pooled`, the root of the mean variance
    within groups of two and more.
    """
    found = statistics(r, gid, ddof=ddof)
    whole = torch.zeros(len(found.variance if pooled else r), dtype=torch.int64)
    if pooled:
        variance = statistics(torch.where(found.count > 1, found.variance, torch.nan), whole).mean.nan_to_num()
    else:
        variance = statistics(r, whole, ddof=ddof).variance
    return scaled(r, found, variance.sqrt().expand_as(found.mean), eps=eps, floor=floor)


def scaled(r: Tensor, found: Statistics, std: Tensor, *, eps: float, floor: Floor = 0.0) -> Tensor:
    """The gaps of rewards r over deviations std (U, C), in the shape of r; 0 where there is no reward or no spread."""
    std = torch.maximum(std, torch.as_tensor(floor).detach().cpu().double())[found.index]
    return restored(torch.where(std > 0, found.gap / (std + eps), 0).nan_to_num(), r)


def win_rate(r: Tensor, gid: Tensor) -> Tensor:
    """Share of the others in its group that a sample beats, ties one half; NaN for NaN and where there are no others.

    It keeps the order and drops the distances, so that a tiny spread is not blown up.
    """
    x = columns(r)
    known = ~x.isnan()
    cell = joint_ids(gid.unsqueeze(-1), torch.arange(x.shape[1]))[known]  # a group in a column
    level = torch.unique(x[known], return_inverse=True)[1]
    _, place, ties = torch.unique(cell * (len(level) + 1) + level, return_inverse=True, return_counts=True)
    size = cell.bincount()
    below = (ties.cumsum(0) - ties)[place] - (size.cumsum(0) - size)[cell]
    others = size[cell] - 1
    rate = (below + (ties[place] - 1) / 2) / others.clamp(min=1)
    found = torch.full_like(x, torch.nan)
    found[known] = torch.where(others > 0, rate.double(), torch.nan)
    return restored(found, r)


def win_rate_judged(pairs: Tensor, first_wins: Tensor, count: int) -> Tensor:
    """Win rate (count,) from judged pairs (P, 2) of row numbers; 1: the first wins, 0: the second, 1/2 or NaN: a tie.

    A row in no pair is NaN.
    """
    if not (first_wins.isnan() | ((first_wins >= 0) & (first_wins <= 1))).all():
        raise ConfigError(
            "a judgement lies outside [0, 1]. Give 1 if the first wins, 0 if the second does, 0.5 if none."
        )
    pairs, won = pairs.detach().cpu().long(), columns(first_wins).squeeze(-1).nan_to_num(0.5)
    points = torch.stack([won, 1 - won], 1).flatten()
    wins = torch.zeros(count, dtype=torch.float64).index_add(0, pairs.flatten(), points)
    games = pairs.flatten().bincount(minlength=count)
    return torch.where(games > 0, wins / games.clamp(min=1), torch.nan).to(real(first_wins))


def group_filter(r: Tensor, gid: Tensor, tau: Floor = 0.0, weights: Tensor | None = None) -> Tensor:
    """Which rows (N,) belong to a group whose population deviation is above `tau` and have a reward themselves.

    Of rewards in columns, one above its `tau` (a number or one per column) is enough; a column of weight 0 counts not.
    """
    found = statistics(r, gid)
    counts = torch.ones(found.gap.shape[1], dtype=torch.bool) if weights is None else weights.detach().cpu() != 0
    spread = (found.std > torch.as_tensor(tau).detach().cpu().double()) & counts
    known = (~found.gap.isnan() & counts).any(-1)
    return (spread.any(-1)[found.index] & known).to(r.device)


def frac_zero_std(r: Tensor, gid: Tensor) -> float:
    """Share of the groups with any reward in which no column of rewards differs: they teach nothing."""
    found = statistics(r, gid)
    some = (found.count > 0).any(-1)
    same = (found.variance == 0).all(-1)[some]
    return float(same.double().mean()) if len(same) else 0.0
