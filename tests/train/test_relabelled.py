"""Scores in prompts: every pair twice, tags by quantiles, plain prompts that stay."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.cases import Case
from diffalign.data.pictures import Picture
from diffalign.errors import ConfigError
from diffalign.train import evaluate
from diffalign.train.known import Known
from diffalign.train.relabelled import RelabelConfig, highest, relabelled, tag
from tests.train.test_known import search_run
from tests.train.tiny_runs import run, settings


def known(*scores: float, prompt: str = "red cube") -> Known:
    pictures = tuple(Picture(f"{prompt}-{k}.png", "here", Path("x")) for k in range(len(scores)))
    return Known(Case(prompt=prompt), pictures, tuple(scores))


def entries(count: int) -> list[Known]:
    draws = torch.Generator().manual_seed(0)
    return [known(*sorted(torch.rand(3, generator=draws).tolist(), reverse=True), prompt=f"p{k}") for k in range(count)]


ALL = RelabelConfig(enabled=True, plain=0.0)


def test_every_pair_comes_twice_and_the_second_is_the_first_turned_round() -> None:
    given = entries(5)
    found = relabelled(given, ALL, 0)
    assert len(found) == 10
    for k, each in enumerate(given):
        high, low = found[2 * k : 2 * k + 2]
        assert high.pictures == (each.pictures[0], each.pictures[-1])
        assert low.pictures == high.pictures[::-1]
        assert high.scores == low.scores == (1.0, 0.0)
        assert float(high.case.prompt.split()[1]) > float(low.case.prompt.split()[1])
        assert high.case.prompt.endswith(f"of 10, p{k}")


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30))
def test_tags_keep_the_order_of_scores_and_lie_between_1_and_10(scores: list[float]) -> None:
    every = sorted(scores)
    tags = [float(tag(score, every, 3)) for score in every]
    assert tags == sorted(tags)
    assert 1 <= tags[0] <= tags[-1] <= 10
    assert sum(tags) / len(tags) == pytest.approx(5.5, abs=2e-3)


def test_a_share_keeps_its_plain_prompt_and_its_own_order() -> None:
    found = relabelled(entries(400), RelabelConfig(enabled=True, plain=0.25), 3)
    plain = [each for each in found if not each.case.prompt.startswith("quality")]
    assert len(plain) / 400 == pytest.approx(0.25, abs=0.08)
    assert all(each.pictures[0].content.endswith("-0.png") for each in plain)  # type: ignore[union-attr]
    assert relabelled(entries(400), RelabelConfig(enabled=True, plain=0.25), 3) == found


def test_a_picture_alone_has_its_own_tag_and_the_highest_is_told() -> None:
    found = relabelled([known(1.0), known(0.0, prompt="x"), known(0.5, prompt="y")], ALL, 0)
    assert [each.case.prompt for each in found] == [
        "quality 8.5 of 10, red cube",
        "quality 2.5 of 10, x",
        "quality 5.5 of 10, y",
    ]
    assert all(len(each.pictures) == 1 for each in found)
    assert highest(found, ALL) == "8.5"


def test_scores_of_different_files_have_ladders_of_their_own() -> None:
    other = known(-1.0, -2.0, prompt="x")
    moved = replace(other, pictures=tuple(replace(p, file=Path("y")) for p in other.pictures))
    found = relabelled([known(0.9, 0.1), moved], ALL, 0)
    assert [each.case.prompt.split()[1] for each in found] == ["7.8", "3.2"] * 2


def test_pairs_with_one_tag_are_left_out() -> None:
    with pytest.warns(UserWarning, match="1 of 2 pairs have the same tag"):
        found = relabelled(
            [known(1.0, 0.0), known(0.5, 0.5, prompt="x")], RelabelConfig(enabled=True, plain=0, digits=0), 0
        )
    assert {each.case.prompt.split(", ")[1] for each in found} == {"red cube"}
    with warnings.catch_warnings(action="ignore"), pytest.raises(ConfigError, match="no pair is left"):
        relabelled([known(0.5, 0.5)], ALL, 0)


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_it_trains_and_evaluates_with_a_tag_that_judges_do_not_see(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = set(), evaluate.Driver

    def driver(pipe: Any, cases: Any, **told: Any) -> Any:
        asked.update(case.prompt for case in cases if case.prompt.startswith("quality"))
        return real(pipe, cases, **told)

    monkeypatch.setattr(evaluate, "Driver", driver)
    folder = search_run(tmp_path / "search")
    told: dict[str, Any] = {"enabled": True, "plain": 0.0}
    (tmp_path / "other.txt").write_text("green tree\ngrey boat\n")
    settings(tmp_path)
    found, _ = run(
        tmp_path,
        objective=objective,
        prompts=None,
        data={"from_search": [str(folder)]},
        relabel=told,
        group_size=2,
        groups=2,
        evaluate={"prompts": str(tmp_path / "other.txt"), "before": "quality 10.0 of 10, ", "limit": 2},
        steps=2,
    )
    assert found["steps"] == 2
    shown = (tmp_path / "run/samples/step-2/results.jsonl").read_text()
    assert "quality" not in shown
    assert asked == {"quality 10.0 of 10, green tree", "quality 10.0 of 10, grey boat"}


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"template": "score {score}"}, "holds {score} and {prompt}"),
        ({"plain": 1.0}, r"\[0, 1\)"),
        ({"digits": -1}, "0 or more"),
    ],
)
def test_settings_without_sense_are_refused(told: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RelabelConfig(**told)
