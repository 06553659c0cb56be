"""Scenes of the shapes world: one to four coloured shapes on a plain grey ground, in units of a 64-pixel canvas."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.15, 0.25, 0.85),
    "yellow": (0.95, 0.80, 0.10),
}
GROUNDS = (0.12, 0.55, 0.94)  # grey levels
CANVAS = 64.0
SMALL, LARGE = 6.75, 8.75  # a radius below the first is small, one above the second is large

# Shapes of the same radius cover the same area, so a radius can be read back from the area alone.
SQUARE_HALF = math.sqrt(math.pi) / 2  # half the side of the square with the area of the unit circle
TRIANGLE_HEIGHT = math.sqrt(math.pi * math.sqrt(3))  # of the equilateral triangle with that area


@dataclass(frozen=True)
class Shape:
    """One shape; `x`, `y` is the centre of its bounding box and `radius` that of the circle of equal area."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def half_extent(self) -> tuple[float, float]:
        """Half the width and half the height of the bounding box."""
        return half_extent(self.kind, self.radius)

    @property
    def size(self) -> str | None:
        """`small`, `large`, or None for the sizes in between."""
        return size_of(self.radius)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        w, h = self.half_extent
        return self.x - w, self.y - h, self.x + w, self.y + h


@dataclass(frozen=True)
class Scene:
    """What an image shows, without pixels."""

    shapes: tuple[Shape, ...]
    ground: float = GROUNDS[-1]


def half_extent(kind: str, radius: float) -> tuple[float, float]:
    """Half the width and height of a shape's bounding box."""
    if kind == "circle":
        return radius, radius
    if kind == "square":
        return SQUARE_HALF * radius, SQUARE_HALF * radius
    height = TRIANGLE_HEIGHT * radius
    return height / math.sqrt(3), height / 2


def size_of(radius: float) -> str | None:
    """`small`, `large`, or None for the sizes in between."""
    if radius < SMALL:
        return "small"
    return "large" if radius > LARGE else None


def place_of(x: float, y: float) -> set[str]:
    """Every absolute place, such as `left` or `top`, that a centre lies in: the outer 40 % of the canvas."""
    near, far = 0.4 * CANVAS, 0.6 * CANVAS
    tests = {"left": x < near, "right": x > far, "top": y < near, "bottom": y > far}
    return {name for name, holds in tests.items() if holds}


def apart(a: Shape, b: Shape, gap: float = 2.0) -> bool:
    """Whether the bounding boxes keep at least `gap` pixels between them."""
    (aw, ah), (bw, bh) = a.half_extent, b.half_extent
    return abs(a.x - b.x) > aw + bw + gap or abs(a.y - b.y) > ah + bh + gap


def relations_between(a: Shape, b: Shape) -> set[str]:
    """GenEval's relations of `a` to `b`, from bounding boxes; two may hold, or none."""
    offset = (a.x - b.x, a.y - b.y)
    sizes = [2 * (p + q) for p, q in zip(a.half_extent, b.half_extent, strict=True)]
    rest = [math.copysign(max(abs(o) - 0.1 * s, 0.0), o) for o, s in zip(offset, sizes, strict=True)]
    length = math.hypot(*offset)
    if max(abs(r) for r in rest) < 1e-3 or length == 0:
        return set()
    dx, dy = rest[0] / length, rest[1] / length
    tests = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in tests.items() if holds}
