"""Edits: what is said is what is read, exact results are exact, and pixels tell the same as scenes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign import world
from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.world.edit_sets import EditTriple, picture
from diffalign.world.edits import CHANGES, KINDS, Edit, EditVerdict, judge_edit, parse_edit, say_edit
from diffalign.world.grammar import PLACES, SIZES
from diffalign.world.scenes import COLOURS, GROUNDS, SHAPES, Scene, Shape

seeds = st.integers(0, 10_000)
colours, kinds = st.sampled_from(list(COLOURS)), st.sampled_from(list(SHAPES))
places, sizes = st.sampled_from(list(PLACES)), st.sampled_from(list(SIZES))
edits = st.one_of(
    st.builds(Edit, st.just("recolour"), colour=colours, kind=kinds, new_colour=colours),
    st.builds(Edit, st.just("resize"), colour=colours, kind=kinds, size=sizes),
    st.builds(Edit, st.just("move"), colour=colours, kind=kinds, place=places),
    st.builds(Edit, st.just("remove"), colour=colours, kind=kinds),
    st.builds(Edit, st.just("replace"), colour=colours, kind=kinds, new_colour=colours, new_kind=kinds),
    st.builds(
        Edit,
        st.just("add"),
        new_colour=colours,
        new_kind=kinds,
        size=st.none() | sizes,
        place=st.none() | places,
    ),
)


def drawn(seed: int, task: str | None = None) -> tuple[EditTriple, random.Random]:
    rng = random.Random(seed)
    return world.sample_edit(rng, task=task), rng


def verdict_of(triple: EditTriple, result: Scene, *, unknown: int = 0) -> EditVerdict:
    return judge_edit(triple.source, result, triple.edit, unknown=unknown)


def seen(triple: EditTriple, result: Scene, size: int) -> EditVerdict:
    (found,) = world.verify_edits(world.render(result, size)[None], [world.edit_case(triple, size=size)])
    return found


@given(edit=edits)
def test_every_edit_is_read_from_its_own_instruction(edit: Edit) -> None:
    assert parse_edit(say_edit(edit)) == edit
    assert Edit.from_dict(edit.as_dict()) == edit


@given(edit=edits)
def test_case_spaces_and_a_full_stop_do_not_matter(edit: Edit) -> None:
    assert parse_edit(f"  {say_edit(edit).upper().replace(' ', '   ')}. ") == edit


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("paint the red circle blue", "recolour"),
        ("turn the red circle blue", "recolour"),
        ("put the red circle on the left", "move"),
        ("draw a small blue square at the top", "add"),
        ("erase the red circle", "remove"),
        ("turn the red circle into a blue square", "replace"),
        ("make the red circle large", "resize"),
    ],
)
def test_other_words_for_the_same_edit_are_read(text: str, task: str) -> None:
    found = parse_edit(text)
    assert found is not None
    assert found.task == task


@settings(max_examples=200)
@given(text=st.text(max_size=60) | st.just("make the purple circle blue") | st.just("x" * 100_000))
def test_anything_else_is_no_edit_and_never_an_exception(text: str) -> None:
    assert parse_edit(text) is None


@pytest.mark.parametrize("task", KINDS)
@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_the_exact_result_has_quality_1_and_no_edit_has_0_but_keeps_everything(task: str, seed: int) -> None:
    triple, _ = drawn(seed, task)
    assert triple.edit.task == task
    exact, none = verdict_of(triple, triple.result), verdict_of(triple, triple.source)
    assert (exact.applies, exact.followed, exact.kept, exact.quality, exact.reason) == (True, 1, 1, 1, "")
    assert (none.followed, none.quality) == (0, 0)
    assert none.kept == 1


@settings(max_examples=60, deadline=None)
@given(seed=seeds, outcome=st.sampled_from(world.OUTCOMES))
def test_the_quality_is_the_smaller_half_and_each_is_in_range(seed: int, outcome: str) -> None:
    triple, rng = drawn(seed)
    found = verdict_of(triple, world.attempt(triple, outcome, rng))
    assert 0 <= found.followed <= 1
    assert 0 <= found.kept <= 1
    assert found.quality == min(found.followed, found.kept)


@settings(max_examples=60, deadline=None)
@given(seed=seeds)
def test_too_much_keeps_less_and_still_follows(seed: int) -> None:
    triple, rng = drawn(seed)
    result = world.attempt(triple, "over", rng)
    found = verdict_of(triple, result)
    if result != triple.source:  # there was room for more
        assert found.kept < 1
        assert found.followed == 1 or result.ground != triple.source.ground


@settings(max_examples=60, deadline=None)
@given(seed=seeds, outcome=st.sampled_from(world.OUTCOMES))
def test_the_order_of_the_objects_changes_nothing(seed: int, outcome: str) -> None:
    triple, rng = drawn(seed)
    result = world.attempt(triple, outcome, rng)

    def shuffled(scene: Scene) -> Scene:
        return replace(scene, shapes=tuple(rng.sample(scene.shapes, len(scene.shapes))))

    found = judge_edit(shuffled(triple.source), shuffled(result), triple.edit)
    first = verdict_of(triple, result)
    assert (found.followed, found.kept) == (first.followed, pytest.approx(first.kept))


@settings(max_examples=100, deadline=None)
@given(seed=seeds, data=st.data())
def test_damage_to_something_else_never_raises_the_quality(seed: int, data: st.DataObject) -> None:
    triple, _ = drawn(seed)
    edit, result = triple.edit, triple.result
    others = [
        k
        for k, shape in enumerate(result.shapes)
        if any(shape == old for old in triple.source.shapes) and (shape.colour, shape.kind) != (edit.colour, edit.kind)
    ]
    before = verdict_of(triple, result).quality
    for step in data.draw(st.lists(st.sampled_from(["ground", "unknown", "colour", "gone"]), min_size=1, max_size=3)):
        unknown = 1 if step == "unknown" else 0
        if step == "ground":
            greys = [grey for grey in GROUNDS if abs(grey - triple.source.ground) > 0.2]
            result = replace(result, ground=greys[0])
        elif step in ("colour", "gone") and others:
            k = others.pop()
            taken = {shape.colour for shape in result.shapes} | {edit.new_colour, edit.colour}
            free = [colour for colour in COLOURS if colour not in taken]
            new = [replace(result.shapes[k], colour=free[0])] if step == "colour" and free else []
            result = replace(result, shapes=(*result.shapes[:k], *new, *result.shapes[k + 1 :]))
            others = [j - (not new and j > k) for j in others]
        after = verdict_of(triple, result, unknown=unknown).quality
        assert after <= before + 1e-9
        before = after if not unknown else before


@pytest.mark.parametrize("size", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_pixels_and_scenes_give_the_same_verdict_on_clean_renderings(size: int) -> None:
    rng, same = random.Random(7), 0
    for number in range(300):
        triple = world.sample_edit(rng)
        result = world.attempt(triple, world.OUTCOMES[number % len(world.OUTCOMES)], rng)
        expected, found = verdict_of(triple, result), seen(triple, result, size)
        same += found.applies and (found.followed, found.kept) == pytest.approx((expected.followed, expected.kept))
    assert same >= 285


@settings(max_examples=30, deadline=None)
@given(seed=seeds, size=st.sampled_from([64, 128]))
def test_the_exact_result_beats_no_edit_from_pixels_too(seed: int, size: int) -> None:
    triple, _ = drawn(seed)
    assert seen(triple, triple.result, size).quality > seen(triple, triple.source, size).quality
    assert seen(triple, triple.source, size).kept == 1


def test_an_instruction_that_names_no_object_or_two_does_not_apply() -> None:
    red = Shape("circle", "red", 20, 20, 7)
    edit = Edit("recolour", colour="red", kind="circle", new_colour="blue")
    for shapes in ((), (red, replace(red, x=45))):
        scene = Scene(shapes, GROUNDS[0])
        assert not judge_edit(scene, scene, edit).applies


@pytest.mark.parametrize(
    "case",
    [
        Case(prompt="make the red circle blue"),
        Case(prompt="make it prettier", source=picture(torch.full((3, 64, 64), 0.5))),
        Case(prompt="make the red circle blue", source=picture(torch.rand(3, 64, 64))),
        Case(prompt="make the red circle blue", source=picture(torch.full((3, 8, 8), 0.5))),
    ],
)
def test_without_a_source_or_an_instruction_of_the_world_no_verdict_applies(case: Case) -> None:
    (found,) = world.verify_edits(torch.full((1, 3, 64, 64), 0.5), [case])
    assert not found.applies
    assert found.reason


def test_the_instruction_in_the_metadata_goes_before_the_prompt_and_the_edit_before_both() -> None:
    triple, _ = drawn(3, "recolour")
    media, bare = world.render(triple.result)[None], world.edit_case(triple)
    for told in ({"instruction": triple.instruction}, {"edit": triple.edit.as_dict(), "instruction": "dance"}):
        (found,) = world.verify_edits(media, [replace(bare, prompt="dance", metadata=told)])
        assert found.quality == 1


def test_a_case_holds_what_the_verifier_needs_and_a_seed() -> None:
    triple, _ = drawn(5)
    case = world.edit_case(triple, seed=9, size=128)
    assert (case.prompt, case.seed) == (triple.instruction, 9)
    assert case.source is not None
    assert case.source.size == (128, 128)
    assert Edit.from_dict(case.metadata["edit"]) == triple.edit


def test_every_edit_has_a_rule_for_what_it_may_change() -> None:
    assert set(CHANGES) | {"add", "remove"} == set(KINDS)


FOREIGN = [
    "make the circle blue",
    ["recolour", "red"],
    {"colour": "red"},
    {"task": "style", "colour": "red", "kind": "circle"},
    {"task": ["recolour"]},
    {"task": "recolour", "instruction": "make it blue"},
    {"task": "recolour", "colour": "red", "kind": "circle"},
    {"task": "recolour", "colour": "red", "kind": "circle", "new_colour": "purple"},
    {"task": "recolour", "colour": ["red"], "kind": "circle", "new_colour": "blue"},
    {"task": "remove", "colour": "red", "kind": "circle", "place": "left"},
    {"task": "move", "colour": "red", "kind": "circle", "place": "centre"},
    {"task": "resize", "colour": "red", "kind": "circle", "size": 2},
    {"task": "remove", "colour": "red", "kind": "circle", 3: "left"},
]


@pytest.mark.parametrize("told", FOREIGN)
def test_an_edit_from_elsewhere_is_refused_and_its_case_is_not_judged(told: Any) -> None:
    with pytest.raises(ConfigError, match="edit"):
        Edit.from_dict(told)
    triple, _ = drawn(1)
    case = world.edit_case(triple)
    [found] = world.verify_edits(world.render(triple.result, 64)[None], [replace(case, metadata={"edit": told})])
    assert not found.applies
    assert "none of this world" in found.reason


def test_names_without_a_value_are_left_out_of_an_edit() -> None:
    told = {"task": "remove", "colour": "red", "kind": "circle", "place": None, "new_colour": None}
    assert Edit.from_dict(told) == Edit("remove", colour="red", kind="circle")
