"""Dense step rewards where the completion of every latent is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diffalign.budget import Limits
from diffalign.errors import BudgetError, ConfigError
from diffalign.noise import Levels, Transition, ddim
from diffalign.search.dense import DenseConfig, DenseResult, dense
from diffalign.search.values import CleanPrediction, Completion, Rollouts
from tests.search.toys import ToyChain, exact, gaussian_chain, judge_of, linear, mixture_chain


def run(chain: ToyChain, rate: object = linear(1.0), **config: object) -> DenseResult:
    return dense(chain, judge_of(chain, rate), DenseConfig(**config))  # type: ignore[arg-type]


def curved(media: Tensor, rows: Sequence[int]) -> Tensor:
    return (3 * media[:, 0]).sin()


def two_modes(**options: object) -> ToyChain:
    return mixture_chain([0.3, 0.7], [-1.0, 1.0], 0.3, steps=8, **options)


def test_gains_sum_to_the_final_reward_minus_the_first() -> None:
    chain = two_modes(cases=20)
    judge = judge_of(chain, curved)
    found = dense(chain, judge)
    assert found.levels == tuple(range(9))
    assert (found.rewards.shape, found.gains.shape) == ((20, 9), (20, 8))
    torch.testing.assert_close(found.gains.sum(1), found.rewards[:, -1] - found.rewards[:, 0], atol=1e-5, rtol=0)
    assert float(found.gains.abs().max()) > 0.1
    assert torch.equal(judge.best_reward(), found.rewards[:, -1])  # the image is the one leaf
    assert [len(leaves) for leaves in judge.leaves] == [1] * 20


def test_every_completion_of_a_deterministic_walk_is_its_image_so_no_step_gains() -> None:
    found = run(two_modes(cases=20), curved, stochastic=False)
    assert torch.equal(found.gains, torch.zeros(20, 8))
    silent = run(two_modes(cases=20, kernel=ddim(0.0)), curved)  # a stochastic walk whose kernel draws nothing
    torch.testing.assert_close(silent.gains, torch.zeros(20, 8), atol=1e-4, rtol=0)


def test_the_completion_of_the_noise_is_the_plain_sampler() -> None:
    chain = two_modes(cases=20)
    found = run(chain, curved)
    _, media = chain.generate(chain.noise(chain.seeds, range(20)), list(range(20)))
    assert torch.equal(found.rewards[:, 0], curved(media, range(20)))


@pytest.mark.parametrize("noisy", [0, 3, 6])
def test_with_noise_at_one_step_only_that_step_gains(noisy: int) -> None:
    def kernel(levels: Levels, x: Tensor, prediction: Tensor, i: int) -> Transition:
        return ddim(float(i == noisy))(levels, x, prediction, i)

    found = run(two_modes(cases=20, kernel=kernel), curved)
    others = [i for i in range(8) if i != noisy]
    torch.testing.assert_close(found.gains[:, others], torch.zeros(20, 7), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.gains[:, noisy], found.rewards[:, -1] - found.rewards[:, 0], atol=2e-4, rtol=0)
    assert float(found.gains[:, noisy].abs().max()) > 0.01


def test_a_completion_of_gaussian_data_keeps_the_rank_of_the_latent() -> None:
    """Each deterministic step is affine, so R_i = slope_i x_i + offset_i with the deterministic chain's recursion."""
    chain = gaussian_chain(steps=6, cases=30)
    found = run(chain, keep_latents=True)
    known = exact(gaussian_chain(steps=6, kernel=ddim(0.0)))
    assert found.latents is not None
    assert found.latents.shape == (30, 7, 1)
    for i in range(7):
        wanted = known.slope[i] * found.latents[:, i, 0] + known.offset[i]
        torch.testing.assert_close(found.rewards[:, i], wanted, atol=1e-5, rtol=1e-5)


def test_one_step_completions_are_clean_predictions_and_the_posterior_mean() -> None:
    chain = gaussian_chain(mean=0.5, deviation=0.7, steps=6, cases=30)
    found = run(chain, completion=1, keep_latents=True)
    judge = judge_of(chain, linear(1.0))
    clean = dense(chain, judge, value=CleanPrediction(judge))
    assert torch.equal(found.rewards, clean.rewards)
    assert found.latents is not None
    for i in range(6):
        alpha, sigma = chain.levels.at(i)
        gain = 0.49 * alpha / (0.49 * alpha**2 + sigma**2)
        wanted = 0.5 + gain * (found.latents[:, i, 0] - alpha * 0.5)
        torch.testing.assert_close(found.rewards[:, i], wanted, atol=1e-5, rtol=1e-5)


