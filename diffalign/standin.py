"""The stand-in scheduler: a copy of the real one whose loop we steer and whose steps we answer.

A pipeline asks its scheduler for timesteps and hands it each prediction. The stand-in is a subclass of the real
scheduler's class, so `isinstance` checks, config and arithmetic stay native; `timesteps` iterates over the loop
indices that a `Run` visits, and `step` gives back what the `Run` answers. Nothing here names a model family.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from diffalign.errors import SeamError
from diffalign.steering import Run, walk_type


def stand_in(real: Any) -> Any:
    """A deep copy of `real` whose class adds our loop control; set `.run` before each use."""
    twin = copy_of(real)
    twin.__class__ = _subclass(cast(Any, type(real)))
    twin.__dict__["_walk_type"] = walk_type(twin)
    twin.__dict__["_schedules"] = []
    return twin


def copy_of(real: Any) -> Any:
    """A deep copy of a scheduler, cut off from any graph that its last run left in it."""
    return copy.deepcopy(real, {id(t): t.detach().clone() for t in _held_tensors(vars(real))})


def _held_tensors(state: dict[str, Any]) -> list[Tensor]:
    """Tensors a scheduler keeps between steps; one that is part of a graph cannot be copied otherwise."""
    values = [v for value in state.values() for v in (value if isinstance(value, list | tuple) else [value])]
    return [v for v in values if isinstance(v, Tensor)]


@functools.cache
def _subclass(real: type) -> type:
    """The real scheduler's class with `set_timesteps`, `step`, `init_noise_sigma` under our control."""

    @functools.wraps(real.set_timesteps)  # type: ignore[attr-defined]
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        _native_schedule(self, real, args, kwargs)
        self.timesteps = torch.as_tensor(self.timesteps).as_subclass(self._walk_type)

    @functools.wraps(real.step)  # type: ignore[attr-defined]
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _answer_step(self, real, args, kwargs)

    def init_noise_sigma(self: Any) -> Any:
        if self.run.unit_start:
            return 1.0
        native = inspect.getattr_static(real, "init_noise_sigma", None)
        return native.fget(self) if isinstance(native, property) and native.fget else self.__dict__["init_noise_sigma"]

    def set_sigma(self: Any, value: Any) -> None:
        self.__dict__["init_noise_sigma"] = value

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        """A pipeline that copies its scheduler gets the plain native one."""
        twin: Any = object.__new__(real)
        own = {k: v for k, v in self.__dict__.items() if k not in ("run", "_walk_type", "_schedules", "timesteps")}
        twin.__dict__.update(copy.deepcopy(own, memo))
        twin.__dict__["timesteps"] = torch.as_tensor(self.timesteps).as_subclass(torch.Tensor).clone()
        if "run" in self.__dict__:
            twin.__dict__["step"] = functools.partial(_step_beside, self, functools.partial(real.step, twin))  # type: ignore[attr-defined]
        return twin

    body = {"set_timesteps": set_timesteps, "step": step, "__deepcopy__": deepcopy, "__module__": real.__module__}
    if hasattr(real, "init_noise_sigma") or "init_noise_sigma" in inspect.getsource(real):
        body["init_noise_sigma"] = property(init_noise_sigma, set_sigma)
    return type(real.__name__, (real,), body)


_signature = functools.lru_cache(maxsize=64)(inspect.signature)


def _native_schedule(self: Any, real: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the native `set_timesteps`, or restore what it left the last time it got these arguments."""
    for key, state in self._schedules:
        if _alike(key, (args, kwargs)):
            for name, value in state.items():
                self.__dict__[name] = copy.copy(value) if isinstance(value, list) else value
            return
    real.set_timesteps(self, *args, **kwargs)  # type: ignore[attr-defined]
    keep = ("run", "_walk_type", "_schedules")
    state = {k: copy.copy(v) if isinstance(v, list) else v for k, v in self.__dict__.items() if k not in keep}
    self._schedules[:] = [*self._schedules[-3:], ((args, kwargs), state)]


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_alike(a[k], b[k]) for k in a)
    if hasattr(a, "shape"):
        return type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and bool(a == b)


def _answer_step(self: Any, real: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand the prediction to the run; give back its answer in the shape the native step would."""
    bound = _signature(real.step).bind(self, *args, **kwargs)  # type: ignore[attr-defined]
    prediction, sample = _first(bound.arguments, "model_output"), _first(bound.arguments, "sample")
    run: Run = self.run
    run.count_step(real.__name__)
    following = run.answer(run.position, prediction, sample)
    if following is None:
        native = real.step(self, *args, **kwargs)  # type: ignore[attr-defined]
        run.last = native[0] if isinstance(native, tuple) else native.prev_sample
        return native
    run.last = following
    _count_on(self, bound.arguments.get("timestep"))
    if bound.arguments.get("return_dict", True) is False:
        return following, following
    return _Output(prev_sample=following, pred_original_sample=following)


def _step_beside(owner: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A step of a copy of our scheduler: it moves a second latent, which is right only if every step before was run."""
    run: Run = owner.run
    visited = range(run.order + 1) if run.visit is None else run.visit[: run.order + 1]
    if run.in_loop and not run.blanked and list(visited) != list(range(run.position + 1)):
        raise SeamError(
            f"this pipeline moves a second latent beside the one it returns, so its step {run.position} has a history "
            "that latents handed to us cannot carry. Roll out from step 0 instead."
        )
    return step(*args, **kwargs)


def _count_on(scheduler: Any, timestep: Any) -> None:
    """Advance a scheduler that counts its own steps past one we answered: the loop may add noise at its next level."""
    if "_step_index" not in scheduler.__dict__ or not hasattr(scheduler, "_init_step_index"):
        return
    if scheduler._step_index is None:
        scheduler._init_step_index(timestep)
    scheduler._step_index += 1


def _first(arguments: dict[str, Any], name: str) -> Tensor:
    """The tensor called `name`, else the first (model_output) or last (sample) tensor of the call."""
    if isinstance(arguments.get(name), Tensor):
        return arguments[name]  # type: ignore[no-any-return]
    tensors = [v for v in arguments.values() if isinstance(v, Tensor) and v.ndim > 1]
    return tensors[0 if name == "model_output" else -1]


class _Output(dict[str, Any]):
    """What a scheduler returns with return_dict=True: fields by name, or by position."""

    def __init__(self, **fields: Tensor) -> None:
        super().__init__(fields)
        self.__dict__.update(fields)

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


def unstepped(scheduler: Any) -> Any:
    """A plain copy of a stand-in, with its timesteps and no step taken."""
    plain = copy.deepcopy(scheduler)
    plain.__dict__.pop("step", None)
    plain.__dict__.update({k: None for k in ("_begin_index", "_step_index") if k in plain.__dict__})
    return plain
