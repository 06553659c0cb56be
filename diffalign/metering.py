"""What stock calls cost: denoiser rows counted from outside, the calls themselves untouched."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diffalign.budget import Budget
from diffalign.memory import Memory
from diffalign.steering import Run
from diffalign.tap import Tap, Watch


@contextmanager
def metered(pipe: Any, budget: Budget) -> Iterator[None]:
    """Charge `budget` for every stock call of `pipe` inside the block; the calls themselves are untouched."""
    watch, own, scheduler = Watch(Memory(), {}), pipe.__dict__, pipe.scheduler
    watch.run = Run(lambda *_: None, order=0, current=torch.empty(0))
    modules = {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    native_step = scheduler.step

    @functools.wraps(native_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        watch.on_step()
        return native_step(*args, **kwargs)

    def free(*args: Any, **kwargs: Any) -> Any:
        own.update(modules)  # hooks belong on the modules, not on their taps
        return type(pipe).maybe_free_model_hooks(pipe, *args, **kwargs)

    own.update({k: Tap(k, m, watch) for k, m in modules.items()}, maybe_free_model_hooks=free)
    scheduler.__dict__["step"] = step
    try:
        yield
    finally:
        scheduler.__dict__.pop("step", None)
        own.pop("maybe_free_model_hooks", None)
        own.update(modules)
        budget.charge(nfe=watch.rows)
