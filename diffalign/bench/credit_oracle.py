"""What a step of a walk was truly worth: its noise is drawn again, and the policy's sampler finishes every redraw.

From a latent x_i, M redraws of step i's noise are completed C times each with fresh later noise. The mean of all M x C
rewards estimates the value V(x_i), and the true advantage of the step that was taken is V(x_{i+1}) - V(x_i), whose two
sides share no noise. The variance between redraws, less what the completions leave in it, is the step's part of the
variance of the reward.

Letters: N images, S steps with noise, M redraws, C completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign import media
from diffalign.cases import derived_seed
from diffalign.errors import ConfigError
from diffalign.noise import case_noise
from diffalign.train.job import Job
from diffalign.train.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """How often the noise of every step is drawn again; all of it comes on top of the walks."""

    redraws: int = 8  # of each step's noise, half for each half of the noise ceiling; 0 leaves the truth out
    completions: int = 2  # of each redraw, by fresh later noise; what they differ by is taken off the variance map
    batch: int = 128  # walks at once

    def __post_init__(self) -> None:
        if self.redraws < 0 or self.redraws % 2:
            raise ConfigError(
                f"oracle.redraws is {self.redraws}, but they are cut in two halves: give an even number, or 0 for none."
            )
        if self.completions < 2:
            raise ConfigError(f"oracle.completions is {self.completions}, but only 2 or more tell how much they vary.")
        if self.batch < 1:
            raise ConfigError(f"oracle.batch is {self.batch}, but it must be at least 1.")


@dataclass
class Worth:
    """Values of the latents of walks; column S is the end of the last step with noise."""

    V: Tensor  # (N, S + 1)
    halves: Tensor  # (2, N, S + 1), each from half of the redraws
    variance: Tensor  # (N, S) of the values a step may lead to
    error: Tensor  # (N, S) variance of V itself

    @property
    def advantage(self) -> Tensor:
        """(N, S) what each step added to the expected reward."""
        return self.V.diff(dim=1)

    def json(self) -> dict[str, Any]:
        return {name: tensor.double().tolist() for name, tensor in vars(self).items()}

    @classmethod
    def read(cls, told: dict[str, Any]) -> Worth:
        return cls(**{name: torch.from_numpy(np.array(rows, dtype=np.float64)) for name, rows in told.items()})


@torch.no_grad()
def redrawn(job: Job, rollout: Rollout, i: int, redraws: int, completions: int, batch: int, stream: str) -> Tensor:
    """Rewards (B, M, C) after other noises of step i; all completions are one where no later step has noise."""
    driver, walk, cases = rollout.driver, rollout.walk, rollout.cases
    x = walk.latents[i]
    step = rollout.kernel(driver.levels, x, walk.predictions[i], i)
    ends = 1 if i + 1 == rollout.trained.stop else completions
    rows = [(b, m, c) for b in range(len(cases)) for m in range(redraws) for c in range(ends)]
    found = []
    for some in [rows[first : first + batch] for first in range(0, len(rows), batch)]:
        place = torch.tensor([b for b, _, _ in some])
        noise = case_noise([derived_seed(cases[b].seed, stream, i, m) for b, m, _ in some], x, "step", i)
        moved = type(step)(step.mean[place.to(step.mean.device)], step.std).sample(noise)
        fresh = [cases[b].with_seed(derived_seed(cases[b].seed, stream, i, m, c)) for b, m, c in some]
        end = job.driver(fresh).rollout(rollout.kernel, x=moved, start=i + 1, quiet=True, dtype=torch.float32)
        found.append((job.score(media.to_tensor(end.media).float(), fresh) * job.weights).sum(1))
    return torch.cat(found).view(len(cases), redraws, ends).expand(-1, -1, completions)


def worth(job: Job, rollouts: Sequence[Rollout], rewards: Tensor, told: OracleConfig) -> Worth:
    """Values along walks whose images have `rewards` (N,); the end of the last noisy step leads to one image only."""
    columns = [
        summed_up(
            torch.cat([redrawn(job, r, i, told.redraws, told.completions, told.batch, "redraw") for r in rollouts])
        )
        for i in rollouts[0].trained
    ]
    last = rewards.double()
    return Worth(
        V=torch.stack([*(column[0] for column in columns), last], 1),
        halves=torch.stack([*(column[1] for column in columns), last.expand(2, -1)], 2),
        variance=torch.stack([column[2] for column in columns], 1),
        error=torch.stack([column[3] for column in columns], 1),
    )


def summed_up(rewards: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rewards (N, M, C) of redraws: value (N,), its two halves (2, N), variance of the redraws' own values (N,), and
    variance of the value's estimate (N,); NaN rewards are left out."""
    rewards = rewards.double()
    each = rewards.nanmean(2)  # (N, M)
    middle = each.shape[1] // 2
    halves = torch.stack([each[:, :middle].nanmean(1), each[:, middle:].nanmean(1)])
    between = spread(each)
    count = (~rewards.isnan()).sum(2).clamp(min=1)
    within = (spread(rewards.flatten(0, 1)).view_as(each) / count).nanmean(1)
    return each.nanmean(1), halves, between - within, between / (~each.isnan()).sum(1).clamp(min=1)


def spread(x: Tensor) -> Tensor:
    """The unbiased variance (N,) of the numbers in each row (N, K); NaN where fewer than two are there."""
    count = (~x.isnan()).sum(1)
    squares = (x - x.nanmean(1, keepdim=True)).square().nansum(1)
    return torch.where(count > 1, squares / (count - 1).clamp(min=1), torch.nan)


def variances(worth: Worth, rewards: Tensor, gid: Tensor) -> dict[str, Tensor]:
    """Per group (P,): the variance of rewards (N,) (total), of the start's value (start), of each step (P, S) (steps),
    and what is left of the total (residual), whose expectation is 0 by the law of total variance."""
    found: dict[str, list[Tensor]] = {"total": [], "start": [], "steps": []}
    for group in sorted(set(gid.tolist())):
        rows = gid == group
        found["total"].append(spread(rewards[rows].double()[None])[0])
        found["start"].append(spread(worth.V[rows, 0][None])[0] - worth.error[rows, 0].nanmean())
        found["steps"].append(worth.variance[rows].nanmean(0))
    told = {name: torch.stack(values) for name, values in found.items()}
    return told | {"residual": told["total"] - told["start"] - told["steps"].sum(1)}


def ranks(x: Tensor) -> Tensor:
    """Ranks of numbers (K,); those that tie share their mean rank."""
    _, place, count = torch.unique(x, return_inverse=True, return_counts=True)
    count = count.double()
    found: Tensor = (count.cumsum(0) - (count - 1) / 2)[place]
    return found


def pearson(a: Tensor, b: Tensor) -> float:
    """The correlation of a and b (K,) where both are numbers; NaN where one of them is constant."""
    both = ~(a.isnan() | b.isnan())
    a, b = a[both].double(), b[both].double()
    if len(a) < 2:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    size = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / size if size > 0 else float("nan")


def spearman(a: Tensor, b: Tensor) -> float:
    """The correlation of the ranks of a and b (K,)."""
    both = ~(a.isnan() | b.isnan())
    return pearson(ranks(a[both]), ranks(b[both]))


def ceiling(between_halves: float) -> float:
    """The correlation of perfect credit with the measured truth, from that of the truth's two halves."""
    r = between_halves
    return (2 * r / (1 + r)) ** 0.5 if r > 0 else float("nan") if r != r else 0.0
