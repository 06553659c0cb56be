"""What the loop asks of an objective. One paper is one file in `objectives/` that defines `OBJECTIVE`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from diffalign import config
from diffalign.errors import UnknownName
from diffalign.train import objectives
from diffalign.train.settings import named

if TYPE_CHECKING:
    from diffalign.train.job import Job
    from diffalign.train.rehearsal import Rehearsal


@dataclass
class Collected:
    """What one step learns from: micro-batches of this process, in order, and figures of all processes."""

    micros: Sequence[Any]  # whatever `learn` takes; len() of each is its rows
    stats: dict[str, float] = field(default_factory=dict)


class Teaches(Protocol):
    """What a training step is made of: collect without gradients, then learn from one micro-batch at a time."""

    def collect(self, job: Any, step: int) -> Collected:
        """The data of a step."""

    def learn(self, job: Any, micro: Any, share: float) -> Mapping[str, Tensor]:
        """Backward through `job.backward` of this micro-batch's share of the loss; figures as sums of shares."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights."""

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Objective(Teaches, Protocol):
    """What raises the rewards of a pipeline."""

    name: ClassVar[str]
    settings: ClassVar[type[Any]]  # the frozen dataclass of its config

    def __init__(self, config: Any) -> None: ...

    def check(self, job: Job) -> None:
        """Refuse a job that cannot work, saying what to change; nothing has run yet."""

    def prepare(self, job: Job) -> None:
        """What is measured once before the first step, such as a calibration."""


@runtime_checkable
class Rehearses(Protocol):
    """An objective that tries itself on less than a step; any other is tried on a whole one."""

    def rehearse(self, job: Job) -> Rehearsal:
        """Try a micro-batch and leave its gradient; refuse what would teach nothing."""


@runtime_checkable
class Refreshes(Protocol):
    """An objective that looks at all micro-batches of an update before it learns from the first."""

    def refresh(self, job: Any, micros: Sequence[Any]) -> None:
        """Prepare the micro-batches for the present weights."""


def names() -> list[str]:
    """Every objective there is."""
    return sorted(module.name for module in pkgutil.iter_modules(objectives.__path__))


def about(name: str) -> tuple[str, str, list[str]]:
    """An objective's name, the first sentence of its file, and its settings."""
    module = importlib.import_module(f"{objectives.__name__}.{name}")
    told = " ".join((module.__doc__ or "").partition("\n\n")[0].split())
    return name, told, [field.name for field in dataclasses.fields(module.OBJECTIVE.settings)]


def make(spec: str | Mapping[str, Any]) -> Objective:
    """An objective from `flow_grpo` or `{flow_grpo: {...}}`."""
    name, given = named(spec)
    if name not in names():
        raise UnknownName.among("objective", name, names(), "diffalign ls objectives")
    cls = importlib.import_module(f"{objectives.__name__}.{name}").OBJECTIVE
    built: Objective = cls(config.build(cls.settings, given, where=f"objective.{name}"))
    return built
