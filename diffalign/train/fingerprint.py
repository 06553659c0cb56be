"""What prompt embeddings depend on besides the prompts, as one hash: encoders, their adapters, tokenizers, versions.

Every weight counts: a tensor is known by name, shape, dtype, the whole-number sum of its bits (the same on every
device) and evenly spaced values. A tensor is hashed again only when it was written to or moved.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED = 64  # values of each tensor that count in their places
OTHERS = re.compile(r"^(unet|transformer|vae|vqvae|vqgan|movq|controlnet|denoiser|adapter)")  # no text goes through
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bits of a value as a whole number


def encoders(pipe: Any) -> dict[str, nn.Module]:
    """The components that may have a part in encoding text: all networks but denoisers, autoencoders and the like."""
    found = {name: getattr(pipe, name, None) for name in pipe.components}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module) and _encodes(name, module)}


def _encodes(name: str, module: Any) -> bool:
    for wrapper in ("_orig_mod", "module"):  # of torch.compile and of data parallel training
        module = getattr(module, wrapper, module)
    if callable(getattr(module, "get_base_model", None)):
        module = module.get_base_model()
    return not OTHERS.match(name) and not module.__class__.__module__.startswith("diffusers.models.")


class Fingerprint:
    """The hash for one pipeline as it is now."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._known: dict[str, tuple[Any, Any, str]] = {}  # name -> (reference, how it is recognised, hash)

    def now(self) -> str | None:
        """32 hexadecimal digits; None where a weight cannot be read, such as one that is not in memory."""
        found = encoders(self.pipe)
        tensors = {f"{name}.{key}": tensor for name, module in found.items() for key, tensor in _tensors(module)}
        if any(tensor.is_meta for tensor in tensors.values()):
            return None
        texts = {name: _tokenizer(getattr(self.pipe, name, None)) for name in self.pipe.components if name not in found}
        parts = [
            [[name, self._once(name, tensor, _token(tensor), _hash_values)] for name, tensor in tensors.items()],
            [
                [name, module.__class__.__qualname__, _settings(module), _state(module)]
                for name, module in found.items()
            ],
            [[n, self._once(n, text, len(text), _hash_tokenizer)] for n, text in texts.items() if text is not None],
            [self._plain(), _versions()],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _once(self, name: str, part: Any, token: Any, hashed: Callable[[Any], str]) -> str:
        """The hash of a part, from before where it is the same object in the same state."""
        reference, known, digest = self._known.get(name, (None, None, ""))
        if reference is None or reference() is not part or known != token:
            digest = hashed(part)
            self._known[name] = weakref.ref(part), token, digest
        return digest

    def _plain(self) -> dict[str, Any]:
        """Numbers and words on the pipeline itself, such as the longest prompt it takes."""
        own = {k: v for k, v in vars(self.pipe).items() if not k.startswith("_") and isinstance(v, bool | int | str)}
        return {"pipeline": type(self.pipe).__qualname__, **own}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _token(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor is written to, replaced or moved."""
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tuple(tensor.shape), str(tensor.dtype), tensor.device.type


@torch.no_grad()
def _hash_values(tensor: Tensor) -> str:
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    whole = values.detach().view(WHOLE[values.element_size()])
    flat = whole.reshape(-1)
    spots = torch.linspace(0, max(flat.numel() - 1, 0), min(SAMPLED, flat.numel()), dtype=torch.float64).long()
    sampled = flat[spots.to(flat.device)].tolist()
    told = [list(tensor.shape), str(tensor.dtype), tensor.device.type, int(whole.sum(dtype=torch.int64)), sampled]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _state(module: nn.Module) -> list[Any]:
    """Which adapters are at work, and how strongly."""
    found = []
    for name, layer in module.named_modules():
        if isinstance(getattr(type(layer), "disable_adapters", None), property):  # a layer of peft
            on: Any = layer
            if callable(on.disable_adapters):  # a model's method, not a layer's switch
                continue
            scaling = {str(k): float(v) for k, v in dict(getattr(on, "scaling", {})).items()}
            merged = list(getattr(on, "merged_adapters", []))
            found.append([name, bool(on.disable_adapters), list(on.active_adapters), scaling, merged])
    return found


def _settings(module: Any) -> str:
    config: Any = getattr(module, "config", None)
    told = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    attention = getattr(config, "_attn_implementation", None)
    return json.dumps([told, attention], sort_keys=True, default=str)


def _tokenizer(component: Any) -> Any:
    """The tokenizer itself, also inside a processor."""
    inner = getattr(component, "tokenizer", component)
    return inner if callable(getattr(inner, "get_vocab", None)) else None


def _hash_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:  # how the latest call wanted its text cut and filled is no part of it
        content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    named = ("model_max_length", "padding_side", "truncation_side", "chat_template", "special_tokens_map")
    own = {name: getattr(tokenizer, name, None) for name in named}
    told = json.dumps([type(tokenizer).__qualname__, content, own], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()


@functools.cache
def _versions() -> Mapping[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "transformers")}
