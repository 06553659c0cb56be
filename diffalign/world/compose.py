"""Sampling what to ask for and scenes that fulfil it; the compositions that training never sees."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from diffalign.world.grammar import MOST, PLACES, RELATIONS, SIZES, Clauses, Relation, Want
from diffalign.world.scenes import CANVAS, COLOURS, GROUNDS, SHAPES, Scene, Shape, apart, half_extent, relations_between

HELD_OUT_PAIRS = frozenset({("yellow", "triangle"), ("blue", "circle")})  # colour and shape never shown together
HELD_OUT_SHARE = 15  # per cent of object pairs, relation triples, counts, sizes and places kept from training
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RADII = {1: (5.0, 12.0), 2: (5.0, 10.5), 3: (5.0, 9.5), 4: (5.0, 8.5)}  # per number of objects
SIZE_RADII = {"small": (5.0, 6.5), "large": (9.0, 12.0)}
GAP = 3.0  # pixels between bounding boxes
MARGIN = 1.5  # pixels between a bounding box and the border
CONE = 0.75  # a sampled relation's sideways offset stays under this share of its forward offset


@dataclass(frozen=True)
class Template:
    """A form of prompt: how many objects each noun asks for and which neighbouring nouns are related."""

    counts: tuple[int, ...]
    related: tuple[int, ...] = ()  # noun k is in a relation to noun k + 1


HARD: dict[str, Template] = {
    "a+b+c": Template((1, 1, 1)),
    "a>b+c": Template((1, 1, 1), (0,)),
    "2a+b": Template((2, 1)),
    "2a>b": Template((2, 1), (0,)),
    "a+b+c+d": Template((1, 1, 1, 1)),
    "a>b+c+d": Template((1, 1, 1, 1), (0,)),
    "a>b+c>d": Template((1, 1, 1, 1), (0, 2)),
    "2a+2b": Template((2, 2)),
    "3a+b": Template((3, 1)),
    "2a+b+c": Template((2, 1, 1)),
}


def keys(clauses: Clauses) -> Iterator[str]:
    """Every composition in a prompt, in a form that does not depend on word order."""
    names = [f"{w.colour or 'any'} {w.shape}" for w in clauses.wants]
    for want, name in zip(clauses.wants, names, strict=True):
        if len(clauses.wants) == 1 and want.count > 1:
            yield f"{want.count} {name}"
        yield from (f"{trait} {name}" for trait in (want.size, want.place) if trait)
        if want.size and want.place:
            yield f"{want.size} {want.place} {name}"
    described = sorted(f"{w.size or 'any'} {name}" for w, name in zip(clauses.wants, names, strict=True))
    yield from (f"{a} with {b}" for a, b in combinations(described, 2) if not a.startswith("any any"))
    for relation in clauses.relations:
        a, b, kind = names[relation.a], names[relation.b], relation.kind
        yield f"{a} {kind} {b}" if kind in ("left of", "above") else f"{b} {OPPOSITE[kind]} {a}"


def held_out(clauses: Clauses) -> bool:
    """Whether a prompt holds any composition that training never sees."""
    if any((want.colour, want.shape) in HELD_OUT_PAIRS for want in clauses.wants):
        return True
    return any(zlib.crc32(key.encode()) % 100 < HELD_OUT_SHARE for key in keys(clauses))


def sample_clauses(kind: str, rng: random.Random, *, template: str | None = None) -> Clauses:
    """Clauses of one of GenEval's task kinds, or `hard`, held out or not."""
    if kind == "hard":
        return _fill(HARD[template or rng.choice(list(HARD))], rng)
    if kind in ("single", "colours"):
        colour = rng.choice(list(COLOURS)) if kind == "colours" else None
        size = rng.choice(SIZES) if rng.random() < 0.3 else None
        place = rng.choice(list(PLACES)) if rng.random() < 0.25 else None
        return Clauses((Want(1, rng.choice(SHAPES), colour, size, place),))
    if kind == "counting":
        colour = rng.choice(list(COLOURS)) if rng.random() < 0.8 else None
        return Clauses((Want(rng.choices(range(2, MOST + 1), (4, 4, 2))[0], rng.choice(SHAPES), colour),))
    if kind == "two":
        sizes = rng.choices((None, *SIZES), (4, 1, 1), k=2)
        return Clauses(tuple(Want(1, s, None, z) for s, z in zip(rng.sample(SHAPES, 2), sizes, strict=True)))
    return _fill(Template((1, 1), (0,) if kind == "position" else ()), rng)


