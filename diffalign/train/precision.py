"""How denoisers run while they train: half precision inside them alone, recomputed activations, compiled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import ConfigError
from diffalign.restore import checkpointed

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def checkpointing(denoisers: Mapping[str, nn.Module], on: bool = True) -> Iterator[None]:
    """Run a block with gradient checkpointing in every denoiser: less memory for a second forward, equal gradients."""
    with checkpointed(denoisers.values(), on=on):
        for name, module in denoisers.items() if on else ():
            if not getattr(module, "is_gradient_checkpointing", False):
                raise ConfigError(
                    f"checkpointing is on, but '{name}', a {type(module).__name__}, knows no gradient checkpointing. "
                    "Turn it off and use smaller micro-batches."
                )
        yield


@contextmanager
def compiled(denoisers: Mapping[str, nn.Module], on: bool = True, **options: Any) -> Iterator[None]:
    """Run a block in which every denoiser's forward is compiled; its hooks, such as those of autocast, stay outside."""
    before = [(module, vars(module).get("forward")) for module in denoisers.values()]
    try:
        for module, _ in before if on else ():
            module.forward = torch.compile(module.forward, **options)
        yield
    finally:
        for module, forward in before if on else ():
            vars(module).update({"forward": forward}) if forward else vars(module).pop("forward", None)


@contextmanager
def autocast(modules: Iterable[nn.Module], precision: str) -> Iterator[None]:
    """For the length of the block each module computes under autocast and answers in float32.

    A module in half precision does so in its own dtype where no other is asked for: what it is given is float32.
    """
    with ExitStack() as stack:
        for module in modules:
            dtype = DTYPES.get(precision) or _half(module)
            if dtype is None:
                continue
            cast = _Autocast(dtype)
            for hook in (
                module.register_forward_pre_hook(cast.enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(cast.leave, always_call=True),
            ):
                stack.callback(hook.remove)
        yield


def _half(module: nn.Module) -> torch.dtype | None:
    """The half precision that some of a module's weights are in."""
    return next((p.dtype for p in module.parameters() if p.dtype in DTYPES.values()), None)


class _Autocast:
    """Hooks that open and close autocast around each forward of one module."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.open: list[Any] = []

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        device = next((p.device.type for p in module.parameters()), "cpu")
        block = torch.autocast(device, self.dtype)
        block.__enter__()  # type: ignore[no-untyped-call]
        self.open.append(block)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.open:  # a forward that raised before it began has none
            self.open.pop().__exit__(None, None, None)
        return in_float32(output)


def in_float32(value: Any) -> Any:
    """Every floating tensor of a module's answer as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return type(value)(**{k: in_float32(v) for k, v in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(in_float32(v) for v in value)
    return value
