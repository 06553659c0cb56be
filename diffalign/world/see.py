"""From pixels alone to objects: plain ground, colour regions, and the shape that explains each region best."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from diffalign.world.rendering import coverage
from diffalign.world.scenes import CANVAS, COLOURS, SHAPES, TRIANGLE_HEIGHT, Shape

SMALLEST_SIDE = 16  # pixels; below it shapes cannot be told apart
SPECK = 12.0  # square pixels; smaller regions are dust
MOST_REGIONS = 16  # more than this is texture, not a scene
PLAIN = 0.15  # a border pixel this close to the median belongs to the ground
OFF_COLOUR = 0.3  # distance from every mixture of ground and palette beyond which a pixel has no known colour
SOFTEN = (
    torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]).view(1, 1, 3, 3) / 16
)  # mild blur of a template
LEAST_FIT = 0.75  # overlap (intersection over union) with the best template below which a region is no shape


@dataclass(frozen=True)
class Sight:
    """What was read from one image; `problem` says why nothing could be."""

    shapes: tuple[Shape, ...] = ()
    blobs: int = 0  # regions of an unknown colour or shape
    problem: str = ""


def see(media: Tensor) -> list[Sight]:
    """Read every image of (B, 3, H, W) in [0, 1], of any size, in units of a 64-pixel canvas."""
    sights = []
    for image in media.detach().float().cpu():
        problem = _unreadable(image)
        sights.append(Sight(problem=problem) if problem else _read(_fit_canvas(image.clamp(0, 1))))
    return sights


def _unreadable(image: Tensor) -> str:
    if image.ndim != 3 or image.shape[0] != 3:
        return f"not an RGB image: shape {tuple(image.shape)}"
    if min(image.shape[1:]) < SMALLEST_SIDE:
        return f"{image.shape[2]}x{image.shape[1]} pixels are too few to tell shapes apart"
    return "" if bool(torch.isfinite(image).all()) else "the image has NaN or infinite pixels"


def _fit_canvas(image: Tensor) -> Tensor:
    """Scale the longer side to the canvas."""
    height, width = image.shape[1:]
    scale = CANVAS / max(height, width)
    if scale == 1:
        return image
    size = [max(round(height * scale), 1), max(round(width * scale), 1)]
    return functional.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]


def _read(image: Tensor) -> Sight:
    """Objects of one image (3, H, W) whose longer side is the canvas."""
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)  # (3, P)
    ground = border.median(1).values
    if float(((border - ground[:, None]).abs().amax(0) < PLAIN).float().mean()) < 0.7:
        return Sight(problem="the ground is not plain")
    label, alpha = _colours(image, ground)
    regions = [(k, region) for k in range(len(COLOURS) + 1) for region in _regions(label == k)]
    if len(regions) > MOST_REGIONS:
        return Sight(problem=f"{len(regions)} separate regions are a texture, not a scene")
    shapes, blobs = [], 0
    for k, region in regions:
        shape = _explain(region, alpha[k] * ((label == k) | (label < 0)), k) if k < len(COLOURS) else None
        shapes += [shape] if shape else []
        blobs += shape is None
    return Sight(tuple(shapes), blobs)


def _colours(image: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """Label (H, W) of every pixel and coverage (C, H, W) per colour, pixels being mixtures of ground and one colour.

    Labels count through COLOURS; one beyond is an unknown colour and -1 the ground.
    """
    palette = torch.tensor(list(COLOURS.values())) - ground  # (C, 3)
    offset = image - ground[:, None, None]  # (3, H, W)
    length = palette.square().sum(1).clamp(min=1e-3)
    alpha = (torch.einsum("cd,dhw->chw", palette, offset) / length[:, None, None]).clamp(0, 1)
    rest = (offset[None] - alpha[:, None] * palette[:, :, None, None]).square().sum(1).sqrt()  # (C, H, W)
    rest = torch.where(length[:, None, None] < 0.02, torch.inf, rest)  # a ground of this colour hides it
    distance, best = rest.min(0)
    covered = alpha.gather(0, best[None])[0] > 0.5
    label = torch.where(covered & (distance < OFF_COLOUR), best, -1)
    strange = (distance >= OFF_COLOUR) & (offset.square().sum(0).sqrt() > OFF_COLOUR)
    return torch.where(strange, len(COLOURS), label), alpha


def _regions(mask: Tensor) -> Iterator[Tensor]:
    """Connected regions of a mask (H, W), corners touching, that are larger than a speck and thicker than a line."""
    if int(mask.sum()) < SPECK:
        return
    ids = torch.arange(1.0, mask.numel() + 1).view(mask.shape) * mask
    while True:
        grown = functional.max_pool2d(ids[None], 3, stride=1, padding=1)[0] * mask
        if torch.equal(grown, ids):
            break
        ids = grown
    core = functional.avg_pool2d(mask[None].float(), 3, stride=1, padding=1)[0] > 0.99  # halos and lines have none
    cored = set(ids[core & mask].tolist())
    values, sizes = torch.unique(ids[mask], return_counts=True)
    yield from (ids == value for value in values[sizes >= SPECK] if float(value) in cored)


def _explain(region: Tensor, alpha: Tensor, colour: int) -> Shape | None:
    """The shape whose rendering of equal area and centroid overlaps the region best, or None where none fits."""
    height, width = region.shape
    near = functional.max_pool2d(region[None].float(), 5, stride=1, padding=2)[0]
    seen = functional.pad(alpha * near, (0, int(CANVAS) - width, 0, int(CANVAS) - height))
    area = float(seen.sum())
    axis = torch.arange(CANVAS) + 0.5
    x, y = float((seen.sum(0) * axis).sum()) / area, float((seen.sum(1) * axis).sum()) / area
    radius = math.sqrt(area / math.pi)
    lift = TRIANGLE_HEIGHT * radius / 6  # a triangle's centroid lies below the centre of its box
    ys = torch.tensor([y - lift if kind == "triangle" else y for kind in SHAPES])
    same = torch.ones(len(SHAPES))
    sharp = coverage(torch.arange(len(SHAPES)), x * same, ys, radius * same)
    soft = functional.conv2d(sharp[:, None], SOFTEN, padding=1)
    templates = torch.stack([sharp, soft[:, 0], functional.conv2d(soft, SOFTEN, padding=1)[:, 0]])  # (3, S, H, W)
    fits = (torch.minimum(templates, seen).sum((2, 3)) / torch.maximum(templates, seen).sum((2, 3))).amax(0)
    best = int(fits.argmax())
    if float(fits[best]) < LEAST_FIT:
        return None
    return Shape(SHAPES[best], list(COLOURS)[colour], x, float(ys[best]), radius)
