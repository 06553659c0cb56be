"""A pipeline dressed for one of our calls, and undressed: stand-in scheduler, taps, quiet bars, same stray noise."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch

from diffalign.restore import KeptState


class Stage:
    """What a pipeline's attributes are replaced by for the length of a call, and how they come back."""

    def __init__(self, pipe: Any, taps: Mapping[str, Any], kept: KeptState) -> None:
        self.pipe, self.taps, self.kept = pipe, taps, kept
        self.device = getattr(pipe, "_execution_device", None)
        self.global_noise = torch.get_rng_state()

    @contextmanager
    def set(self, scheduler: Any, *, quiet: bool) -> Iterator[None]:
        """Swap everything in; put everything back, also after an error."""
        own, cls = self.pipe.__dict__, type(self.pipe)
        before = dict(own)
        own.update(self.taps, scheduler=scheduler, maybe_free_model_hooks=_nothing)
        self.pipe.__class__ = _with_known_device(cast(Any, cls), self.device)
        if quiet:
            own["_progress_bar_config"] = {**own.get("_progress_bar_config", {}), "disable": True}
        try:
            with self._same_global_noise():
                yield
        except BaseException:
            self.kept.restore()
            raise
        finally:
            self.pipe.__class__ = cls
            own.clear()
            own.update(before)

    @contextmanager
    def _same_global_noise(self) -> Iterator[None]:
        """Some pipelines draw from torch's global generator too: every run of ours sees it as it was when we began."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.global_noise)
            yield


@functools.lru_cache(maxsize=64)
def _with_known_device(cls: type, device: Any) -> type:
    """The pipeline's class with its execution device looked up once: finding it walks through every submodule."""
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), body | ({"_execution_device": device} if device is not None else {}))


def _nothing(*_: Any, **__: Any) -> None:
    """Offloaded modules stay where they are between two of our calls."""
