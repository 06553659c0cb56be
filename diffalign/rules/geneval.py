"""GenEval's verdict on what a detector found, and the soft score that Flow-GRPO trains with.

Dhruba Ghosh et al.: "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment", 2023 (arXiv
2310.11513); Jie Liu et al.: "Flow-GRPO: Training Flow Matching Models via Online RL", 2025 (arXiv 2505.05470).

A request has clauses: all of `include` must hold, none of `exclude`. An include wants at least `count` objects of a
class, and looks for colour and position at its `count` most confident ones only.

Where we differ: the soft score has exactly one term a clause, each in [0, 1], and counts excludes; a relation holds
only where both of its sides hold, count and colour included. It is 1 exactly where the verdict is a pass: more objects
than an include wants cost nothing, unless an exclude of `count + 1` of the same class makes the count exact.
`flow_grpo_compat` brings back the published score: counts that are always exact, terms below 0 where too many objects
are found, a failed relation that adds a 0 and then a 1, excludes that do not count, and a verdict that wants exact
counts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.rules.boxes import iou

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
COUNTING = "counting"  # the task whose objects must be found with more confidence
MARGIN = 0.1  # share of both sizes that an offset has to exceed
CONE = 0.5  # share of the distance that must lie along the axis of a relation

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One object found in a picture; `box` is left, top, right, bottom in pixels, y down."""

    label: str
    confidence: float
    box: Box
    colour: str | None = None  # None: not looked at
    mask: Tensor | None = field(default=None, repr=False, compare=False)  # (H, W) bool


@dataclass(frozen=True)
class Include:
    """At least `count` objects of a class, of a colour, in a relation to those of an earlier include."""

    label: str
    count: int = 1
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Exclude:
    """Fewer than `count` objects of a class."""

    label: str
    count: int


@dataclass(frozen=True)
class Request:
    """What a picture should show."""

    include: tuple[Include, ...]
    exclude: tuple[Exclude, ...] = ()
    tag: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """Every class that a detector has to look for."""
        wanted, unwanted = (want.label for want in self.include), (clause.label for clause in self.exclude)
        return tuple(dict.fromkeys((*wanted, *unwanted)))


@dataclass(frozen=True)
class Verdict:
    """Whether every clause holds, and how nearly."""

    strict: bool
    terms: tuple[tuple[str, float], ...]  # (kind of clause, value); the kinds are count, colour, position, exclude

    @property
    def soft(self) -> float:
        return sum(value for _, value in self.terms) / len(self.terms) if self.terms else 0.0

    def by_kind(self) -> dict[str, float]:
        """The mean of the terms of each kind."""
        groups: dict[str, list[float]] = {}
        for kind, value in self.terms:
            groups.setdefault(kind, []).append(value)
        return {kind: sum(values) / len(values) for kind, values in groups.items()}


def read_request(metadata: Mapping[str, Any]) -> Request:
    """The clauses of a row of GenEval's metadata: `include`, `exclude` and `tag`."""
    rows = metadata.get("include", [])
    include = tuple(_include(row, k) for k, row in enumerate(_rows(rows, "include")))
    exclude = tuple(_exclude(row, k) for k, row in enumerate(_rows(metadata.get("exclude", []), "exclude")))
    if not include and not exclude:
        raise ConfigError("GenEval metadata has neither 'include' nor 'exclude', so it asks for nothing.")
    return Request(include, exclude, str(metadata.get("tag", "")))


def select(
    request: Request,
    detections: Iterable[Detection],
    *,
    confidence: float = 0.3,
    counting_confidence: float = 0.9,
    most: int = 16,
    nms: float = 1.0,
) -> dict[str, list[Detection]]:
    """The detections that count, by class, most confident first; `nms` 1 keeps boxes however much they overlap."""
    least = counting_confidence if request.tag == COUNTING else confidence
    kept: dict[str, list[Detection]] = {label: [] for label in request.labels}
    for found in sorted(detections, key=lambda d: -d.confidence):
        if found.label in kept and found.confidence > least:
            kept[found.label].append(found)
    return {label: _apart(found[:most], nms) for label, found in kept.items()}


def relations(a: Box, b: Box, margin: float = MARGIN) -> set[str]:
    """Every relation of `a` to `b`; two may hold, or none."""
    offset = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
    sizes = [abs(a[k + 2] - a[k]) + abs(b[k + 2] - b[k]) for k in (0, 1)]
    rest = [math.copysign(max(abs(o) - margin * s, 0.0), o) for o, s in zip(offset, sizes, strict=True)]
    if max(map(abs, rest)) < 1e-3:
        return set()
    dx, dy = (r / math.hypot(*offset) for r in rest)
    tests = zip(RELATIONS, (dx < -CONE, dx > CONE, dy < -CONE, dy > CONE), strict=True)
    return {name for name, holds in tests if holds}


def judge(request: Request, found: Mapping[str, Sequence[Detection]], *, flow_grpo_compat: bool = False) -> Verdict:
    """Hold what `select` kept against what was asked; objects of a coloured include carry their colours."""
    groups = _groups(request, found, exact=flow_grpo_compat)
    if flow_grpo_compat:
        return Verdict(None not in groups, tuple(_published_terms(request, found, groups)))
    absent = [len(found.get(clause.label, ())) < clause.count for clause in request.exclude]
    terms = [*_terms(request, found, groups), *(("exclude", float(holds)) for holds in absent)]
    return Verdict(None not in groups and all(absent), tuple(terms))


