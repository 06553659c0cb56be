"""CLIP-type models as two differentiable encoders: the embedded one, any open_clip checkpoint, a hub id or a folder."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign import registry
from diffalign.errors import ConfigError, HubError, ModelError, UnknownName
from diffalign.vision import Preprocess

EMBEDDED = "shapes-clip"
_INSTEAD = f"Give a local folder, or leave `model` out to use the embedded '{EMBEDDED}'."


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where open_clip finds a model, and what tells its weights from others."""

    name: str  # what open_clip calls it
    tag: str | None = None  # its pretrained tag; a folder has none
    quick_gelu: bool = False  # the activation the tag was trained with
    version: str


class ClipTower:
    """Unit embeddings of pictures and prompts; frozen, loaded at the first use, moved to where the pictures are."""

    def __init__(self, model: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.revision, self.dtype = model, revision, dtype
        self.truncated = 0  # prompts that were longer than the model reads
        self._texts: dict[tuple[str, torch.device], Tensor] = {}

    @cached_property
    def source(self) -> Source:
        return find_source(self.model, self.revision)

    def images(self, media: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) float32 of length 1; the gradient reaches the pixels."""
        tower = self._tower.to(media.device)
        with torch.autocast(media.device.type, enabled=False):
            features = tower.encode_image(self._preprocess(media.float()).to(self.dtype))
        return F.normalize(features.float(), dim=-1)

    def texts(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """B prompts -> (B, D) float32 of length 1; each is encoded once."""
        new = [p for p in dict.fromkeys(prompts) if (p, device) not in self._texts]
        if len(self._texts) + len(new) > 4096:
            self._texts.clear()
            new = list(dict.fromkeys(prompts))
        if new:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                features = self._tower.to(device).encode_text(self._tokens(new).to(device))
                for prompt, feature in zip(new, F.normalize(features.float(), dim=-1), strict=True):
                    self._texts[prompt, device] = feature
        return torch.stack([self._texts[p, device] for p in prompts])

    @cached_property
    def _tower(self) -> Any:
        return load(self.source, self.dtype)

    @cached_property
    def _preprocess(self) -> Preprocess:
        return preprocess_of(self._tower)

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        return open_clip.get_tokenizer(self.source.name)

    def _tokens(self, prompts: list[str]) -> Tensor:
        tokens: Tensor = self._tokenizer(prompts)
        length = tokens.shape[1]
        padding = self._tokenizer([""])[0, -1]
        cut = (self._tokenizer(prompts, context_length=2 * length)[:, length:] != padding).any(1)
        if cut.any():
            self.truncated += int(cut.sum())
            first = prompts[int(cut.nonzero()[0])]
            warnings.warn(
                f"'{self.model}' reads {length} tokens, so the end of {int(cut.sum())} of {len(prompts)} prompts "
                f"does not count ({self.truncated} so far), first: '{first[:60]}...'",
                stacklevel=2,
            )
        return tokens


def find_source(model: str, revision: str | None) -> Source:
    """The embedded model, a folder, `hf-hub:owner/name` or `owner/name`, or `architecture:tag` of open_clip."""
    if model == EMBEDDED:
        return _folder(registry.embedded(model))
    folder = Path(model.removeprefix("local-dir:")).expanduser()
    if model.startswith("local-dir:") or folder.is_dir():
        return _folder(folder)
    if model.startswith("hf-hub:") or "/" in model:
        return _folder(_download(model.removeprefix("hf-hub:"), revision))
    return _named(model)


def load(source: Source, dtype: torch.dtype) -> torch.nn.Module:
    """The frozen model in eval mode; the caller's random state and grad mode stay as they are."""
    import open_clip

    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            model: torch.nn.Module = open_clip.create_model(
                source.name, source.tag, force_quick_gelu=source.quick_gelu, require_pretrained=True
            )
    except Exception as e:
        reason = str(e).partition("\n")[0]
        if "download" in reason:
            raise HubError(f"cannot fetch the CLIP weights '{source.name}:{source.tag}': {reason}. {_INSTEAD}") from e
        raise ModelError(f"open_clip cannot load '{source.name}': {reason}. {_INSTEAD}") from e
    return model.requires_grad_(False).eval().to(dtype)


def preprocess_of(model: Any) -> Preprocess:
    """What the checkpoint says about its own input."""
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


def _folder(folder: Path) -> Source:
    settings = folder / "open_clip_config.json"
    weights = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    if not settings.is_file() or not weights:
        raise ConfigError(
            f"'{folder}' is not an open_clip model: it needs open_clip_config.json and .safetensors. {_INSTEAD}"
        )
    digest = hashlib.sha256()
    for path in (settings, *weights):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return Source(name=f"local-dir:{folder}", version=digest.hexdigest()[:16])


def _named(model: str) -> Source:
    import open_clip

    name, _, tag = model.partition(":")
    if name not in open_clip.list_models():
        raise UnknownName.among("CLIP model", name, [EMBEDDED, *open_clip.list_models()], "diffalign ls rewards")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise UnknownName.among(
            f"weights of '{name}'", tag, tags, f"diffalign score --reward clip with model: {name}:TAG"
        )
    told = open_clip.pretrained.get_pretrained_cfg(name, tag)
    return Source(name=name, tag=tag, quick_gelu=bool(told.get("quick_gelu")), version=f"{name}:{tag}")


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.txt", "*.model"]
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*small, "open_clip*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*small, "open_clip*.bin"]))
        return folder
    except Exception as e:
        reason = f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"
        offline = type(e).__name__ in (
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
            "ConnectError",
            "ConnectionError",
        )
        why = f"there is no network here, and it is not in the local cache ({reason})" if offline else reason
        raise HubError(f"cannot fetch the CLIP model '{hub_id}' from the hub: {why}. {_INSTEAD}") from e
