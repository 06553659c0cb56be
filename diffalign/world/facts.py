"""The atomic facts of a prompt: what it asks for, one yes-or-no question each, and what a scene answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from diffalign.world.grammar import COUNTS, PLACES, Clauses, Want
from diffalign.world.scenes import Scene, Shape, place_of, relations_between

Answer = Literal["yes", "partial", "no"]


@dataclass(frozen=True)
class Fact:
    """One thing that holds of a scene or does not; `must` where a scene without it misses the point."""

    kind: str  # count, size, place, relation or rest
    colour: str | None = None
    shape: str = ""
    count: int = 1
    trait: str = ""  # the size, place or relation
    other: tuple[str | None, str] | None = None  # colour and shape of what a relation is to

    @property
    def must(self) -> bool:
        return self.kind == "count"

    @property
    def question(self) -> str:
        """As a person would ask."""
        several = self.count > 1
        name = named(self.colour, self.shape, several)
        if self.kind == "count":
            word = next(word for word, n in COUNTS.items() if n == self.count)
            return f"Are there exactly {word} {name}?" if several else f"Is there {word} {name}?"
        if self.kind == "rest":
            return f"Are there {self.count} objects in all?" if several else "Is there one object in all?"
        be = "Are" if several else "Is"
        if self.kind == "relation":
            assert self.other is not None
            return f"{be} the {name} {self.trait} the {named(*self.other, several=False)}?"
        return f"{be} the {name} {PLACES[self.trait] if self.kind == 'place' else self.trait}?"

    def holds(self, scene: Scene) -> Answer:
        """What an exact eye answers."""
        if self.kind == "rest":
            return "yes" if len(scene.shapes) == self.count else "no"
        mine = self.about(scene)
        if self.kind == "count":
            return "yes" if len(mine) == self.count else "partial" if mine and self.count > 1 else "no"
        if self.kind == "relation":
            assert self.other is not None
            pairs = [self.trait in relations_between(a, b) for a in mine for b in _those(scene, *self.other)]
            return _answer(pairs)
        if self.kind == "size":
            return _answer([shape.size == self.trait for shape in mine])
        return _answer([self.trait in place_of(shape.x, shape.y) for shape in mine])

    def about(self, scene: Scene) -> list[Shape]:
        """The objects that the question names."""
        return list(scene.shapes) if self.kind == "rest" else _those(scene, self.colour, self.shape)


def named(colour: str | None, shape: str, several: bool) -> str:
    return " ".join(word for word in (colour, shape + "s" * several) if word)


def facts(clauses: Clauses) -> Iterator[Fact]:
    """Every fact of a prompt, objects first; two nouns of one name ask once."""
    wants = list(dict.fromkeys(clauses.wants))
    for want in wants:
        yield Fact("count", want.colour, want.shape, want.count)
        if want.size:
            yield Fact("size", want.colour, want.shape, want.count, want.size)
        if want.place:
            yield Fact("place", want.colour, want.shape, want.count, want.place)
    for relation in clauses.relations:
        a, b = clauses.wants[relation.a], clauses.wants[relation.b]
        yield Fact("relation", a.colour, a.shape, a.count, relation.kind, _name(b))
    yield Fact("rest", count=clauses.total)


def _name(want: Want) -> tuple[str | None, str]:
    return want.colour, want.shape


def _those(scene: Scene, colour: str | None, shape: str) -> list[Shape]:
    return [s for s in scene.shapes if s.kind == shape and colour in (None, s.colour)]


def _answer(held: list[bool]) -> Answer:
    return "no" if not any(held) else "yes" if all(held) else "partial"
