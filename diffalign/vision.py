"""Pictures to tensors and back, and the differentiable preprocessing that image towers share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

OVERSHOOT = (
    1e-3  # bicubic edges are cut this far outside [0, 1]: a clamp at exactly 0 and 1 stops gradients of plain areas
)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """What a tower wants to see, applied to (B, 3, H, W) in [0, 1] with gradients."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Literal["shortest", "longest", "squash"] = "shortest"  # crop the rest, pad the rest, or ignore the aspect
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fill: float = 0.0  # of the padding, before normalising

    def __call__(self, media: Tensor) -> Tensor:
        if self.fit == "squash":
            fitted = resize(media, self.size, self.interpolation)
        elif self.fit == "longest":
            fitted = pad_to(resize_long_side(media, self.size, self.interpolation), self.size, self.fill)
        else:
            fitted = centre_crop(resize_short_side(media, self.size, self.interpolation), self.size)
        return normalise(fitted, self.mean, self.std)


def resize(media: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """With antialias, as PIL resizes: (B, C, H, W) -> (B, C, *size)."""
    if tuple(media.shape[-2:]) == size:
        return media
    resized = F.interpolate(media, size=size, mode=interpolation, antialias=True, align_corners=False)
    return resized.clamp(-OVERSHOOT, 1 + OVERSHOOT)


def resize_short_side(media: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """The smallest picture of the same aspect that covers `size`."""
    ratio = max(size[0] / media.shape[-2], size[1] / media.shape[-1])
    covering = [max(want, int(side * ratio)) for want, side in zip(size, media.shape[-2:], strict=True)]
    return resize(media, (covering[0], covering[1]), interpolation)


def resize_long_side(media: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """The largest picture of the same aspect that fits into `size`."""
    ratio = min(size[0] / media.shape[-2], size[1] / media.shape[-1])
    fitting = [min(want, max(1, round(side * ratio))) for want, side in zip(size, media.shape[-2:], strict=True)]
    return resize(media, (fitting[0], fitting[1]), interpolation)


def centre_crop(media: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle `size` of a picture at least that large."""
    height, width = media.shape[-2:]
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
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