def _fill(template: Template, rng: random.Random) -> Clauses:
    kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], len(template.counts))
    wants = tuple(Want(n, shape, colour) for n, (colour, shape) in zip(template.counts, kinds, strict=True))
    return Clauses(wants, tuple(Relation(k, rng.choice(RELATIONS), k + 1) for k in template.related))


def sample_scene(clauses: Clauses, rng: random.Random, *, seen_only: bool = False, smallest: float = 5.0) -> Scene:
    """A scene that fulfils the clauses; with `seen_only` free colours avoid the held-out pairs."""
    while True:
        if scene := find_scene(clauses, rng, seen_only=seen_only, smallest=smallest):
            return scene


def find_scene(
    clauses: Clauses, rng: random.Random, *, seen_only: bool = False, smallest: float = 5.0, tries: int = 200
) -> Scene | None:
    """The same, or None where `tries` placements of objects of one draw failed: some clauses no scene has room for."""
    looks = [_look(want, rng, clauses.total, seen_only, smallest) for want in clauses.wants for _ in range(want.count)]
    owners = [k for k, want in enumerate(clauses.wants) for _ in range(want.count)]
    for _ in range(tries):
        shapes = _place_all(looks, [clauses.wants[k] for k in owners], rng)
        if shapes and fulfils(shapes, owners, clauses):
            return Scene(tuple(shapes), rng.choice(GROUNDS))
    return None


def _look(want: Want, rng: random.Random, total: int, seen_only: bool, smallest: float) -> tuple[str, str, float]:
    """Shape, colour and radius of one object."""
    free = [c for c in COLOURS if not (seen_only and (c, want.shape) in HELD_OUT_PAIRS)]
    return want.shape, want.colour or rng.choice(free), rng.uniform(*radii(want, total, smallest))


def radii(want: Want, total: int, smallest: float) -> tuple[float, float]:
    """Least and greatest radius of an object among `total`."""
    low, high = RADII[total]
    if want.size:
        low, high = SIZE_RADII[want.size]
        high = max(min(high, RADII[total][1]), low + 0.5)
    return max(low, smallest), high


def _place_all(looks: list[tuple[str, str, float]], wants: list[Want], rng: random.Random) -> list[Shape]:
    """Random centres without overlap; empty where an object found no room."""
    shapes: list[Shape] = []
    for (kind, colour, radius), want in zip(looks, wants, strict=True):
        w, h = half_extent(kind, radius)
        for _ in range(8):
            x = rng.uniform(*room(w, want.place == "left", want.place == "right"))
            y = rng.uniform(*room(h, want.place == "top", want.place == "bottom"))
            shape = Shape(kind, colour, x, y, radius)
            if all(apart(shape, other, GAP) for other in shapes):
                shapes.append(shape)
                break
        else:
            return []
    return shapes


def room(half: float, low: bool, high: bool) -> tuple[float, float]:
    """Where the centre of something `half` as wide may lie, all along an axis or at its low or high end."""
    start, end = half + MARGIN, CANVAS - half - MARGIN
    return (max(start, 0.63 * CANVAS) if high else start), (min(end, 0.37 * CANVAS) if low else end)


def fulfils(shapes: Sequence[Shape], owners: Sequence[int], clauses: Clauses) -> bool:
    """Whether shapes keep apart and stand in the relations asked for; `owners` says which want each is of."""
    if not all(apart(a, b, GAP) for a, b in combinations(shapes, 2)):
        return False
    return all(
        _related(a, relation.kind, b)
        for relation in clauses.relations
        for a in (s for s, k in zip(shapes, owners, strict=True) if k == relation.a)
        for b in (s for s, k in zip(shapes, owners, strict=True) if k == relation.b)
    )


def _related(a: Shape, kind: str, b: Shape) -> bool:
    """Whether a relation holds, with the sideways offset inside the cone."""
    forward, sideways = abs(a.x - b.x), abs(a.y - b.y)
    if kind in ("above", "below"):
        forward, sideways = sideways, forward
    return sideways <= CONE * forward and kind in relations_between(a, b)
