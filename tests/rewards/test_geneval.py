from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign import world
from diffalign.cases import Case
from diffalign.errors import ConfigError, InvalidReward
from diffalign.rewards.geneval import GenEval, request_of
from diffalign.rules.geneval import COLOURS, Detection
from diffalign.scoring import ScoreCache, make_reward, score
from diffalign.world.grammar import TAGS, parse, say
from diffalign.world.scenes import Scene, Shape


class Fixed:
    """Finds the same objects in every picture, whose top left pixel says in red how sure it is of them."""

    version = "1"

    def __init__(self, *detections: Detection) -> None:
        self.detections, self.asked = detections, list[Any]()

    def detect(self, media: Tensor, labels: Any) -> list[list[Detection]]:
        self.asked += labels
        return [[d for d in self.detections if d.label in row] for row in labels]


def scenes(count: int, seed: int) -> tuple[list[Case], Tensor]:
    rng = random.Random(seed)
    kinds = (*TAGS, "hard")
    asked = [world.sample_clauses(kinds[i % len(kinds)], rng) for i in range(count)]
    return [Case(prompt=say(c)) for c in asked], world.render_many([world.sample_scene(c, rng) for c in asked])


def dog(confidence: float = 0.95, colour: str | None = "red") -> Detection:
    return Detection("dog", confidence, (0, 0, 10, 10), colour)


@pytest.mark.parametrize(("shift", "count"), [(0, 210), (7, 140), (1, 140)])
def test_verdicts_on_the_shapes_world_agree_with_its_verifier(shift: int, count: int) -> None:
    cases, media = scenes(count, seed=3 + shift)
    media = media.roll(shift, 0)  # other scenes: of the same kind of prompt after 7, of another one after 1
    found = make_reward({"geneval": {"score": "strict"}})(media, cases)
    verdicts = world.verify(media, cases)
    said = [request_of(clauses) is not None for case in cases if (clauses := parse(case.prompt))]
    assert found.valid.tolist() == said
    kinds = Counter(
        clauses.tag for case, valid in zip(cases, said, strict=True) if (clauses := parse(case.prompt)) and valid
    )
    assert set(kinds) == {*TAGS, "hard"}
    assert sum(said) > 0.6 * count
    agreed = [bool(t) == v.strict for t, v, ok in zip(found.total, verdicts, said, strict=True) if ok]
    assert sum(agreed) == len(agreed)
    if shift == 0:
        assert float(found.total.nanmean()) > 0.99


def test_the_soft_score_of_the_shapes_world_is_one_where_the_strict_one_is() -> None:
    cases, media = scenes(140, seed=4)
    media = torch.cat([media, media.roll(7, 0)])
    found = make_reward("geneval")(media, cases * 2)
    strict, soft = found.parts["strict"], found.parts["soft"]
    assert torch.equal(found.total.nan_to_num(-1), soft.nan_to_num(-1))
    assert torch.equal((soft == 1)[found.valid], (strict == 1)[found.valid])
    assert {"count", "colour", "position", "exclude"} <= set(found.parts)


@pytest.mark.parametrize(
    ("prompt", "valid"),
    [
        ("a red circle left of a blue circle", True),
        ("two red circles and a blue square", True),
        ("a circle above a square", True),
        ("a small red circle", False),  # sizes and places are no clauses of GenEval
        ("a red circle on the left", False),
        ("a circle and a red circle", False),  # which is which cannot be said
        ("a red circle left of a red circle", False),
        ("a photo of a dog", False),
    ],
)
def test_prompts_of_the_grammar_are_judged_where_geneval_can_say_them(prompt: str, valid: bool) -> None:
    scene = Scene((Shape("circle", "red", 20, 20, 8), Shape("circle", "blue", 44, 20, 8)))
    found = make_reward("geneval")(world.render(scene)[None], [Case(prompt=prompt)])
    assert bool(found.valid[0]) == valid
    if prompt == "a red circle left of a blue circle":
        assert float(found.total[0]) == 1


