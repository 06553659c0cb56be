"""Statistics of rewards by group, on which all advantages rest.

Rewards are (N,) or (N, C), each of the C columns on its own; the group ids (N,) are any integers and groups may differ
in size. NaN counts nowhere. Everything is taken in float64 on the CPU, in the order of the rows, so that no device and
no number of threads changes a result, and from each group's lowest reward, so that equal rewards have a deviation of
exactly 0 and lie exactly at their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.shaping.references import real


@dataclass(frozen=True, eq=False)
class Statistics:
    """What U groups of N rows hold, column by column; `mean` is NaN where nothing is known."""

    index: Tensor  # (N,) which of the U groups each row belongs to
    gap: Tensor  # (N, C) reward minus the mean of its group; NaN where unknown
    count: Tensor  # (U, C) known rewards
    mean: Tensor  # (U, C)
    variance: Tensor  # (U, C) 0 where fewer than two rewards count

    @property
    def std(self) -> Tensor:
        """Deviation (U, C) of each group."""
        return self.variance.sqrt()


def statistics(r: Tensor, gid: Tensor, *, ddof: int = 0, trim: tuple[float, float] = (0.0, 0.0)) -> Statistics:
    """Mean and variance (divided by count - ddof) of each group, without the shares `trim` of the lowest and highest.

    Trimmed rewards still have a `gap` and still count in `count`.
    """
    x, index = columns(r), numbered(gid)
    if len(index) != len(x):
        raise ConfigError(f"there are {len(x)} rewards and {len(index)} group ids. Give one id for each row.")
    known = ~x.isnan()
    where = index.unsqueeze(-1).expand_as(x)
    zeros = x.new_zeros(int(index.max()) + 1 if len(index) else 0, x.shape[1])
    count = zeros.scatter_add(0, where, known.double())
    used = known if trim == (0.0, 0.0) else _untrimmed(x, index, count, trim)
    size = zeros.scatter_add(0, where, used.double())
    filled = torch.where(used, x, torch.inf)
    low = torch.full_like(zeros, torch.inf).scatter_reduce(0, where, filled, "amin")
    rise = torch.where(used, x - low[index], 0)
    mean = torch.where(size > 0, low + zeros.scatter_add(0, where, rise) / size.clamp(min=1), torch.nan)
    gap = x - mean[index]
    squares = zeros.scatter_add(0, where, torch.where(used, gap, 0).square())
    variance = torch.where(size > 1, squares / (size - ddof).clamp(min=1), 0)
    return Statistics(index, gap, count, mean, variance)


def columns(r: Tensor) -> Tensor:
    """Rewards of any shape (N, ...) as float64 (N, C) on the CPU."""
    return r.detach().cpu().double().reshape(len(r), r.shape[1:].numel())


def restored(x: Tensor, like: Tensor) -> Tensor:
    """Columns (N, C) in the shape, the device and the float type of the rewards they came from."""
    return x.reshape(like.shape).to(real(like))


def numbered(ids: Tensor) -> Tensor:
    """Integer ids of any shape as 0 ... U-1 on the CPU, in ascending order of id."""
    if ids.is_floating_point() or ids.is_complex():
        raise ConfigError(
            f"the ids have the type {ids.dtype}, but floats merge large numbers: 2**24 and 2**24 + 1 are one float32. "
            "Give integers, for instance torch.int64."
        )
    found: Tensor = torch.unique(ids.detach().cpu(), return_inverse=True)[1]
    return found


def joint_ids(*ids: Tensor) -> Tensor:
    """One id for each combination of ids; the arguments have one shape or broadcast to it."""
    joint, *others = (numbered(column) for column in ids)
    for other in others:
        joint = numbered(joint * (int(other.max()) + 1 if other.numel() else 1) + other)
    return joint


def _untrimmed(x: Tensor, index: Tensor, count: Tensor, trim: tuple[float, float]) -> Tensor:
    """Which rewards (N, C) stay when each group loses a share of its lowest and of its highest, rounded down."""
    low, high = trim
    if not (low >= 0 and high >= 0 and low + high < 1):
        raise ConfigError(
            f"trim is {trim}, but the two shares are at least 0 and leave something: their sum is below 1."
        )
    order = x.argsort(dim=0, stable=True)
    order = order.gather(0, index[order].argsort(dim=0, stable=True))  # by group, then by reward, the unknown last
    sizes = index.bincount()
    rank = (torch.arange(len(x)) - (sizes.cumsum(0) - sizes)[index.sort().values]).unsqueeze(-1)  # within the group
    total = count[index].gather(0, order)
    kept = (rank >= (low * total).floor()) & (rank < total - (high * total).floor())
    return torch.zeros_like(kept).scatter(0, order, kept)
