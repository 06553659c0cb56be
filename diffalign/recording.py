"""A recorded stock run, and how ours is compared with it: the same seeds, the same stray noise, largest difference."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.drive import Driver


@dataclass
class Stock:
    """A recorded stock run."""

    samples: list[Tensor] = field(default_factory=list)
    timesteps: list[Any] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    media: Any = None


class Recorder:
    """Runs one stock call again and again, with everything its scheduler is handed written down."""

    def __init__(self, pipe: Any, call: Mapping[str, Any]) -> None:
        self.pipe, self.call = pipe, dict(call)
        self.noise_state = torch.get_rng_state()
        self.stock = self.record(self.call)

    def new_driver(self, **changed: Any) -> Driver:
        with self.same_stray_noise():
            return Driver(self.pipe, **{**self.call, **changed})

    @contextmanager
    def same_stray_noise(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.noise_state)
            yield

    def record(self, call: Mapping[str, Any]) -> Stock:
        """A stock run, with everything its scheduler was handed."""
        stock, scheduler = Stock(), self.pipe.scheduler
        native = scheduler.step

        @functools.wraps(native)
        def step(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(native).bind(*args, **kwargs).arguments
            stock.samples.append(given["sample"].clone())
            stock.timesteps.append(given.get("timestep"))
            stock.predictions.append(given["model_output"].clone())
            return native(*args, **kwargs)

        scheduler.__dict__["step"] = step
        try:
            with self.same_stray_noise():
                stock.media = self.pipe(**self.stock_arguments(call))[0]
        finally:
            del scheduler.__dict__["step"]
        return stock

    def stock_arguments(self, call: Mapping[str, Any]) -> dict[str, Any]:
        driver = getattr(self, "driver", None) or self.new_driver()
        generators = [torch.Generator("cpu").manual_seed(s) for s in driver.seeds]
        given = {k: list(v) if isinstance(v, list) else v for k, v in call.items()}
        return {
            **given,
            "generator": generators if len(generators) > 1 else generators[0],
            "output_type": "pt",
            "return_dict": False,
        }


def difference(a: Any, b: Any) -> float:
    """Largest absolute difference of two media or latents; inf where their shapes differ."""
    a, b = media_tensor(a), media_tensor(b)
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def media_tensor(media: Any) -> Tensor:
    if isinstance(media, list):
        return torch.stack([torch.as_tensor(m) for m in media])
    return torch.as_tensor(media).detach()