def task_scores(rows: Iterable[tuple[str, float]]) -> tuple[dict[str, float], float]:
    """The mean of each task from (tag, score) pairs, and the mean of those means; NaN scores do not count."""
    groups: dict[str, list[float]] = defaultdict(list)
    for tag, score in rows:
        if not math.isnan(score):
            groups[tag].append(score)
    tasks = {tag: sum(scores) / len(scores) for tag, scores in groups.items()}
    return tasks, sum(tasks.values()) / len(tasks) if tasks else math.nan


def _groups(
    request: Request, found: Mapping[str, Sequence[Detection]], *, exact: bool
) -> list[Sequence[Detection] | None]:
    """The objects that fulfil each include, None where they do not; `exact` counts, or those the request makes so."""
    groups: list[Sequence[Detection] | None] = []
    for want in request.include:
        objects = found.get(want.label, ())
        objects = objects if exact or _is_exact(request, want) else objects[: want.count]
        fits = len(objects) == want.count and _coloured(want, objects) == want.count
        groups.append(objects if fits and _placed(want, objects, groups) else None)
    return groups


def _is_exact(request: Request, want: Include) -> bool:
    """Whether an exclude forbids one more than the include wants, as prompts that count have it."""
    return Exclude(want.label, want.count + 1) in request.exclude


def _coloured(want: Include, objects: Sequence[Detection]) -> int:
    return sum(want.colour in (None, found.colour) for found in objects)


def _placed(want: Include, objects: Sequence[Detection], groups: Sequence[Sequence[Detection] | None]) -> bool:
    """Whether every object stands in the relation to every one of the target."""
    if want.position is None:
        return True
    relation, target = want.position
    others = groups[target]
    return others is not None and all(relation in relations(a.box, b.box) for a in objects for b in others)


def _terms(
    request: Request, found: Mapping[str, Sequence[Detection]], groups: Sequence[Sequence[Detection] | None]
) -> Iterable[tuple[str, float]]:
    """One term a clause, in [0, 1]; colour and position are 0 where the count is wrong."""
    for want, group in zip(request.include, groups, strict=True):
        objects = found.get(want.label, ())
        objects = objects if _is_exact(request, want) else objects[: want.count]
        yield "count", max(0.0, 1 - abs(want.count - len(objects)) / want.count)
        if want.colour:
            yield "colour", _coloured(want, objects) / want.count if len(objects) == want.count else 0.0
        if want.position:
            yield "position", float(group is not None)


def _published_terms(
    request: Request, found: Mapping[str, Sequence[Detection]], groups: Sequence[Sequence[Detection] | None]
) -> Iterable[tuple[str, float]]:
    """The terms of Flow-GRPO's reward as its code has them."""
    for want in request.include:
        objects = found.get(want.label, ())
        yield "count", 1 - abs(want.count - len(objects)) / want.count
        if len(objects) != want.count:
            if want.colour or want.position:
                yield "colour" if want.colour else "position", 0.0
            continue
        right = _coloured(want, objects)
        if want.colour:
            yield "colour", 1 - abs(want.count - right) / want.count
        if want.position and right == want.count:
            lost = groups[want.position[1]] is None
            if lost or not _placed(want, objects, groups):
                yield "position", 0.0
            if not lost:
                yield "position", 1.0


def _apart(found: list[Detection], nms: float) -> list[Detection]:
    """Without the boxes that overlap a more confident one by `nms` or more, counting their last pixels."""
    kept: list[Detection] = []
    for one in found:
        box = torch.tensor([one.box])
        if nms >= 1 or not kept or float(iou(box, torch.tensor([d.box for d in kept]), pixels=True).max()) < nms:
            kept.append(one)
    return kept


def _rows(rows: Any, name: str) -> Sequence[Any]:
    if not isinstance(rows, list | tuple):
        raise ConfigError(f"GenEval metadata has '{name}' {rows!r}, but it is a list of clauses.")
    return rows


def _include(row: Any, place: int) -> Include:
    label, count = _named(row, f"include[{place}]", ("class", "count", "color", "position"))
    colour, position = row.get("color"), row.get("position")
    if colour is not None and colour not in COLOURS:
        raise ConfigError(f"include[{place}] has the color {colour!r}; GenEval's are {', '.join(COLOURS)}.")
    if position is not None:
        position = _position(position, place)
    return Include(label, count, colour, position)


def _exclude(row: Any, place: int) -> Exclude:
    return Exclude(*_named(row, f"exclude[{place}]", ("class", "count")))


def _named(row: Any, where: str, keys: Sequence[str]) -> tuple[str, int]:
    """Class and count of a clause."""
    if not isinstance(row, Mapping) or not isinstance(row.get("class"), str) or not row["class"].strip():
        raise ConfigError(f"{where} is {row!r}, but a clause is an object with the name of a 'class'.")
    if unknown := [str(key) for key in row if key not in keys]:
        raise ConfigError(f"{where} has the unknown key '{unknown[0]}'. A clause knows {', '.join(keys)}.")
    count = row.get("count", 1)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"{where} has the count {count!r}, but a count is a whole number from 1 on.")
    return row["class"], count


def _position(given: Any, place: int) -> tuple[str, int]:
    if not isinstance(given, list | tuple) or len(given) != 2 or given[0] not in RELATIONS:
        raise ConfigError(
            f"include[{place}] has the position {given!r}; write [relation, index of an earlier include], "
            f"the relation one of {', '.join(RELATIONS)}."
        )
    target = given[1]
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < place:
        raise ConfigError(
            f"include[{place}] stands in a relation to include[{target}], but only earlier ones can be named."
        )
    return given[0], target
