"""Things put on a pipeline for the length of a check and taken off again without a trace: a LoRA, offload hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def temporary_lora(module: nn.Module, *, rank: int = 2) -> Iterator[int]:
    """A random LoRA on up to eight linear layers of `module`; yields how many took one."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    attention = [n for n in linear if n.rpartition(".")[2] in ("to_q", "to_k", "to_v", "qkv")]
    names = (attention or [n for n in linear if "attn" in n or "ff" in n] or linear)[:8]
    children = {p: dict(m.named_children()) for p, m in module.named_modules()}
    own = dict(vars(module))
    flags = {p: p.requires_grad for p in module.parameters()}
    if names:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=False)
            inject_adapter_in_model(config, module, adapter_name="diffalign_check")
    try:
        yield len(names)
    finally:
        _put_children_back(module, children)
        for key in vars(module).keys() - own.keys():
            vars(module).pop(key)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _put_children_back(module: nn.Module, children: dict[str, dict[str, nn.Module]]) -> None:
    for path, kept in children.items():
        parent = _at(module, path, children)
        for name, child in kept.items():
            if parent._modules[name] is not child:
                parent._modules[name] = child


def _at(root: nn.Module, path: str, children: dict[str, dict[str, nn.Module]]) -> nn.Module:
    """The original module at `path`, found through the original children."""
    found, so_far = root, ""
    for name in path.split(".") if path else ():
        found = children[so_far][name]
        so_far = f"{so_far}.{name}" if so_far else name
    return found


@contextmanager
def offload_hooks(pipe: Any) -> Iterator[dict[str, int]]:
    """Model-offload hooks on every component, as `enable_model_cpu_offload` sets them; yields runs by component."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    modules = {k: m for k, m in pipe.components.items() if isinstance(m, nn.Module)}
    if any(hasattr(m, "_hf_hook") for m in modules.values()):
        yield {}  # the pipeline is offloaded already: the check runs with its own hooks
        return
    device = next((p.device for m in modules.values() for p in m.parameters()), torch.device("cpu"))
    runs = dict.fromkeys(modules, 0)
    counters, previous = [], None
    for name, module in modules.items():
        _, previous = cpu_offload_with_hook(module, device, prev_module_hook=previous)
        counters.append(module.register_forward_pre_hook(_counter(runs, name)))
    try:
        yield runs
    finally:
        for counter in counters:
            counter.remove()
        for module in modules.values():
            remove_hook_from_module(module)
            vars(module).pop("forward", None)
            module.to(device)


def _counter(runs: dict[str, int], name: str) -> Any:
    def count(*_: Any) -> None:
        runs[name] += 1

    return count
