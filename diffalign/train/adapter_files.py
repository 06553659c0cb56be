"""Trained weights as files that stock pipelines load: LoRA in the diffusers format, whole components as shards.

| what is trained | written by | loaded by |
|---|---|---|
| LoRA of a component the pipeline class saves | `pipe.save_lora_weights` | `pipe.load_lora_weights(folder)` |
| LoRA of its numbered sibling (a second expert) | the same, into a folder | `denoiser.load_lora_adapter(folder, ...)` |
| LoRA where the pipeline class saves none | the same format | `denoiser.load_lora_adapter(folder, ...)` |
| LoRA of a denoiser that knows no adapters | peft's format | `PeftModel.from_pretrained(denoiser, folder)` |
| all weights | `denoiser.save_pretrained` | `type(denoiser).from_pretrained(folder)` |

`adapter.json` beside them says which row holds for each component, so that `load` needs no guess.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.atomic import write_json
from diffalign.errors import ModelError, OutputError
from diffalign.train.ema import whole
from diffalign.train.tensors_file import sync

NOTE = "adapter.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # the key of a safetensors header under which diffusers keeps LoRA settings


@dataclass(frozen=True)
class Place:
    """Where one component's weights lie in the folder, and how a stock pipeline takes them."""

    by: str  # save_lora_weights | load_lora_adapter | peft | from_pretrained
    folder: str = ""  # below the saved folder
    prefix: str = ""  # of the names in the file

    def line(self, component: str, folder: str) -> str:
        """The Python line that loads it into a stock pipeline."""
        own = Path(folder, self.folder)
        if self.by == "save_lora_weights":
            return f"pipe.load_lora_weights('{folder}')"
        if self.by == "load_lora_adapter":
            return f"pipe.{component}.load_lora_adapter('{own}', weight_name='{LORA_FILE}', prefix='{self.prefix}')"
        if self.by == "peft":
            return f"peft.PeftModel.from_pretrained(pipe.{component}, '{own}')"
        return f"pipe.{component} = type(pipe.{component}).from_pretrained('{own}')"


def lora_places(pipe: Any, denoisers: Mapping[str, nn.Module]) -> dict[str, Place]:
    """How the LoRA of each component can be kept so that stock code loads it."""
    places = {}
    for name, module in denoisers.items():
        below = name if len(denoisers) > 1 else ""
        sibling = re.sub(r"_\d+$", "", name)
        if not hasattr(module, "load_lora_adapter"):
            places[name] = Place("peft", below)
        elif _saves(pipe, name):
            places[name] = Place("save_lora_weights", "", name)
        elif _saves(pipe, sibling):
            places[name] = Place("load_lora_adapter", name, sibling)
        else:
            places[name] = Place("load_lora_adapter", below, name)
    return places


def save_lora(pipe: Any, places: Mapping[str, Place], weights: Mapping[str, dict[str, Tensor]], folder: Path) -> None:
    """Write each component's LoRA at its place below `folder`; `weights` are by component, then by name."""
    together: dict[str, Any] = {}
    for name, place in places.items():
        module, target = getattr(pipe, name), folder / place.folder
        told = _settings(module.peft_config["diffalign"])
        target.mkdir(exist_ok=True)
        if place.by == "save_lora_weights":
            together |= {f"{name}_lora_layers": weights[name], f"{name}_lora_adapter_metadata": told}
        elif place.by == "load_lora_adapter":
            _write(target / LORA_FILE, _below(place.prefix, weights[name]), _below(place.prefix, told))
        else:
            _write(target / "adapter_model.safetensors", _below("base_model.model", weights[name]), None)
            write_json(target / "adapter_config.json", told)
    if together:
        pipe.save_lora_weights(str(folder), **together)


def save_full(modules: Mapping[str, Any], places: Mapping[str, Place], folder: Path, dtype: torch.dtype) -> None:
    """Write each component in the diffusers layout, its floating-point weights in `dtype`."""
    for name, place in places.items():
        module = modules[name]
        kept = {t: t.data for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()}
        try:
            for tensor in kept:
                tensor.data = tensor.data.to(dtype)
            module.save_pretrained(str(folder / place.folder), safe_serialization=True)
        finally:
            for tensor, data in kept.items():
                tensor.data = data


