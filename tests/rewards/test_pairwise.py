"""Pairwise judging: the symmetry of the swap, win rates of a group, and the bias on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.judges.asking import Decision
from diffalign.judges.wording import FIRST, SECOND
from diffalign.rewards.pairwise import Pairwise
from diffalign.scoring import Score, rate
from tests.judges import tiny_judges
from tests.rewards.scripted import Scripted, grey, level, plain

Chooses = Callable[[Decision], tuple[float, ...] | None]


def leaning(slope: float, bias: float = 0.0) -> Chooses:
    """Likes the brighter picture by `slope`, and the first place by `bias`."""

    def choose(decision: Decision) -> tuple[float, ...]:
        a, b = (level(image) for image in decision.images)
        first = 1 / (1 + math.exp(-slope * (a - b) - bias))
        return first, 1 - first

    return choose


def pairs(chooses: Chooses, media: torch.Tensor, cases: list[Case], **options: str) -> tuple[Score, Pairwise]:
    reward = Pairwise(Scripted(chooses=chooses), **options)  # type: ignore[arg-type]
    return rate(reward, media, cases), reward


def referred(*levels: float) -> list[Case]:
    return [Case(prompt="a lamp", reference=grey(each)) for each in levels]


def group(count: int, prompt: str = "a lamp") -> list[Case]:
    return [Case(prompt=prompt, seed=k) for k in range(count)]


@pytest.mark.parametrize("ties", ["agree", "mean"])
@pytest.mark.parametrize("against", ["reference", "group"])
def test_a_judge_that_always_prefers_the_first_place_gives_one_half(against: str, ties: str) -> None:
    cases = referred(0.1, 0.5, 0.9) if against == "reference" else group(3)
    found, reward = pairs(lambda d: (0.9, 0.1), plain(0.2, 0.5, 0.8), cases, against=against, ties=ties)
    assert found.total.tolist() == pytest.approx([0.5] * 3)
    assert (reward.bias.flip_rate, reward.bias.first_share) == (1, 1)
    assert found.parts["flipped"].tolist() == found.parts["first"].tolist() == [1, 1, 1]


def test_a_fair_judge_has_no_bias() -> None:
    found, reward = pairs(leaning(9), plain(0.2, 0.8), referred(0.5, 0.5))
    assert found.total.tolist() == [0, 1]
    assert (reward.bias.flip_rate, reward.bias.first_share) == (0, 0.5)
    assert (reward.bias.pairs, reward.bias.answers) == (2, 4)


@given(st.lists(st.integers(0, 20), min_size=2, max_size=5), st.floats(-3, 3), st.floats(-3, 3))
@pytest.mark.parametrize("ties", ["agree", "mean"])
def test_the_win_rates_of_a_group_add_up_to_half_its_size(
    ties: str, shades: list[int], slope: float, bias: float
) -> None:
    media = plain(*[shade / 20 for shade in shades])
    found, _ = pairs(leaning(slope, bias), media, group(len(shades)), against="group", ties=ties)
    assert float(found.total.double().sum()) == pytest.approx(len(shades) / 2, abs=1e-5)


def test_the_better_pictures_win_more_and_equal_ones_alike() -> None:
    found, _ = pairs(leaning(9), plain(0.5, 0.9, 0.1, 0.5), group(4), against="group")
    assert found.total.tolist() == pytest.approx([0.5, 1.0, 0.0, 0.5])


def test_the_order_of_a_group_does_not_matter() -> None:
    media, order = plain(0.5, 0.9, 0.1, 0.3), torch.tensor([3, 1, 0, 2])
    for ties in ("agree", "mean"):
        found, _ = pairs(leaning(3, 1.0), media, group(4), against="group", ties=ties)
        turned, _ = pairs(leaning(3, 1.0), media[order], group(4), against="group", ties=ties)
        assert torch.allclose(found.total[order], turned.total)


def test_swapping_picture_and_reference_turns_the_result_around() -> None:
    for ties in ("agree", "mean"):
        for bias in (0.0, 1.0):
            one, _ = pairs(leaning(3, bias), plain(0.8), referred(0.3), ties=ties)
            other, _ = pairs(leaning(3, bias), plain(0.3), referred(0.8), ties=ties)
            assert float(one.total + other.total) == pytest.approx(1)


def test_orders_that_disagree_are_a_tie_and_their_mean_is_kept_where_that_is_asked_for() -> None:
    biased = leaning(1, 1.0)  # the place weighs more than the picture
    agree, _ = pairs(biased, plain(0.9), referred(0.1))
    mean, _ = pairs(biased, plain(0.9), referred(0.1), ties="mean")
    assert float(agree.total) == 0.5 < float(mean.total) < 1


def test_both_orders_are_asked_with_the_pictures_swapped() -> None:
    _, reward = pairs(leaning(9), plain(0.8), referred(0.3))
    first, second = reward.backend.decisions  # type: ignore[attr-defined]
    assert [level(image) for image in first.images] == [level(image) for image in second.images][::-1]
    assert first.labels == ("A", "B")
    assert first.described == (FIRST, SECOND)
    assert first.prompt == second.prompt


def test_prompts_are_groups_of_their_own() -> None:
    cases = [*group(2, "a lamp"), *group(2, "a hat"), Case(prompt="alone")]
    found, reward = pairs(leaning(9), plain(0.1, 0.2, 0.8, 0.9, 0.5), cases, against="group")
    assert found.total[:4].tolist() == [0, 1, 0, 1]
    assert found.valid.tolist() == [True] * 4 + [False]
    assert reward.bias.pairs == 2
    ((_, judgement),) = [entry for entry in reward.judgements if not entry[1].valid]
    assert "no other picture" in judgement.problem


def test_edits_of_two_sources_are_two_groups() -> None:
    cases = [Case(prompt="brighter", source=grey(shade)) for shade in (0.1, 0.1, 0.9, 0.9)]
    found, reward = pairs(leaning(9), plain(0.1, 0.2, 0.8, 0.9), cases, against="group")
    assert found.total.tolist() == [0, 1, 0, 1]
    assert reward.bias.pairs == 2


def test_a_call_with_one_picture_of_each_prompt_says_what_is_missing() -> None:
    with pytest.warns(UserWarning, match="one of each"):
        found, _ = pairs(leaning(9), plain(0.5), group(1), against="group")
    assert not found.valid.any()


def test_a_case_without_a_reference_is_invalid() -> None:
    found, _ = pairs(leaning(9), plain(0.9, 0.9), [Case(prompt="a lamp"), *referred(0.1)])
    assert found.valid.tolist() == [False, True]


def test_a_pair_that_lacks_an_answer_counts_for_neither_side() -> None:
    def shy(decision: Decision) -> tuple[float, ...] | None:
        shades = [level(image) for image in decision.images]
        return None if shades == [level(image) for image in plain(0.1, 0.5)] else leaning(9)(decision)

    found, reward = pairs(shy, plain(0.1, 0.5, 0.9), group(3), against="group")
    assert found.total.tolist() == [0, 0, 1]
    assert (reward.bias.pairs, reward.bias.answers) == (2, 5)
    silent, _ = pairs(lambda d: None, plain(0.1, 0.5), group(2), against="group")
    assert not silent.valid.any()


def test_scores_in_a_group_are_never_cached_and_those_against_a_reference_are() -> None:
    assert Pairwise(Scripted(), against="group").version is None
    assert Pairwise(Scripted()).version is not None


def test_a_judge_of_one_picture_is_refused() -> None:
    backend = Scripted()
    backend.most_images = 1
    with pytest.raises(ConfigError, match="shows 2 pictures"):
        rate(Pairwise(backend), plain(0.5), referred(0.1))


@pytest.mark.parametrize("ties", ["agree", "mean"])
def test_a_real_judge_keeps_the_symmetry(ties: Literal["agree", "mean"], tmp_path: Path) -> None:
    judge = {"model": str(tiny_judges.folder(tmp_path / "judge")), "covered": 0.0}  # a random one says no label
    reward = Pairwise(judge, against="group", ties=ties)
    media = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = rate(reward, media, group(4))
    assert float(found.total.double().sum()) == pytest.approx(2, abs=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(rate(reward, media[order], group(4)).total, found.total[order], atol=1e-4)
    assert reward.bias.pairs == 12
