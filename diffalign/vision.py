"""Pictures to tensors and back, and the differentiable preprocessing that image towers share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

ROUNDED = "path: reference rounds pixels to 8 bits; use auto or tensor"  # why it has no gradient
OVERSHOOT = (
    1e-3  # bicubic edges are cut this far outside [0, 1]: a clamp at exactly 0 and 1 stops gradients of plain areas
)
LUMA = (0.299, 0.587, 0.114)  # what red, green and blue weigh in brightness


Route = Literal["auto", "reference", "tensor"]
Resize = Callable[[Tensor, tuple[int, int], str], Tensor]


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """What a tower wants to see, made of (B, 3, H, W) in [0, 1].

    The path "reference" rounds to 8 bits and resizes as the published preprocessing does: reported scores take it.
    The path "tensor" passes gradients and rounds nothing. "auto" is the first, or the second for a gradient.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Literal["shortest", "longest", "squash"] = "shortest"  # crop the rest, pad the rest, or ignore the aspect
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fill: float = 0.0  # of the padding, before normalising
    path: Route = "auto"
    published: Literal["pil", "torch"] = "pil"  # what the reference path resizes with
    crop: Literal["even", "down"] = "even"  # half a pixel beside the middle: torchvision's way, or that of transformers

    def __call__(self, media: Tensor) -> Tensor:
        graded = media.requires_grad and torch.is_grad_enabled()
        if self.path == "tensor" or (self.path == "auto" and graded):
            fitted = self._fitted(media, resize if self.published == "pil" else resize_freely)
        else:
            fitted = self._fitted(quantise(media), resize_as_pil if self.published == "pil" else resize_freely)
        return normalise(fitted, self.mean, self.std)

    def _fitted(self, media: Tensor, resized: Resize) -> Tensor:
        if self.fit == "squash":
            return resized(media, self.size, self.interpolation)
        if self.fit == "longest":
            return pad_to(resize_long_side(media, self.size, self.interpolation, resized), self.size, self.fill)
        covering = resize_short_side(without_ends(media), self.size, self.interpolation, resized)
        return centre_crop(covering, self.size, down=self.crop == "down")


def resize(media: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """With antialias, as PIL resizes: (B, C, H, W) -> (B, C, *size)."""
    resized = resize_freely(media, size, interpolation)
    return media if resized is media else resized.clamp(-OVERSHOOT, 1 + OVERSHOOT)


def resize_freely(media: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """As `resize`, but bicubic overshoot stays: what torchvision does to float tensors."""
    if tuple(media.shape[-2:]) == size:
        return media
    return F.interpolate(media, size=size, mode=interpolation, antialias=True, align_corners=False)


def resize_as_pil(media: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """Through PIL on 8-bit pixels, without a gradient; a picture that is not finite comes back as NaN."""
    from PIL import Image

    if tuple(media.shape[-2:]) == size:
        return media
    method = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    pictures = to_pil(media)
    with ThreadPoolExecutor(min(len(pictures), os.cpu_count() or 1)) as pool:  # PIL resizes outside the global lock
        resized = to_tensor(pool.map(lambda p: p.resize((size[1], size[0]), method), pictures)).to(media.device)
    sound = media.isfinite().flatten(1).all(1)
    return resized.where(sound[:, None, None, None], torch.nan)


def quantise(media: Tensor) -> Tensor:
    """The nearest 8-bit level of each value, as a saved picture has it; NaN stays NaN."""
    return (media.detach().float().clamp(0, 1) * 255).round() / 255


def resize_short_side(
    media: Tensor, size: tuple[int, int], interpolation: str = "bicubic", resized: Resize = resize
) -> Tensor:
    """The smallest picture of the same aspect that covers `size`."""
    height, width = media.shape[-2:]
    if size[0] * width >= size[1] * height:
        covering = size[0], max(size[1], width * size[0] // height)
    else:
        covering = max(size[0], height * size[1] // width), size[1]
    return resized(media, covering, interpolation)


def without_ends(media: Tensor, keep: int = 32) -> Tensor:
    """A very long picture without the ends that no centre crop shows: in whole short sides, so that nothing shifts."""
    height, width = media.shape[-2:]
    short = max(1, min(height, width))
    away = max(0, (max(height, width) // short - keep) // 2) * short
    if not away:
        return media
    return media[..., away:-away, :] if height > width else media[..., away:-away]


def resize_long_side(
    media: Tensor, size: tuple[int, int], interpolation: str = "bicubic", resized: Resize = resize
) -> Tensor:
    """The largest picture of the same aspect that fits into `size`."""
    ratio = min(size[0] / media.shape[-2], size[1] / media.shape[-1])
    fitting = [min(want, max(1, round(side * ratio))) for want, side in zip(size, media.shape[-2:], strict=True)]
    return resized(media, (fitting[0], fitting[1]), interpolation)


def centre_crop(media: Tensor, size: tuple[int, int], *, down: bool = False) -> Tensor:
    """The middle `size` of a picture at least that large; half a pixel goes to an even number, or `down`."""
    spare = [side - kept for side, kept in zip(media.shape[-2:], size, strict=True)]
    top, left = (more // 2 if down else round(more / 2) for more in spare)
    return media[..., top : top + size[0], left : left + size[1]]


def pad_to(media: Tensor, size: tuple[int, int], value: float = 0.0) -> Tensor:
    """A picture at most that large in the middle of `size`, surrounded by `value`."""
    rows, columns = size[0] - media.shape[-2], size[1] - media.shape[-1]
    return F.pad(media, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), value=value)


def normalise(media: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(media - mean) / std per channel."""
    return (media - media.new_tensor(mean)[:, None, None]) / media.new_tensor(std)[:, None, None]


def to_tensor(images: Image.Image | Iterable[Image.Image]) -> Tensor:
    """Pictures of one size as (B, 3, H, W) in [0, 1]; transparent pixels show white."""
    from PIL import Image

    found = [images] if isinstance(images, Image.Image) else list(images)
    if sizes := {image.size for image in found} - {found[0].size}:
        raise MediaError(
            f"pictures of sizes {found[0].size} and {sizes.pop()} do not fit one batch. Give them one size."
        )
    return torch.stack([torch.from_numpy(_array(image)) for image in found]).permute(0, 3, 1, 2).contiguous()


def to_pil(media: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] as 8-bit pictures, rounded to the nearest level; NaN becomes black."""
    from PIL import Image

    if media.ndim != 4 or media.shape[1] != 3:
        raise ConfigError(f"media has shape {tuple(media.shape)}, but pictures are (B, 3, H, W).")
    levels = (media.detach().float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(level) for level in levels.permute(0, 2, 3, 1).cpu().numpy()]


def read_image(path: str | Path) -> Image.Image:
    """A picture file as RGB, turned as its EXIF data says; MediaError names a file that cannot be read in full."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            opened.load()
            return _rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError as e:
        raise MediaError(f"there is no image '{path}'. Check the path.") from e
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as e:
        raise MediaError(
            f"cannot read the image '{path}': {type(e).__name__}: {e}. "
            "It is truncated, empty or not an image; save it again as PNG."
        ) from e


def read_images(paths: Iterable[str | Path]) -> list[Tensor]:
    """Each picture as (1, 3, H, W) in [0, 1], at its own size."""
    return [to_tensor(read_image(path)) for path in paths]


def _array(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(_rgb(image), dtype=np.float32) / np.float32(255)


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I;16"):  # PIL would cut 16-bit values at 255
        return Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
