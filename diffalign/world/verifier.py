"""The exact verifier: pixels -> objects -> clauses, by the rules of GenEval (Ghosh et al., 2023, arXiv 2310.11513).

Where we differ: counts are exact for every kind of prompt and extra objects are a failed clause; every clause is one
soft term clipped to [0, 1], and a clause whose objects are missing counts as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from diffalign.cases import Case
from diffalign.world.grammar import Clauses, Relation, Want, parse
from diffalign.world.scenes import Shape, place_of, relations_between
from diffalign.world.see import Sight, see

EXACT = 6  # what `_suits` gives an object that meets every trait of a want


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows exactly what was asked; without `applies` the prompt is outside the grammar."""

    strict: bool
    soft: float  # mean of `terms`
    terms: dict[str, float] = field(default_factory=dict)  # one per clause, each in [0, 1]
    reason: str = ""  # why `strict` fails
    applies: bool = True


def verify(media: Tensor, cases: Sequence[Case]) -> list[Verdict]:
    """One verdict per image of (B, 3, H, W) in [0, 1]."""
    return [judge(sight, clauses_of(case)) for sight, case in zip(see(media), cases, strict=True)]


def clauses_of(case: Case) -> Clauses | None:
    """The clauses a case carries in its metadata, else those its prompt says."""
    stored = case.metadata.get("clauses")
    return Clauses.from_dict(stored) if stored else parse(case.prompt)


def judge(sight: Sight, clauses: Clauses | None) -> Verdict:
    """Hold what was seen against what was asked."""
    if clauses is None:
        return Verdict(False, 0.0, {}, "the prompt is outside the grammar of the shapes world", applies=False)
    if sight.problem:
        return Verdict(False, 0.0, dict.fromkeys(_names(clauses), 0.0), sight.problem)
    owned, extra = assign(sight.shapes, clauses.wants)
    terms: dict[str, float] = {}
    for k, want in enumerate(clauses.wants):
        terms |= {f"{name}:{k}": value for name, value in _want_terms(want, owned[k]).items()}
    for k, relation in enumerate(clauses.relations):
        terms[f"relation:{k}"] = _relation_term(relation, owned)
    terms["nothing else"] = _clip(1 - (extra + sight.blobs) / clauses.total)
    failed = [name for name, value in terms.items() if value < 1]
    saw = ", ".join(f"{shape.colour} {shape.kind}" for shape in sight.shapes) or "no shape"
    saw += f" and {sight.blobs} unknown" if sight.blobs else ""
    reason = f"failed {', '.join(failed)}; saw {saw}" if failed else ""
    return Verdict(not failed, sum(terms.values()) / len(terms), terms, reason)


def assign(shapes: Sequence[Shape], wants: Sequence[Want]) -> tuple[list[list[Shape]], int]:
    """Give every object to the want it suits best; objects of a shape nobody asked for are extra."""
    owned: list[list[Shape]] = [[] for _ in wants]
    extra = 0
    for shape in sorted(shapes, key=lambda s: -max(_suits(s, w) for w in wants)):
        choices = [k for k, want in enumerate(wants) if want.shape == shape.kind]
        exact = [k for k in choices if _suits(shape, wants[k]) == EXACT]
        room = [k for k in choices if len(owned[k]) < wants[k].count]
        # red in place of blue is a wrong colour; a third red circle where two were asked is a wrong count
        choices = exact or room or choices
        if not choices:
            extra += 1
            continue
        best = max(choices, key=lambda k: (_suits(shape, wants[k]), len(owned[k]) < wants[k].count))
        owned[best].append(shape)
    return owned, extra


def _suits(shape: Shape, want: Want) -> int:
    """How well an object meets a want: colour counts most."""
    if shape.kind != want.shape:
        return 0
    traits = (want.size in (None, shape.size)) + (want.place is None or want.place in place_of(shape.x, shape.y))
    return 1 + traits + 3 * (want.colour in (None, shape.colour))


def _want_terms(want: Want, found: Sequence[Shape]) -> dict[str, float]:
    terms = {"count": _clip(1 - abs(want.count - len(found)) / want.count)}
    tests = {
        "colour": (want.colour, [shape.colour == want.colour for shape in found]),
        "size": (want.size, [shape.size == want.size for shape in found]),
        "place": (want.place, [want.place in place_of(shape.x, shape.y) for shape in found]),
    }
    for name, (asked, hits) in tests.items():
        if asked:
            terms[name] = _clip(1 - abs(want.count - sum(hits)) / want.count)
    return terms


def _relation_term(relation: Relation, owned: Sequence[Sequence[Shape]]) -> float:
    """Share of the pairs that stand in the relation; none to compare is a fail."""
    pairs = [(a, b) for a in owned[relation.a] for b in owned[relation.b]]
    return sum(relation.kind in relations_between(a, b) for a, b in pairs) / len(pairs) if pairs else 0.0


def _names(clauses: Clauses) -> list[str]:
    names = []
    for k, want in enumerate(clauses.wants):
        traits = {"count": 1, "colour": want.colour, "size": want.size, "place": want.place}
        names += [f"{name}:{k}" for name, asked in traits.items() if asked]
    return [*names, *(f"relation:{k}" for k in range(len(clauses.relations))), "nothing else"]


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)
