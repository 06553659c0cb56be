"""What objectives share that compare the images of a prompt: scored beside the sampling, then against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from diffalign.cases import Case, batched
from diffalign.errors import ConfigError
from diffalign.shaping.groups import numbered
from diffalign.train.advantage import AdvantageConfig, Advantages, Hardness, advantages
from diffalign.train.job import Job
from diffalign.train.preflight import require_advantages


class Made(Protocol):
    """A micro-batch of finished images."""

    @property
    def media(self) -> Tensor: ...

    @property
    def cases(self) -> Sequence[Case]: ...


M = TypeVar("M", bound=Made)


def in_turn(made: Sequence[M]) -> Iterator[tuple[M, slice]]:
    """Every micro-batch with its rows among all of this process."""
    first = 0
    for each in made:
        yield each, slice(first, first + len(each.cases))
        first += len(each.cases)


def require_no_advantage(job: Job, reason: str) -> None:
    """Refuse settings of advantages under an objective that compares no images by them."""
    given = job.config.advantage
    if given != AdvantageConfig(missing=given.missing):
        raise ConfigError(f"advantage has settings that are not read here: {reason} Drop them.")


def group_sums(values: Tensor, groups: Tensor) -> Tensor:
    """For every row of values (B, ...) the sum over the rows of its group."""
    place = numbered(groups).to(values.device)
    sums = values.new_zeros(int(place.max()) + 1, *values.shape[1:]).index_add_(0, place, values)
    return sums[place]


def require_whole_groups(job: Job, objective: str) -> None:
    """Refuse updates that would learn from a part of a prompt's images, whose means are over all of them."""
    size, batch = job.config.group_size, job.config.micro_batch
    if job.config.updates > 1 and batch % size:
        raise ConfigError(
            f"updates is {job.config.updates}, which parts a step between micro-batches of {batch}, and {objective} "
            f"compares the {size} images of a prompt. Use a multiple of {size} as micro_batch, or updates=1 and passes."
        )


class Grouped:
    """Base of the objectives whose baseline is the group."""

    name: ClassVar[str]
    config: Any

    def prepare(self, job: Job) -> None:
        """Nothing is measured beforehand."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to take back."""

    def require_groups(self, job: Job, *, stepwise: bool = False) -> None:
        """Refuse what cannot give an advantage."""
        if job.config.group_size < 2:
            raise ConfigError(
                f"group_size is {job.config.group_size}, and an image alone has no baseline: every advantage would be "
                "0. Use at least 2; 12 to 24 are usual."
            )
        require_advantages(job, stepwise=stepwise, objective=self.name)
        rows = len(job.group_ids)
        zeros = torch.zeros(rows, len(job.members))
        self.compare(job, 0, zeros, torch.zeros(rows, 2) if stepwise else None, Hardness(delta=torch.zeros(rows)))

    def scored(
        self, job: Job, cases: Sequence[Case], make: Callable[[int, Sequence[Case]], M]
    ) -> tuple[list[M], Tensor]:
        """Micro-batches as `make(first row, cases)` draws them, and the rewards (n, K) of their images."""
        made: list[M] = []
        answers = []
        with job.scoring() as ask:
            for chunk in batched(cases, job.config.micro_batch):
                made.append(make(sum(len(each.cases) for each in made), chunk))
                if not job.listwise:
                    answers.append(ask(made[-1].media, made[-1].cases))
            if job.listwise:
                own = [case for each in made for case in each.cases]
                answers.append(ask(torch.cat([each.media for each in made]), own))
            rewards = torch.cat([answer.result() for answer in answers])
        return made, rewards

    def judge(
        self, job: Job, step: int, made: Sequence[Made], rewards: Tensor, gains: Tensor | None = None
    ) -> tuple[Advantages, dict[str, float]]:
        """Advantages of a step over all processes from the rewards (n, K) of this one, and what to log of them."""
        members = job.gather(rewards)
        invalid = job.require_valid(members, step)
        steps = None if gains is None else job.gather(gains)
        hardness = None
        if job.config.advantage.hardness != "off":
            hardness = Hardness(delta=job.gather(torch.cat([job.misses(each.media, each.cases) for each in made])))
        found = self.compare(job, step, members, steps, hardness)
        return found, {"reward": float(job.total(members).nanmean()), "invalid": invalid, **found.stats}

    def compare(
        self, job: Job, step: int, members: Tensor, steps: Tensor | None, hardness: Hardness | None
    ) -> Advantages:
        """Advantages of a step's rewards (N, K) of all processes, with step rewards (N, S) where there are any."""
        told, tasks = job.config.advantage, job.task_ids(step)
        return advantages(members, job.weights, job.group_ids, told, tid=tasks, steps=steps, hardness=hardness)

    def weight(self, job: Job, found: Advantages) -> float:
        """Of a policy loss: images over kept images, where a filter takes groups out."""
        kept = int(found.kept.sum()) if job.config.advantage.filter is not None else len(found.kept)
        return len(found.kept) / max(kept, 1)