def test_metadata_of_geneval_is_judged_with_the_detector_given() -> None:
    detector = Fixed(dog(), dog(0.5))
    case = Case(prompt="a dog", metadata={"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]})
    found = make_reward({"geneval": {"detector": detector}})(torch.rand(2, 3, 20, 20), [case] * 2)
    assert found.parts["strict"].tolist() == [1, 1]
    assert found.total.tolist() == [1, 1]  # the second dog is no less red, and nothing forbids it
    assert detector.asked == [("dog",), ("dog",)]


def test_options_reach_the_rules() -> None:
    two, too_many = [{"class": "dog", "count": 2}], [{"class": "dog", "count": 3}]
    counting = Case(prompt="", metadata={"tag": "counting", "include": two, "exclude": too_many})
    three = Fixed(dog(), dog(0.8), dog(0.31), dog(0.2), dog(0.2))

    def total(**options: Any) -> float:
        made = make_reward({"geneval": {"detector": three, **options}})
        return float(made(torch.rand(1, 3, 20, 20), [counting]).total)

    assert total() == 0.75  # only one is surer than .9
    assert total(counting_confidence=0.5) == 1
    assert total(counting_confidence=0.3) == 0.25
    assert total(counting_confidence=0.1) == 0
    assert total(counting_confidence=0.1, flow_grpo_compat=True) == -0.5
    assert total(counting_confidence=0.1, most=2) == 1
    assert total(counting_confidence=0.1, nms=0.9) == 0.75
    assert total(score="strict") == 0
    assert make_reward({"geneval": {"flow_grpo_compat": True}}).range is None


def test_colours_that_the_detector_does_not_know_are_named_by_clip_and_only_where_they_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = []

    def name(self: Any, image: Tensor, found: Detection) -> str:
        named.append(found)
        return COLOURS[0]

    monkeypatch.setattr("diffalign.detectors.ColourNamer.name", name)
    include = [{"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1}]
    cat = Detection("cat", 0.9, (20, 0, 30, 10))
    reward = make_reward({"geneval": {"detector": Fixed(dog(colour=None), dog(0.5, None), cat)}})
    found = reward(torch.rand(1, 3, 20, 20), [Case(prompt="", metadata={"include": include})])
    assert [one.confidence for one in named] == [0.95]
    assert found.parts["strict"].tolist() == [1]


def test_rows_that_cannot_be_judged_are_invalid_and_stay_out() -> None:
    media = world.render(Scene((Shape("circle", "red", 20, 20, 8),))).repeat(3, 1, 1, 1)
    media[1, 0, 0, 0] = torch.nan
    cases = [Case(prompt="a red circle"), Case(prompt="a red circle"), Case(prompt="a photo of something")]
    found = score(make_reward("geneval"), media, cases)
    assert found.valid.tolist() == [True, False, False]
    assert [math.isnan(t) for t in found.total.tolist()] == [False, True, True]
    assert all(part[1:].isnan().all() for part in found.parts.values())
    with pytest.raises(InvalidReward):
        score(make_reward({"geneval": {"detector": Fixed()}}), media, cases)  # no metadata, and not the shapes world


def test_an_empty_picture_fails_and_keeps_the_terms_of_its_excludes() -> None:
    blank = torch.full((1, 3, 64, 64), 0.94)
    found = make_reward("geneval")(blank, [Case(prompt="a red circle")])
    assert (float(found.parts["strict"]), float(found.parts["count"]), float(found.parts["exclude"])) == (0, 0, 1)


def test_a_wrong_clause_or_an_unknown_class_is_an_error_and_not_a_score() -> None:
    picture = torch.rand(1, 3, 64, 64)
    with pytest.raises(ConfigError, match="the count 0"):
        make_reward("geneval")(picture, [Case(prompt="", metadata={"include": [{"class": "dog", "count": 0}]})])
    with pytest.raises(ConfigError, match="For photographs give detector: facebook/mask2former"):
        make_reward("geneval")(picture, [Case(prompt="", metadata={"include": [{"class": "dog"}]})])


def test_scores_are_cached_by_detector_and_options(tmp_path: Any) -> None:
    cache, (cases, media) = ScoreCache(tmp_path / "c.sqlite"), scenes(7, seed=1)
    valid = int(score(make_reward("geneval"), media, cases, cache=cache).valid.sum())
    score(make_reward("geneval"), media, cases, cache=cache)
    assert len(cache) == valid
    score(make_reward({"geneval": {"score": "strict"}}), media, cases, cache=cache)
    assert len(cache) == 2 * valid
    assert GenEval(detector=type("Nameless", (), {"detect": None, "version": None})()).options["detector"] == "Nameless"
