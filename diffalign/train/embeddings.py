"""Prompt embeddings that are made once: every prompt is encoded alone, and batches are put together from its rows.

So a prompt has the same bits in every batch, after a resume too. A pipeline whose batches are not rows of single
prompts, because it pads to the longest or mixes them, is found out by two fixed prompts and keeps its own way.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import atomic
from diffalign.arguments import PER_CASE
from diffalign.errors import OutputError
from diffalign.memory import tensors_in
from diffalign.train import tensors_file
from diffalign.train.fingerprint import Fingerprint, encoders
from diffalign.train.prompt_rows import compared, copied, joined

PROBES = ("a", "a red cube left of a small blue ball on a wooden table")  # of different length
ENTRY = 1  # layout of a file


@dataclass(frozen=True)
class Request:
    """A call of `encode_prompt`, prompt by prompt."""

    shared: Mapping[str, Any]  # arguments that hold for all prompts
    texts: Mapping[str, Sequence[str]]  # arguments with one text per prompt
    listed: bool  # texts came as lists
    device: torch.device  # where the embeddings go

    @property
    def rows(self) -> int:
        return len(next(iter(self.texts.values())))

    @property
    def setting(self) -> str:
        """Everything but the texts; a device counts by its type."""
        plain = {k: v for k, v in self.shared.items() if k != "device"}
        return json.dumps([plain, self.device.type, sorted(self.texts)], sort_keys=True, default=repr)

    def alone(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """Arguments for one prompt."""
        return {**self.shared, **{k: [v] if self.listed else v for k, v in texts.items()}}

    def row(self, number: int) -> dict[str, str]:
        return {name: texts[number] for name, texts in self.texts.items()}


class PromptCache:
    """While it is open, `pipe.encode_prompt` answers from memory, or from `folder`, for frozen encoders.

    with PromptCache(pipe, out / "embeddings"):
        pipe(prompt="a red cube")
    """

    def __init__(self, pipe: Any, folder: Path | None = None, *, most: int = 1 << 30) -> None:
        self.pipe = pipe
        self.folder = folder
        self.most = most  # bytes kept in memory; what was used longest ago goes first
        self.encoded = 0  # prompts that went through the encoders
        self._stock: Callable[..., Any] | None = None
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._bytes = 0
        self._layouts: dict[str, list[str] | None] = {}  # setting -> what each tensor is; None: the stock way
        self._print = Fingerprint(pipe)
        self._told: set[str] = set()

    def __enter__(self) -> PromptCache:
        stock = getattr(self.pipe, "encode_prompt", None)
        if callable(stock):
            self._before = self.pipe.__dict__.get("encode_prompt")
            self._stock, self._signature = stock, inspect.signature(stock)
            self.pipe.__dict__["encode_prompt"] = functools.wraps(stock)(functools.partial(self._answer, stock))
        return self

    def __exit__(self, *_: object) -> None:
        if self._stock is None:
            return
        self._stock = None
        if self._before is None:
            self.pipe.__dict__.pop("encode_prompt", None)
        else:
            self.pipe.__dict__["encode_prompt"] = self._before

    def _answer(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Embeddings for a call of `encode_prompt`; the stock call wherever it cannot be taken apart."""
        request = self._read(args, kwargs) if self._stock is not None and self._ready() else None
        fingerprint = self._print.now() if request is not None else None
        if request is None or fingerprint is None:
            return stock(*args, **kwargs)
        if request.rows == 1:
            return copied(self._alone(stock, request, 0, fingerprint))
        layout = self._layout(stock, request)
        if layout is None:
            return stock(*args, **kwargs)
        parts = [self._alone(stock, request, row, fingerprint) for row in range(request.rows)]
        return joined(parts, layout)

    def _ready(self) -> bool:
        """Whether embeddings are constants of the prompt: encoders frozen, dropout off."""
        found = encoders(self.pipe)
        trained = [name for name, module in found.items() if any(p.requires_grad for p in module.parameters())]
        if trained:
            self._say(
                f"'{trained[0]}' asks for gradients, so prompts are encoded anew each time; freeze it to keep them"
            )
        return not trained and not any(module.training for module in found.values())

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request | None:
        """The call as a request, None where an argument is more than text and plain settings."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError:
            return None
        given = dict(bound.arguments)
        for parameter in self._signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
            elif parameter.kind is parameter.VAR_POSITIONAL and given.pop(parameter.name, ()):
                return None
        prompt = given.get("prompt")
        listed = isinstance(prompt, list | tuple)
        per_row = {k: v for k, v in given.items() if PER_CASE.search(k) and isinstance(v, list | tuple)}
        texts: dict[str, Any] = per_row if listed else {"prompt": [prompt]}
        shared = {k: v for k, v in given.items() if k not in texts}
        alike = all(len(v) == len(texts["prompt"]) and all(isinstance(t, str) for t in v) for v in texts.values())
        if not (alike and texts["prompt"] and (listed or not per_row) and all(map(_is_plain, shared.values()))):
            return None
        device = torch.device(given.get("device") or getattr(self.pipe, "_execution_device", None) or "cpu")
        return Request(shared, texts, listed, device)

    def _alone(self, stock: Callable[..., Any], request: Request, row: int, fingerprint: str) -> Any:
        """The embeddings of one prompt: from memory, from the disk, or made now."""
        told = json.dumps([ENTRY, fingerprint, request.setting, request.row(row), _precision()], sort_keys=True)
        key = hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        path = self.folder / fingerprint / f"{key}.safetensors" if self.folder else None
        value = _load(path, request.device) if path is not None and path.is_file() else None
        if value is None:
            value = _encoded(stock, request.alone(request.row(row)))
            self.encoded += 1
            self._store(path, value)
        self._keep(key, value)
        return value

    def _keep(self, key: str, value: Any) -> None:
        self._kept[key] = value
        self._bytes += _size(value)
        while self._bytes > self.most and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])

    def _store(self, path: Path | None, value: Any) -> None:
        """To the disk, whole or not at all; a failure only ends the storing."""
        if path is None:
            return
        from safetensors.torch import save

        try:
            tree, tensors = tensors_file.pack(value)
            places = [tensor.device.type for tensor in tensors_in(value)]
            told = {"tree": json.dumps(tree), "devices": json.dumps(places)}
            atomic.write_bytes(path, save(tensors, metadata=told))
        except (OutputError, TypeError) as e:  # a full disk, or an output that is more than tensors
            self._say(f"prompt embeddings are no longer stored: {e}")
            self.folder = None

    def _layout(self, stock: Callable[..., Any], request: Request) -> list[str] | None:
        """Which tensors have rows of prompts and which are the same for all, told by two fixed prompts."""
        if request.setting not in self._layouts:
            alone = [_encoded(stock, request.alone(dict.fromkeys(request.texts, text))) for text in PROBES]
            both = _encoded(stock, {**request.shared, **{name: list(PROBES) for name in request.texts}})
            layout = compared(alone, both)
            if layout is None:
                self._say("its batches are not rows of single prompts, so prompts are encoded batch by batch")
            self._layouts[request.setting] = layout
        return self._layouts[request.setting]

    def _say(self, what: str) -> None:
        """A warning in one line, once."""
        if what not in self._told:
            self._told.add(what)
            warnings.warn(f"{type(self.pipe).__name__}: {what}.", stacklevel=2)


def _encoded(stock: Callable[..., Any], call: Mapping[str, Any]) -> Any:
    """Plain tensors without a graph, that later steps may use with gradients."""
    with torch.inference_mode(False), torch.no_grad():
        return stock(**call)


def _precision() -> list[Any]:
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return [[kind, str(torch.get_autocast_dtype(kind))] for kind in kinds]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)


def _size(value: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_in(value))


def _load(path: Path, device: torch.device) -> Any:
    """The entry of a file, None where it is damaged or gone: it is made again."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            told, names = file.metadata(), file.keys()
            value = tensors_file.unpack(json.loads(told["tree"]), {name: file.get_tensor(name) for name in names})
        places = iter(json.loads(told["devices"]))
        return _placed(value, lambda kind: device if kind == device.type else torch.device(kind), places)
    except (OSError, ValueError, KeyError, TypeError, StopIteration, SafetensorError):
        return None


def _placed(value: Any, where: Callable[[str], torch.device], places: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(where(next(places)))
    return type(value)(_placed(each, where, places) for each in value) if isinstance(value, tuple | list) else value
