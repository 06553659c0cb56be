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

from diffalign.steering import IndexUnseen, Run

# What pipelines compute from unchanged inputs before their loop; arguments with a generator are never remembered.
REMEMBERED = re.compile(r"^_?(encode_|prepare_image|prepare_control|prepare_mask|prepare_ip_adapter|get_.*embed)")


class Memory:
    """Results of pure calls by equal arguments, for the length of one of our calls; the oldest go first."""

    def __init__(self, keep: int = 32, most: int = 1 << 30) -> None:
        self.keep = keep  # results of each component
        self.most = most  # bytes of each component's results; the latest stays, however large
        self.scope = ""  # differs while adapters are off, so that their outputs do not mix
        self._entries: dict[str, list[tuple[Any, Any]]] = {}

    def call(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The remembered result of `function(*args, **kwargs)`, or a fresh one."""
        key = _freeze((args, kwargs, torch.is_inference_mode_enabled()))
        if key is None:
            return function(*args, **kwargs)
        entries = self._entries.setdefault(self.scope + name, [])
        for known, value in entries:
            if _same(known, key):
                return _hand_out(value)
        noise = torch.get_rng_state()
        value = function(*args, **kwargs)
        if not _has_gradient(value) and torch.equal(noise, torch.get_rng_state()):
            entries[:] = [*entries[-self.keep :], (key, value)]
            while len(entries) > 1 and sum(_bytes(kept) for _, kept in entries) > self.most:
                del entries[0]
        return _hand_out(value)


def _bytes(value: Any) -> int:
    """Memory of the tensors in a result."""
    if isinstance(value, Tensor):
        return value.nelement() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, tuple | list) else 0


class _Unfrozen(Exception):
    """An argument whose use cannot be repeated, such as a generator."""


def _freeze(value: Any) -> Any:
    try:
        return _frozen(value)
    except _Unfrozen:
        return None


def _frozen(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        raise _Unfrozen
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise _Unfrozen
        return _Held(value)
    if isinstance(value, tuple | list):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    return value


class _Held:
    """A tensor argument with its version, so that writing into it in place is noticed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = -1 if tensor.is_inference() else tensor._version

    def same(self, other: _Held) -> bool:
        mine, theirs = self.tensor, other.tensor
        if self.version >= 0 and mine._version != self.version:
            return False
        if mine is theirs:
            return self.version == other.version
        alike = mine.shape == theirs.shape and mine.dtype == theirs.dtype and mine.device == theirs.device
        return alike and torch.equal(mine, theirs)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, _Held):
        return isinstance(b, _Held) and a.same(b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(_same, a, b))
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except (ValueError, TypeError, RuntimeError):  # arrays have no single truth value
        return False


def _hand_out(value: Any) -> Any:
    """Containers are copied, so that a caller who extends a list does not change what is remembered."""
    return type(value)(value) if type(value) in (list, dict) else value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor inside nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, tuple | list) else []


def _has_gradient(value: Any) -> bool:
    return any(t.requires_grad for t in tensors_in(value)) or (
        hasattr(value, "latent_dist") and value.latent_dist.mean.requires_grad
    )


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
