"""Text and clauses map onto each other; held-out compositions never reach training."""

from __future__ import annotations

import random

import pytest

from diffalign import world
from diffalign.errors import UnknownName
from diffalign.world.compose import HARD, HELD_OUT_PAIRS
from diffalign.world.grammar import TAGS, Clauses, Relation, Want, parse, say
from diffalign.world.promptsets import COUNTS, draw, sample_case
from diffalign.world.scenes import Scene, Shape


@pytest.mark.parametrize("kind", [*TAGS, "hard"])
def test_every_sampled_prompt_parses_back(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(100):
        clauses = world.sample_clauses(kind, rng)
        assert parse(say(clauses)) == clauses
        assert clauses.tag == kind


@pytest.mark.parametrize("template", HARD)
def test_every_hard_template_parses_back(template: str) -> None:
    clauses = world.sample_clauses("hard", random.Random(template), template=template)
    assert parse(say(clauses)) == clauses


def test_the_caption_of_a_scene_is_true_of_it() -> None:
    rng = random.Random(2)
    drawn = [world.sample_scene(world.sample_clauses(kind, rng), rng) for kind in (*TAGS, "hard") for _ in range(5)]
    cases = [world.parse(world.caption(scene)) for scene in drawn]
    assert all(asked and asked.total == len(scene.shapes) for asked, scene in zip(cases, drawn, strict=True))


def test_caption_groups_equal_objects() -> None:
    scene = Scene(
        (Shape("circle", "red", 10, 10, 6), Shape("circle", "red", 40, 10, 6), Shape("square", "blue", 30, 45, 6))
    )
    assert world.caption(scene) == "two red circles and a blue square"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "two circle",
        "a red circles",
        "five red circles",
        "four red circles and a blue square",
        "a red",
        "x" * 9999,
    ],
)
def test_text_outside_the_grammar_is_none(text: str) -> None:
    assert parse(text) is None


def test_words_a_user_would_add_are_understood() -> None:
    expected = Clauses((Want(1, "circle", "red"), Want(1, "square", "blue")), (Relation(0, "left of", 1),))
    assert parse("A red circle is to the left of a blue square.") == expected


@pytest.mark.parametrize("split", list(COUNTS))
def test_the_shipped_prompts_follow_from_seed_0(split: str) -> None:
    assert world.prompts(split) == draw(split, seed=0)


def test_training_prompts_hold_no_held_out_composition_and_held_out_prompts_all_do() -> None:
    assert not any(world.held_out(Clauses.from_dict(c.metadata["clauses"])) for c in world.prompts("train"))
    assert all(world.held_out(Clauses.from_dict(c.metadata["clauses"])) for c in world.prompts("heldout"))


def test_training_scenes_never_show_a_held_out_pair() -> None:
    rng = random.Random(4)
    for _ in range(200):
        clauses = world.sample_clauses(rng.choice(["single", "two", "counting"]), rng)
        if not world.held_out(clauses):
            scene = world.sample_scene(clauses, rng, seen_only=True)
            assert not any((shape.colour, shape.kind) in HELD_OUT_PAIRS for shape in scene.shapes)


def test_held_out_set_has_the_six_kinds_in_equal_parts() -> None:
    tags = [case.metadata["tag"] for case in world.prompts("heldout")]
    assert {tag: tags.count(tag) for tag in TAGS} == dict.fromkeys(TAGS, len(tags) // len(TAGS))


def test_a_sampled_case_follows_from_its_seed() -> None:
    assert sample_case("position", seed=4) == sample_case("position", seed=4)
    assert sample_case("position", seed=4) != sample_case("position", seed=5)


def test_unknown_prompt_set_names_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="heldout"):
        world.prompts("held-out")
