"""Advantages on the scale of their task, weighted by how hard the prompt is.

Paper: "GoLongRL: Capability-Oriented Long Context Reinforcement Learning with Multitask Alignment", Lv et al., 2026
(arXiv 2605.19577): TMN-Reweight, as its code has it. Every prompt (group) belongs to a task, a kind of prompt or of
verifier. The deviation is the root of the mean variance of the groups of a task, so that 0/1 verifiers and continuous
scores can share a batch while easy and hard prompts keep their relative size.

Where we differ: a group of one has the advantage 0 and counts in no mean over a task (there: mean 0, variance 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.shaping.advantages import Floor, scaled
from diffalign.shaping.groups import columns, numbered, restored, statistics

_ROUNDING = 1e-9  # deviations by which a reward that meets the bar may seem to lie above it


def tmn(
    r: Tensor,
    gid: Tensor,
    tid: Tensor,
    *,
    reweight: bool = True,
    alpha: float = 0.8,
    gamma: float = 1.0,
    eps: float = 1e-6,
    floor: Floor = 0.0,
) -> Tensor:
    """(r - mean of its group) / (deviation of its task + eps) for rewards (N,) or (N, K), ids gid and tid (N,).

    With `reweight`, rare successes on hard prompts and rare failures on easy ones count up to e^{gamma/2} times as
    much; `alpha` is the weight of the group's own mean, against that of its task, in the bar for a success.
    """
    found = statistics(r, gid, ddof=1)
    task = _task_of_group(found.index, tid)  # (U,)
    teaches = found.count > 1
    variance = statistics(torch.where(teaches, found.variance, torch.nan), task).mean.nan_to_num()
    advantage = scaled(r, found, variance.sqrt()[task], eps=eps, floor=floor)
    if not reweight:
        return advantage
    level = statistics(torch.where(teaches, found.mean, torch.nan), task).mean[task]
    bar = ((1 - alpha) * (level - found.mean) + _ROUNDING * variance.sqrt()[task])[found.index]  # above the mean
    x = columns(r)
    passed = torch.where(x.isnan(), torch.nan, (found.gap > bar).double())
    hard = (0.5 - statistics(passed, gid).mean)[found.index]  # from -1/2, where all pass, to 1/2
    weight = (gamma * torch.where(found.gap > 0, hard, -hard)).exp()
    return restored(torch.where(x.isnan(), 0, columns(advantage) * weight), r)


def _task_of_group(index: Tensor, tid: Tensor) -> Tensor:
    """The task (U,) of every group; ConfigError where a group has two."""
    task = numbered(tid)
    if task.shape != index.shape:
        raise ConfigError(f"there are {len(index)} rewards and {task.numel()} task ids. Give one task id for each row.")
    count = int(index.max()) + 1 if len(index) else 0
    low, high = (
        task.new_zeros(count).scatter_reduce(0, index, task, end, include_self=False) for end in ("amin", "amax")
    )
    if (low != high).any():
        group = int((low != high).nonzero()[0])
        given = torch.unique(tid.cpu()[index == group]).tolist()
        raise ConfigError(
            f"one group has the task ids {given}, but a task belongs to a prompt. Give all its samples one."
        )
    return low
