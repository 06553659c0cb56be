"""Closeness to a given picture: `psnr`, `ssim`, `patch_similarity`.

Zhou Wang et al.: "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE Transactions on Image
Processing 13 (4), 2004: a Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, whole windows only.
Patch similarity is the bidirectional max-average similarity of Mixed-R1 (arXiv 2505.24164) on patches instead of words.

Where we differ:
- PSNR stops at `ceiling` dB: equal pictures would be infinite. SSIM is the mean over the colour channels unless `grey`.
- With `mask` (a metadata key: white, or above one half, is where the edit is) only what lies wholly outside it counts:
  pixels, windows and patches alike.
- A patch is its pixels in [-1, 1] and one constant of the same weight: plain patches have a direction too, and only
  equal patches have a cosine of 1. Features of DINO or CLIP would see content rather than pixels.
- A reference of another size is refused, since resizing costs sharpness that the score would blame on the picture;
  `resize` accepts that. A row without its reference or mask, or with nothing outside the mask, is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign import vision
from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.registry import register_reward
from diffalign.rules.text import bmas
from diffalign.scoring import Score

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
Against = Literal["reference", "source"]


class _Compared:
    """What the three share: finding each row's reference and mask, and leaving out the rows that lack one."""

    version = "1"

    def __init__(self, against: Against, resize: bool, mask: str | None) -> None:
        self.against, self.resize, self.mask = against, resize, mask
        self.options: dict[str, Any] = {"against": against, "resize": resize, "mask": mask}
        self.reads = (against, mask) if mask else (against,)

    def compared(self, media: Tensor, wanted: Tensor, counts: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) against (B, 3, H, W) where counts (B, 1, H, W) -> (B,)."""
        raise NotImplementedError

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        found = [self._given(case, media) for case in cases]
        known = [k for k, pair in enumerate(found) if pair is not None]
        mask = torch.zeros(len(cases), dtype=torch.bool, device=media.device)
        mask[known] = True
        if not known:
            return Score(media.new_full((len(cases),), torch.nan))
        wanted, counts = (torch.stack(side) for side in zip(*(pair for pair in found if pair), strict=True))
        return Score(self.compared(media[known].float(), wanted, counts)).spread(mask)

    def _given(self, case: Case, media: Tensor) -> tuple[Tensor, Tensor] | None:
        """The reference (3, H, W) and what counts of it (1, H, W), or None where the case lacks one of them."""
        image, size = getattr(case, self.against), (media.shape[-2], media.shape[-1])
        if image is None or (self.mask and case.metadata.get(self.mask) is None):
            return None
        wanted = vision.to_tensor(image).to(media.device)
        if wanted.shape[-2:] != size and not self.resize:
            raise ConfigError(
                f"a picture is {size[1]} x {size[0]} and its {self.against} {image.width} x {image.height}, so pixels "
                f"do not correspond. Give a {self.against} of that size, or accept some loss of sharpness: resize=true."
            )
        wanted = vision.resize(wanted, size)[0].clamp(0, 1)
        edited = _mask(case.metadata[self.mask], size) if self.mask else torch.zeros(1, *size)
        return wanted, (edited <= 0.5).to(wanted)


@register_reward("psnr", differentiable=True, range=(0.0, 100.0))
class PSNR(_Compared):
    """Decibels of peak over mean squared error, at most `ceiling`."""

    def __init__(
        self, against: Against = "reference", resize: bool = False, mask: str | None = None, ceiling: float = 100.0
    ) -> None:
        super().__init__(against, resize, mask)
        self.ceiling, self.range = ceiling, (0.0, ceiling)
        self.options["ceiling"] = ceiling

    def compared(self, media: Tensor, wanted: Tensor, counts: Tensor) -> Tensor:
        error = _mean_where((media - wanted) ** 2, counts)
        return -10 * error.clamp(min=10 ** (-self.ceiling / 10)).log10()


@register_reward("ssim", differentiable=True, range=(-1.0, 1.0))
class SSIM(_Compared):
    """Structural similarity, 1 for equal pictures."""

    def __init__(
        self, against: Against = "reference", resize: bool = False, mask: str | None = None, grey: bool = False
    ) -> None:
        super().__init__(against, resize, mask)
        self.grey = grey
        self.options["grey"] = grey

    def compared(self, media: Tensor, wanted: Tensor, counts: Tensor) -> Tensor:
        if min(media.shape[-2:]) < WINDOW:
            raise ConfigError(
                f"ssim looks through a window of {WINDOW} pixels, and the picture is {media.shape[-1]} x "
                f"{media.shape[-2]}. Use psnr for pictures this small."
            )
        if self.grey:
            luma = media.new_tensor(vision.LUMA).view(1, 3, 1, 1)
            media, wanted = (media * luma).sum(1, keepdim=True), (wanted * luma).sum(1, keepdim=True)
        whole = 1 - F.max_pool2d(1 - counts, WINDOW, stride=1)  # windows that touch no edited pixel
        return _mean_where(_ssim_map(media, wanted), whole)


@register_reward("patch_similarity", differentiable=True, range=(0.0, 1.0))
class PatchSimilarity(_Compared):
    """How well each patch of one picture is found anywhere in the other, both ways; 1 for the same set of patches."""

    def __init__(
        self,
        against: Against = "reference",
        resize: bool = False,
        mask: str | None = None,
        patch: int = 16,
        mean: Literal["arithmetic", "harmonic"] = "arithmetic",
    ) -> None:
        super().__init__(against, resize, mask)
        if patch < 1:
            raise ConfigError(f"patch_similarity.patch is {patch}, but a patch has at least 1 pixel.")
        self.patch, self.mean = patch, mean
        self.options |= {"patch": patch, "mean": mean}

    def compared(self, media: Tensor, wanted: Tensor, counts: Tensor) -> Tensor:
        ours, theirs = self._patches(media), self._patches(wanted)
        whole = F.unfold(self._padded(counts), self.patch, stride=self.patch).amin(1) > 0  # (B, N)
        rows = [bmas(a[keep], b[keep], self.mean) for a, b, keep in zip(ours, theirs, whole, strict=True)]
        return torch.stack(rows)  # one picture at a time: N x N cosines are large

    def _patches(self, media: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D): pixels in [-1, 1] with a mean square of at most 1, then the constant 1."""
        pixels = F.unfold(self._padded(media) * 2 - 1, self.patch, stride=self.patch).transpose(1, 2)
        return F.pad(pixels / pixels.shape[-1] ** 0.5, (0, 1), value=1.0)

    def _padded(self, media: Tensor) -> Tensor:
        """Up to whole patches by repeating the last row and column."""
        rows, columns = (-side % self.patch for side in media.shape[-2:])
        return F.pad(media, (0, columns, 0, rows), mode="replicate")


