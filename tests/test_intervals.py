"""Intervals cover what they claim and never claim certainty they lack."""

from __future__ import annotations

import pytest
import torch

from diffalign.errors import ConfigError
from diffalign.intervals import bootstrap, wilson


def test_wilson_matches_published_values():
    # 8 of 10 at 95 %: .4902 to .9433 (Agresti and Coull, 1998)
    got = wilson(8, 10)
    assert (round(got.lo, 4), round(got.hi, 4)) == (0.4902, 0.9433)


@pytest.mark.parametrize("passes", [0, 8])
def test_all_or_nothing_still_has_a_width(passes: int):
    got = wilson(passes, 8)
    assert got.hi - got.lo > 0.2
    assert got.lo <= got.mean <= got.hi


def test_the_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    data = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    hits = sum((i := bootstrap(row.tolist(), draws=500)).lo <= 0.0 <= i.hi for row in data)
    assert 176 <= hits <= 200  # 95 % of 200 less four sigma


def test_the_bootstrap_repeats():
    assert bootstrap([0.1, 0.9, 0.4]) == bootstrap([0.1, 0.9, 0.4])


def test_constant_values_have_no_width():
    got = bootstrap([0.5, 0.5])
    assert got.lo == got.mean == got.hi == 0.5


def test_no_prompt_is_an_error():
    with pytest.raises(ConfigError, match="at least one prompt"):
        bootstrap([])


def test_weights_count_a_prompt_by_what_it_brings():
    values = [0.0, 1.0, 0.5]
    assert bootstrap(values, weights=[2.0, 2.0, 2.0]) == bootstrap(values)
    assert bootstrap(values, weights=[1.0, 3.0, 0.0]).mean == 0.75


def test_the_bootstrap_does_not_depend_on_how_many_draws_are_made_at_once(monkeypatch: pytest.MonkeyPatch):
    whole = bootstrap([0.1, 0.9, 0.4])
    monkeypatch.setattr("diffalign.intervals.PICKS", 20)
    assert bootstrap([0.1, 0.9, 0.4]) == whole
