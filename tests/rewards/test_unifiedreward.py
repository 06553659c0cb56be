"""UnifiedReward in both forms: what is read, what counts, and what is no score."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.rewards.unifiedreward import UnifiedReward
from diffalign.scoring import rate
from tests.rewards.scripted import Scripted, plain

CASE = Case(prompt="a red circle")
THREE = "Alignment Score: 5\nCoherence Score: 3.5\nStyle Score: 2"


def scored(text: str, **options: Any) -> Any:
    return rate(UnifiedReward(Scripted(lambda q: text), **options), plain(0.5), [CASE])


def test_three_scores_and_their_mean() -> None:
    found = scored(THREE)
    assert {name: float(found.parts[name]) for name in found.parts} == {"alignment": 5, "coherence": 3.5, "style": 2}
    assert float(found.total) == 3.5


@pytest.mark.parametrize(("counts", "value"), [("alignment", 5), ("coherence", 3.5), ("style", 2), ("mean", 3.5)])
def test_the_score_that_counts_is_the_total(counts: Any, value: float) -> None:
    assert float(scored(THREE, counts=counts).total) == value


def test_the_first_models_write_one_score() -> None:
    found = scored("The circle is red.\nFinal Score: 4.5", form="point")
    assert float(found.total) == 4.5


def test_the_published_reward_is_a_fifth() -> None:
    assert float(scored("Final Score: 4", form="point", divide=5.0).total) == pytest.approx(0.8)
    assert UnifiedReward(Scripted(), divide=5.0).range == (0.2, 1.0)
    assert UnifiedReward(Scripted()).range == (1.0, 5.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "Final Score: 4",
        "Alignment Score: 5\nStyle Score: 2",
        THREE.replace("3.5", "7"),
        THREE.replace("2", "two"),
    ],
)
def test_malformed_replies_are_asked_once_more_and_then_invalid(text: str) -> None:
    backend = Scripted(lambda q: text)
    found = rate(UnifiedReward(backend), plain(0.5), [CASE])
    assert not found.valid.any()
    assert len(backend.questions) == 2
    assert not found.parts  # nothing was read


def test_malformed_rows_are_left_out_of_the_mean_and_not_zero() -> None:
    backend = Scripted(lambda q: THREE if "circle" in q.text else "hm")
    found = rate(UnifiedReward(backend), plain(0.5, 0.5), [CASE, Case(prompt="a hat")])
    assert found.total.nanmean() == 3.5
    assert found.valid.tolist() == [True, False]


def test_the_judge_is_greedy_and_sees_the_size_that_was_asked_for() -> None:
    backend = Scripted(lambda q: THREE)
    rate(UnifiedReward(backend, size=16), plain(0.5, size=(8, 12)), [CASE])
    rate(UnifiedReward(backend), plain(0.5, size=(8, 12)), [CASE])
    assert [tuple(q.images[0].shape[-2:]) for q in backend.questions] == [(16, 16), (8, 12)]
    assert {q.temperature for q in backend.questions} == {0}


def test_a_published_wording_is_a_bare_text(tmp_path: Path) -> None:
    file = tmp_path / "three.txt"
    file.write_text("Judge {prompt} as {json}.")
    backend = Scripted(lambda q: THREE)
    rate(UnifiedReward(backend, wording=str(file)), plain(0.5), [CASE])
    assert backend.questions[0].text == "Judge a red circle as {json}."


@pytest.mark.parametrize("options", [{"divide": 0.0}, {"divide": math.inf}, {"divide": math.nan}, {"size": 0}])
def test_settings_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="both are positive"):
        UnifiedReward(Scripted(), **options)
