"""Couplings against POT, closed forms and golden masses; ragged batches, extreme costs, the map of Gaussians."""

from __future__ import annotations

import math
import warnings

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.transport import (
    CostConfig,
    CouplingConfig,
    GaussianMap,
    couple,
    fused,
    ranged,
    token_cost,
)

GOLDEN = torch.tensor([[[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]]], dtype=torch.float64)
FINE = {"iterations": 20_000, "tolerance": 1e-12}


def costs(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def config(**told: object) -> CouplingConfig:
    return CouplingConfig(**{**FINE, **told})  # type: ignore[arg-type]


def test_the_exponent_of_soft_marginals_is_the_mass() -> None:
    for epsilon in (0.05, 0.5):
        rho = epsilon * 0.9 / 0.1
        assert rho / (rho + epsilon) == pytest.approx(0.9)
    assert config(mass=0.9).exponent == 0.9
    assert config(mass=0.9995).exponent == config(kind="balanced").exponent == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_balanced_plans_are_those_of_pot(seed: int) -> None:
    cost = costs(seed, 3, 5, 7)
    found = couple(cost, config=config(kind="balanced", epsilon=0.1)).plan
    for k in range(3):
        expected = ot.sinkhorn(
            np.full(5, 1 / 5), np.full(7, 1 / 7), cost[k].numpy(), 0.1, "sinkhorn_log", 20_000, 1e-13
        )
        np.testing.assert_allclose(found[k].numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(2).numpy(), 1 / 5, atol=1e-6)
    np.testing.assert_allclose(found.sum(1).numpy(), 1 / 7, atol=1e-6)


@pytest.mark.parametrize("mass", [0.5, 0.9])
def test_unbalanced_plans_are_those_of_pot(mass: float) -> None:
    epsilon, cost = 0.2, costs(1, 2, 4, 6)
    found = couple(cost, config=config(epsilon=epsilon, mass=mass)).plan
    for k in range(2):
        expected = ot.unbalanced.sinkhorn_unbalanced(
            np.full(4, 1 / 4),
            np.full(6, 1 / 6),
            cost[k].numpy(),
            epsilon,
            epsilon * mass / (1 - mass),
            reg_type="entropy",
            numItermax=20_000,
            stopThr=1e-14,
        )
        np.testing.assert_allclose(found[k].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("mass", [0.3, 0.8])
def test_partial_plans_are_those_of_pot_and_move_the_mass(mass: float) -> None:
    cost = costs(2, 2, 4, 6)
    found = couple(cost, config=config(kind="partial", epsilon=0.2, mass=mass)).plan
    for k in range(2):
        expected = ot.partial.entropic_partial_wasserstein(
            np.full(4, 1 / 4), np.full(6, 1 / 6), cost[k].numpy(), 0.2, m=mass, numItermax=20_000, stopThr=1e-14
        )
        np.testing.assert_allclose(found[k].numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(found.sum((1, 2)).numpy(), mass, atol=1e-9)
    assert float(found.sum(2).max()) <= 1 / 4 + 1e-6
    assert float(found.sum(1).max()) <= 1 / 6 + 1e-6


@pytest.mark.parametrize(
    ("told", "mass", "first"),
    [
        ({"epsilon": 0.5, "mass": 0.9}, 1.058657, (0.31528, 0.17138, 0.04267)),
        ({"epsilon": 0.05, "mass": 0.9}, 0.940939, (0.39299, 0.07748, 0.0)),
        ({"epsilon": 0.05, "mass": 1.0}, 1.0, (1 / 3, 1 / 6, 0.0)),
    ],
)
def test_golden_masses(told: dict[str, float], mass: float, first: tuple[float, ...]) -> None:
    found = couple(GOLDEN, config=config(**told))
    assert float(found.mass) == pytest.approx(mass, abs=1e-6)
    assert found.plan[0, 0].tolist() == pytest.approx(first, abs=1e-5)


def test_the_fixed_point_ties_marginals_to_scalings() -> None:
    cost, m, epsilon = costs(3, 1, 4, 5), 0.8, 0.3
    plan = couple(cost, config=config(epsilon=epsilon, mass=m)).plan[0]
    scaled = plan.log() + cost[0] / epsilon  # log u_i + log v_j
    gap = scaled - scaled[:1]
    np.testing.assert_allclose(gap.numpy(), gap[:, :1].expand_as(gap).numpy(), atol=1e-9)  # u and v apart
    exponent = (1 - m) / m
    rows = plan.sum(1)
    np.testing.assert_allclose((rows / rows[0]).log().numpy(), (-exponent * gap[:, 0]).numpy(), atol=1e-9)


@pytest.mark.parametrize("epsilon", [0.01, 0.3, 2.0])
def test_two_by_two_has_its_closed_form(epsilon: float) -> None:
    cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    found = couple(cost, config=config(kind="balanced", epsilon=epsilon)).plan
    assert float(found[0, 0, 0]) == pytest.approx(0.5 / (1 + math.exp(-1 / epsilon)), abs=1e-9)


@given(st.integers(0, 1000), st.sampled_from(["balanced", "unbalanced", "partial"]))
def test_plans_go_with_the_order_of_tokens(seed: int, kind: str) -> None:
    cost, draws = costs(seed, 1, 4, 5), torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(4, generator=draws), torch.randperm(5, generator=draws)
    told = CouplingConfig(kind=kind, epsilon=0.3, iterations=3000, tolerance=1e-9)  # type: ignore[arg-type]
    plain, moved = couple(cost, config=told).plan, couple(cost[:, rows][:, :, columns], config=told).plan
    torch.testing.assert_close(moved, plain[:, rows][:, :, columns], atol=1e-6, rtol=0)


def test_a_constant_more_of_cost_changes_no_balanced_plan_and_equal_costs_couple_evenly() -> None:
    cost, told = costs(5, 2, 3, 4), config(kind="balanced")
    torch.testing.assert_close(couple(cost, config=told).plan, couple(cost + 0.7, config=told).plan, atol=1e-8, rtol=0)
    even = couple(torch.zeros(1, 3, 4), config=told).plan
    torch.testing.assert_close(even, torch.full((1, 3, 4), 1 / 12))


@pytest.mark.parametrize("kind", ["balanced", "unbalanced", "partial", "paper_literal"])
def test_ragged_batches_are_single_cases(kind: str) -> None:
    cost, sizes = costs(6, 3, 5, 6), [(5, 6), (2, 6), (3, 4)]
    rows = torch.stack([torch.arange(5) < n for n, _ in sizes])
    columns = torch.stack([torch.arange(6) < m for _, m in sizes])
    told = config(kind=kind, epsilon=0.2, iterations=30 if kind == "paper_literal" else 5000)
    found = couple(cost, rows, columns, told).plan
    for k, (n, m) in enumerate(sizes):
        alone = couple(cost[k : k + 1, :n, :m], config=told).plan[0]
        torch.testing.assert_close(found[k, :n, :m], alone, atol=1e-8, rtol=0)
        assert float(found[k, n:].abs().sum() + found[k, :, m:].abs().sum()) == 0


@pytest.mark.parametrize("kind", ["balanced", "unbalanced", "partial"])
def test_nothing_to_couple_is_a_plan_of_zeros_and_a_broken_cost_one_of_nan(kind: str) -> None:
    cost, rows = costs(7, 3, 4, 5), torch.ones(3, 4, dtype=torch.bool)
    rows[1] = False
    cost[2, 0, 0] = torch.nan
    found = couple(cost, rows, config=config(kind=kind, epsilon=0.2, iterations=4000)).plan
    assert not found[1].any()
    assert bool(found[2].isnan().all())
    torch.testing.assert_close(
        found[:1], couple(cost[:1], config=config(kind=kind, epsilon=0.2, iterations=4000)).plan, atol=1e-8, rtol=0
    )


@pytest.mark.parametrize("epsilon", [1e-3, 0.05, 50.0])
def test_float32_stays_finite_and_agrees_with_float64(epsilon: float) -> None:
    cost, told = costs(8, 2, 6, 9), CouplingConfig(epsilon=epsilon, iterations=3000, tolerance=1e-5)
    with warnings.catch_warnings(action="ignore"):
        single, double = couple(cost.float(), config=told).plan, couple(cost, config=told).plan
    assert bool(single.isfinite().all())
    assert float(single.min()) >= 0
    torch.testing.assert_close(single.double(), double, atol=1e-4, rtol=0)


def test_the_printed_update_drifts_where_the_clouds_differ_in_size() -> None:
    """By (1 - m) ln(M / N) an iteration: why the standard form is the default."""
    cost = torch.zeros(1, 2, 8, dtype=torch.float64)
    for count in (5, 6, 50):
        found = couple(cost, config=CouplingConfig(kind="paper_literal", mass=0.9, iterations=count))
        assert found.iterations == count
        assert float(found.residual) == pytest.approx(0.1 * math.log(8 / 2), abs=1e-9)


def test_a_plan_that_did_not_settle_is_told_and_dealt_with() -> None:
    cost, told = costs(9, 2, 4, 4), {"kind": "balanced", "epsilon": 0.01, "iterations": 2, "tolerance": 1e-9}
    with pytest.warns(UserWarning, match="2 of 2 couplings had not settled after 2 iterations"):
        couple(cost, config=CouplingConfig(**told))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="even plans stand in"):
        found = couple(cost, config=CouplingConfig(**told, fallback="uniform")).plan  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.full_like(found, 1 / 16))
    with pytest.raises(ConfigError, match="Raise iterations"):
        couple(cost, config=CouplingConfig(**told, fallback="raise"))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"epsilon": 0.0}, {"mass": 0.0}, {"mass": 1.5}, {"iterations": 0}, {"tolerance": 0.0}])
