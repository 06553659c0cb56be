"""What a step of a reward model learns: the loss of its pairs, weighed over all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.cases import derived_seed
from diffalign.train.known import Known
from diffalign.train.objective import Collected
from diffalign.train.reward_models import losses
from diffalign.train.reward_models.comparisons import Batch, Dealer
from diffalign.train.reward_models.raters import Rater
from diffalign.train.reward_models.settings import LossConfig, RewardConfig
from diffalign.train.team import Team


@dataclass(kw_only=True)
class RewardJob(Team):
    """A reward model in training."""

    config: RewardConfig
    trained: Any  # Rater
    train: Sequence[Known]
    heldout: Sequence[Known]

    @property
    def images(self) -> int:
        """Pictures of a step, on average."""
        sizes = [min(len(each.pictures), self.config.pictures) for each in self.train]
        return round(self.config.batch * sum(sizes) / len(sizes))

    @property
    def rater(self) -> Rater:
        found: Rater = self.trained
        return found


@dataclass
class Part:
    """Some entries of a step, which are looked at together."""

    batch: Batch
    total: float  # what the entries of the step weigh, over all processes
    seeds: list[int]  # of what is drawn for each entry

    def __len__(self) -> int:
        return len(self.batch)


class Preferences:
    """Collects comparisons, and learns from them."""

    def __init__(self, job: RewardJob) -> None:
        self.dealer = Dealer(job.train, job.config, job.seed)

    def collect(self, job: RewardJob, step: int) -> Collected:
        """This process's share of the entries of a step, some at a time."""
        chosen, size = self.dealer.of(step), job.config.micro_batch
        share = len(chosen) // job.processes
        own = chosen[job.rank * share : (job.rank + 1) * share]
        total = self.dealer.total(chosen)
        parts = []
        for k in range(0, share, size):
            batch = self.dealer.batch(own[k : k + size])
            places = range(job.rank * share + k, job.rank * share + k + len(batch.sizes))
            parts.append(Part(batch, total, [derived_seed(job.seed, "draws", step, place) for place in places]))
        return Collected(parts)

    def learn(self, job: RewardJob, micro: Part, share: float) -> Mapping[str, Tensor]:
        """Backward of this part's loss; figures as parts of their sums, of which processes are averaged."""
        batch, many = micro.batch, job.processes
        found = job.rater.rate(batch.images, batch.prompts)
        job.budget.charge(nfe=3 * len(batch))  # a pass and its way back
        loss = cost(found, batch, job.config.loss, micro.seeds) / max(micro.total, 1e-12) * many
        job.backward(loss)
        first, second, label = batch.places(found)
        sides = (found[first, 0] - found[second, 0]) * (label - 0.5)
        right = (sides > 0).sum() / (label != 0.5).sum().clamp(min=1)
        return {"loss": loss.detach().float().cpu(), "right": right.float().cpu() * share}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing is remembered between steps."""


def cost(found: Tensor, batch: Batch, config: LossConfig, seeds: Sequence[int]) -> Tensor:
    """The weighted sum over the pairs, or the entries, of a batch, of ratings (n, 2) and their log deviations."""
    if config.kind == "best_of_all":
        return _of_entries(found[:, 0], batch)
    if not batch.pairs:
        return found.sum() * 0
    first, second, label = batch.places(found)
    gap = found[first, 0] - found[second, 0]
    if config.kind == "ties":
        each = losses.with_ties(gap, label, config.k)
    elif config.kind == "pick":
        each = losses.pick(gap, label)
    elif config.kind == "uncertain":
        deviation = (found[first, 1].mul(2).exp() + found[second, 1].mul(2).exp()).sqrt()
        normals = torch.cat(
            [
                torch.randn(config.draws, count, generator=torch.Generator().manual_seed(seed))
                for count, seed in zip(batch.counts, seeds, strict=True)
            ],
            1,
        ).to(found)
        each = losses.uncertain(gap, deviation, label, normals)
    else:
        each = losses.bradley_terry(gap, label, config.margin)
    return (each * torch.tensor(batch.weights).to(each)).sum()


def _of_entries(ratings: Tensor, batch: Batch) -> Tensor:
    """The softmax over all pictures of an entry; several equally good ones share the blame."""
    total, start = ratings.sum() * 0, 0
    for size, best, weight in zip(batch.sizes, batch.best, batch.entry_weights, strict=True):
        rows = ratings[start : start + size]
        each = torch.stack([losses.best_of_all(rows, place - start) for place in best])
        total, start = total + weight * each.mean(), start + size
    return total
