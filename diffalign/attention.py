"""Choosing the attention kernel of a pipeline's denoisers, and seeing that the choice took effect.

diffusers has two ways: processors that dispatch to a named backend, and the older xformers switch. Some models use
neither and ignore the setting silently, so the first forward of each denoiser is watched and a setting without effect
is an error.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffalign.errors import MissingExtra, ModelError, UnknownName


@dataclass(frozen=True)
class _Saved:
    """One attention module as it was."""

    module: Any
    processor: Any
    backend: Any  # None where the processor does not dispatch

    def restore(self) -> None:
        if self.module.processor is not self.processor:
            self.module.set_processor(self.processor)
        if hasattr(self.processor, "_attention_backend"):
            self.processor._attention_backend = self.backend


def use_attention(pipe: Any, backend: str) -> None:
    """Run the pipeline's denoisers on `backend` (native, xformers, flash, ...); checked at their first forward."""
    _set(pipe, backend)


@contextlib.contextmanager
def attention(pipe: Any, backend: str) -> Iterator[None]:
    """The same for the length of a block; afterwards every processor is what it was."""
    undo = _set(pipe, backend)
    try:
        yield
    finally:
        undo()


def backends() -> list[str]:
    """The public names diffusers knows."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return sorted(b.value for b in AttentionBackendName if not b.value.startswith("_"))


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The components that hold attention processors and are no autoencoder."""
    found = {}
    for name, part in pipe.components.items():
        coder = type(part).__module__.startswith("diffusers.models.autoencoders")
        if isinstance(part, nn.Module) and hasattr(part, "set_attention_backend") and not coder and _processors(part):
            found[name] = part
    return found


def _set(pipe: Any, backend: str) -> Callable[[], None]:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    if backend not in {b.value for b in AttentionBackendName}:
        raise UnknownName.among("attention backend", backend, backends(), "diffalign generate --help")
    if backend == "xformers" and importlib.util.find_spec("xformers") is None:
        raise MissingExtra.of("--attention xformers", "xformers", "xformers")
    models = denoisers(pipe)
    if not models:
        raise ModelError(f"{type(pipe).__name__} has no component with attention processors. Leave out --attention.")
    saved = [kept for model in models.values() for kept in _processors(model)]
    active = _AttentionBackendRegistry.get_active_backend()[0]
    handles: list[Any] = []

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for kept in saved:
            kept.restore()
        _AttentionBackendRegistry.set_active_backend(active)

    try:
        for model in models.values():
            _switch(model, backend, getattr(pipe, "_execution_device", None))  # an offloaded model runs elsewhere
            handles += _watch_first_forward(model, backend, undo)
    except BaseException:
        undo()
        raise
    return undo


def _processors(model: nn.Module) -> list[_Saved]:
    owners = [m for m in model.modules() if hasattr(m, "processor") and hasattr(m, "set_processor")]
    return [_Saved(m, m.processor, getattr(m.processor, "_attention_backend", None)) for m in owners]


def _switch(model: Any, backend: str, device: torch.device | None) -> None:
    """Set one denoiser, by whichever of the two ways it has."""
    sample = next(p for p in model.parameters() if p.is_floating_point())
    query = torch.zeros(1, 16, 2, 64, device=device or sample.device, dtype=sample.dtype)  # (B, tokens, heads, width)
    dispatches = any(hasattr(kept.processor, "_attention_backend") for kept in _processors(model))
    try:
        if dispatches:
            model.set_attention_backend(backend)
            _try_kernel(query, backend)
        elif backend == "xformers":
            model.set_use_memory_efficient_attention_xformers(True)
        elif backend != "native":  # native is what such a model does anyway
            raise _no_effect(model, backend)
    except ModelError:
        raise
    except Exception as e:
        reason = str(e).strip().partition("\n")[0]
        raise ModelError(
            f"attention backend '{backend}' does not run here: {reason} "
            f"(device {query.device}, dtype {query.dtype}). Use --attention native."
        ) from e


def _try_kernel(query: torch.Tensor, backend: str) -> None:
    """One small call, so that a wrong device or dtype shows before the model runs."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    with torch.no_grad():
        dispatch_attention_fn(query, query, query, backend=AttentionBackendName(backend))


def _watch_first_forward(model: nn.Module, backend: str, undo: Callable[[], None]) -> list[Any]:
    watching = contextlib.ExitStack()
    seen: Counter[str] = Counter()

    def before(*_: Any) -> None:
        start.remove()
        watching.enter_context(_counting(seen))

    def after(*_: Any) -> None:
        end.remove()
        watching.close()
        if not _took_effect(seen, backend):
            undo()
            raise _no_effect(model, backend)
        if backend != "native" and seen["direct"]:
            warnings.warn(
                f"{seen['direct']} of {sum(seen.values())} calls of {type(model).__name__} bypass '{backend}'.",
                stacklevel=2,
            )

    start = model.register_forward_pre_hook(before)
    end = model.register_forward_hook(after, always_call=True)
    return [start, end]


def _took_effect(seen: Counter[str], backend: str) -> bool:
    others = set(+seen) - {backend, "direct"}
    return not others if backend == "native" else seen[backend] > 0


def _no_effect(model: nn.Module, backend: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} ignores the attention backend '{backend}': its attention is computed another way. "
        "Use --attention native, or xformers where the model has that switch."
    )


@contextlib.contextmanager
def _counting(seen: Counter[str]) -> Iterator[None]:
    """Count attention calls by backend; `direct` are calls of torch's attention outside any backend."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    depth = 0

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth == 0:
                seen[name] += 1
            depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1

        return run

    with contextlib.ExitStack() as stack:
        table = _AttentionBackendRegistry._backends
        stack.callback(table.update, dict(table))
        for name in list(table):
            table[name] = counted(name.value, table[name])
        stack.enter_context(_patched(torch.nn.functional, "scaled_dot_product_attention", counted, "direct"))
        if importlib.util.find_spec("xformers") is not None:
            import xformers.ops

            stack.enter_context(_patched(xformers.ops, "memory_efficient_attention", counted, "xformers"))
        yield


@contextlib.contextmanager
def _patched(place: Any, name: str, counted: Callable[[str, Any], Any], label: str) -> Iterator[None]:
    real = getattr(place, name)
    setattr(place, name, counted(label, real))
    try:
        yield
    finally:
        setattr(place, name, real)