def test_settings_without_sense_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="a coupling has"):
        CouplingConfig(**bad)  # type: ignore[arg-type]


# attention and cost


def test_a_fused_attention_has_rows_of_one_and_no_gradient_through_the_plan() -> None:
    attention = costs(10, 2, 3, 5).softmax(-1).requires_grad_()
    plan = costs(11, 2, 3, 5).requires_grad_()
    found = fused(attention, plan)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    weights = costs(12, 2, 3, 5)
    (slope,) = torch.autograd.grad((found * weights).sum(), attention, retain_graph=True)
    assert float(slope.abs().sum()) > 0
    assert torch.autograd.grad((found * weights).sum(), plan, allow_unused=True)[0] is None
    torch.testing.assert_close(fused(attention, torch.full_like(plan, 1 / 15)), attention, atol=1e-6, rtol=0)
    torch.testing.assert_close(fused(attention, 7 * plan), found, atol=1e-6, rtol=0)


def test_a_cost_is_the_weighted_sum_of_ranged_parts() -> None:
    draws = torch.Generator().manual_seed(0)
    text, video = torch.randn(1, 2, 8, generator=draws), torch.randn(1, 6, 8, generator=draws)
    attention = torch.rand(1, 2, 6, generator=draws).softmax(-1)
    times, places = torch.tensor([[0.0, 0, 0, 1, 1, 1]]), torch.rand(1, 6, 2, generator=draws)
    valid = torch.ones(1, 2, 6, dtype=torch.bool)
    cosine = ranged(1 - torch.nn.functional.cosine_similarity(text[:, :, None], video[:, None], dim=-1), valid)
    when = ((attention * times[:, None]).sum(-1)[:, :, None] - times[:, None]).abs()
    where = (attention[..., None] * places[:, None]).sum(2)
    apart = (where[:, :, None] - places[:, None]).square().sum(-1)
    expected = ranged(cosine + 0.2 * ranged(when, valid) + 0.2 * ranged(apart, valid), valid)
    torch.testing.assert_close(token_cost(text, video, attention, times, places), expected, atol=1e-5, rtol=0)
    plain = token_cost(text, video, attention, times, places, config=CostConfig(time=0.0, place=0.0))
    torch.testing.assert_close(plain, cosine, atol=1e-5, rtol=0)
    assert float(expected.min()) == 0
    assert float(expected.max()) == 1


