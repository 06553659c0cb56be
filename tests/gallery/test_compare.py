"""Statistics of a page against closed forms."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from diffalign.gallery import compare


@given(st.integers(0, 200), st.integers(0, 200))
def test_the_sign_test_is_the_exact_binomial_one(wins, losses):
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert compare.sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_wins_losses_ties_and_what_is_missing_are_counted_apart():
    found = compare.paired([1.0, 2.0, 3.0, None, 5.0], [2.0, 2.0, 1.0, 4.0, None])
    assert found is not None
    assert (found["n"], found["wins"], found["losses"], found["ties"]) == (3, 1, 1, 1)
    assert found["delta"] == pytest.approx(-1 / 3)
    assert found["win_rate"] == 0.5
    assert compare.paired([None, 1.0], [1.0, None]) is None


def test_the_bootstrap_of_a_difference_is_as_wide_as_its_normal_limit():
    draw = random.Random(0)
    gaps = [draw.gauss(0.2, 1.0) for _ in range(2000)]
    found = compare.paired([0.0] * 2000, gaps)
    assert found is not None
    half = 1.96 * stats.tstd(gaps) / math.sqrt(2000)
    assert (found["hi"] - found["lo"]) / 2 == pytest.approx(half, rel=0.1)


def test_the_interval_of_a_difference_covers_the_truth_as_often_as_it_says():
    draw, covered = random.Random(1), 0
    for seed in range(200):
        found = compare.paired([0.0] * 40, [draw.gauss(0.3, 1.0) for _ in range(40)], seed=seed)
        covered += found is not None and found["lo"] <= 0.3 <= found["hi"]
    assert stats.binomtest(covered, 200, 0.93).pvalue > 0.001  # a percentile interval of 40 is a little narrow


def test_swapping_systems_flips_every_sign():
    a, b = [1.0, 5.0, 2.0, 2.0], [3.0, 1.0, 2.0, 9.0]
    there, back = compare.paired(a, b), compare.paired(b, a)
    assert there is not None
    assert back is not None
    assert there["delta"] == pytest.approx(-back["delta"])
    assert (there["lo"], there["hi"]) == pytest.approx((-back["hi"], -back["lo"]))
    assert (there["wins"], there["sign_p"]) == (back["losses"], back["sign_p"])
    assert there["win_rate"] == pytest.approx(1 - back["win_rate"])


def test_agreement_leaves_out_ties_of_either_side_and_what_has_no_score():
    found = compare.agreement([1, -1, 0, 1, 1], [0.5, 0.5, 0.5, 0.0, None])
    assert (found["mean"], found["n"], found["ties"]) == (0.5, 2, 2)
    assert compare.agreement([0], [1.0])["mean"] is None


def test_every_pair_of_systems_is_compared_the_baseline_first():
    scores = [{"r": [0.0, 1.0]}, {"r": [1.0, 1.0]}, {"r": [None, None]}]
    found = compare.summaries(scores, ["r"])
    assert [(row["a"], row["b"]) for row in found] == [(0, 1), (0, 2), (1, 2)]
    assert found[0]["rewards"]["r"]["wins"] == 1
    assert found[1]["rewards"] == {}
