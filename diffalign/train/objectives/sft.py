"""Rejection-sampling fine-tuning: the best images of every prompt are learnt as if they were data. The plain baseline.

Nothing holds the model near its base except `anchor`, and nothing tells a bad image from one that was not kept; what
comes of it is the best of `group_size` in one draw at most. With `data` it learns pictures that a search, a vote or a
file calls best, and draws none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.train.advantage import Advantages
from diffalign.train.forward import ForwardProcess
from diffalign.train.groups import in_turn
from diffalign.train.job import Job
from diffalign.train.renoised import Clean, ForwardConfig, NoAnchor, Seen, mean_error


@dataclass(frozen=True, kw_only=True)
class SFTConfig(ForwardConfig):
    """What is learnt of a group."""

    keep: int = 1  # best images of each prompt; those of a group whose rewards are all the same teach nothing
    anchor: NoAnchor = field(default_factory=NoAnchor)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep < 1:
            raise ConfigError(f"keep is {self.keep}, but at least the best image of a prompt is learnt.")


def best_of(advantage: Tensor, kept: Tensor, groups: Tensor, count: int) -> Tensor:
    """(B,) whether a row is among the `count` best of its group; none is where all of a group are alike."""
    chosen = torch.zeros(len(groups), dtype=torch.bool)
    for group in sorted(set(groups.tolist())):
        rows = ((groups == group) & kept).nonzero().flatten()
        values = advantage[rows]
        if len(rows) and float(values.max()) > float(values.min()):
            chosen[rows[values.argsort(descending=True, stable=True)[:count]]] = True
    return chosen


class SFT(ForwardProcess):
    """Denoise the best images."""

    name: ClassVar[str] = "sft"
    settings: ClassVar[type[SFTConfig]] = SFTConfig
    config: SFTConfig
    least_group: ClassVar[int] = 1

    def check(self, job: Job) -> None:
        super().check(job)
        if job.stock is None and self.config.keep >= job.config.group_size:
            raise ConfigError(
                f"keep is {self.config.keep} of a group_size of {job.config.group_size}, which rejects nothing. Keep "
                "fewer, or draw more."
            )

    def deal(self, job: Job, step: int, micros: Sequence[Clean], rewards: Tensor, found: Advantages) -> None:
        super().deal(job, step, micros, rewards, found)
        chosen = best_of(found.values, found.kept, job.group_ids, self.config.keep)  # of all processes
        if job.config.group_size == 1:
            chosen = found.kept
        weight = job.own(chosen).float() * len(chosen) / max(int(chosen.sum()), 1)
        for micro, rows in in_turn(micros):
            micro.weight = weight[rows]

    def loss(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        return mean_error(seen.prediction, seen.place.target).float(), {}


OBJECTIVE = SFT
