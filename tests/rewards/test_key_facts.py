"""The reward `key_facts`: what a judge tells of a picture against ordered facts, and style checks of the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from diffalign.cases import Case
from diffalign.errors import ConfigError, UnknownName
from diffalign.judges import wording
from diffalign.rewards.key_facts import KeyFacts, facts_of, split
from diffalign.scoring import ScoreCache, score
from tests.judges.scripted_rubrics import Scripted

MEDIA = torch.full((1, 3, 20, 40), 0.5)


def told(text: str, case: Case, **options: Any) -> Any:
    return KeyFacts(Scripted(lambda question: text), **options)(MEDIA, [case])


def facts(*key_facts: Any) -> Case:
    return Case(prompt="x", metadata={"key_facts": list(key_facts)})


@pytest.mark.parametrize(
    ("text", "worth"),
    [("a, then c", 2 / 3), ("c, then a", 1 / 3), ("nothing", 0), ("a b c", 1), ("a a b c", 3 / 4)],
)
def test_content_of_the_worked_examples(text, worth):
    found = told(text, facts(["a", "b", "c"]))
    assert float(found.total) == pytest.approx(worth)
    assert float(found.parts["content"]) == float(found.parts["fact/1"]) == pytest.approx(worth)


def test_the_judge_is_asked_what_the_picture_shows_and_nothing_about_the_facts():
    judge = Scripted(lambda question: "a cat")
    KeyFacts(judge)(MEDIA, [facts(["secret"])])
    (question,) = judge.asked
    assert question.text == wording.TELL
    assert len(question.images) == 1


def test_facts_are_averaged_and_of_several_references_the_best_counts():
    case = facts([["red circle", "red circle"], ["two red circles"]], "blue square")
    assert float(told("two red circles", case).total) == 0.5
    assert float(told("red circle, blue square, red circle", case).total) == 1


def test_across_facts_the_order_of_all_keywords_counts():
    case = facts(["cat"], ["dog"], ["bird"])
    assert float(told("a bird, a dog, a cat", case).total) == 1
    assert float(told("a bird, a dog, a cat", case, order="across").total) == pytest.approx(1 / 3)
    assert float(told("a cat, a dog, a bird", case, order="across").total) == 1


@pytest.mark.parametrize(
    ("prompt", "right", "worth_wrong", "wrong"),
    [
        ("two red circles", "red circle a1, red circle c3 on white", 0.5, "red circle a1 on white"),
        ("two red circles", "two red circles", 0, "two blue circles"),
        ("a red circle above a blue square", "red circle a1, blue square c3", 2.5 / 3, "blue square a1, red circle c3"),
        ("a blue square below a red circle", "red circle a1, blue square c3", 2.5 / 3, "blue square a1, red circle c3"),
        ("a small red circle", "small red circle d4 on grey", 0, "large red circle d4 on grey"),
        ("a circle and a red square", "blue circle b2, red square g7", 0.5, "blue circle b2, green square g7"),
    ],
)
def test_prompts_of_the_shapes_world_become_facts(prompt, right, worth_wrong, wrong):
    case = Case(prompt=prompt)
    assert float(told(right, case).total) == 1
    assert float(told(wrong, case).total) == pytest.approx(worth_wrong)


def test_other_prompts_are_split_into_clauses_without_fillers():
    assert split("A cat on the mat, two dogs and a cat on the mat.") == [(("cat", "mat"),), (("two", "dogs"),)]
    assert split(" , and the ") == []
    assert facts_of(Case(prompt="")) == []


def test_a_case_without_facts_or_a_silent_judge_is_invalid():
    assert told("a cat", Case(prompt="")).valid.tolist() == [False]
    assert told("a cat", facts()).valid.tolist() == [False]
    assert told(" ", facts(["cat"])).valid.tolist() == [False]
    assert told("<think>a cat</think>", facts(["cat"])).valid.tolist() == [False]
    assert told("<think>a cat</think>a dog", facts(["cat"])).total.tolist() == [0.0]


CHECKS = [{"measure": "aspect", "at_least": 1.5, "weight": 3.0}, {"measure": "brightness", "at_least": 0.9}]


def test_style_is_added_as_the_paper_or_as_the_code_does():
    found = told("a dog", facts(["cat"], ["dog"]), checks=CHECKS)
    assert float(found.total) == pytest.approx((0.5 + 0.75) / 2)
    assert {k: float(v) for k, v in found.parts.items()} == {
        "content": 0.5,
        "style": 0.75,
        "fact/1": 0.0,
        "fact/2": 1.0,
        "check/aspect": 1.0,
        "check/brightness": 0.0,
    }
    summed = KeyFacts(Scripted(lambda question: "a dog"), checks=CHECKS, total="sum")
    assert summed.range == (0.0, 2.0)
    assert float(summed(MEDIA, [facts(["cat"], ["dog"])]).total) == 1.25


@dataclass(frozen=True)
class Read:
    text: str


class Engine:
    version = "1"
    options: dict[str, Any] = {}  # noqa: RUF012

    def read(self, image):
        assert image.size == (40, 20)
        return Read("EXIT only")


def test_a_check_of_text_asks_an_engine():
    checks = [{"measure": "text", "says": "exit"}, {"measure": "text", "says": "enter"}]
    found = told("a sign", facts(["sign"]), checks=checks, engine=Engine())
    assert (float(found.parts["check/text 1"]), float(found.parts["check/text 2"])) == (1.0, 0.0)
    with pytest.raises(ConfigError, match="engine is 'x'"):
        told("a sign", facts(["sign"]), checks=checks, engine="x")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"order": "both"}, ConfigError, "order 'both'"),
        ({"total": "max"}, ConfigError, "total 'max'"),
        ({"checks": "aspect"}, ConfigError, "it is a list of checks"),
        ({"checks": [{"measure": "exec", "at_least": 1.0}]}, UnknownName, "no style check called 'exec'"),
        ({"checks": [{"measure": "aspect", "code": "1/0"}]}, ConfigError, r"checks\[0\]\.code"),
        ({"checks": [7]}, ConfigError, r"checks\[0\] is 7"),
    ],
)
def test_a_wrong_option_is_one_clear_error(options, error, says):
    with pytest.raises(error, match=says):
        KeyFacts(Scripted(lambda question: ""), **options)


@pytest.mark.parametrize(
    "value", [7, "cat", [7], [[]], [[7]], [[["cat"], 7]], [[" "]], [["x"] * 100], [["x"]] * 100, {}]
)
def test_wrong_facts_of_a_case_are_one_clear_error(value):
    with pytest.raises(ConfigError, match="key_facts"):
        told("a cat", Case(prompt="x", metadata={"key_facts": value}))


def test_scores_are_cached_by_judge_and_checks(tmp_path):
    cache, judge = ScoreCache(tmp_path / "c.sqlite"), Scripted(lambda question: "a cat")
    for checks in ([], CHECKS, []):
        score(KeyFacts(judge, checks=checks), MEDIA, [facts(["cat"])], cache=cache)
    assert len(judge.asked) == 2
    with_text = KeyFacts(judge, checks=[{"measure": "text", "says": "exit"}], engine=Engine())
    assert "reads" in str(with_text.version)


def test_a_picture_is_read_once_for_all_checks_of_text():
    seen = []

    class Counting(Engine):
        def read(self, image):
            seen.append(image)
            return super().read(image)

    checks = [{"measure": "text", "says": says} for says in ("exit", "enter", "only")]
    reward = KeyFacts(Scripted(lambda question: "a sign"), checks=checks, engine=Counting())
    reward(MEDIA.repeat(2, 1, 1, 1), [facts(["sign"])] * 2)
    assert len(seen) == 2
