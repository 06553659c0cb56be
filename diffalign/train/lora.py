"""A peft LoRA put into a denoiser and taken out without a trace, beside whatever adapters it carries already."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.noise import case_generator


@dataclass(frozen=True)
class Before:
    """What a denoiser was before a LoRA came in."""

    switches: tuple[tuple[Any, bool, list[str]], ...]  # adapter layers: whether they were off, which adapters were on
    attributes: dict[str, Any]


def layers_of(module: nn.Module) -> list[Any]:
    """The layers of `module` that carry adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def state_of(module: nn.Module) -> Before:
    switches = [(layer, layer.disable_adapters, list(layer.active_adapters)) for layer in layers_of(module)]
    return Before(tuple(switches), dict(vars(module)))


def add(module: Any, adapter: str, names: list[str], rank: int, alpha: float) -> None:
    """A LoRA on exactly the layers called `names`; the global random state stays as it is."""
    from peft import LoraConfig, inject_adapter_in_model

    strays = [n for n, _ in module.named_modules() if n not in set(names) and any(n.endswith(f".{t}") for t in names)]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=list(names),
        exclude_modules="|".join(map(re.escape, strays)) or None,  # peft also takes names that end with a target
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # adapters that are there are meant to stay
        if hasattr(module, "load_lora_adapter"):
            module.add_adapter(config, adapter_name=adapter)
        else:
            inject_adapter_in_model(config, module, adapter)


def activate(module: nn.Module, adapter: str, before: Before) -> list[tuple[Any, list[str]]]:
    """Turn `adapter` on beside those that were on; gives every layer with the others that are on in it."""
    were_on = {layer: [] if off else active for layer, off, active in before.switches}
    found = []
    for layer in layers_of(module):
        others = [name for name in were_on.get(layer, []) if name in layer.lora_A]
        layer.enable_adapters(enabled=True)
        layer.set_adapter([*others, *([adapter] if adapter in layer.lora_A else [])])
        found.append((layer, others))
    return found


def remove(module: Any, adapter: str, before: Before) -> None:
    """Take `adapter` out; layers that carried none before are the plain ones again."""
    carried = {layer: (off, active) for layer, off, active in before.switches}
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if layer in carried and adapter in layer.lora_A:
                layer.delete_adapter(adapter)
            elif layer not in carried and adapter in getattr(layer, "lora_A", ()):
                parent._modules[name] = layer.get_base_layer()
    for layer, (off, active) in carried.items():
        layer.set_adapter(active)
        layer.enable_adapters(enabled=not off)
    getattr(module, "peft_config", {}).pop(adapter, None)
    for key in vars(module).keys() - before.attributes.keys():
        vars(module).pop(key)
    if "_hf_peft_config_loaded" in before.attributes:
        module._hf_peft_config_loaded = before.attributes["_hf_peft_config_loaded"]


def first(like: Tensor, name: str, init: str, seed: int) -> Tensor:
    """What a factor starts from, float32: zeros for the second; the first is drawn from its own name and `seed`.

    `gaussian` has the standard deviation 1 / rank, `default` is uniform within 1 / sqrt(fan-in).
    """
    value = torch.zeros(like.shape, dtype=torch.float32)
    if ".lora_A." in name:
        draw = case_generator(seed, "lora", name)
        if init == "gaussian":
            value.normal_(std=1 / len(like), generator=draw)
        else:
            bound = 1 / math.sqrt(like[0].numel())
            value.uniform_(-bound, bound, generator=draw)
    return value.to(like.device)
