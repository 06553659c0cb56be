"""Losses of reward models: golden values, invariances, and chances that sum to 1."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.errors import ConfigError
from diffalign.train.reward_models.losses import (
    best_of_all,
    bradley_terry,
    pick,
    ranked_pairs,
    uncertain,
    weighted,
    with_ties,
)

gaps = st.floats(-6, 6)


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("gap", "win", "tie"), [(0.0, 1 / 6, 2 / 3), (1.0, 0.352187, 0.579279), (2.0, 0.596418, 0.377228)]
)
def test_ties_have_their_golden_chances(gap: float, win: float, tie: float) -> None:
    found = (-with_ties(of(gap, gap), of(1.0, 0.5))).exp()
    assert found.tolist() == pytest.approx([win, tie], abs=1e-6)
    if gap == 0:
        assert with_ties(of(0, 0), of(1.0, 0.5)).tolist() == pytest.approx([1.791759, 0.405465], abs=1e-6)


@given(gaps, st.floats(1.001, 50))
def test_win_loss_and_tie_are_all_there_is(gap: float, k: float) -> None:
    assert float((-with_ties(of(gap, gap, gap), of(1, 0, 0.5), k)).exp().sum()) == pytest.approx(1, abs=1e-9)


@given(gaps, st.floats(0, 1))
def test_without_ties_it_is_bradley_and_terrys(gap: float, label: float) -> None:
    sigma = 1 / (1 + math.exp(-gap))
    expected = -label * math.log(sigma) - (1 - label) * math.log(1 - sigma)
    assert float(bradley_terry(of(gap), of(label))) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    sharp = round(label)
    assert float(with_ties(of(gap), of(sharp), 1 + 1e-9)) == pytest.approx(
        float(bradley_terry(of(gap), of(sharp))), abs=1e-6
    )


@given(gaps, gaps, st.floats(-50, 50))
def test_only_differences_of_scores_count(a: float, b: float, shift: float) -> None:
    scores = of(a, b)
    moved = scores + shift
    assert float(bradley_terry(moved[0] - moved[1], of(1.0))) == pytest.approx(
        float(bradley_terry(of(a - b), of(1.0))), abs=1e-6
    )
    assert float(best_of_all(moved, 0)) == pytest.approx(float(bradley_terry(of(a - b), of(1.0))), abs=1e-6)


def test_a_margin_asks_for_more() -> None:
    assert float(bradley_terry(of(0.57), of(1.0), margin=0.57)) == pytest.approx(math.log(2))


def test_a_tie_of_pickscore_costs_nothing_at_equal_scores() -> None:
    gap = of(0.0, 0.0, 1.0).requires_grad_()
    found = pick(gap, of(0.5, 1.0, 0.5))
    assert found.tolist() == pytest.approx([0.0, math.log(2), bradley_terry(of(1.0), of(0.5)).item() - math.log(2)])
    (slope,) = torch.autograd.grad(found.sum(), gap)
    assert float(slope[0]) == 0


@given(gaps, st.floats(0, 3))
def test_uncertainty_never_costs_less_and_nothing_where_there_is_none(gap: float, deviation: float) -> None:
    half = torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    normals = torch.cat([half, -half])  # of mean 0 exactly
    plain = float(bradley_terry(of(gap), of(1.0)))
    assert float(uncertain(of(gap), of(deviation), of(1.0), normals)) >= plain - 1e-9
    assert float(uncertain(of(gap), of(0.0), of(1.0), normals)) == pytest.approx(plain)


def test_uncertainty_shrinks_on_easy_pairs() -> None:
    deviation = of(1.0, 1.0).requires_grad_()
    normals = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    uncertain(of(4.0, -1.0), deviation, of(1.0, 1.0), normals).sum().backward()
    assert deviation.grad is not None
    assert deviation.grad[0] > 0


def test_a_ranking_gives_every_unequal_pair_once() -> None:
    assert ranked_pairs([1, 2, 2, 3]) == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert ranked_pairs([1, 1]) == []


def test_weights_are_shares_of_all_processes() -> None:
    losses, weights = of(1.0, 3.0), of(1.0, 0.5)
    assert float(weighted(losses, weights)) == pytest.approx(2.5 / 1.5)
    assert float(weighted(losses, weights, 3.0)) == pytest.approx(2.5 / 3)


def test_ties_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="above 1"):
        with_ties(of(0.0), of(1.0), 1.0)
