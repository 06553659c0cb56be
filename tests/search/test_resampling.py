from __future__ import annotations

import math

import pytest
import torch

from diffalign.search import resampling
from diffalign.search.resampling import Scheme

SCHEMES: list[Scheme] = ["systematic", "ssp", "multinomial"]


def counts(index: torch.Tensor) -> torch.Tensor:
    """Children (B, K) of each particle."""
    return torch.nn.functional.one_hot(index, index.shape[1]).sum(1)


def test_effective_size_is_all_for_equal_weights_and_one_for_a_lone_holder() -> None:
    one_hot = torch.tensor([[-math.inf, 3.0, -math.inf, -math.inf]])
    assert resampling.ess(torch.full((1, 4), -7.0)) == 4
    assert resampling.ess(one_hot) == 1


def test_a_set_without_any_weight_counts_as_equal() -> None:
    lost = torch.full((1, 4), -math.inf)
    assert torch.equal(resampling.weights(lost), torch.full((1, 4), 0.25, dtype=torch.float64))


def test_log_mean_exp_of_huge_weights_does_not_overflow() -> None:
    found = resampling.log_mean_exp(torch.tensor([[5000.0, 5000.0 + math.log(3)]]))
    assert float(found) == pytest.approx(5000 + math.log(2), abs=1e-3)


@pytest.mark.parametrize("scheme", ["systematic", "ssp"])
def test_children_are_the_expected_number_rounded_down_or_up(scheme: Scheme) -> None:
    log_w = torch.randn(500, 7, generator=torch.Generator().manual_seed(3)) * 2
    expected = resampling.weights(log_w) * 7
    born = counts(resampling.resample(log_w, scheme, range(500), "t"))
    assert (born >= (expected - 1e-9).floor()).all()
    assert (born <= (expected + 1e-9).ceil()).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_children_are_k_w_on_average(scheme: Scheme) -> None:
    log_w = torch.tensor([0.05, 0.3, 0.0, 0.4, 0.25]).log().expand(6000, -1)
    born = counts(resampling.resample(log_w, scheme, range(6000), "t")).double()
    error = born.std(0) / math.sqrt(6000)
    assert ((born.mean(0) - 5 * log_w[0].double().exp()).abs() <= 3 * error + 1e-6).all()
    assert (born[:, 2] == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_set_is_resampled_as_if_it_were_alone(scheme: Scheme) -> None:
    log_w = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    together = resampling.resample(log_w, scheme, [5, 6, 7, 8], "t", 2)
    assert torch.equal(together[2:3], resampling.resample(log_w[2:3], scheme, [7], "t", 2))
    assert not torch.equal(together, resampling.resample(log_w, scheme, [5, 6, 7, 8], "t", 3))


@pytest.mark.parametrize("scheme", ["systematic", "ssp"])
def test_equal_weights_leave_one_child_each(scheme: Scheme) -> None:
    for count in (1, 3, 4, 7, 10):
        index = resampling.resample(torch.zeros(50, count), scheme, range(50), "t")
        assert (counts(index) == 1).all()


def test_gathering_reaches_into_mappings_and_lists() -> None:
    held = {"a": torch.tensor([1, 2, 3]), "b": {"c": [4, 5, 6], "d": None}}
    found = resampling.gathered(held, torch.tensor([2, 2]))
    assert found["a"].tolist() == [3, 3]
    assert found["b"] == {"c": [6, 6], "d": None}
