"""Intervals: Wilson for a share of passes, bootstrap over prompts for a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean

from diffalign.errors import ConfigError


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


def bootstrap(values: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
    """Percentile interval of the mean of one value per prompt; prompts are resampled, never the samples of a prompt."""
    import torch

    if not values:
        raise ConfigError("an interval needs at least one prompt, but got none")
    if not all(math.isfinite(v) for v in values):
        raise ConfigError("an interval needs finite values; drop the invalid prompts first and report how many")
    data = torch.tensor(values, dtype=torch.float64)  # (P,)
    picks = torch.randint(len(data), (draws, len(data)), generator=torch.Generator().manual_seed(seed))
    means = data[picks].mean(dim=1)
    lo, hi = torch.quantile(means, torch.tensor([0.5 - level / 2, 0.5 + level / 2], dtype=torch.float64)).tolist()
    return Interval(fmean(values), lo, hi)
