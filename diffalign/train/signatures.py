"""What pictures look like when a reward is being hacked: a number per image for each look, and its change since base.

Media are (N, 3, H, W) or (N, F, 3, H, W) in [0, 1], from 16 pixels up; a video's frames are averaged. Every statistic
is (N,) float64, NaN for an image that is not finite. Those that span orders of magnitude are logarithms.

The change of a statistic has two sizes. `shift` is how far its mean moved in units of the base model's deviation from
image to image: it says whether the look differs. `t` is the same move in standard errors over prompts, paired image by
image: it says whether the move is more than chance. A large t alone is a real but harmless drift, a large shift alone
may be luck. `above` and `below` are the shares of images that look like none of the base model's: they see a few
hacked pictures among many, which a mean hides.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign import vision
from diffalign.errors import MediaError
from diffalign.train.overoptimisation import mean_change

CHUNK = 16  # pictures looked at together, so that large ones need no more memory than a few
LEAST_SIDE = 16
LEVEL = 1 / 255
FLAT = 2 * LEVEL  # luma deviation below which a block is flat
COARSE, NEAR = 8, 0.1  # colour levels in which the dominant colour is sought, and how near a pixel must be to it
LEAST_ERROR = 0.01  # of the base's deviation: the least standard error, for moves that are the same in every prompt


@dataclass(frozen=True, kw_only=True)
class Signature:
    """A look: how small a change of it still counts as one, and what it means when it rises or falls."""

    least: float  # a change that shows, in the statistic's own unit
    up: str = ""  # what the pictures are when it rises; empty where a rise means nothing
    down: str = ""


SIGNATURES: dict[str, Signature] = {
    "saturation": Signature(least=0.03, up="over-saturated", down="drained of colour"),
    "vividness": Signature(
        least=0.05, up="garish: their strongest colours are too pure", down="pale, without strong colours"
    ),
    "contrast": Signature(least=0.02, up="harsh in contrast", down="without contrast, as empty pictures are"),
    "clipped": Signature(least=0.03, up="full of pixels cut off at black, white or pure colour"),
    "sharpness": Signature(least=0.5, up="full of texture, noise or sharpened edges", down="blurred or empty"),
    "high_frequency": Signature(least=0.3, up="full of fine grain or a grid", down="smooth where there was detail"),
    "jpeg_bytes": Signature(least=0.15, up="hard to compress, as noise is", down="tiny when compressed, as blanks are"),
    "flat": Signature(least=0.05, up="mostly flat areas, as a removed background is"),
    "dominant": Signature(least=0.05, up="one colour almost everywhere"),
    "brightness": Signature(least=0.03, up="too bright", down="too dark"),
    "nearest": Signature(least=0.5, down="near copies of one another"),
}


@dataclass(frozen=True)
class Shift:
    """How a statistic moved since the base model; the file's head says how to read it."""

    shift: float
    t: float
    above: float
    below: float
    low: tuple[int, ...]  # images in ascending order of the statistic


def measure(media: Tensor) -> dict[str, Tensor]:
    """The statistics that pixels alone give, (N,) each."""
    if media.ndim not in (4, 5) or media.shape[-3] != 3 or min(media.shape[-2:]) < LEAST_SIDE:
        raise MediaError(
            f"media has shape {tuple(media.shape)}, but the watch looks at (N, 3, H, W) or (N, F, 3, H, W) of at least "
            f"{LEAST_SIDE} pixels a side."
        )
    frames = media.detach().reshape(-1, *media.shape[-3:])
    parts = [_measure(part.float()) for part in torch.split(frames, CHUNK)]
    told = {name: torch.cat([part[name] for part in parts]).double().cpu() for name in parts[0]}
    return {name: value.reshape(len(media), -1).mean(-1) for name, value in told.items()}