def test_equal_values_have_no_range_and_masked_ones_none_either() -> None:
    valid = torch.tensor([[[True, True], [False, False]]])
    assert not ranged(torch.full((1, 2, 2), 3.0), valid).any()
    assert ranged(torch.tensor([[[1.0, 3.0], [9.0, torch.nan]]]), valid).tolist() == [[[0.0, 1.0], [0.0, 0.0]]]


# Gaussians


@given(st.floats(-5, 5), st.floats(0.1, 4))
def test_on_a_line_the_map_is_shift_and_scale(shift: float, scale: float) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    found = GaussianMap.between(torch.zeros(1), one, torch.tensor([shift]), one * scale**2)
    rows = torch.tensor([[-1.0], [0.0], [2.0]], dtype=torch.float64)
    torch.testing.assert_close(found(rows), torch.tensor([shift]).double() + scale * rows, atol=1e-6, rtol=0)


def test_the_map_carries_one_gaussian_into_the_other_and_is_that_of_pot() -> None:
    draws = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 4, generator=draws, dtype=torch.float64) for _ in range(2))
    one, two = a @ a.mT + 0.1 * torch.eye(4), b @ b.mT + 0.1 * torch.eye(4)
    means = torch.randn(2, 4, generator=draws, dtype=torch.float64)
    found = GaussianMap.between(means[0], one, means[1], two)
    torch.testing.assert_close(found.matrix @ one @ found.matrix.mT, two, atol=1e-8, rtol=0)
    torch.testing.assert_close(found.matrix, found.matrix.mT, atol=1e-9, rtol=0)
    assert float(torch.linalg.eigvalsh(found.matrix).min()) > 0  # the gradient of a convex function
    expected, offset = ot.gaussian.bures_wasserstein_mapping(*(x.numpy() for x in (means[0], means[1], one, two)))
    np.testing.assert_allclose(found.matrix.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(found(torch.zeros(4).double()).numpy(), offset.ravel(), atol=1e-6)


def test_a_fitted_map_brings_samples_over() -> None:
    draws = torch.Generator().manual_seed(1)
    source = torch.randn(4000, 3, generator=draws)
    target = torch.randn(4000, 3, generator=draws) @ torch.tensor([[2.0, 0, 0], [0.5, 1, 0], [0, 0, 0.3]]) + 4
    made = GaussianMap.fit(source, target)(source)
    torch.testing.assert_close(made.mean(0), target.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(made.T), torch.cov(target.T), atol=0.1, rtol=0)
    with pytest.raises(ConfigError, match="takes 2 on each side"):
        GaussianMap.fit(source[:1], target)
