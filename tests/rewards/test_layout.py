from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign import world
from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.scoring import ScoreCache, make_reward, score
from diffalign.world.scenes import CANVAS, Scene, Shape

METRICS = ("vision_r1", "vlm_r1", "od_length")


def case(*boxes: tuple[str, Any]) -> Case:
    return Case(prompt="", metadata={"boxes": [{"label": label, "box": box} for label, box in boxes]})


def asked(scene: Scene, dx: float = 0.0) -> Case:
    rows = [(s.kind, [side / CANVAS + (dx if k % 2 == 0 else 0) for k, side in enumerate(s.box)]) for s in scene.shapes]
    return case(*rows)


def scenes(count: int) -> list[Scene]:
    rng = random.Random(5)
    return [world.sample_scene(world.sample_clauses("hard", rng), rng) for _ in range(count)]


SCENE = Scene((Shape("circle", "red", 20, 20, 10), Shape("square", "blue", 44, 40, 10)))
MEDIA = world.render(SCENE)[None]


def total(media: Tensor, cases: list[Case], **options: Any) -> list[float]:
    found: list[float] = make_reward({"layout": options})(media, cases).total.tolist()
    return found


@pytest.mark.parametrize("metric", METRICS)
def test_scenes_score_high_on_their_own_layout_and_low_on_that_of_others(metric: str) -> None:
    drawn = scenes(40)
    media, cases = world.render_many(drawn), [asked(scene) for scene in drawn]
    own, other = total(media, cases, metric=metric), total(media.roll(1, 0), cases, metric=metric)
    assert min(own) > 0.6
    assert sum(own) / 40 > 0.85
    assert sum(other) / 40 < 0.35


@pytest.mark.parametrize("metric", METRICS)
def test_the_score_falls_as_the_layout_moves_away(metric: str) -> None:
    found = [total(MEDIA, [asked(SCENE, dx)], metric=metric)[0] for dx in (0.0, 0.04, 0.08, 0.16)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


@pytest.mark.parametrize("metric", METRICS)
def test_the_size_of_the_picture_does_not_matter(metric: str) -> None:
    large = torch.nn.functional.interpolate(MEDIA, scale_factor=3, mode="bilinear")
    assert total(large, [asked(SCENE)], metric=metric) == pytest.approx(
        total(MEDIA, [asked(SCENE)], metric=metric), abs=0.1
    )


def test_missing_and_surplus_objects_cost() -> None:
    circle = ("circle", [10 / 64, 10 / 64, 30 / 64, 30 / 64])
    one, three = case(circle), case(circle, ("square", [0.5, 0.5, 0.9, 0.9]), ("triangle", [0.0, 0.7, 0.2, 0.9]))
    alone = world.render(Scene(SCENE.shapes[:1]))[None]
    crowd = world.render(Scene((SCENE.shapes[0], Shape("circle", "red", 46, 46, 10))))[None]
    for metric in METRICS:
        exact, short, extra = (total(m, [c], metric=metric)[0] for m, c in ((alone, one), (alone, three), (crowd, one)))
        assert exact > 0.85
        assert short < exact
        assert extra < exact
    assert total(crowd, [one], precision_over="matched")[0] == pytest.approx(total(alone, [one])[0], abs=0.05)


def test_a_step_moves_the_stage_and_with_it_the_key_of_the_cache(tmp_path: Any) -> None:
    near = [asked(SCENE, 0.03)]
    reward: Any = make_reward({"layout": {"step": 0}})
    cache = ScoreCache(tmp_path / "c.sqlite")
    first = float(score(reward, MEDIA, near, cache=cache).total)
    reward.step = 1500
    assert reward.options["strictness"] == "second"
    assert float(score(reward, MEDIA, near, cache=cache).total) < first
    assert len(cache) == 2
    assert total(MEDIA, near, strictness="second") == [float(score(reward, MEDIA, near).total)]


def test_no_object_found_scores_zero_and_an_unreadable_row_is_invalid() -> None:
    blank = torch.full_like(MEDIA, 0.94)
    broken = MEDIA.clone()
    broken[0, 0, 0, 0] = torch.nan
    media = torch.cat([blank, broken, MEDIA, MEDIA, MEDIA])
    cases = [asked(SCENE), asked(SCENE), Case(prompt="a circle"), case(), asked(SCENE)]
    for metric in METRICS:
        found = score(make_reward({"layout": {"metric": metric}}), media, cases)
        assert found.valid.tolist() == [True, False, False, False, True]
        assert float(found.total[0]) == 0


def test_parts_belong_to_the_metric() -> None:
    names = {m: set(make_reward({"layout": {"metric": m}})(MEDIA, [asked(SCENE)]).parts) for m in METRICS}
    assert names == {
        "vision_r1": {"precision", "recall"},
        "vlm_r1": {"overlap", "label", "completeness"},
        "od_length": {"map"},
    }


@pytest.mark.parametrize(
    ("boxes", "says"),
    [
        ("circle", "boxes are a list of"),
        ([{"box": [0, 0, 1, 1]}], r"boxes\[0\] is .* needs a 'label'"),
        ([{"label": "circle", "box": [0, 0, 20, 20]}], "in shares of the picture"),
        ([{"label": "circle", "box": [0.5, 0, 0.2, 1]}], "left before right"),
        ([{"label": "circle", "box": [0, 0, 1]}], r"write \[left, top, right, bottom\]"),
    ],
)
def test_a_wrong_layout_is_one_clear_error(boxes: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_reward("layout")(MEDIA, [Case(prompt="", metadata={"boxes": boxes})])
