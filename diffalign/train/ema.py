"""Averaged weights: an exponential moving average of what is trained, in float32, swapped in for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import ConfigError, ModelError

BEGUN = "begun"  # beside the averages in a state: whether any weights were taken in


def warm_up(step: int, decay: float) -> float:
    """d_k = min((1 + k) / (10 + k), decay): the first weights, which are the start's, are soon forgotten."""
    return min((1 + step) / (10 + step), decay)


class Averages:
    """Other values of some weights, float32, that follow them and can take their place for a block.

    Of a LoRA these are its factors, so that a model of an earlier moment costs an adapter and no second model.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._weights = dict(named)
        self._averages = {name: _copy(weight) for name, weight in self._weights.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """avg <- decay avg + (1 - decay) weights."""
        for name, average in self._averages.items():
            average.lerp_(self._weights[name].detach().to(average), 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Run a block with the averages in the model; the trained weights come back to the bit, whatever happens."""
        kept = {name: held(weight) for name, weight in self._weights.items()}
        try:
            for name, weight in self._weights.items():
                put(weight, self._averages[name].to(weight, copy=True))
            yield
        finally:
            for name, weight in self._weights.items():
                put(weight, kept[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages as whole copies."""
        return {name: whole(average).clone() for name, average in self._averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over averages; names and shapes must be those of the weights."""
        check_names(self._averages, state, "the averages")
        for name, average in self._averages.items():
            fill(average, state[name])


class Ema(Averages):
    """avg <- d avg + (1 - d) weights, after every `every`-th optimiser step; steps are counted from 0.

    Until the first of these the average is only what training began with, and `swapped` leaves the weights as they are.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        decay: float = 0.9,
        *,
        every: int = 8,
        rule: Callable[[int, float], float] = warm_up,
    ) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema.decay is {decay}, but an average needs 0 <= decay < 1; 0 copies the weights.")
        if every < 1:
            raise ConfigError(f"ema.every is {every}, but the average is updated every 1 or more steps.")
        super().__init__(named)
        self.decay, self.every, self.rule = decay, every, rule
        self.begun = False

    def update(self, step: int) -> bool:
        """Take in the weights that optimiser step `step` left; says whether this step was one that counts."""
        if (step + 1) % self.every:
            return False
        self.follow(self.rule(step, self.decay))
        self.begun = True
        return True

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """As `Averages` has it, once there is an average."""
        with super().swapped() if self.begun else nullcontext():
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, and whether they have begun; the decay depends on the step alone."""
        return super().state_dict() | {BEGUN: torch.tensor(self.begun)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over averages; names and shapes must be those of the weights."""
        super().load_state_dict({name: average for name, average in state.items() if name != BEGUN})
        self.begun = bool(state.get(BEGUN, True))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of one that is sharded over processes every process must ask."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def held(weight: Tensor) -> Tensor:
    """What `put` takes to bring a weight back."""
    return weight.data.clone() if hasattr(weight, "device_mesh") else weight.data


@torch.no_grad()
def put(weight: Tensor, value: Tensor) -> None:
    """Give a weight other values: another tensor, or where it is sharded, into the memory that its owner knows."""
    if hasattr(weight, "device_mesh"):
        fill(weight, value)
    else:
        weight.data = value


def fill(own: Any, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded over processes."""
    if hasattr(own, "device_mesh") and not hasattr(value, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(own.device, own.dtype), own.device_mesh, own.placements, src_data_rank=None)
    own.copy_(value)


def check_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights of another model or of other adapter settings."""
    missing, strange = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    shapes = [n for n in own if n in given and own[n].shape != given[n].shape]
    if missing or strange or shapes:
        told = [f"{len(names)} {word}, such as '{names[0]}'" for names, word in (
            (missing, "missing"), (strange, "unknown"), (shapes, "of another shape")) if names]  # fmt: skip
        raise ModelError(
            f"{what} do not fit what is trained here: {'; '.join(told)}. "
            "Use the model and the adapter settings they were saved with."
        )


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float32, copy=True)
