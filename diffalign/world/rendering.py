"""Exact, anti-aliased rendering: each pixel mixes ground and shape by the share of the pixel that the shape covers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.world.scenes import CANVAS, COLOURS, SHAPES, SQUARE_HALF, TRIANGLE_HEIGHT, Scene


def coverage(kind: Tensor, x: Tensor, y: Tensor, radius: Tensor, size: int = 64) -> Tensor:
    """Covered share of every pixel, (N, size, size), for N shapes given by index into SHAPES, centre and radius."""
    scale = size / CANVAS
    axis = torch.arange(size, device=x.device) + 0.5  # pixel centres
    dx = axis.view(1, 1, -1) - (x * scale).view(-1, 1, 1)
    dy = axis.view(1, -1, 1) - (y * scale).view(-1, 1, 1)
    r = (radius * scale).view(-1, 1, 1)
    index = kind.view(-1, 1, 1)
    square = _inside(SQUARE_HALF * r - dx.abs()) * _inside(SQUARE_HALF * r - dy.abs())
    return torch.where(
        index == 0, _inside(r - torch.hypot(dx, dy)), torch.where(index == 1, square, _triangle(dx, dy, r))
    )


def _inside(distance: Tensor) -> Tensor:
    """Covered share of a pixel whose centre lies `distance` inside a straight edge."""
    return (distance + 0.5).clamp(0, 1)


def _triangle(dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    height = TRIANGLE_HEIGHT * r
    base = _inside(height / 2 - dy)
    slope = (dy + height / 2) / 2 - dx.abs() * math.sqrt(3) / 2  # distance inside the nearer slanted edge
    return base * _inside(slope)


def render_many(scenes: Sequence[Scene], size: int = 64) -> Tensor:
    """Images (B, 3, size, size) in [0, 1]."""
    image = torch.tensor([scene.ground for scene in scenes]).view(-1, 1, 1, 1).repeat(1, 3, size, size)
    for k in range(max((len(scene.shapes) for scene in scenes), default=0)):
        rows = [i for i, scene in enumerate(scenes) if len(scene.shapes) > k]
        shapes = [scenes[i].shapes[k] for i in rows]
        geometry = torch.tensor([[s.x, s.y, s.radius] for s in shapes])  # (N, 3)
        kind = torch.tensor([SHAPES.index(s.kind) for s in shapes])
        alpha = coverage(kind, geometry[:, 0], geometry[:, 1], geometry[:, 2], size).unsqueeze(1)
        colour = torch.tensor([COLOURS[s.colour] for s in shapes]).view(-1, 3, 1, 1)
        image[rows] = image[rows] * (1 - alpha) + colour * alpha
    return image


def render(scene: Scene, size: int = 64) -> Tensor:
    """One image (3, size, size) in [0, 1]."""
    return render_many([scene], size)[0]
