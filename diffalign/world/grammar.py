"""The language of the shapes world: text <-> clauses, for GenEval's six task kinds and scenes of up to four objects.

prompt  = unit {("," | "and" | ", and") unit}        unit  = noun [relation noun]
noun    = count [size] [colour] shape [place]        place = "on the left" | "at the top" | ...
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffalign.world.scenes import COLOURS, SHAPES, Scene

COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
SIZES = ("small", "large")
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single", "two", "counting", "colours", "position", "binding")  # GenEval's six; `hard` is the seventh
MOST = 4  # objects in one scene

_NOUN = (
    rf"(?P<count>{'|'.join(COUNTS)})(?: (?P<size>{'|'.join(SIZES)}))?(?: (?P<colour>{'|'.join(COLOURS)}))?"
    rf" (?P<shape>{'|'.join(SHAPES)})(?P<plural>s?)(?: (?P<place>{'|'.join(PLACES.values())}))?"
)
_NOUN_AT = re.compile(_NOUN + r"(?= |$)")
_RELATION_AT = re.compile(rf" (?:is )?(?:to the )?(?P<relation>{'|'.join(RELATIONS)}) ")
_JOIN_AT = re.compile(r" (?:and )?")


@dataclass(frozen=True)
class Want:
    """`count` objects of one shape, optionally of one colour, size and absolute place."""

    count: int
    shape: str
    colour: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Relation:
    """Every object of want `a` stands in relation `kind` to every object of want `b`."""

    a: int
    kind: str
    b: int


@dataclass(frozen=True)
class Clauses:
    """What a prompt asks for: exactly these objects, in these relations, and nothing else."""

    wants: tuple[Want, ...]
    relations: tuple[Relation, ...] = ()

    @property
    def total(self) -> int:
        return sum(want.count for want in self.wants)

    @property
    def tag(self) -> str:
        """GenEval's task kind, or `hard` for three and more kinds of object or relations among many."""
        first = self.wants[0]
        if len(self.wants) == 1:
            return "counting" if first.count > 1 else "colours" if first.colour else "single"
        if len(self.wants) > 2 or self.total > 2:
            return "hard"
        if self.relations:
            return "position"
        return "binding" if any(want.colour for want in self.wants) else "two"

    def as_dict(self) -> dict[str, Any]:
        return {"wants": [asdict(w) for w in self.wants], "relations": [asdict(r) for r in self.relations]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Clauses:
        return cls(tuple(Want(**w) for w in data["wants"]), tuple(Relation(**r) for r in data["relations"]))


def say(clauses: Clauses) -> str:
    """The canonical prompt of some clauses; `parse` takes it back."""
    units: list[str] = []
    index = 0
    while index < len(clauses.wants):
        text = _say_noun(clauses.wants[index])
        for relation in clauses.relations:
            if relation.a == index:
                text += f" {relation.kind} {_say_noun(clauses.wants[relation.b])}"
                index = relation.b
        units.append(text)
        index += 1
    return units[0] if len(units) == 1 else ", ".join(units[:-1]) + " and " + units[-1]


def _say_noun(want: Want) -> str:
    count = next(word for word, n in COUNTS.items() if n == want.count)
    words = [count, want.size, want.colour, want.shape + ("s" if want.count > 1 else "")]
    words.append(PLACES[want.place] if want.place else None)
    return " ".join(word for word in words if word)


def parse(prompt: str) -> Clauses | None:
    """The clauses of a prompt, or None where it is outside the grammar."""
    text = " ".join(prompt[:400].lower().replace(",", " ").strip(" .").split())
    wants: list[Want] = []
    relations: list[Relation] = []
    at, linked = 0, False
    while noun := _NOUN_AT.match(text, at):
        wants.append(_read_noun(noun))
        at = noun.end()
        if at == len(text):
            clauses = Clauses(tuple(wants), tuple(relations))
            return clauses if clauses.total <= MOST and all(_agrees(n) for n in _NOUN_AT.finditer(text)) else None
        step = None if linked else _RELATION_AT.match(text, at)
        linked = step is not None
        if step:
            relations.append(Relation(len(wants) - 1, step["relation"], len(wants)))
        step = step or _JOIN_AT.match(text, at)
        at = step.end() if step else len(text)
    return None


def _read_noun(noun: re.Match[str]) -> Want:
    place = next((name for name, phrase in PLACES.items() if phrase == noun["place"]), None)
    return Want(COUNTS[noun["count"]], noun["shape"], noun["colour"], noun["size"], place)


def _agrees(noun: re.Match[str]) -> bool:
    """Whether count and plural fit: `two circle` is a slip, not a request."""
    return (COUNTS[noun["count"]] > 1) == bool(noun["plural"])


def caption(scene: Scene) -> str:
    """A prompt that the scene satisfies: its objects grouped by shape and colour."""
    groups = Counter((shape.kind, shape.colour) for shape in scene.shapes)
    return say(Clauses(tuple(Want(n, kind, colour) for (kind, colour), n in groups.items())))


def words() -> list[str]:
    """Every word of the grammar, the comma included, for a word-level vocabulary."""
    nouns = [*SHAPES, *(shape + "s" for shape in SHAPES)]
    phrases = " ".join([*COUNTS, *SIZES, *COLOURS, *nouns, *PLACES.values(), *RELATIONS, "and is to ,"])
    return list(dict.fromkeys(phrases.split()))
