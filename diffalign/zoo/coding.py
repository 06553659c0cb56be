"""Noise that carries a layout: a one-step model can draw a sharp scene only if its noise says where things are.

A few numbers of the noise, standard normal like all of it, decide a scene's free choices: how far each object sways
from its usual place, how large it is, which colour where the prompt leaves it open, and the ground. Since scenes are
made from noise, and not noise from scenes, the noise of training is exactly that of use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations, product

import torch
from torch import Tensor

from diffalign.world.compose import HELD_OUT_PAIRS, fulfils, radii, room
from diffalign.world.grammar import Clauses, Want
from diffalign.world.scenes import COLOURS, GROUNDS, Scene, Shape, half_extent

SLOTS = 4  # objects
TRAITS = 4  # x, y, radius, colour: one latent channel each
CODES = SLOTS * TRAITS + 1  # and the ground
SWAY = 5.0  # pixels from the usual place, at most
SPOTS = (12.0, 32.0, 52.0)  # usual coordinates
ROOMY = 30.0  # pixels between usual places beyond which more distance is no gain

Point = tuple[float, float]


def directions(side: int = 16) -> Tensor:
    """Orthonormal directions (17, 4, side, side): object k's traits are the channels of one 2 x 2 patch in quadrant k.

    A transformer embeds such a patch as one token, so each trait can be read from a single place.
    """
    half = side // 2
    found = torch.zeros(CODES, TRAITS, side, side)
    for k in range(SLOTS):
        row, column = half * (k // 2) + half // 2, half * (k % 2) + half // 2
        for trait in range(TRAITS):
            found[k * TRAITS + trait, trait, row : row + 2, column : column + 2] = 0.5
    found[-1, -1, half : half + 2, half : half + 2] = 0.5
    return found


def codes_in(noise: Tensor) -> Tensor:
    """Codes (B, 17) that noise (B, 4, H, W) carries."""
    return torch.einsum("bchw,kchw->bk", noise, directions(noise.shape[-1]))


def encode_layout(noise: Tensor, codes: Tensor) -> Tensor:
    """Noise (B, 4, H, W) with its codes replaced by `codes` (B, 17)."""
    return noise + torch.einsum("bk,kchw->bchw", codes - codes_in(noise), directions(noise.shape[-1]))


def scene_of(clauses: Clauses, codes: Sequence[float], *, smallest: float = 6.0) -> Scene:
    """The scene that codes mean for a prompt; it fulfils the prompt, and its colours avoid the held-out pairs."""
    shares = [0.5 * (1 + math.erf(code / math.sqrt(2))) for code in codes]
    owners = [k for k, want in enumerate(clauses.wants) for _ in range(want.count)]
    places = usual_places(clauses)
    freedom = 1.0
    while True:
        shapes = [
            _shape(clauses.wants[k], place, shares[i * TRAITS : (i + 1) * TRAITS], freedom, clauses.total, smallest)
            for i, (k, place) in enumerate(zip(owners, places, strict=True))
        ]
        if freedom < 0.01 or fulfils(shapes, owners, clauses):
            return Scene(tuple(shapes), GROUNDS[_nth(shares[-1], len(GROUNDS))])
        freedom *= 0.7


def usual_places(clauses: Clauses) -> tuple[Point, ...]:
    """Where the objects of a prompt stand when nothing sways: apart, central, equal ones from left to right."""
    bare = tuple(Want(want.count, "triangle", None, None, want.place) for want in clauses.wants)
    return _roomiest(Clauses(bare, clauses.relations))


@lru_cache(maxsize=512)
def _roomiest(clauses: Clauses) -> tuple[Point, ...]:
    wants = [want for want in clauses.wants for _ in range(want.count)]
    owners = [k for k, want in enumerate(clauses.wants) for _ in range(want.count)]
    best: tuple[float, float] | None = None
    found: tuple[Point, ...] = ()
    for points in permutations(product(SPOTS, SPOTS), len(wants)):
        if any(a == b and p > q for a, b, p, q in zip(owners, owners[1:], points, points[1:], strict=False)):
            continue  # the same layout with equal objects exchanged
        shapes = [Shape("triangle", "red", x, y, 6.0) for x, y in points]
        if all(_stands(want, point) for want, point in zip(wants, points, strict=True)) and fulfils(
            shapes, owners, clauses
        ):
            gaps = [math.dist(p, q) for i, p in enumerate(points) for q in points[:i]]
            merit = min([ROOMY, *gaps]), -sum(math.dist(p, (32.0, 32.0)) for p in points)
            if best is None or merit > best:
                best, found = merit, points
    return found


def _stands(want: Want, point: Point) -> bool:
    x, y = point
    return want.place is None or {"left": x < 32, "right": x > 32, "top": y < 32, "bottom": y > 32}[want.place]


def _shape(want: Want, place: Point, shares: Sequence[float], freedom: float, total: int, smallest: float) -> Shape:
    """One object; less than full freedom brings it nearer to its usual place and to its least size."""
    across, down, size, hue = shares
    low, high = radii(want, total, smallest)
    radius, sway = low + size * freedom * (high - low), SWAY * freedom
    w, h = half_extent(want.shape, radius)
    x = _within(place[0] + sway * (2 * across - 1), *room(w, want.place == "left", want.place == "right"))
    y = _within(place[1] + sway * (2 * down - 1), *room(h, want.place == "top", want.place == "bottom"))
    free = [colour for colour in COLOURS if (colour, want.shape) not in HELD_OUT_PAIRS]
    return Shape(want.shape, want.colour or free[_nth(hue, len(free))], x, y, radius)


def _nth(share: float, count: int) -> int:
    return min(int(share * count), count - 1)


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), max(low, high))
