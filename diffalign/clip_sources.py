"""Where CLIP-type models come from: the embedded one, folders and hub ids of two libraries, open_clip's tags."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffalign import registry, weights
from diffalign.errors import ConfigError, HubError, ModelError, UnknownName
from diffalign.vision import Preprocess

EMBEDDED = "shapes-clip"
INSTEAD = f"Give a local folder, or '{EMBEDDED}', the embedded model."
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_SETTINGS = ["*.json", "*.txt", "*.model"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model by the library that reads it, and what tells its weights from others."""

    library: Literal["open_clip", "transformers"] = "open_clip"
    name: str  # what the library calls it: an architecture, or a folder
    tag: str | None = None  # open_clip's pretrained tag; a folder has none
    quick_gelu: bool = False  # the activation the tag was trained with
    checkpoint: Path | None = None  # weights for an architecture of open_clip
    entry: str | None = None  # where the checkpoint nests its state dict
    version: str


def find_source(model: str, revision: str | None = None) -> Source:
    """The embedded model, a folder, `hf-hub:owner/name` or `owner/name`, or `architecture:tag` of open_clip."""
    folder = registry.embedded(model) if model == EMBEDDED else Path(model.removeprefix("local-dir:")).expanduser()
    here = model.startswith("local-dir:") or folder.is_dir()
    hub = not here and (model.startswith("hf-hub:") or "/" in model)
    if revision is not None and not hub:
        raise ConfigError(f"revision '{revision}' picks a commit on the hub, but '{model}' is no hub id. Leave it out.")
    if here:
        return _folder(folder)
    return _folder(_download(model.removeprefix("hf-hub:"), revision)) if hub else _named(model)


def checkpoint_source(architecture: str, path: Path, entry: str | None = None) -> Source:
    """An architecture of open_clip with the weights of a file."""
    _require_architecture(architecture)
    version = f"{architecture} {weights.digest(path)}"
    return Source(name=architecture, checkpoint=path, entry=entry, version=version)


def settings(file: Path) -> dict[str, Any]:
    """A settings file of a model; without one, nothing is set."""
    if not file.is_file():
        return {}
    return weights.read_settings(file)


def preprocess_of(model: Any) -> Preprocess:
    """What a model of open_clip says about its own input."""
    told = model.visual.preprocess_cfg
    size = told["size"]
    fit: Literal["shortest", "longest", "squash"] = told.get("resize_mode", "shortest")
    return Preprocess(
        size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        mean=tuple(told["mean"]),
        std=tuple(told["std"]),
        fit=fit,
        interpolation="bilinear" if told.get("interpolation") == "bilinear" else "bicubic",
        fill=told.get("fill_color", 0) / 255,
    )


def preprocess_of_folder(folder: Path, side: int) -> Preprocess:
    """What preprocessor_config.json asks for, in its old form (numbers) and its new one (named sides)."""
    told = settings(folder / "preprocessor_config.json")
    told = told or settings(folder / "processor_config.json").get("image_processor", {})
    size, crop = told.get("size", side), told.get("crop_size", side)
    squash = isinstance(size, dict) and "height" in size
    wanted = size if squash else crop
    short = size.get("shortest_edge") if isinstance(size, dict) else size
    frame = (wanted["height"], wanted["width"]) if isinstance(wanted, dict) else (wanted, wanted)
    resample = told.get("resample", 3)
    if resample not in (2, 3) or frame != (side, side) or (not squash and short != side):
        raise ConfigError(
            f"'{folder}' resizes to {size} with method {resample} and crops {crop}; we resize bilinear (2) or bicubic "
            f"(3), to the {side} pixels its model sees. Change its preprocessor_config.json."
        )
    return Preprocess(
        crop="down",
        size=frame,
        mean=tuple(told.get("image_mean", MEAN)) if told.get("do_normalize", True) else (0.0, 0.0, 0.0),
        std=tuple(told.get("image_std", STD)) if told.get("do_normalize", True) else (1.0, 1.0, 1.0),
        fit="squash" if squash else "shortest",
        interpolation="bilinear" if resample == 2 else "bicubic",
    )


def _folder(folder: Path) -> Source:
    """The library whose settings are there; where both are, as in LAION's repositories, whose weights are."""
    found = _weights_in(folder)
    kind = settings(folder / "config.json").get("model_type")
    own = settings(folder / "open_clip_config.json")
    if own and found and (kind != "clip" or any(name.startswith("open_clip") for name in found)):
        if "trust_remote_code" in json.dumps(own):
            raise ModelError(f"'{folder}' asks to run code of its own (trust_remote_code), so it is not loaded.")
        return Source(name=f"local-dir:{folder}", version=weights.digest(folder))
    if kind == "clip" and found:
        return Source(library="transformers", name=str(folder), version=weights.digest(folder))
    if kind and kind != "clip":
        raise ConfigError(f"'{folder}' holds a model of the type '{kind}', but this reward reads 'clip'. {INSTEAD}")
    raise ConfigError(
        f"'{folder}' is not a CLIP model: it needs open_clip_config.json (open_clip) or config.json (transformers) "
        f"and weights ({', '.join(weights.SAFE + weights.PICKLED)}). {INSTEAD}"
    )


def _weights_in(folder: Path) -> list[str]:
    suffixes = (*weights.SAFE, *weights.PICKLED)
    return [path.name for path in folder.iterdir() if path.suffix in suffixes] if folder.is_dir() else []


def _download(hub_id: str, revision: str | None) -> Path:
    """Settings first, then the smallest set of weights that serves them: safetensors before pickled ones."""
    weights.require_hub_id(hub_id, INSTEAD)
    folder = weights.fetch_folder(hub_id, _SETTINGS, revision, instead=INSTEAD)
    own = (folder / "open_clip_config.json").is_file()
    for pattern in ["open_clip*.safetensors", "open_clip*.bin"] * own + ["model*.safetensors", "pytorch_model*.bin"]:
        folder = weights.fetch_folder(hub_id, [*_SETTINGS, pattern], revision, instead=INSTEAD)
        if any(folder.glob(pattern)):
            return folder
    raise HubError(
        f"cannot fetch '{hub_id}': its settings are in '{folder}', but its weights are not there, and the hub "
        f"cannot be reached or has none. {INSTEAD}"
    )


def _named(model: str) -> Source:
    import open_clip

    name, _, tag = model.partition(":")
    _require_architecture(name)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise UnknownName.among(
            f"weights of '{name}'", tag, tags, f"diffalign score --reward clip with model: {name}:TAG"
        )
    told = open_clip.pretrained.get_pretrained_cfg(name, tag)
    return Source(name=name, tag=tag, quick_gelu=bool(told.get("quick_gelu")), version=f"{name}:{tag}")


def _require_architecture(name: str) -> None:
    import open_clip

    if name not in open_clip.list_models():
        raise UnknownName.among("CLIP model", name, [EMBEDDED, *open_clip.list_models()], "diffalign ls rewards")
