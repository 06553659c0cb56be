"""The laws of best-of-N: exact against brute force, against closed forms, and under every invariance it claims."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import pytest
import torch

from diffalign.errors import ConfigError
from diffalign.search import best_of_n as bon

POOL = torch.tensor([0.3, -1.2, 4.0, 2.5, 2.4, -0.7, 1.1, 0.9], dtype=torch.float64)
TIED = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 2.0, 1.0, 0.0], dtype=torch.float64)


def gaussian_draws(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("pool", [POOL, TIED])
@pytest.mark.parametrize("n", range(1, 9))
def test_the_estimate_equals_the_average_over_all_subsets(pool: torch.Tensor, n: int):
    brute = sum(max(s) for s in combinations(pool.tolist(), n)) / math.comb(8, n)
    assert bon.expected(pool, n) == pytest.approx(brute, abs=1e-14)


def test_one_draw_gives_the_mean_and_all_draws_give_the_maximum():
    assert bon.expected(POOL, 1) == pytest.approx(float(POOL.mean()), abs=1e-15)
    assert bon.expected(POOL, 8) == float(POOL.max())


@pytest.mark.parametrize(("pool", "n"), [(50, 7), (1000, 250), (4000, 4000), (4000, 3), (4000, 2000)])
def test_weights_are_exact_for_pools_of_thousands(pool: int, n: int):
    got = bon.weights(pool, n)
    assert float(got.sum()) == pytest.approx(1.0, abs=1e-12)
    for i in {n, (n + pool) // 2, pool - 1, pool}:
        if n <= i:
            exact = float(Fraction(math.comb(i - 1, n - 1), math.comb(pool, n)))
            assert float(got[i - 1]) == pytest.approx(exact, rel=1e-11, abs=1e-300)


@pytest.mark.parametrize("n", range(1, 9))
def test_a_carried_metric_is_averaged_over_the_order_of_ties(n: int):
    metric = gaussian_draws((8,))
    brute = 0.0
    for subset in combinations(range(8), n):
        top = max(float(TIED[i]) for i in subset)
        tied = [float(metric[i]) for i in subset if float(TIED[i]) == top]
        brute += sum(tied) / len(tied)
    assert bon.expected(TIED, n, metric) == pytest.approx(brute / math.comb(8, n), abs=1e-13)


def test_a_carried_metric_does_not_depend_on_the_order_of_the_pool():
    metric, shuffled = gaussian_draws((8,)), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(bon.curve(TIED, metric), bon.curve(TIED[shuffled], metric[shuffled]), atol=1e-14)


def test_the_curve_never_falls():
    assert (bon.curve(gaussian_draws((200,))).diff() >= 0).all()


@pytest.mark.parametrize(("n", "best"), [(2, 0.56419), (4, 1.02938), (8, 1.42360), (16, 1.76599), (32, 2.06967)])
def test_a_gaussian_reward_reaches_the_known_expected_maximum(n: int, best: float):
    # closed-form order statistics of the normal; four standard errors of a pool of 4000 are below .06 here
    pools = gaussian_draws((5, 4000))
    mean = sum(bon.expected(pool, n) for pool in pools) / 5
    assert mean == pytest.approx(best, abs=0.06)


@pytest.mark.parametrize(
    ("n", "kl"), [(1, 0.0), (2, 0.19315), (4, 0.63629), (8, 1.20444), (16, 1.83509), (32, 2.49699)]
)
def test_the_kl_bound_has_the_published_values(n: int, kl: float):
    assert bon.kl_bound(n) == pytest.approx(kl, abs=1e-5)


def test_the_kl_bound_is_reached_when_no_rewards_tie():
    n, draws = 4, 200_000
    uniform = torch.rand((draws, n), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = uniform.max(dim=1).values  # its density is n u^(n-1), so E log density is the KL
    assert float((math.log(n) + (n - 1) * best.log()).mean()) == pytest.approx(bon.kl_bound(n), abs=0.01)


@pytest.mark.parametrize("q", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_a_pass_or_fail_reward_has_the_exact_binary_kl_below_the_bound(q: float, n: int):
    s = 1 - (1 - q) ** n
    exact = s * math.log(s / q) + (1 - s) * math.log((1 - s) / (1 - q))
    assert bon.binary_kl(q, n) == pytest.approx(exact, abs=1e-12)
    assert bon.binary_kl(q, n) <= bon.kl_bound(n) + 1e-12


def test_a_reward_that_never_or_always_passes_moves_nothing():
    assert bon.binary_kl(0.0, 8) == bon.binary_kl(1.0, 8) == 0.0


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 1), (3, 2), (4, 4), (7, 1), (1, 7)])
@pytest.mark.parametrize("pool", [POOL, TIED])
def test_the_win_rate_equals_brute_force_over_disjoint_subsets(pool: torch.Tensor, n: int, m: int):
    score, count = 0.0, 0
    for mine in combinations(range(8), n):
        rest = [i for i in range(8) if i not in mine]
        for theirs in combinations(rest, m):
            a, b = max(float(pool[i]) for i in mine), max(float(pool[i]) for i in theirs)
            score, count = score + (a > b) + 0.5 * (a == b), count + 1
    assert bon.win_rate(pool, n, m) == pytest.approx(score / count, abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 1), (8, 4)])
def test_without_ties_the_win_rate_is_n_over_n_plus_m(n: int, m: int):
    assert bon.win_rate(gaussian_draws((500,)), n, m) == pytest.approx(bon.win_rate_without_ties(n, m), abs=1e-9)


def test_a_constant_reward_wins_exactly_half_the_time():
    assert bon.win_rate(torch.ones(10), 5, 3) == pytest.approx(0.5, abs=1e-12)


def test_monte_carlo_wins_agree_with_the_formula():
    # sigma of a share over 200,000 pairs is .001
    mine, theirs = (
        gaussian_draws((200_000, 4)).max(dim=1).values,
        gaussian_draws((200_000, 2), seed=1).max(dim=1).values,
    )
    assert float((mine > theirs).double().mean()) == pytest.approx(4 / 6, abs=0.005)


@pytest.mark.parametrize("pool", [POOL, TIED])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_pool_calibrated_on_itself_has_mean_one_half(pool: torch.Tensor, smooth: bool):
    assert float(bon.calibrate(pool, pool, smooth=smooth).mean()) == pytest.approx(0.5, abs=1e-15)


def test_calibration_ignores_any_increasing_transform():
    pool, fresh = gaussian_draws((64,)), gaussian_draws((500,), seed=1)
    plain = bon.calibrate(fresh, pool)
    assert torch.equal(plain, bon.calibrate(fresh.exp() + 7, pool.exp() + 7))


def test_fresh_base_samples_are_calibrated_to_a_uniform():
    from scipy.stats import kstest

    u = bon.calibrate(gaussian_draws((2000,), seed=1), gaussian_draws((20_000,)))
    assert kstest(u.numpy(), "uniform").pvalue > 0.01


def test_smoothed_calibration_stays_strictly_inside():
    u = bon.calibrate(torch.tensor([-99.0, 99.0]), POOL, smooth=True)
    assert 0.0 < float(u[0]) < float(u[1]) < 1.0


@pytest.mark.parametrize("m", [1, 3, 8])
def test_a_policy_that_is_itself_best_of_m_wins_m_over_m_plus_one(m: int):
    # F(u) = u^M on a fine grid of calibrated rewards: W = 1 - integral of F = M / (M + 1)
    grid = torch.arange(1, 20_001, dtype=torch.float64) / 20_000
    policy = grid.pow(1 / m)  # quantiles of u^m
    assert bon.wins(policy, grid) == pytest.approx(m / (m + 1), abs=1e-3)


def test_the_best_come_first_with_ties_to_the_earlier_and_invalid_last():
    total = torch.tensor([[1.0, 3.0, float("nan"), 3.0]])
    assert bon.best_first(total, torch.isfinite(total), 4).tolist() == [[1, 3, 0, 2]]


def test_the_running_best_never_falls_on_nested_seeds():
    total = gaussian_draws((6, 32))
    assert (bon.running_best(total, torch.isfinite(total)).diff(dim=1) >= 0).all()


def test_asking_for_more_than_the_pool_says_how_many_there_are():
    with pytest.raises(ConfigError, match="the pool holds 8"):
        bon.expected(POOL, 9)


def test_a_pool_with_an_invalid_reward_is_refused():
    with pytest.raises(ConfigError, match="drop the invalid"):
        bon.expected(torch.tensor([1.0, float("nan")]), 1)
