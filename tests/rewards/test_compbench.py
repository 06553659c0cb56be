from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import world
from diffalign.cases import Case
from diffalign.data.prompt_sets import read_prompts
from diffalign.errors import ConfigError
from diffalign.scoring import make_reward, score
from diffalign.world.scenes import Scene, Shape

MEDIA = world.render(Scene((Shape("circle", "red", 20, 20, 8), Shape("square", "blue", 44, 22, 8))))[None]


def case(**metadata: Any) -> Case:
    return Case(prompt="", metadata=metadata)


def spatial(relation: str, *objects: str) -> Case:
    return case(category="spatial", objects=list(objects), relation=relation)


def numbers(**objects: int) -> Case:
    return case(category="numeracy", objects=objects)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (spatial("on the left of", "circle", "square"), 1),
        (spatial("on the right of", "circle", "square"), 0.5),
        (spatial("on the top of", "circle", "square"), 0.5),  # above, but more to the left
        (spatial("next to", "circle", "square"), 1),
        (spatial("on the left of", "circle", "triangle"), 0),
        (numbers(circle=1, square=1), 1),
        (numbers(circle=2, square=1), 0.75),
        (numbers(circle=2), 0.5),
        (numbers(triangle=1), 0),
    ],
)
def test_a_scene_of_the_shapes_world_scores_as_the_rules_say(asked: Case, expected: float) -> None:
    assert float(make_reward("compbench")(MEDIA, [asked]).total) == pytest.approx(expected)


def test_parts_show_what_was_seen_and_rows_of_other_categories_are_invalid() -> None:
    broken = MEDIA.clone()
    broken[0, 0, 0, 0] = torch.inf
    cases = [spatial("near", "circle", "square"), numbers(circle=2), case(category="color"), case(), numbers(circle=1)]
    found = score(make_reward("compbench"), torch.cat([MEDIA] * 4 + [broken]), cases)
    assert found.valid.tolist() == [True, True, False, False, False]
    assert {name: part[:2].tolist() for name, part in found.parts.items() if name in ("objects", "there")} == {
        "objects": [1, pytest.approx(torch.nan, nan_ok=True)],
        "there": [pytest.approx(torch.nan, nan_ok=True), 1],
    }


def test_near_is_in_pixels_of_the_picture() -> None:
    reward = make_reward({"compbench": {"near": 1.0}})
    assert float(reward(MEDIA, [spatial("near", "circle", "square")]).parts["position"]) == pytest.approx(
        1 / 24, abs=0.01
    )


def test_on_top_of_never_scores_a_position_when_compatible() -> None:
    above = world.render(Scene((Shape("circle", "red", 30, 16, 8), Shape("square", "blue", 32, 46, 8))))[None]
    asked = [spatial("on top of", "circle", "square")]
    assert float(make_reward("compbench")(above, asked).total) == 1
    assert float(make_reward({"compbench": {"compat": True}})(above, asked).total) == 0.5


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (spatial("inside", "circle", "square"), "'inside' is no relation"),
        (spatial("near", "circle"), "give the two names"),
        (numbers(circle=0), "give each class its count"),
        (case(category="numeracy", objects=["circle"]), "give each class its count"),
        (numbers(dog=1), "does not know the class 'dog'"),
    ],
)
def test_wrong_metadata_is_one_clear_error(asked: Case, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_reward("compbench")(MEDIA, [asked])


def test_published_prompts_are_judged_from_the_file_to_the_score(tmp_path: Path) -> None:
    """Two scenes: a circle left of a square, and two circles with a square."""
    (tmp_path / "spatial_val.txt").write_text("a circle on the left of a square\na square on the left of a circle\n")
    (tmp_path / "numeracy_val.txt").write_text("two circles and one square\nthree circles\nsome circles\n")
    (tmp_path / "color_val.txt").write_text("a red circle\n")
    beside = world.render(Scene((Shape("circle", "red", 14, 32, 8), Shape("square", "blue", 48, 32, 8))))[None]
    crowd = world.render(
        Scene(
            (Shape("circle", "red", 14, 14, 8), Shape("circle", "red", 14, 48, 8), Shape("square", "blue", 48, 32, 8))
        )
    )[None]
    reward = make_reward("compbench")
    spatial_cases, number_cases = (read_prompts(tmp_path / f"{name}_val.txt") for name in ("spatial", "numeracy"))
    assert reward(beside.expand(2, -1, -1, -1), spatial_cases).total.tolist() == [1.0, 0.5]
    found = reward(crowd.expand(3, -1, -1, -1), number_cases).total
    assert found[:2].tolist() == [1.0, 0.5]
    assert found[2].isnan()
    assert reward(beside, read_prompts(tmp_path / "color_val.txt")).total.isnan().all()
    assert reward(beside, [case(category="Counting")]).total.isnan().all()  # DrawBench has categories too
