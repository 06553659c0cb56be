"""What a call may disturb is put back: training flags, dtypes, attention processors, adapter switches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_OWN_DTYPES = "_diffalign_own_dtypes"  # on a module that `steady` holds in float32


class KeptState:
    """A snapshot of what stock calls change inside modules and only put back when they end well."""

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self._flags = [(m, m.training) for module in modules.values() for m in module.modules()]
        self._dtypes = [(module, _dtypes(module)) for module in modules.values()]
        self._processors = [(m, dict(_processors(m))) for m in modules.values() if hasattr(m, "attn_processors")]

    def restore(self) -> None:
        """Put everything back that differs from the snapshot."""
        for module, training in self._flags:
            module.training = training
        for module, dtypes in self._dtypes:
            if _OWN_DTYPES in vars(module):
                continue
            for name, tensor in _tensors(module):
                if tensor.dtype != dtypes.get(name, tensor.dtype):
                    tensor.data = tensor.data.to(dtypes[name])
        for module, processors in self._processors:
            if _processors(module) != processors:
                module.set_attn_processor(dict(processors))  # type: ignore[operator]


def _processors(module: Any) -> dict[str, Any]:
    found: dict[str, Any] = module.attn_processors
    return found


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _dtypes(module: torch.nn.Module) -> dict[str, torch.dtype]:
    """Of every tensor; of a module that `steady` holds, the dtypes it will have again."""
    held: dict[str, torch.dtype] | None = vars(module).get(_OWN_DTYPES)
    return held or {name: tensor.dtype for name, tensor in _tensors(module)}


@contextmanager
def adapters_off(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Run a block with every PEFT adapter of `modules` switched off, then restore switches and gradient flags."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    with ExitStack() as stack:
        for module in modules:
            for layer in module.modules():
                if isinstance(layer, BaseTunerLayer):
                    stack.callback(_switch_back, layer, layer.disable_adapters, _gradient_flags(layer))
                    layer.enable_adapters(enabled=False)
        yield


@contextmanager
def frozen(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Run a block in which no weight asks for a gradient, so that a backward pass is the input's alone."""
    asking = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def checkpointed(modules: Iterable[torch.nn.Module], *, on: bool) -> Iterator[None]:
    """Run a block with gradient checkpointing in every module that knows it: less memory for a second forward."""
    switched: list[Any] = []
    try:
        for module in modules if on else ():
            if getattr(module, "is_gradient_checkpointing", True):  # on already, or a module without the switch
                continue
            try:
                module.enable_gradient_checkpointing()  # type: ignore[operator]
            except (ValueError, AttributeError):  # diffusers names the method on models that cannot do it
                continue
            switched.append(module)
        yield
    finally:
        for module in switched:
            module.disable_gradient_checkpointing()


@contextmanager
def steady(modules: Iterable[torch.nn.Module], *, every_half: bool = False) -> Iterator[None]:
    """Run a block in which autoencoders that must decode in float32 stay in float32.

    Stock calls turn such a half-precision autoencoder up to decode and down again after, which changes its weights
    under the feet of a backward pass that is yet to come. With `every_half` all half-precision ones are held, for
    latents that are float32 whatever the model's dtype.
    """
    with ExitStack() as stack:
        for module in modules:
            raised = getattr(getattr(module, "config", None), "force_upcast", False)
            dtype = getattr(module, "dtype", None)
            half = every_half and dtype in (torch.float16, torch.bfloat16)
            if (raised and dtype == torch.float16) or (half and hasattr(module, "decode")):
                stack.enter_context(_in_float32(module))
        yield


@contextmanager
def _in_float32(module: Any) -> Iterator[None]:
    dtypes = _dtypes(module)
    for _, tensor in _tensors(module):
        tensor.data = tensor.data.float() if tensor.is_floating_point() else tensor.data
    decode, move = module.decode, module.to

    def decode_here(z: Any, *args: Any, **kwargs: Any) -> Any:
        return decode(z.float(), *args, **kwargs)

    def move_only(*args: Any, **kwargs: Any) -> Any:
        places = [arg for arg in args if not isinstance(arg, torch.dtype)]
        named = {name: value for name, value in kwargs.items() if name != "dtype"}
        return move(*places, **named) if places or named else module

    before = dict(vars(module))
    vars(module).update({"decode": decode_here, "to": move_only, _OWN_DTYPES: dtypes})
    try:
        yield
    finally:
        for name in ("decode", "to", _OWN_DTYPES):
            del vars(module)[name]
        vars(module).update({name: before[name] for name in ("decode", "to") if name in before})
        for name, tensor in _tensors(module):
            tensor.data = tensor.data.to(dtypes[name])


def _gradient_flags(layer: torch.nn.Module) -> dict[torch.nn.Parameter, bool]:
    return {p: p.requires_grad for p in layer.parameters()}


def _switch_back(layer: Any, disabled: bool, flags: dict[torch.nn.Parameter, bool]) -> None:
    layer.enable_adapters(enabled=not disabled)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
