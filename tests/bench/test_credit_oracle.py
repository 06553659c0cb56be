"""True advantages are measured right where a closed form tells them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from diffalign.bench.credit_methods import Methods
from diffalign.bench.credit_oracle import (
    OracleConfig,
    Worth,
    ceiling,
    pearson,
    ranks,
    redrawn,
    spearman,
    summed_up,
    variances,
    worth,
)
from tests.bench.credit_jobs import (
    NOISE,
    STEPS,
    all_methods,
    shrinking,
    still_job,
    walked,
)
from tests.cli.conftest import here, tiny  # noqa: F401
from tests.train.bench_chain import drawn


def test_the_value_of_a_latent_is_what_a_linear_chain_makes_of_it() -> None:
    with still_job(groups=1, group_size=4, micro_batch=4) as found:
        rollouts, rewards = walked(found, Methods(all_methods(), NOISE))
        told = OracleConfig(redraws=16, completions=4, batch=64)
        measured = worth(found, rollouts, rewards[:, 0], told)
        c, nu = shrinking(rollouts[0])
        x = torch.stack([z.double().flatten(1).mean(1) for z in rollouts[0].walk.latents[:STEPS]], 1)
        after = torch.stack([c[i:].prod() for i in range(STEPS)])
        torch.testing.assert_close(measured.V[:, -1], rewards[:, 0].double())
        z = (measured.V[:, :-1] - (after * x)[:, : STEPS - 1]) / measured.error.sqrt()
        assert float(z.abs().max()) < 4.5
        torch.testing.assert_close(measured.V[:, -1], after[-1] * x[:, -1], rtol=1e-4, atol=1e-5)
        size = rollouts[0].elements
        true = torch.stack([(c[i + 1 :].prod() * nu[i]) ** 2 / size for i in range(STEPS - 1)])
        later = true.sum() - true.cumsum(0)
        error = (2 / (4 * 15)) ** 0.5 * (true + later / told.completions)
        assert bool(((measured.variance.mean(0) - true).abs() < 4 * error).all())
        torch.testing.assert_close(measured.halves.mean(0), measured.V)


def test_redraws_differ_and_repeat_whatever_the_batch() -> None:
    with still_job(groups=1, group_size=2, micro_batch=2) as found:
        rollouts, _ = walked(found, Methods(all_methods(), NOISE))
        a = redrawn(found, rollouts[0], 1, 3, 2, 64, "redraw")
        b = redrawn(found, rollouts[0], 1, 3, 2, 5, "redraw")
    torch.testing.assert_close(a, b)
    assert a.shape == (2, 3, 2)
    assert len(set(a.flatten().tolist())) == 12


def test_after_the_last_noise_all_completions_are_one() -> None:
    with still_job(groups=1, group_size=2, micro_batch=2) as found:
        rollouts, _ = walked(found, Methods(all_methods(), NOISE))
        before = found.budget.reward_calls
        last = redrawn(found, rollouts[0], STEPS - 2, 4, 3, 64, "redraw")
        assert found.budget.reward_calls - before == 2 * 4
    assert bool((last == last[..., :1]).all())


def test_the_law_of_total_variance_holds_on_the_chain_in_spite_of_few_redraws() -> None:
    steps, group, prompts = 4, 4, 600
    nu = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    n = group * prompts
    chain, drawing = drawn(n, steps, nu=nu, seed=1), torch.Generator().manual_seed(2)
    start = torch.randn(n, 1, generator=drawing, dtype=torch.float64)
    x = chain.x + start
    columns = []
    for i in range(steps):
        later = float(nu[i + 1 :].square().sum()) ** 0.5
        redraw = nu[i] * torch.randn(n, 6, 1, generator=drawing, dtype=torch.float64)
        columns.append(summed_up(x[:, i, None, None] + redraw + later * torch.randn(n, 6, 2, generator=drawing)))
    V, halves, variance, error = (torch.stack([column[k] for column in columns], -1) for k in range(4))
    measured = Worth(torch.cat([V, x[:, -1:]], 1), torch.cat([halves, x[:, -1:].expand(2, n, 1)], 2), variance, error)
    found = variances(measured, x[:, -1], torch.arange(prompts).repeat_interleave(group))

    def near(values: Tensor, truth: float) -> bool:
        return abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(len(values))

    assert near(found["start"], 1.0)
    assert near(found["total"], 1.0 + float(nu.square().sum()))
    assert all(near(found["steps"][:, k], float(nu[k] ** 2)) for k in range(steps))
    assert near(found["residual"], 0.0)


def test_a_broadcast_reward_correlates_as_one_over_the_root_of_the_steps_and_true_credit_reaches_the_ceiling() -> None:
    chain = drawn(40000, 10)
    A, truth = chain.broadcast(), chain.truth
    assert pearson(A.flatten(), truth.flatten()) == pytest.approx(10**-0.5, abs=0.01)
    noise = [0.7 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    halves = [truth + each for each in noise]
    measured = (halves[0] + halves[1]) / 2
    top = ceiling(pearson(halves[0].flatten(), halves[1].flatten()))
    assert pearson(truth.flatten(), measured.flatten()) == pytest.approx(top, abs=0.01)


@given(st.lists(st.integers(0, 5), min_size=3, max_size=30), st.integers(0, 99))
def test_ranks_of_ties_are_their_mean(numbers: list[int], seed: int) -> None:
    x = torch.tensor(numbers).double()
    y = torch.randn(len(x), generator=torch.Generator().manual_seed(seed)).double()
    assert ranks(x).tolist() == stats.rankdata(numbers).tolist()
    if len(set(numbers)) > 1:
        assert spearman(x, y) == pytest.approx(float(stats.spearmanr(numbers, y.numpy()).statistic))
        assert spearman(x, y.exp()) == pytest.approx(spearman(x, y))


def test_what_failed_is_left_out() -> None:
    rewards = torch.tensor([[[1.0, 3.0], [torch.nan, 5.0], [torch.nan, torch.nan], [6.0, 8.0]]])
    value, halves, _, _ = summed_up(rewards)
    assert value.tolist() == [(2 + 5 + 7) / 3]
    assert halves.flatten().tolist() == [3.5, 7.0]
    assert spearman(torch.tensor([1.0, 2, 3, torch.nan]), torch.tensor([2.0, 3, 9, 1])) == pytest.approx(1)
