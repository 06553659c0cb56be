"""Intervals: Wilson for a share of passes, bootstrap over prompts for a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean

from diffalign.errors import ConfigError

PICKS = 2**22  # drawn at once, so that many prompts cost no more memory than few


@dataclass(frozen=True)
class Interval:
    """A mean and the two ends of its confidence interval."""

    mean: float
    lo: float
    hi: float

    def json(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.lo:.3f}, {self.hi:.3f}]"


def wilson(passes: int, total: int, *, level: float = 0.95) -> Interval:
    """Score interval for a pass rate; honest at 0 of 8 and at 8 of 8, where the normal one has no width."""
    if not 0 <= passes <= total or total == 0:
        raise ConfigError(f"a pass rate needs 0 <= passes <= total and total > 0, but got {passes} of {total}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, grown = passes / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / grown
    half = z / grown * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(
    values: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mean of one value per prompt; prompts are resampled, never the samples of a prompt.

    With weights, such as how many pairs a prompt brings, of the weighted mean.
    """
    import torch

    if not values:
        raise ConfigError("an interval needs at least one prompt, but got none")
    if not all(math.isfinite(v) for v in values):
        raise ConfigError("an interval needs finite values; drop the invalid prompts first and report how many")
    data = torch.tensor(values, dtype=torch.float64)  # (P,)
    mass = torch.ones_like(data) if weights is None else torch.tensor(weights, dtype=torch.float64)  # (P,)
    generator, rows = torch.Generator().manual_seed(seed), max(1, PICKS // len(data))
    means = []
    for start in range(0, draws, rows):
        picks = torch.randint(len(data), (min(rows, draws - start), len(data)), generator=generator)
        means.append((data * mass)[picks].sum(1) / mass[picks].sum(1))
    ends = torch.tensor([0.5 - level / 2, 0.5 + level / 2], dtype=torch.float64)
    lo, hi = torch.quantile(torch.cat(means), ends).tolist()
    return Interval(fmean(values, weights), lo, hi)
