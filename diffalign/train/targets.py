"""Where an adapter sits: a pipeline's denoisers, and in them the layers of their attention or those a user names.

No model family is named. A module is attention if its own layers are called like queries and keys (`to_q` and `to_k`,
`q_proj` and `k_proj`, a fused `to_qkv`, ...) and it sits in a repeated block. Poolers outside the blocks are left
alone: they often read their layers' weights without calling the layers, and an adapter there would change nothing.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from diffalign.drive import Driver
from diffalign.errors import ConfigError, ModelError, UnknownName

USUAL = ("transformer", "unet", "prior", "decoder")  # where stock pipelines keep their denoiser, asked in this order
QUERY = re.compile(r"(to_|w|linear_)?(q|query)(_proj|_linear)?")
KEY = re.compile(r"(to_|w|linear_)?(k|kv|key)(_proj|_linear)?")
FUSED = re.compile(r"(to_|w)?(qkv|query_key_value)(_mlp)?(_proj|_linear)?", re.IGNORECASE)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def ran(driver: Driver) -> tuple[str, ...]:
    """The components that denoise the first and the last step: two predictions tell."""
    x, names = driver.start(), list[str]()
    for i in sorted({0, driver.length - 1}):
        driver.predict(x, i)
        names += [driver.denoiser] if driver.denoiser else []
    return tuple(dict.fromkeys(names))


def find_denoisers(pipe: Any, modules: Iterable[str] = (), ran: Iterable[str] = ()) -> dict[str, nn.Module]:
    """The components to train, by name: those asked for, or those that `ran` as denoisers, or the usual place.

    Experts that share the work (`transformer` and `transformer_2`) come together; a ControlNet is nobody's expert.
    """
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    for name in modules:
        if name not in parts:
            raise UnknownName.among("trainable component", name, parts, "diffalign check")
        if type(parts[name]).__module__.startswith(("transformers.", "diffusers.models.autoencoders")):
            raise ConfigError(
                f"adapter.modules names '{name}', a {type(parts[name]).__name__}: prompts are encoded once and media "
                "decoded outside the chain, so training it would change nothing that is learnt from. Name a denoiser."
            )
    found = list(modules) or list(ran) or [name for name in USUAL if name in parts][:1]
    if not found:
        raise ModelError(
            f"{type(pipe).__name__} keeps no denoiser under {', '.join(USUAL)}. Name it with adapter.modules; "
            f"its components are: {', '.join(parts)}."
        )
    kinds = {(re.sub(r"_\d+$", "", name), type(parts[name])) for name in found}
    siblings = [] if tuple(modules) else [n for n, p in parts.items() if (re.sub(r"_\d+$", "", n), type(p)) in kinds]
    return {name: parts[name] for name in dict.fromkeys([*found, *siblings])}


def find(
    module: nn.Module, targets: Sequence[str] = (), exclude: Sequence[str] = (), *, convolutions: bool = False
) -> list[str]:
    """Names of the layers to adapt, in the module's order.

    `targets` and `exclude` hold name endings or regular expressions of whole names; without targets the attention
    layers are found, or every layer of the repeated blocks where no attention is known by its structure.
    """
    known = adaptable(module)
    plain = {
        n: layer for n, layer in known.items() if isinstance(layer, nn.Linear) or (convolutions and _is_1x1(layer))
    }
    if targets:
        chosen = _named(known, targets, "targets", module)
    else:
        chosen = _attention(known, plain) or [n for n in plain if _in_block(n)]
    dropped = set(_named(known, exclude, "exclude", module))
    chosen = [name for name in chosen if name not in dropped]
    if not chosen:
        raise ConfigError(
            f"{type(module).__name__} has no layer to adapt: targets {list(targets) or 'found by structure'}, exclude "
            f"{list(exclude)}. Name some with adapter.targets; there are: {endings(known)}."
        )
    return chosen


def adaptable(module: nn.Module) -> dict[str, nn.Module]:
    """Linear and convolution layers by name; one that carries adapters counts once, under its own name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, nn.Module] = {}
    closed = None  # a module whose inside is not ours to adapt
    for name, part in module.named_modules():
        if closed is not None and name.startswith(closed + "."):
            continue
        layer = part
        if isinstance(part, BaseTunerLayer):
            closed, layer = name, part.get_base_layer()
        elif isinstance(part, nn.MultiheadAttention):  # reads its layers' weights, does not call the layers
            closed = name
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
            found[name] = layer
    return found


def matches(name: str, pattern: str) -> bool:
    """A name ending at a dot, or a regular expression of the whole name."""
    return name == pattern or name.endswith(f".{pattern}") or re.fullmatch(pattern, name) is not None


def endings(names: Iterable[str]) -> str:
    """What the names end with, most frequent first; numbered places read with what stands before them."""
    counts = Counter(".".join(_ending(name)) for name in names)
    return ", ".join(f"{ending} ({count})" for ending, count in counts.most_common(20)) or "none"


def check_patterns(patterns: Sequence[str], setting: str) -> None:
    """Refuse what is no regular expression before a model loads."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as e:
            raise ConfigError(
                f"adapter.{setting} holds '{pattern}', which is neither a name ending nor a regular expression ({e}). "
                "Write an ending such as 'to_q', or a pattern of the whole name such as '.*attn.*to_q'."
            ) from e


def _named(known: Mapping[str, nn.Module], patterns: Sequence[str], setting: str, module: nn.Module) -> list[str]:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in known):
            raise ConfigError(
                f"adapter.{setting} holds '{pattern}', but no linear or convolution layer of {type(module).__name__} "
                f"ends with it or matches it. There are: {endings(known)}."
            )
    return [name for name in known if any(matches(name, pattern) for pattern in patterns)]


def _attention(known: Mapping[str, nn.Module], plain: Mapping[str, nn.Module]) -> list[str]:
    owners = _owners(known)
    return [n for n in plain if "processor" not in n.split(".") and any(above in owners for above in _above(n))]


def _owners(known: Mapping[str, nn.Module]) -> set[str]:
    """Modules in repeated blocks whose own layers are called like queries and keys."""
    children = defaultdict(list)
    for name in known:
        parent, _, child = name.rpartition(".")
        children[parent].append(child)
    return {parent for parent, names in children.items() if _in_block(parent) and _asks(names)}


def _asks(names: Sequence[str]) -> bool:
    def one(pattern: re.Pattern[str]) -> bool:
        return any(pattern.fullmatch(name) for name in names)

    return one(FUSED) or (one(QUERY) and one(KEY))


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _is_1x1(layer: nn.Module) -> bool:
    return isinstance(layer, CONVOLUTIONS) and all(size == 1 for size in layer.kernel_size)


def _ending(name: str) -> list[str]:
    parts = name.split(".")
    return parts[-2:] if parts[-1].isdigit() else parts[-1:]
