"""Shapes by the statistics of all rewards so far, the baselines of the PAR study.

"Reward Shaping to Mitigate Reward Hacking in RLHF", Fu et al., 2025 (arXiv 2502.18770).

Where we differ: the statistics are a value that a caller keeps; where all rewards are one, `minmax` is 1/2 and
`mean_std` divides by 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from diffalign.shaping.references import real


@dataclass(frozen=True)
class Running:
    """Statistics of every valid reward so far; a batch is counted before it is transformed."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean
    low: float = math.inf
    high: float = -math.inf

    @property
    def std(self) -> float:
        """Population deviation; exactly 0 where all values are one."""
        return math.sqrt(self.squares / self.count) if self.high > self.low else 0.0

    def update(self, r: Tensor) -> Running:
        """The state after these rewards; several processes give it the rewards of all of them."""
        new = r.detach().cpu().double()
        new = new[~new.isnan()]
        if not len(new):
            return self
        count, mean = self.count + len(new), float(new.mean())
        gap, share = mean - self.mean, len(new) / count
        squares = self.squares + float((new - mean).square().sum()) + gap**2 * self.count * share
        low, high = min(self.low, float(new.min())), max(self.high, float(new.max()))
        return Running(count, self.mean + gap * share, squares, low, high)


def mean_std(r: Tensor, running: Running) -> tuple[Tensor, Running]:
    """Distance from the running mean in running deviations, and the next state."""
    running = running.update(r)
    return (real(r) - running.mean) / (running.std or 1.0), running


def minmax(r: Tensor, running: Running) -> tuple[Tensor, Running]:
    """Place in [0, 1] between the lowest and the highest reward so far, and the next state."""
    running, r = running.update(r), real(r)
    if running.high > running.low:
        return (r - running.low) / (running.high - running.low), running
    return r * 0 + 0.5, running


def running_clip(r: Tensor, running: Running) -> tuple[Tensor, Running]:
    """Rewards held within one running deviation of the running mean, and the next state."""
    running = running.update(r)
    return real(r).clamp(running.mean - running.std, running.mean + running.std), running