def _ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """The index of every whole window: two of (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    steps = torch.arange(WINDOW, device=a.device, dtype=a.dtype) - WINDOW // 2
    line = (-(steps**2) / (2 * SIGMA**2)).exp()
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        planes = x.flatten(0, 1)[:, None]
        blurred = F.conv2d(F.conv2d(planes, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
        return blurred.view(*x.shape[:2], *blurred.shape[2:])

    shift = ((a + b) / 2).mean((2, 3), keepdim=True).detach()  # variances do not see it, and float32 cancels less
    a, b = a - shift, b - shift
    mean_a, mean_b = blur(a), blur(b)
    spread = blur(a * a) + blur(b * b) - (mean_a**2 + mean_b**2)
    shared = blur(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + shift, mean_b + shift
    return (2 * mean_a * mean_b + C1) * (2 * shared + C2) / ((mean_a**2 + mean_b**2 + C1) * (spread + C2))


def _mean_where(values: Tensor, counts: Tensor) -> Tensor:
    """The mean of values (B, C, H, W) over the pixels that count (B, 1, H, W) -> (B,); NaN where none does."""
    number = counts.sum((1, 2, 3))
    mean = (values * counts).mean(1).sum((1, 2)) / number.clamp(min=1)  # 0 / 0 would reach the gradient of other rows
    return torch.where(number > 0, mean, torch.nan)


def _mask(given: Any, size: tuple[int, int]) -> Tensor:
    """A picture, the path of one, or numbers (H, W) as (1, H, W) of the wanted size, without in-between values."""
    from PIL import Image

    image = vision.read_image(given) if isinstance(given, str) else given
    if isinstance(image, Image.Image):
        plane = vision.to_tensor(image).mean(1, keepdim=True)
    else:
        try:
            plane = torch.as_tensor(image).cpu().float()[None, None]
        except (TypeError, ValueError, RuntimeError, OverflowError) as e:
            raise ConfigError(f"a mask is {repr(given)[:60]}, but it is one number per pixel: (H, W).") from e
    if plane.ndim != 4 or not plane.numel():
        raise ConfigError(
            f"a mask has {plane.ndim - 2} dimensions and {plane.numel()} numbers, but it is one per pixel: (H, W)."
        )
    return F.interpolate(plane, size=size, mode="nearest-exact")[0]
