"""The point score: the expected level of a choice, or a written number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.judges.asking import Decision
from diffalign.judges.wording import LEVELS
from diffalign.rewards.point_score import PointScore
from diffalign.scoring import make_reward, rate
from tests.judges import tiny_judges
from tests.rewards.scripted import Scripted, level, plain

CASE = Case(prompt="a red circle")
UNIFORM = (0.2,) * 5


def choosing(decision: Decision) -> tuple[float, ...] | None:
    """The lighter the picture, the higher the level; black ones are not answered."""
    place = round(4 * level(decision.images[0]))
    return None if place == 0 else tuple(float(k == place) for k in range(5))


@given(st.lists(st.floats(0.01, 1), min_size=5, max_size=5))
def test_the_score_is_the_expected_level(weights: list[float]) -> None:
    shares = tuple(weight / sum(weights) for weight in weights)
    found = rate(PointScore(Scripted(chooses=lambda d: shares)), plain(0.5), [CASE])
    assert float(found.total) == pytest.approx(sum(k * p for k, p in enumerate(shares, 1)), abs=1e-5)
    assert float(found.parts["sure"]) == pytest.approx(max(shares), abs=1e-6)
    assert 1 <= float(found.total) <= 5


def test_a_sure_judge_gives_its_level_and_an_even_one_the_middle() -> None:
    found = rate(PointScore(Scripted(chooses=choosing)), plain(0.25, 0.5, 1.0), [CASE] * 3)
    assert found.total.tolist() == [2, 3, 5]
    assert found.parts["level"].tolist() == [2, 3, 5]
    assert found.parts["spread"].tolist() == [0, 0, 0]
    even = rate(PointScore(Scripted(chooses=lambda d: UNIFORM)), plain(0.5), [CASE])
    assert float(even.total) == pytest.approx(3)
    assert float(even.parts["spread"]) == pytest.approx(2**0.5)


def test_the_levels_are_described_in_order() -> None:
    backend = Scripted(chooses=lambda d: UNIFORM)
    rate(PointScore(backend), plain(0.5), [Case(prompt="a {red} circle")])
    (decision,) = backend.decisions
    assert decision.labels == ("A", "B", "C", "D", "E")
    assert decision.described == LEVELS
    assert decision.ordered
    assert '"a {red} circle"' in decision.prompt
    assert f"E. {LEVELS[-1]}" in decision.prompt


def test_a_judge_that_chooses_nothing_leaves_the_row_invalid() -> None:
    found = rate(PointScore(Scripted(chooses=choosing)), plain(0.0, 1.0), [CASE] * 2)
    assert found.valid.tolist() == [False, True]


@pytest.mark.parametrize(
    ("text", "value"), [("Good.\nFinal Score: 3.5", 3.5), ("**Final Score: 4**", 4), ("Final Score: 5/5", 5)]
)
def test_a_written_score_is_read(text: str, value: float) -> None:
    assert float(rate(PointScore(Scripted(lambda q: text), how="write"), plain(0.5), [CASE]).total) == value


@pytest.mark.parametrize(
    "text", ["", "3", "Final Score: 6", "Final Score: 0", "Final Score: good", "Final Score: 2\nFinal Score: 4"]
)
def test_a_malformed_score_is_no_number(text: str) -> None:
    backend = Scripted(lambda q: text)
    found = rate(PointScore(backend, how="write"), plain(0.5), [CASE])
    assert not found.valid.any()
    assert len(backend.questions) == 2


def test_rows_do_not_depend_on_their_neighbours() -> None:
    reward, media = PointScore(Scripted(chooses=choosing)), plain(0.25, 0.5, 1.0)
    cases = [Case(prompt=str(k)) for k in range(3)]
    whole = rate(reward, media, cases).total
    assert torch.equal(whole, torch.cat([rate(reward, media[k : k + 1], cases[k : k + 1]).total for k in range(3)]))


def test_wording_and_way_are_part_of_what_tells_scores_apart(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("points: 'Is it {prompt}?'")
    rewards = [PointScore(Scripted()), PointScore(Scripted(), wording=str(file))]
    assert len({reward.version for reward in rewards}) == 2
    assert rewards[0].options != PointScore(Scripted(), how="write").options
    with pytest.raises(ConfigError, match="decide"):
        make_reward({"point_score": {"judge": Scripted(), "how": "think"}})


def test_a_real_judge_is_asked_and_a_batch_equals_its_rows(tmp_path: Path) -> None:
    reward = PointScore(
        {"model": str(tiny_judges.folder(tmp_path / "judge")), "covered": 0.0}
    )  # a random one says no label
    media = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    cases = [Case(prompt=text) for text in ("a red circle", "two blue squares left of a green triangle", "a")]
    whole = rate(reward, media, cases).total
    assert whole.isfinite().all()
    assert ((whole >= 1) & (whole <= 5)).all()
    assert len(set(whole.tolist())) == 3
    alone = torch.cat([rate(reward, media[k : k + 1], cases[k : k + 1]).total for k in range(3)])
    assert torch.allclose(whole, alone, atol=1e-4)
    assert reward.version is not None
