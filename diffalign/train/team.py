"""What every training has, whatever it trains: weights, a folder, and the processes that work on them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffalign.budget import Budget


class Weights(Protocol):
    """What is trained."""

    def parameters(self) -> list[nn.Parameter]: ...
    def named_parameters(self) -> list[tuple[str, nn.Parameter]]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(kw_only=True)
class Team:
    """The part of a job that is the same for all of them."""

    config: Any
    trained: Any  # Weights
    accelerator: Any
    folder: Path
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    say: Callable[[str], None] = lambda text: None  # a line for people

    @property
    def processes(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def gather(self, rows: Tensor) -> Tensor:
        """Rows (n, ...) of this process -> those of all (n x processes, ...), in the order of the processes."""
        if self.processes == 1:
            return rows
        found: Tensor = self.accelerator.gather(rows.to(self.device).contiguous())
        return found.to(rows.device)

    def from_main(self, value: Any) -> Any:
        """What the main process has here."""
        if self.processes == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def mean(self, figures: Mapping[str, Tensor | float]) -> dict[str, float]:
        """The mean over processes of each figure."""
        names = sorted(figures)
        values = torch.tensor([float(figures[name]) for name in names], dtype=torch.float64)
        if self.processes > 1 and names:
            values = self.gather(values[None]).mean(0)
        return dict(zip(names, values.tolist(), strict=True))

    @cached_property
    def sharded(self) -> bool:
        """Whether every process holds only its part of the weights."""
        return any(hasattr(parameter, "device_mesh") for parameter in self.trained.parameters())

    @property
    def device(self) -> torch.device:
        found: torch.device = self.accelerator.device
        return found

    @property
    def images(self) -> int:
        """Images of a step, over all processes."""
        return int(self.config.images)

    def own(self, rows: Tensor) -> Tensor:
        """The rows of this process (n, ...) of those of all (N, ...), in the order of the processes."""
        share = len(rows) // self.processes
        return rows[self.rank * share : (self.rank + 1) * share]

    @property
    def updates_each(self) -> int:
        """Optimiser steps of a rollout."""
        micros = -(-self.config.images // self.processes // self.config.micro_batch)
        return int(min(self.config.updates, micros) * self.config.passes)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def share_gradients(self) -> None:
        """The mean over processes of every gradient, in one exchange; what no process has a gradient for keeps none."""
        if self.processes == 1 or self.sharded:  # shards exchange theirs in the backward pass
            return
        import torch.distributed as dist

        named = self.trained.parameters()
        found = torch.tensor([parameter.grad is not None for parameter in named], device=self.device).float()
        dist.all_reduce(found)
        reached = [parameter for parameter, count in zip(named, found.tolist(), strict=True) if count]
        if not reached:
            return
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in reached]
        flat = torch.cat([grad.flatten() for grad in own])
        dist.all_reduce(flat)
        means = torch.split(flat / self.processes, [grad.numel() for grad in own])
        for parameter, mean in zip(reached, means, strict=True):
            parameter.grad = mean.view_as(parameter)
