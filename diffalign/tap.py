"""Taps on a pipeline's components: count denoiser rows, answer calls without the model, remember conditioning.

For the length of one of our calls a pipeline sees each component through a `Tap`; the module itself is never touched,
so hooks, compiled calls and training flags stay what they are.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffalign.memory import Memory
from diffalign.steering import IndexUnseen, Run

# What pipelines compute from unchanged inputs before their loop; arguments with a generator are never remembered.
REMEMBERED = re.compile(r"^_?(encode_|prepare_image|prepare_control|prepare_mask|prepare_ip_adapter|get_.*embed)")


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Latent rows of a denoiser call: the batch of its first tensor with features, or the length of a list."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim >= 3:
            return int(value.shape[0])
        if isinstance(value, list) and value and all(isinstance(v, Tensor) and v.ndim >= 3 for v in value):
            return len(value)
    return 1


class Watch:
    """Sees every component call of one run: counts it, answers it blank, or lets it pass."""

    def __init__(self, memory: Memory, blanks: dict[Any, Any]) -> None:
        self.memory = memory
        self.blanks = blanks  # (component, shapes) -> the shape of its output, learnt from real calls
        self.run: Run | None = None
        self.denoiser: str | None = None
        self.rows = 0  # denoiser rows of this run
        self.last_rows = 0  # of its latest step
        self.blank_rows: list[int] = []  # what each blank step of this run would have cost
        self._since_step: list[tuple[str, int]] = []
        self._unspent: list[tuple[str, int]] = []

    def on_step(self) -> None:
        """The component called last before a step is the denoiser; all its calls of this iteration count."""
        if self._unspent:
            self.blank_rows.append(sum(rows for name, rows in self._unspent if name == self._unspent[-1][0]))
            self._unspent.clear()
        if self._since_step:
            self.denoiser = self._since_step[-1][0]
            self.last_rows = sum(rows for name, rows in self._since_step if name == self.denoiser)
            self.rows += self.last_rows
        self._since_step.clear()

    def forward(self, name: str, module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self.run
        if run is None or not run.in_loop or run.current is None:
            return self.memory.call(name, module, args, kwargs)
        if run.needs_index():
            raise IndexUnseen
        signature = (name, _shapes(args), _shapes(kwargs))
        if run.blanked and not run.wet:
            self._unspent.append((name, rows_of(args, kwargs)))
            if signature in self.blanks:
                return _fill(self.blanks[signature])
            if run.guess:
                return _guess(args, kwargs)
        out = module(*args, **kwargs)
        self._since_step.append((name, rows_of(args, kwargs)))
        if signature not in self.blanks:
            self.blanks[signature] = _hollow(out)
        return out


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_shapes, value))
    if isinstance(value, dict):
        return tuple((k, _shapes(v)) for k, v in value.items())
    return value if isinstance(value, bool | None) else type(value)


def _hollow(value: Any) -> Any:
    """`value` with each tensor replaced by a zero stretched to its shape, which takes no memory."""
    return _map_tensors(value, lambda t: torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape))


def _fill(value: Any) -> Any:
    return _map_tensors(value, torch.clone)


class _Guess(tuple[Any, ...]):
    """An output by position or by the one name that denoisers share."""

    @property
    def sample(self) -> Any:
        return self[0]


def _guess(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An output that looks like the latents going in; what a step is handed as its sample does not depend on it."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim >= 3:
            return _Guess((torch.zeros_like(value),))
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return _Guess(([torch.zeros_like(v) for v in value],))
    raise ValueError("no latents among the arguments of a model call")


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):  # model outputs are ordered dictionaries that take their fields by name
        return type(value)(**{k: _map_tensors(v, change) for k, v in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_map_tensors(v, change) for v in value)
    return value


class Tap:
    """A component as a pipeline sees it during one of our calls: everything forwards to the module behind it."""

    __slots__ = ("_tap_module", "_tap_name", "_tap_watch")
    _tap_module: Any
    _tap_name: str
    _tap_watch: Watch

    def __init__(self, name: str, module: Any, watch: Watch) -> None:
        object.__setattr__(self, "_tap_name", name)
        object.__setattr__(self, "_tap_module", module)
        object.__setattr__(self, "_tap_watch", watch)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._tap_module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tap_watch.forward(self._tap_name, self._tap_module, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._tap_module, name)
        if name == "forward":
            return functools.partial(_call_forward, self, value)
        if name in ("encode", "preprocess") and callable(value):
            return functools.partial(_remember, self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tap_module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._tap_module, name)

    def __len__(self) -> int:
        return len(self._tap_module)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter(self._tap_module)

    def __getitem__(self, key: Any) -> Any:
        return self._tap_module[key]


def _call_forward(tap: Tap, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return tap._tap_watch.forward(tap._tap_name, forward, args, kwargs)


def _remember(tap: Tap, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return tap._tap_watch.memory.call(f"{tap._tap_name}.{name}", function, args, kwargs)


def taps_on(pipe: Any, modules: dict[str, torch.nn.Module], watch: Watch) -> dict[str, Any]:
    """What the pipeline's attributes are replaced by: tapped modules and processors, remembered methods."""
    taps: dict[str, Any] = {name: Tap(name, module, watch) for name, module in modules.items()}
    for name, value in vars(pipe).items():
        if callable(getattr(value, "preprocess", None)) and callable(getattr(value, "postprocess", None)):
            taps[name] = Tap(name, value, watch)
    for name in dir(type(pipe)):
        if REMEMBERED.match(name) and callable(inspect.getattr_static(type(pipe), name)):
            taps[name] = _remembering(watch.memory, name, getattr(pipe, name))
    return taps


def _remembering(memory: Memory, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: memory.call(name, method, args, kwargs)
