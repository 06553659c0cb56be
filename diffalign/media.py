"""Pixels in the shapes people hold them: tensors in [0, 1], arrays, PIL images, lists of frames, pipeline outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffalign import vision
from diffalign.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from PIL import Image

FIELDS = ("images", "frames", "videos", "video")  # where pipelines put what they made


def to_tensor(found: Any) -> Tensor:
    """Images -> (B, 3, H, W), videos -> (B, F, 3, H, W), whatever they are held in, in [0, 1]."""
    if isinstance(found, Tensor):
        return found
    if isinstance(found, np.ndarray):
        return torch.from_numpy(found).movedim(-1, -3)
    if isinstance(found, list | tuple) and found:
        if isinstance(found[0], Tensor | np.ndarray | list | tuple):
            return torch.stack([to_tensor(part) for part in found])
        return vision.to_tensor(found)
    raise ModelError(f"cannot read {type(found).__name__} as images. Ask the pipeline for output_type='pt'.")


def convert(pixels: Tensor, output_type: str) -> Any:
    """Media (B, 3, H, W) or (B, F, 3, H, W) as a pipeline's own processor gives it: 'pt', 'np' or 'pil'."""
    from diffusers.image_processor import VaeImageProcessor

    if output_type == "pt":
        return pixels
    if output_type not in ("np", "pil"):
        raise ConfigError(f"output_type is '{output_type}', but images come as 'pil', 'np' or 'pt'.")
    if pixels.ndim == 5:
        videos = [convert(video, output_type) for video in pixels]
        return np.stack(videos) if output_type == "np" else videos
    array = VaeImageProcessor.pt_to_numpy(pixels)
    return array if output_type == "np" else VaeImageProcessor.numpy_to_pil(array)


def to_pil(pixels: Tensor) -> Image.Image:
    """One image (3, H, W) as PIL."""
    return vision.to_pil(pixels[None])[0]


def require_finite(pixels: Tensor, who: str) -> None:
    """Refuse NaN or infinite pixels in the name of the model that made them."""
    broken = (~torch.isfinite(pixels)).flatten(1).any(dim=1)
    if broken.any():
        raise not_finite(who, int(broken.sum()), f"{len(pixels)} images")


def not_finite(who: str, broken: int, images: str) -> ModelError:
    """The error for a model that made `broken` of some images with NaN or infinite pixels."""
    return ModelError(
        f"{who} produced NaN or infinite pixels in {broken} of {images}. "
        "Half precision often overflows: try dtype float32 or bfloat16, or a lower guidance scale."
    )


def pictures(given: Any, rows: int) -> list[Image.Image | None]:
    """The picture that belongs to each row of a call: one for all, or one for each."""
    if given is None:
        return [None] * rows
    if isinstance(given, Tensor | np.ndarray):
        batch = _shown(given)
        each: list[Any] = [_plain(p) for p in (batch if batch.ndim == 4 else batch[None])]
    else:
        each = list(given) if isinstance(given, list | tuple) else [given]
    if len(each) != rows:
        each = [each[0]] * rows  # several pictures for one prompt: the first is the one being edited
    return [_one(picture) for picture in each]


def _one(picture: Any) -> Image.Image | None:
    if isinstance(picture, list | tuple):
        return _one(picture[0]) if picture else None
    if isinstance(picture, Tensor | np.ndarray):
        batch = _shown(picture)
        return _plain(batch if batch.ndim == 3 else batch[0])
    return picture  # type: ignore[no-any-return]


def _shown(picture: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """As a tensor with its channels first, 8-bit levels as shares; height and width alone are a grey picture."""
    if picture.ndim == 2:
        picture = picture[..., None] if isinstance(picture, np.ndarray) else picture[None]
    pixels = to_tensor(picture)
    return pixels / 255 if pixels.dtype == torch.uint8 else pixels


def _plain(pixels: Tensor) -> Image.Image | None:
    """Pixels in [0, 1] or [-1, 1] as PIL, as diffusers accepts both; None for latents, which show nothing."""
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        return None
    return to_pil((pixels / 2 + 0.5 if pixels.min() < 0 else pixels).float().expand(3, -1, -1))


def open_output(output: Any) -> tuple[dict[Any, Any], Any]:
    """The fields of a pipeline's output, a tuple counting as numbered fields, and the key under which its media lie."""
    if isinstance(output, tuple):
        return dict(enumerate(output)), 0
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
        for name in FIELDS:
            if name in fields:
                return fields, name
        raise ModelError(f"{type(output).__name__} has none of the fields {', '.join(FIELDS)}: {', '.join(fields)}.")
    raise ModelError(f"the pipeline returned {type(output).__name__}, which holds no images we can find.")


def close_output(output: Any, fields: dict[Any, Any]) -> Any:
    """An output of the same type with other fields."""
    return tuple(fields.values()) if isinstance(output, tuple) else type(output)(**fields)


def rows_of(value: Any, rows: int) -> list[Any] | None:
    """A field split into its rows, or None when it does not have one entry per row."""
    splits = isinstance(value, Tensor | np.ndarray | list) and len(value) == rows
    return list(value) if splits else None


def join_rows(values: Sequence[Any]) -> Any:
    """Rows put back together the way `rows_of` found them."""
    if isinstance(values[0], Tensor):
        return torch.stack(list(values))
    return np.stack(values) if isinstance(values[0], np.ndarray) else list(values)


class LastLatents:
    """Notes the latents a stock call ends with, through its step callback; the caller's own callback still runs."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.theirs = arguments.get("callback_on_step_end")
        self.names = list(arguments.get("callback_on_step_end_tensor_inputs") or ["latents"])
        self.latents: Tensor | None = None
        watched = [*self.names, "latents"] if "latents" not in self.names else self.names
        self.arguments = {"callback_on_step_end": self, "callback_on_step_end_tensor_inputs": watched}

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        mine = tensors["latents"]
        shown = {name: tensors[name] for name in self.names if name in tensors}
        changed: dict[str, Any] = (self.theirs(pipe, step, timestep, shown) if self.theirs else None) or {}
        self.latents = changed.get("latents", mine)
        return changed

    def found(self, who: str) -> Tensor:
        if self.latents is None:
            raise ModelError(
                f"{who} shows no latents to a callback, so there is nothing to score. Use output_type='pt'."
            )
        return self.latents
