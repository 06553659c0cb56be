from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from diffalign.budget import Budget, Limits
from diffalign.errors import ConfigError
from diffalign.noise import ddim
from diffalign.search.anneal import Anneal, annealed, progress, scale, spent_share
from tests.search.toys import gaussian_chain


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.1), (1.2, 0.1), (2.0, 0.0), (0.4, 0.3)])
def test_the_curve_runs_from_start_to_end_and_only_falls(start, end):
    curve = [Anneal(start=start, end=end).at(progress(i, 10)) for i in range(10)]
    assert curve[0] == pytest.approx(start, abs=1e-12)
    assert curve[-1] == pytest.approx(end, abs=1e-12)
    assert all(a > b for a, b in pairwise(curve))


def test_equal_ends_are_a_constant():
    assert [Anneal(start=0.5, end=0.5).at(u / 7) for u in range(8)] == [0.5] * 8


def test_a_decay_follows_the_published_curve_down_to_its_floor():
    anneal = Anneal(start=1.0, end=0.3, decay=8 / 9)  # d = 8 steps of the 9 intervals of a 10-step walk
    curve = [anneal.at(progress(i, 10)) for i in range(10)]
    assert curve[:5] == pytest.approx([2 - math.exp(i / 8) for i in range(5)])
    assert curve[5:] == [0.3] * 5


def test_progress_of_a_single_item_is_zero():
    assert progress(0, 1) == 0.0
    assert [progress(i, 3) for i in range(3)] == [0.0, 0.5, 1.0]


def test_no_schedule_scales_by_one():
    assert scale(None, 0.7) == 1.0


def test_branches_shrink_to_one():
    anneal = Anneal(start=1.0, end=0.0)
    assert [anneal.count(4, u) for u in (0.0, 0.5, 1.0)] == [4, 2, 1]


def test_the_tightest_limit_tells_how_much_is_spent():
    budget = Budget(Limits(nfe=100, decodes=10), prompts=2)
    budget.charge(nfe=50, decodes=10)
    assert spent_share(budget) == 0.5
    assert spent_share(Budget()) == 0.0


def test_an_annealed_kernel_takes_its_noise_from_the_curve_step_by_step():
    anneal = Anneal(start=1.0, end=0.2)
    chain, plain = gaussian_chain(kernel=annealed(ddim, anneal)), gaussian_chain(kernel=ddim(1.0))
    x = torch.ones(1, 1)
    for i in range(chain.length):
        expected = plain.transition(x, x, i).std * anneal.at(progress(i, 10))
        assert chain.transition(x, x, i).std == pytest.approx(expected)


@pytest.mark.parametrize("wrong", [{"start": 0.1, "end": 0.5}, {"end": -1.0}, {"start": math.inf}, {"decay": 0.0}])
def test_a_rising_or_negative_curve_is_refused(wrong):
    with pytest.raises(ConfigError, match="anneal"):
        Anneal(**wrong)


def test_a_progress_outside_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"1\.5"):
        Anneal().at(1.5)
