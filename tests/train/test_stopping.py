from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.train import stopping
from diffalign.train.overoptimisation import turn_over

GOLD = [0, 0.2, 0.5, 0.6, 0.55, 0.5, 0.45]


def test_the_worked_example_stops_at_5_and_goes_back_to_3() -> None:
    stop = stopping.first_held(stopping.gold_drop(GOLD, weight=0), patience=2)
    assert stop == 5
    assert turn_over([0] * 6, GOLD[:6], weight=0).index == 3


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 0.9))
def test_a_run_that_only_improves_never_stops(steps: list[float], weight: float) -> None:
    gold = [sum(steps[: k + 1]) for k in range(len(steps))]
    assert stopping.first_held(stopping.gold_drop(gold, weight=weight), patience=1) is None


def test_a_missing_evaluation_is_no_drop_and_does_not_interrupt_one() -> None:
    nan = math.nan
    assert stopping.first_held(stopping.gold_drop([0, 0.6, nan, nan, nan], weight=0)) is None
    assert stopping.first_held(stopping.gold_drop([0, 0.6, 0.5, nan, 0.5], weight=0)) == 4
    assert not stopping.holds([0.0, 2.0, 2.0, nan])
    assert stopping.holds([0.0, 2.0, nan, 2.0])


def test_a_drop_within_the_noise_is_none() -> None:
    assert stopping.first_held(stopping.gold_drop(GOLD, [0.1] * 7, weight=0)) is None
    assert stopping.gold_drop([1, 0.5], [0, math.nan], weight=0)[1] == pytest.approx(0.5 / 0.04)


@given(st.lists(st.floats(-1, 3), max_size=12), st.integers(1, 3))
def test_a_rule_holds_now_exactly_where_it_first_does(severity: list[float], patience: int) -> None:
    first = stopping.first_held(severity, patience, at_once=2)
    held = [k for k in range(len(severity)) if stopping.holds(severity[: k + 1], patience, at_once=2)]
    assert first == (held[0] if held else None)


def test_a_strong_finding_does_not_wait() -> None:
    assert stopping.first_held([0.5, 3.0, 0.5], patience=3, at_once=2) == 1
    assert stopping.first_held([0.5, 1.5, 1.5, 0.5], patience=3, at_once=2) is None


def test_variety_below_the_floor_and_kl_above_the_ceiling_hold() -> None:
    assert stopping.diversity_floor([1, 0.85, 0.79]) == pytest.approx([0, 0.75, 1.05])
    assert stopping.kl_ceiling([1, 3], 2) == [0.5, 1.5]
    assert stopping.signature([1, -6]) == pytest.approx([1 / 3, 2])


def test_a_correlation_counts_as_lost_below_zero_and_beyond_its_error() -> None:
    assert [value > 1 for value in stopping.decorrelation([0.2, 0.0, -0.01])] == [False, False, True]
    assert [value > 1 for value in stopping.decorrelation([-0.1, -0.1], [0.01, 0.2], errors=2)] == [True, False]
    assert math.isnan(stopping.decorrelation([math.nan])[0])


def test_gain_that_does_not_transfer_is_told_from_a_proxy_that_stands_still() -> None:
    proxy = [0, 1, 2, 3, 3, 3]
    assert [value > 1 for value in stopping.marginal_transfer(proxy, [0, 0.5, 1, 1, 1, 1])] == [
        False,
        False,
        False,
        False,
        True,
        False,
    ]
    told = stopping.marginal_transfer([0, 1, math.nan, 2], [0, 0, 0, 0])
    assert math.isnan(told[2])
    assert told[3] > 1
