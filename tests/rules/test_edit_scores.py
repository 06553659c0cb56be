"""The arithmetic of EditScore: its worked example, and the laws that make it a score."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.errors import ConfigError
from diffalign.rules.edit_scores import FIELDS, REDUCTIONS, Pass, accepted, ensemble, geometric, mean, pair_right

SCORES = st.floats(0, 10, allow_subnormal=False)
PASSES = st.builds(Pass, SCORES, SCORES, SCORES, SCORES)
GOLDEN = Pass.of((20, 10), (25, 15), 25)


def overall(*passes: Pass, how: str = "average_last") -> float:
    found = ensemble(passes, how)
    assert found is not None
    return found["overall"]


def test_the_worked_example_of_the_spec() -> None:
    assert (GOLDEN.semantic_consistency, GOLDEN.perceptual_quality) == (4, 6)
    assert GOLDEN.overall == pytest.approx(math.sqrt(24), abs=1e-12)
    assert round(overall(GOLDEN), 4) == 4.8990
    assert round(overall(GOLDEN) / 10, 5) == 0.48990
    found = ensemble([GOLDEN])
    assert found is not None
    assert (found["prompt_following"], found["consistency"], found["naturalness"], found["artefacts"]) == (8, 4, 10, 6)


@given(PASSES)
def test_the_overall_score_is_zero_exactly_where_a_half_is(one: Pass) -> None:
    halves = one.semantic_consistency, one.perceptual_quality
    assert (one.overall == 0) == (0 in halves) or min(halves) < 1e-150  # a product below the smallest float


@given(PASSES)
def test_the_overall_score_lies_between_its_halves(one: Pass) -> None:
    halves = one.semantic_consistency, one.perceptual_quality
    assert min(halves) * (1 - 1e-12) <= one.overall <= max(halves) * (1 + 1e-12) or min(halves) < 1e-150


@given(PASSES, st.sampled_from(("prompt_following", "consistency", "naturalness", "artefacts")), SCORES)
@pytest.mark.parametrize("how", REDUCTIONS)
def test_no_sub_score_lowers_the_total_by_rising(how: str, one: Pass, name: str, up: float) -> None:
    raised = Pass(**{**vars(one), name: max(up, getattr(one, name))})
    other = Pass(5, 5, 5, 5)
    assert overall(raised, other, how=how) >= overall(one, other, how=how) - 1e-12


@given(PASSES, st.floats(0, 1))
def test_the_overall_score_scales_with_its_sub_scores(one: Pass, share: float) -> None:
    scaled = Pass(*(value * share for value in vars(one).values()))
    assert scaled.overall == pytest.approx(share * one.overall, abs=1e-9)


@given(st.tuples(*[st.floats(0, 1)] * 4), st.sampled_from((5.0, 10.0, 25.0, 30.0, 100.0)))
def test_the_scale_of_the_judge_does_not_matter(shares: tuple[float, ...], scale: float) -> None:
    said = [share * scale for share in shares]
    assert Pass.of(said[:2], said[2:], scale).overall == pytest.approx(
        Pass.of(shares[:2], shares[2:], 1).overall, abs=1e-9
    )


@given(PASSES)
@pytest.mark.parametrize("how", ["average_last", "average_first_corrected"])
def test_one_pass_is_the_single_pass(how: str, one: Pass) -> None:
    found = ensemble([one], how)
    assert found is not None
    assert {name: found[name] for name in FIELDS} == {name: getattr(one, name) for name in FIELDS}
    assert math.isnan(found["spread"])


@given(PASSES, st.integers(2, 8))
@pytest.mark.parametrize("how", REDUCTIONS)
def test_identical_passes_are_one(how: str, one: Pass, times: int) -> None:
    many, single = ensemble([one] * times, how), ensemble([one], how)
    assert many is not None
    assert single is not None
    assert {name: many[name] for name in FIELDS} == {name: single[name] for name in FIELDS}
    assert many["spread"] == 0


@given(st.lists(PASSES, min_size=2, max_size=4))
@pytest.mark.parametrize("how", REDUCTIONS)
def test_the_order_of_the_passes_does_not_matter_to_the_last_bit(how: str, passes: list[Pass]) -> None:
    found = [ensemble(order, how) for order in itertools.permutations(passes)]
    assert all(each == found[0] for each in found)


@given(st.lists(PASSES, min_size=1, max_size=4), st.integers(0, 4))
@pytest.mark.parametrize("how", REDUCTIONS)
def test_passes_that_could_not_be_read_are_left_out(how: str, passes: list[Pass], where: int) -> None:
    broken = [*passes[:where], None, *passes[where:], None]
    assert repr(ensemble(broken, how)) == repr(ensemble(passes, how))


def test_too_few_passes_are_no_score() -> None:
    assert ensemble([None, None]) is None
    assert ensemble([]) is None
    assert ensemble([GOLDEN, None, None], least=2) is None
    found = ensemble([GOLDEN, GOLDEN, None], least=2)
    assert found is not None
    assert found["valid_passes"] == 2


def test_averaging_last_takes_the_root_first() -> None:
    a, b = Pass(1, 1, 9, 9), Pass(9, 9, 1, 1)
    assert overall(a, b) == 3
    assert overall(a, b, how="average_first_corrected") == 5


def test_the_published_average_first_forgets_consistency() -> None:
    careless = Pass(9, 0, 4, 4)  # it does as told and ruins the rest
    assert overall(careless) == overall(careless, how="average_first_corrected") == 0
    assert overall(careless, how="average_first") == 6


def test_a_mean_stays_between_its_values() -> None:
    assert mean([0.1] * 3) == 0.1
    assert geometric(0.1, 0.1) == 0.1


def test_an_edit_is_accepted_from_half_the_scale() -> None:
    assert [accepted(value) for value in (0.0, 4.99, 5.0, 10.0)] == [0, 0, 1, 1]
    assert math.isnan(accepted(math.nan))


@given(SCORES, SCORES)
def test_a_swap_turns_a_strict_win_into_a_loss_and_leaves_ties_wrong_both_ways(a: float, b: float) -> None:
    assert pair_right(a, b) + pair_right(b, a) == (a != b)
    assert not pair_right(a, a)


def test_wrong_settings_say_what_there_is() -> None:
    with pytest.raises(ConfigError, match="average_first_corrected"):
        ensemble([GOLDEN], "average")
    with pytest.raises(ConfigError, match="scale"):
        Pass.of((1, 1), (1, 1), 0)