def compare(now: Tensor, base: Tensor, prompts: Tensor, *, least: float, margin: float) -> Shift:
    """The change of one statistic (N,); above and below are `margin` times `least` beyond all base images."""
    known = ~(now.isnan() | base.isnan())
    if not known.any():
        return Shift(math.nan, math.nan, math.nan, math.nan, ())
    unit = max(float(base[known].std(correction=0)), least)
    change = mean_change(now, base, prompts)
    low, high = float(base[known].min()) - margin * least, float(base[known].max()) + margin * least
    order = torch.where(known, now, torch.inf).argsort(stable=True)[: int(known.sum())]
    return Shift(
        shift=change.value / unit,
        t=change.value / max(change.se, LEAST_ERROR * unit),
        above=float((now[known] > high).double().mean()),
        below=float((now[known] < low).double().mean()),
        low=tuple(order.tolist()),
    )


def crowding(nearest: Tensor) -> Tensor:
    """The statistic `nearest` from distances (N,) to the most similar image."""
    return (nearest.double() + 1e-4).log()


def _measure(media: Tensor) -> dict[str, Tensor]:
    """Of pictures (n, 3, H, W)."""
    finite = media.isfinite().flatten(1).all(1)
    media = media.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    luma = torch.einsum("nchw,c->nhw", media, torch.tensor(vision.LUMA, device=media.device))
    high, low = media.amax(1), media.amin(1)
    told = {
        "saturation": ((high - low) / torch.where(high > 0, high, 1)).mean((1, 2)),
        "vividness": _vividness(high - low),
        "contrast": luma.std((1, 2), correction=0),
        "clipped": ((high > 1 - LEVEL / 2) | (low < LEVEL / 2)).float().mean((1, 2)),
        "sharpness": (_laplacian(luma).var((1, 2), correction=0) + LEVEL**2).log(),
        "high_frequency": (_fine(luma) + LEVEL).log(),
        "jpeg_bytes": _jpeg_bytes(media).log(),
        "flat": _flat(luma),
        "dominant": torch.stack([_dominant(picture) for picture in media]),
        "brightness": luma.mean((1, 2)),
    }
    return {name: torch.where(finite, value.to(finite.device), torch.nan) for name, value in told.items()}


def _vividness(chroma: Tensor) -> Tensor:
    """Mean distance between the largest and the smallest channel in the most colourful twentieth of a picture, (n,)."""
    pixels = chroma.flatten(1)
    return pixels.topk(max(1, pixels.shape[1] // 20)).values.mean(1)


def _laplacian(luma: Tensor) -> Tensor:
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return around - 4 * luma[:, 1:-1, 1:-1]


def _fine(luma: Tensor) -> Tensor:
    """Root mean square of what lies above a quarter of the Nyquist frequency, (n,)."""
    height, width = luma.shape[-2:]
    y = torch.fft.fftfreq(height, device=luma.device)[:, None]
    x = torch.fft.fftfreq(width, device=luma.device)
    power: Tensor = torch.fft.fft2(luma).abs().square()
    return (power * (torch.hypot(x, y) > 0.125)).sum((1, 2)).sqrt() / (height * width)


def _jpeg_bytes(media: Tensor) -> Tensor:
    sizes = []
    for picture in vision.to_pil(media):
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=90)
        sizes.append(file.tell())
    return torch.tensor(sizes, dtype=torch.float32)


def _flat(luma: Tensor) -> Tensor:
    """Share of blocks without structure: 32 x 32 from 256 pixels up, an eighth of the shorter side below."""
    side = max(4, min(32, min(luma.shape[-2:]) // 8))
    blocks: Tensor = F.unfold(luma[:, None], side, stride=side)  # (n, side^2, blocks)
    return (blocks.std(1, correction=0) < FLAT).float().mean(1)


def _dominant(picture: Tensor) -> Tensor:
    """Share of pixels near the commonest colour of a picture (3, H, W)."""
    pixels = picture.flatten(1)  # (3, P)
    level = (pixels * COARSE).long().clamp(max=COARSE - 1)
    code = (level[0] * COARSE + level[1]) * COARSE + level[2]
    colour = pixels[:, code == code.bincount().argmax()].mean(1, keepdim=True)
    return ((pixels - colour).abs().amax(0) < NEAR).float().mean()
