"""How the tiny judge tells what it sees: objects in reading order, with the square of an 8 x 8 board they lie on."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.world.scenes import CANVAS, GROUNDS, Scene, Shape

COLUMNS = "abcdefgh"
GROUND_NAMES = dict(zip(GROUNDS, ("dark", "grey", "white"), strict=True))


def square(x: float, y: float) -> str:
    """The square of the board that a point lies on: a1 at the top left, h8 at the bottom right."""
    step = CANVAS / len(COLUMNS)
    column, row = (min(max(int(value / step), 0), len(COLUMNS) - 1) for value in (x, y))
    return f"{COLUMNS[column]}{row + 1}"


def tell_shape(shape: Shape) -> str:
    words = (shape.size, shape.colour, shape.kind, square(shape.x, shape.y))
    return " ".join(word for word in words if word)


def tell_shapes(shapes: Sequence[Shape]) -> str:
    """Objects in reading order, or `nothing`."""
    ordered = sorted(shapes, key=lambda shape: (int(shape.y // 8), shape.x))
    return ", ".join(tell_shape(shape) for shape in ordered) or "nothing"


def tell(scene: Scene) -> str:
    ground = min(GROUND_NAMES, key=lambda grey: abs(grey - scene.ground))
    return f"{tell_shapes(scene.shapes)} on {GROUND_NAMES[ground]}"
