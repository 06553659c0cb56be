"""Edits of the shapes world: instruction <-> edit, exact results, and how good an edit is.

An edit has one target. Its quality has two halves, as editing benchmarks ask for: `followed`, whether the instruction
was carried out, and `kept`, whether everything else stayed as it was. The quality is the smaller of the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffalign.errors import ConfigError
from diffalign.world.grammar import PLACES, SIZES
from diffalign.world.scenes import COLOURS, SHAPES, Scene, Shape, place_of, size_of

KINDS = ("recolour", "move", "add", "remove", "replace", "resize")
SHIFT = 5.0  # pixels that a centre may move and still be where it was
GROWTH = 1.2  # factor that a radius may change by and still be the same
GREY = 0.12  # that the ground may change by
LOST = 3.0  # what an unmatched object costs, in the units of `_distance`

_SIZE = rf"(?:(?P<size>{'|'.join(SIZES)}) )?"
_COLOUR = "|".join(COLOURS)
_KIND = "|".join(SHAPES)
_TARGET = rf"the (?P<colour>{_COLOUR}) (?P<kind>{_KIND})"
_NEW = rf"(?P<new_colour>{_COLOUR}) (?P<new_kind>{_KIND})"
_FORMS = {
    "recolour": rf"(?:make|paint|turn|colou?r) {_TARGET} (?P<new_colour>{_COLOUR})",
    "resize": rf"make {_TARGET} (?P<size>{'|'.join(SIZES)})",
    "move": rf"(?:move|put) {_TARGET} (?:to the|at the|on the) (?P<place>{'|'.join(PLACES)})",
    "add": rf"(?:add|draw) an? {_SIZE}{_NEW}(?: (?:at|on) the (?P<place>{'|'.join(PLACES)}))?",
    "remove": rf"(?:remove|delete|erase) {_TARGET}",
    "replace": rf"(?:replace {_TARGET} with|turn {_TARGET.replace('P<', 'P<_')} into) an? {_NEW}",
}
_READERS = {kind: re.compile(form) for kind, form in _FORMS.items()}
_WHICH, _WHAT = ("colour", "kind"), ("new_colour", "new_kind")
NEEDS = {  # what an edit of each kind says
    "recolour": (*_WHICH, "new_colour"),
    "move": (*_WHICH, "place"),
    "add": _WHAT,
    "remove": _WHICH,
    "replace": (*_WHICH, *_WHAT),
    "resize": (*_WHICH, "size"),
}
MAY_SAY = {"add": ("size", "place")}
WORDS = {  # how it may say it
    **dict.fromkeys(("colour", "new_colour"), tuple(COLOURS)),
    **dict.fromkeys(("kind", "new_kind"), SHAPES),
    "size": SIZES,
    "place": tuple(PLACES),
}


@dataclass(frozen=True)
class Edit:
    """One change: `colour` and `kind` say which object, the others what becomes of it."""

    task: str  # one of KINDS
    colour: str | None = None
    kind: str | None = None
    new_colour: str | None = None
    new_kind: str | None = None
    size: str | None = None
    place: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: Any) -> Edit:
        """The edit that `as_dict` wrote, or ConfigError where it is none of this world."""
        task = data.get("task") if isinstance(data, Mapping) else None
        if not isinstance(task, str) or task not in NEEDS:
            raise ConfigError(
                f"{str(data)[:80]!r} is no edit; an edit is a mapping whose `task` is {', '.join(KINDS)}."
            )
        told = {name: value for name, value in data.items() if name != "task" and value is not None}
        known = {*NEEDS[task], *MAY_SAY.get(task, ())}
        if odd := [name for name, value in told.items() if name not in known or not _is_word(name, value)]:
            raise ConfigError(
                f"the edit '{task}' has {odd[0]} = {str(told[odd[0]])[:80]!r}. It takes "
                + "; ".join(f"{name}: {', '.join(WORDS[name])}" for name in sorted(known))
                + "."
            )
        if lacking := [name for name in NEEDS[task] if name not in told]:
            raise ConfigError(f"the edit '{task}' has no `{lacking[0]}`, so nobody can say what it asks for.")
        return cls(task, **told)


def _is_word(name: str, value: Any) -> bool:
    return isinstance(value, str) and value in WORDS[name]


@dataclass(frozen=True)
class EditVerdict:
    """How good an edit is; without `applies` the instruction or the source is outside the world."""

    followed: float  # in [0, 1]
    kept: float  # in [0, 1]
    reason: str = ""
    applies: bool = True

    @property
    def quality(self) -> float:
        return min(self.followed, self.kept)


def say_edit(edit: Edit) -> str:
    """The canonical instruction of an edit; `parse_edit` takes it back."""
    target, new = f"the {edit.colour} {edit.kind}", f"{edit.new_colour} {edit.new_kind}"
    if edit.task == "recolour":
        return f"make {target} {edit.new_colour}"
    if edit.task == "resize":
        return f"make {target} {edit.size}"
    if edit.task == "move":
        return f"move {target} to the {edit.place}"
    if edit.task == "remove":
        return f"remove {target}"
    if edit.task == "replace":
        return f"replace {target} with a {new}"
    words = ["add a", edit.size, new, PLACES[edit.place] if edit.place else None]
    return " ".join(word for word in words if word)


def parse_edit(text: str) -> Edit | None:
    """The edit that an instruction asks for, or None where it is outside the grammar."""
    said = " ".join(text[:400].lower().strip(" .!").split())
    for task, reader in _READERS.items():
        if found := reader.fullmatch(said):
            named = {name.lstrip("_"): value for name, value in found.groupdict().items() if value}
            return Edit(task, **named)
    return None


def judge_edit(source: Scene, result: Scene, edit: Edit, *, unknown: int = 0) -> EditVerdict:
    """Hold what an edit made of a scene against what was asked; `unknown` things in the result count as extra."""
    targets = [k for k, shape in enumerate(source.shapes) if (shape.colour, shape.kind) == (edit.colour, edit.kind)]
    if edit.task != "add" and len(targets) != 1:
        return EditVerdict(0.0, 0.0, f"the source has {len(targets)} objects of that kind", applies=False)
    target = targets[0] if targets else None
    partner, extra = _match(source.shapes, result.shapes, target, edit)
    followed, used = _followed(source, result, edit, None if target is None else partner[target], extra)
    kept: list[float] = [1.0 if abs(source.ground - result.ground) <= GREY else 0.0]
    for k, shape in enumerate(source.shapes):
        if k != target:
            kept.append(_sameness(shape, partner[k], set()))
        elif edit.task != "remove":
            kept.append(_sameness(shape, partner[k], CHANGES[edit.task]))
    kept += [0.0] * (len(extra) - used + unknown)
    share = sum(kept) / len(kept)
    reason = "" if followed == share == 1 else f"followed {followed:g}, kept {share:.2f}"
    return EditVerdict(followed, share, reason)


CHANGES: dict[str, set[str]] = {  # the traits of the target that an edit may change
    "recolour": {"colour"},
    "move": {"place"},
    "replace": {"colour", "kind", "size"},
    "resize": {"size"},
}


def _match(
    source: Sequence[Shape], result: Sequence[Shape], target: int | None, edit: Edit
) -> tuple[list[Shape | None], list[Shape]]:
    """The object of the result that each of the source became, None where it is gone, and those that are new."""
    from scipy.optimize import linear_sum_assignment

    free = {target: CHANGES.get(edit.task, set())}
    costs = [[_distance(a, b, free.get(k, set())) for b in result] + [LOST] * len(source) for k, a in enumerate(source)]
    if not costs:
        return [], list(result)
    chosen = [int(j) for j in linear_sum_assignment(costs)[1]]
    partner = [result[j] if j < len(result) else None for j in chosen]
    return partner, [shape for j, shape in enumerate(result) if j not in chosen]


def _distance(a: Shape, b: Shape, free: set[str]) -> float:
    """How unlike two objects are, but for the traits that may change; those count a little, to break ties."""
    far = ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5 / 16
    unlike = {"place": min(far, 2.0), "colour": 1.5 * (a.colour != b.colour), "kind": 1.5 * (a.kind != b.kind)}
    return float(sum(value * (0.1 if name in free else 1.0) for name, value in unlike.items()))


def traits_kept(shape: Shape, found: Shape | None) -> dict[str, bool]:
    """Which traits of an object another one shares; none where it is gone."""
    if found is None:
        return dict.fromkeys(("place", "kind", "colour", "size"), False)
    near = abs(shape.x - found.x) <= SHIFT and abs(shape.y - found.y) <= SHIFT
    ratio = shape.radius / max(found.radius, 1e-6)
    same = {"place": near, "kind": shape.kind == found.kind, "colour": shape.colour == found.colour}
    return {**same, "size": 1 / GROWTH <= ratio <= GROWTH}


def _sameness(shape: Shape, found: Shape | None, free: set[str]) -> float:
    """The share of the traits that stayed, of those that had to."""
    held = [value for name, value in traits_kept(shape, found).items() if name not in free]
    return sum(held) / len(held)


def _followed(
    source: Scene, result: Scene, edit: Edit, found: Shape | None, extra: Sequence[Shape]
) -> tuple[float, int]:
    """How far the instruction was carried out, and how many new objects that accounts for."""
    if edit.task == "add":
        marks = [_suits(shape, edit) for shape in extra]
        return (max(marks), 1) if marks and max(marks) > 0 else (0.0, 0)
    if edit.task == "remove":
        return (1.0 if found is None else 0.0), 0
    if found is None:
        return 0.0, 0
    was = next(s for s in source.shapes if (s.colour, s.kind) == (edit.colour, edit.kind))
    if edit.task == "recolour":
        return float(found.colour == edit.new_colour), 0
    if edit.task == "replace":
        changed = (found.colour, found.kind) != (was.colour, was.kind)
        return (((found.colour == edit.new_colour) + (found.kind == edit.new_kind)) / 2 if changed else 0.0), 0
    if edit.task == "resize":
        grown = found.radius / was.radius if edit.size == "large" else was.radius / max(found.radius, 1e-6)
        return (1.0 if size_of(found.radius) == edit.size else 0.5 * (grown > GROWTH)), 0
    assert edit.place is not None
    forward = {"left": was.x - found.x, "right": found.x - was.x, "top": was.y - found.y, "bottom": found.y - was.y}
    arrived = edit.place in place_of(found.x, found.y)
    return (1.0 if arrived else 0.5 * (forward[edit.place] > SHIFT)), 0


def _suits(shape: Shape, edit: Edit) -> float:
    """How well a new object is the one to add: kind and colour first, then size and place."""
    tests = [shape.kind == edit.new_kind, shape.colour == edit.new_colour]
    if not any(tests):
        return 0.0
    tests += [shape.size == edit.size] if edit.size else []
    tests += [edit.place in place_of(shape.x, shape.y)] if edit.place else []
    return sum(tests) / len(tests)


def applied(scene: Scene, edit: Edit, new: Shape | None = None) -> Scene:
    """The scene after the edit; `new` is the object that is added, moved or resized to."""
    if edit.task == "add":
        assert new is not None
        return replace(scene, shapes=(*scene.shapes, new))
    shapes = []
    for shape in scene.shapes:
        if (shape.colour, shape.kind) != (edit.colour, edit.kind):
            shapes.append(shape)
        elif edit.task == "recolour":
            shapes.append(replace(shape, colour=str(edit.new_colour)))
        elif edit.task != "remove":
            assert new is not None
            shapes.append(new)
    return replace(scene, shapes=tuple(shapes))
