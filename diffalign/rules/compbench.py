"""T2I-CompBench's rules for where things are, how many there are, and how scores of parts make one.

Kaiyi Huang et al.: "T2I-CompBench: A Comprehensive Benchmark for Open-world Compositional Text-to-image Generation",
2023 (arXiv 2307.06350), and "T2I-CompBench++", 2025 (IEEE TPAMI).

Where we differ: objects and their relation are given, not parsed from the prompt; of several objects of a class the
most confident counts, where the published code takes the first one listed, usually the same; "on top of" means the same
as "on the top of", which `compat` undoes, as the published rules never score it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from diffalign.errors import ConfigError
from diffalign.rules.boxes import containment, iou
from diffalign.rules.geneval import Box, Detection

SIDES = {  # axis, and the sign of the offset of the first object from the second
    "on the left of": (0, -1),
    "on the right of": (0, 1),
    "on the top of": (1, -1),
    "on the bottom of": (1, 1),
}
NEAR = ("next to", "near", "on side of")
ON_TOP = "on top of"
RELATIONS = (*SIDES, *NEAR, ON_TOP)
OVERLAP = 0.1  # up to this two objects stand apart
NEAR_PIXELS = 150.0
CUT = 0.5  # spatial scores below it are 0: one object alone proves no relation
TWICE = 0.9  # overlap from which two boxes of a class are one object


def require_relation(relation: object) -> str:
    """The relation, or ConfigError where the rules do not know it."""
    if not isinstance(relation, str) or relation not in RELATIONS:
        raise ConfigError(f"{relation!r} is no relation of T2I-CompBench; it has {', '.join(RELATIONS)}.")
    return relation


def position(a: Box, b: Box, relation: str, *, near: float = NEAR_PIXELS, compat: bool = False) -> float:
    """How far `a` stands in `relation` to `b`, in [0, 1]; `near` is in the unit of the boxes."""
    offset = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
    if require_relation(relation) in NEAR:
        reach = [abs(o) for o in offset]
        return 1.0 if min(reach) < near else near / max(reach)
    if relation == ON_TOP and compat:
        return 0.0
    axis, sign = SIDES["on the top of" if relation == ON_TOP else relation]
    if sign * offset[axis] <= 0 or abs(offset[axis]) <= abs(offset[1 - axis]):
        return 0.0
    overlap = float(iou(torch.tensor([a]), torch.tensor([b])))
    return 1.0 if overlap < OVERLAP else OVERLAP / overlap


def spatial(
    found: Sequence[Detection], a: str, b: str, relation: str, *, near: float = NEAR_PIXELS, compat: bool = False
) -> dict[str, float]:
    """A quarter of each object's confidence and half the position; a `total` below one half is 0."""
    first, second = _surest(found, a), _surest(found, b, other_than=_surest(found, a))
    sure = sum(one.confidence for one in (first, second) if one)
    value = position(first.box, second.box, relation, near=near, compat=compat) if first and second else 0.0
    total = sure / 4 + value / 2
    return {"total": total if total >= CUT else 0.0, "objects": sure / 2, "position": value}


def numeracy(found: Sequence[Detection], wanted: Mapping[str, int]) -> dict[str, float]:
    """Per class half for being there and half for the exact count, the mean over classes as `total`."""
    counts = {label: len(distinct([one for one in found if one.label == label])) for label in wanted}
    there = sum(counts[label] > 0 for label in wanted) / len(wanted)
    exact = sum(counts[label] == count for label, count in wanted.items()) / len(wanted)
    return {"total": (there + exact) / 2, "there": there, "count": exact}


def distinct(found: Sequence[Detection], twice: float = TWICE) -> list[Detection]:
    """Objects of one class, the surest first, without those that hold or fill an earlier one by more than `twice`."""
    kept: list[Detection] = []
    for one in sorted(found, key=lambda d: -d.confidence):
        box, others = torch.tensor([one.box]), torch.tensor([d.box for d in kept]).view(-1, 4)
        if not bool((containment(box, others, pixels=True) > twice).any()):  # no less than the IoU
            kept.append(one)
    return kept


def attribute(answers: Sequence[float | None]) -> float:
    """The product of the probabilities of yes, one per noun phrase; None where a phrase is missing, which counts 1."""
    return math.prod(1.0 if answer is None else answer for answer in answers)


def three_in_one(attribute: float | None, spatial: float | None, action: float | None) -> float:
    """The mean of the scores that apply to a complex prompt, NaN where none does."""
    scores = [score for score in (attribute, spatial, action) if score is not None]
    return sum(scores) / len(scores) if scores else math.nan


def _surest(found: Sequence[Detection], label: str, other_than: Detection | None = None) -> Detection | None:
    """The most confident object of a class; two of one class are two objects."""
    own = [one for one in found if one.label == label and one is not other_than]
    return max(own, key=lambda one: one.confidence, default=None)
