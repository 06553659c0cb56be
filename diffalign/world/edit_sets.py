"""Drawing edits and what becomes of them: exact results, none, wrong ones, and ones that change too much."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.world.compose import GAP, MARGIN, SIZE_RADII, room, sample_clauses, sample_scene
from diffalign.world.edits import KINDS, Edit, EditVerdict, applied, judge_edit, parse_edit, say_edit
from diffalign.world.grammar import MOST, PLACES, SIZES, caption
from diffalign.world.rendering import render
from diffalign.world.scenes import CANVAS, COLOURS, GROUNDS, SHAPES, Scene, Shape, apart, place_of
from diffalign.world.see import see

OUTCOMES = ("exact", "none", "wrong", "over", "wrecked")
TRIES = 60


@dataclass(frozen=True)
class EditTriple:
    """A scene, what to do with it, and the scene that does it exactly."""

    source: Scene
    edit: Edit
    result: Scene

    @property
    def instruction(self) -> str:
        return say_edit(self.edit)


def sample_edit(rng: random.Random, *, task: str | None = None, smallest: float = 5.5) -> EditTriple:
    """An edit of a random scene in which each object is the only one of its colour and kind."""
    while True:
        kind = rng.choice(("colours", "binding", "position", "two", "hard", "hard"))
        scene = sample_scene(sample_clauses(kind, rng), rng, smallest=smallest)
        looks = [(shape.colour, shape.kind) for shape in scene.shapes]
        if len(set(looks)) == len(looks) and (found := propose(scene, task or rng.choice(KINDS), rng)):
            return EditTriple(scene, *found)


def propose(scene: Scene, task: str, rng: random.Random) -> tuple[Edit, Scene] | None:
    """An edit of one kind that this scene has room for, and what it makes of it."""
    target = rng.choice(scene.shapes)
    named = {"colour": target.colour, "kind": target.kind}
    taken = {(shape.colour, shape.kind) for shape in scene.shapes}
    free = [(colour, kind) for colour in COLOURS for kind in SHAPES if (colour, kind) not in taken]
    colour, kind = rng.choice(free)
    if task == "recolour":
        colours = [c for c in COLOURS if (c, target.kind) not in taken]
        edit = Edit(task, **named, new_colour=rng.choice(colours)) if colours else None
        return (edit, applied(scene, edit)) if edit else None
    if task == "remove":
        edit = Edit(task, **named)
        return (edit, applied(scene, edit)) if len(scene.shapes) > 1 else None
    others = [shape for shape in scene.shapes if task == "add" or shape != target]
    if task == "add":
        if len(scene.shapes) >= MOST:
            return None
        edit = Edit(task, new_colour=colour, new_kind=kind, place=rng.choice([None, None, *PLACES]))
        return _finish(scene, edit, _placed(Shape(kind, colour, 0, 0, rng.uniform(5.5, 9.0)), edit.place, others, rng))
    if task == "replace":
        edit = Edit(task, **named, new_colour=colour, new_kind=kind)
        return _finish(scene, edit, _checked(replace(target, kind=kind, colour=colour), others))
    if task == "resize":
        sizes = [size for size in SIZES if size != target.size]
        edit = Edit(task, **named, size=rng.choice(sizes))
        radius = rng.uniform(*SIZE_RADII[str(edit.size)])
        fits = radius / target.radius > 1.25 or target.radius / radius > 1.25
        return _finish(scene, edit, _checked(replace(target, radius=radius), others)) if fits else None
    places = [place for place in PLACES if place not in place_of(target.x, target.y)]
    edit = Edit(task, **named, place=rng.choice(places))
    moved = _placed(target, edit.place, others, rng, along=edit.place in ("left", "right"))
    return _finish(scene, edit, moved)


def _finish(scene: Scene, edit: Edit, new: Shape | None) -> tuple[Edit, Scene] | None:
    return (edit, applied(scene, edit, new)) if new else None


def _placed(
    shape: Shape, place: str | None, others: Sequence[Shape], rng: random.Random, along: bool | None = None
) -> Shape | None:
    """The shape at a free spot of a place; `along` keeps its height (True) or its left-right position (False)."""
    w, h = shape.half_extent
    for _ in range(TRIES):
        x = rng.uniform(*room(w, place == "left", place == "right"))
        y = rng.uniform(*room(h, place == "top", place == "bottom"))
        moved = replace(shape, x=shape.x if along is False else x, y=shape.y if along else y)
        if found := _checked(moved, others):
            return found
    return None


def _checked(shape: Shape, others: Sequence[Shape]) -> Shape | None:
    """The shape, or None where it leaves the canvas or touches another."""
    left, top, right, bottom = shape.box
    inside = min(left, top) >= MARGIN and max(right, bottom) <= CANVAS - MARGIN
    return shape if inside and all(apart(shape, other, GAP) for other in others) else None


def attempt(triple: EditTriple, outcome: str, rng: random.Random) -> Scene:
    """What an editor may have made of it: one of OUTCOMES."""
    if outcome == "exact":
        return triple.result
    if outcome == "none":
        return triple.source
    if outcome == "wrecked":
        return sample_edit(rng).source
    start = triple.result if outcome == "over" else triple.source
    for _ in range(TRIES):
        task = rng.choice(KINDS)
        found = propose(start, task, rng) if start.shapes else None
        if not found:
            continue
        scene = found[1]
        if outcome == "over" and rng.random() < 0.15:
            return replace(start, ground=rng.choice([grey for grey in GROUNDS if grey != start.ground]))
        verdict = judge_edit(triple.source, scene, triple.edit)
        if outcome == "wrong" or (verdict.followed == 1 and verdict.kept < 1):
            return scene
    return triple.source


def edit_case(triple: EditTriple, seed: int = 0, size: int = 64) -> Case:
    """The instruction and the picture to edit, with the edit and the exact source in the metadata."""
    kept = {"edit": triple.edit.as_dict(), "caption": caption(triple.result)}
    return Case(prompt=triple.instruction, seed=seed, source=picture(render(triple.source, size)), metadata=kept)


def picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] as an image of 8 bits."""
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(levels.numpy())