def test_clean_predictions_of_an_ancestral_walk_gain_nothing_on_average() -> None:
    found = run(gaussian_chain(steps=6, cases=1500), completion=1)
    error = found.gains.std(0) / math.sqrt(1500)
    assert bool((found.gains.mean(0).abs() < 3 * error + 1e-7).all())


def test_a_value_takes_the_place_of_the_completion() -> None:
    chain = two_modes(cases=4)
    judge = judge_of(chain, curved)
    assert torch.equal(
        dense(chain, judge, value=Completion(judge, 2)).rewards, run(chain, curved, completion=2).rewards
    )
    rolled = dense(chain, judge, value=Rollouts(judge, 3))
    assert rolled.rewards.shape == (4, 9)
    assert torch.equal(rolled.rewards[:, -1], run(chain, curved).rewards[:, -1])


def test_every_second_level_merges_the_gains_between() -> None:
    full, sparse = run(two_modes(cases=5), curved), run(two_modes(cases=5), curved, every=3, keep_latents=True)
    assert sparse.levels == (0, 3, 6, 8)
    assert torch.equal(sparse.rewards, full.rewards[:, [0, 3, 6, 8]])
    merged = torch.stack([full.gains[:, 0:3].sum(1), full.gains[:, 3:6].sum(1), full.gains[:, 6:8].sum(1)], 1)
    torch.testing.assert_close(sparse.gains, merged, atol=1e-5, rtol=0)
    assert run(two_modes(), curved, every=50).levels == (0, 8)


@pytest.mark.parametrize("config", [{}, {"completion": 2}, {"every": 3}, {"stochastic": False}])
def test_cases_walked_together_earn_what_they_earn_alone(config: dict[str, object]) -> None:
    together = run(two_modes(cases=3), curved, **config)
    again = run(two_modes(cases=3), curved, **config)
    assert torch.equal(together.rewards, again.rewards)
    for k in range(3):
        assert torch.equal(run(two_modes(seed=1000 * k), curved, **config).rewards[0], together.rewards[k])


def test_an_affine_reward_scales_the_gains_and_a_constant_one_gives_none() -> None:
    plain = run(two_modes(cases=5), curved).gains
    changed = run(two_modes(cases=5), lambda m, rows: 2 * curved(m, rows) + 3).gains
    torch.testing.assert_close(changed, 2 * plain, atol=1e-5, rtol=0)
    assert not run(two_modes(cases=5), lambda m, rows: torch.ones(len(m))).gains.any()


def test_an_invalid_reward_blanks_the_two_gains_beside_it_and_no_more() -> None:
    asked: list[int] = []

    def fails_once(media: Tensor, rows: Sequence[int]) -> Tensor:
        asked.append(len(rows))
        found = curved(media, rows)
        return torch.where(torch.tensor([row == 1 and len(asked) == 4 for row in rows]), torch.nan, found)

    found = run(two_modes(cases=3), fails_once)
    assert found.rewards.isnan().nonzero().tolist() == [[1, 3]]
    assert found.gains.isnan().nonzero().tolist() == [[1, 2], [1, 3]]


def test_full_completions_cost_the_walk_and_what_remains_at_every_level() -> None:
    chain = two_modes(cases=2)
    run(chain, curved)
    assert chain.budget.nfe == sum(n for _, n in chain.calls) == 2 * (8 + 7 * 8 // 2)
    assert (chain.budget.decodes, chain.budget.reward_calls) == (18, 18)


@pytest.mark.parametrize("nfe", range(15, 40))
def test_a_tight_budget_scores_fewer_levels_and_is_never_exceeded(nfe: int) -> None:
    chain = two_modes(cases=2, budget=Limits(nfe=nfe, reward_calls=8))
    found = run(chain, curved)
    assert chain.budget.nfe == sum(n for _, n in chain.calls) <= 2 * nfe
    assert chain.budget.reward_calls == 2 * len(found.levels) <= 16
    assert found.levels[0] == 0
    assert found.levels[-1] == 8
    full = run(two_modes(cases=2), curved)
    assert torch.equal(found.rewards, full.rewards[:, list(found.levels)])


def test_a_budget_below_the_walk_fails_before_anything_is_spent() -> None:
    chain = two_modes(cases=2, budget=14)
    with pytest.raises(BudgetError, match="at least 15"):
        run(chain, curved)
    assert chain.calls == []


@pytest.mark.parametrize("wrong", [{"completion": -1}, {"every": 0}])
def test_a_wrong_setting_is_quoted(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
        DenseConfig(**wrong)