def whole_module(module: Any) -> Any:
    """The module itself, or where it is sharded a whole copy on the CPU, for which every process must ask."""
    if not any(hasattr(parameter, "device_mesh") for parameter in module.parameters()):
        return module
    from torch.distributed.fsdp import FSDPModule

    state = {name: whole(tensor).cpu() for name, tensor in module.state_dict().items()}
    stock: Any = next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))
    copy = stock.from_config(dict(module.config))
    copy.load_state_dict(state, assign=True)
    return copy


def load(pipe: Any, folder: str | Path, name: str = "loaded") -> None:
    """Put what `Trained.save` wrote into a pipeline, for use: a LoRA becomes the adapter called `name`."""
    folder = Path(folder)
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        places = {component: Place(**place) for component, place in note["components"].items()}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ModelError(f"cannot read '{folder / NOTE}': {e}. Give the folder that a training saved.") from e
    for component in places:
        if not isinstance(getattr(pipe, component, None), nn.Module):
            raise ModelError(
                f"'{folder}' holds weights of '{component}', which {type(pipe).__name__} does not have. "
                f"They were trained in a {note.get('pipeline')}."
            )
    try:
        if any(place.by == "save_lora_weights" for place in places.values()):
            pipe.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name=name)
        for component, place in places.items():
            _load_component(getattr(pipe, component), place, folder, name)
    except (RuntimeError, ValueError, OSError) as e:
        raise ModelError(f"'{folder}' does not fit this {type(pipe).__name__}: {e}") from e


def write_note(pipe: Any, places: Mapping[str, Place], folder: Path, shown: str, settings: Mapping[str, Any]) -> None:
    """Say beside the weights what they are and how stock code loads them."""
    lines = list(dict.fromkeys(place.line(name, shown) for name, place in places.items()))
    components = {name: asdict(place) for name, place in places.items()}
    told = {"pipeline": type(pipe).__name__, "components": components, "load": lines, "settings": dict(settings)}
    write_json(folder / NOTE, told)


@contextmanager
def whole_folder(folder: str | Path, note: str = NOTE) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` once the block ends well, and is gone if it does not.

    An older one is replaced only where it has the `note` that such folders have.
    """
    from safetensors import SafetensorError

    target = Path(os.path.abspath(folder))
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / note).is_file()):
        raise OutputError(
            f"'{folder}' holds other files, and saving here would replace them. Name a folder of its own."
        )
    part, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for file in filter(Path.is_file, part.rglob("*")):
            if file.suffix == ".safetensors":
                _order_header(file)
            sync(file)
        _exchange(part, target, old)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise OutputError(f"cannot write '{folder}': {reason}. What stood there before is as it was.") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _exchange(part: Path, target: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    stood = target.exists()
    if stood:
        target.rename(old)
    try:
        part.rename(target)
    except OSError:
        if stood:
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _order_header(file: Path) -> None:
    """Sort the entries about the file, which safetensors writes in random order: equal trainings, equal files."""
    with open(file, "r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(ordered) == length:
            handle.seek(8)
            handle.write(ordered)


def _saves(pipe: Any, name: str) -> bool:
    """Whether the pipeline class saves this component's LoRA together with its settings."""
    known = inspect.signature(pipe.save_lora_weights).parameters if hasattr(pipe, "save_lora_weights") else {}
    return {f"{name}_lora_layers", f"{name}_lora_adapter_metadata"} <= set(known)


def _settings(config: Any) -> dict[str, Any]:
    """peft's settings as JSON takes them, sets in order so that equal trainings write equal files."""
    told = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    plain: dict[str, Any] = json.loads(json.dumps(told))
    return plain


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _write(path: Path, weights: dict[str, Tensor], settings: dict[str, Any] | None) -> None:
    from safetensors.torch import save_file

    told = {METADATA: json.dumps(settings, indent=2, sort_keys=True)} if settings else {}
    save_file(weights, str(path), metadata={"format": "pt"} | told)


def _load_component(module: Any, place: Place, folder: Path, name: str) -> None:
    own = folder / place.folder  # named whole: with `subfolder=` diffusers looks for the file above it first
    if place.by == "load_lora_adapter":
        module.load_lora_adapter(str(own), prefix=place.prefix, weight_name=LORA_FILE, adapter_name=name)
    elif place.by == "peft":
        from peft import PeftModel

        PeftModel.from_pretrained(module, str(own), adapter_name=name)
    elif place.by == "from_pretrained":
        module.load_state_dict(type(module).from_pretrained(str(own)).state_dict())