def pixels(image: Image.Image) -> Tensor:
    """The same back again."""
    import numpy as np

    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


def verify_edits(media: Tensor, cases: Sequence[Case]) -> list[EditVerdict]:
    """One verdict per edited picture of (B, 3, H, W): read from its pixels, those of the source and the instruction."""
    found = []
    for image, case in zip(media, cases, strict=True):
        edit, problem = _edit_of(case)
        if edit is None or case.source is None:
            missing = "the case has no source" if case.source is None else problem
            found.append(EditVerdict(0.0, 0.0, missing, applies=False))
            continue
        before = pixels(case.source)
        was, now = see(before[None])[0], see(image[None])[0]
        if was.problem:
            found.append(EditVerdict(0.0, 0.0, f"the source cannot be read: {was.problem}", applies=False))
        elif now.problem:
            found.append(EditVerdict(0.0, 0.0, now.problem))
        else:
            source, result = Scene(was.shapes, _ground(before)), Scene(now.shapes, _ground(image))
            found.append(judge_edit(source, result, edit, unknown=max(now.blobs - was.blobs, 0)))
    return found


def _edit_of(case: Case) -> tuple[Edit | None, str]:
    """The edit of the case's metadata, else of its instruction; or why there is none."""
    told = case.metadata.get("edit")
    if told is None:
        edit = parse_edit(str(case.metadata.get("instruction", case.prompt)))
        return edit, "" if edit else "the instruction is outside the grammar"
    try:
        return Edit.from_dict(told), ""
    except ConfigError as e:
        return None, f"the metadata's `edit` is none of this world: {e}"


def _ground(image: Tensor) -> float:
    """The grey level of the ground, from the border."""
    edge = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], -1)
    return float(edge.float().median(-1).values.mean())
