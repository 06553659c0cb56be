from __future__ import annotations

import math

import pytest
import torch

from diffalign.budget import Limits
from diffalign.errors import ConfigError
from diffalign.noise import Transition, ddim
from diffalign.search.paths import PathConfig, search_paths
from diffalign.search.stepwise import stepped
from diffalign.search.values import Completion
from tests.search.common import rewards_of, total
from tests.search.toys import gaussian_chain, judge_of, linear

WIDE = {"width": 8, "steps": 10}
SHORT = PathConfig(sigma=0.3, up=0.5, down=0.7)  # two rounds on ten levels


def outcome(chain, rate=total, config=SHORT, **options):
    judge = judge_of(chain, rate)
    return judge, search_paths(chain, judge, config, **options)


def posterior(mean=0.5, deviation=0.7):
    """The exact law of the next level given this one, for data N(mean, deviation^2)."""

    def step(levels, x, prediction, i):
        (a_t, s_t), (a_s, s_s) = levels.at(i), levels.at(i + 1)
        likely = ddim(1.0)(levels, x, prediction, i)
        shift = a_s - math.sqrt(max(s_s**2 - likely.std**2, 0.0)) * a_t / s_t  # of the mean per unit of x0
        spread = deviation**2 * s_t**2 / (a_t**2 * deviation**2 + s_t**2)
        return Transition(likely.mean, math.hypot(likely.std, shift * math.sqrt(spread)))

    return step


def test_raising_and_exact_denoising_keep_the_law_of_the_data():
    chain = gaussian_chain(kernel=posterior(), cases=1000, steps=6)
    config = PathConfig(starts=1, branches=1, sigma=0.35, up=0.5, down=0.67, stochastic=True)
    judge, result = outcome(chain, linear(1.0), config)
    assert len(result.rounds[0]) == 3
    x = torch.tensor([rewards_of(judge, row)[0] for row in range(1000)])
    alpha = chain.levels.at(0)[0]  # the walk starts from N(0, 1), not quite the law of level 0
    assert float(x.mean()) == pytest.approx(0.5, abs=3 * 0.7 / math.sqrt(1000) + alpha)
    assert float(x.var()) == pytest.approx(0.49, abs=3 * 0.49 * math.sqrt(2 / 1000) + alpha)


def test_from_a_clean_sigma_it_is_random_search():
    chain = gaussian_chain(cases=2, **WIDE)
    judge, result = outcome(chain, config=PathConfig(starts=3, sigma=0.0))
    _, media = chain.generate(chain.noise(chain.seeds, [0, 1]), [0, 1])
    assert [judge.leaves[row][0].reward for row in (0, 1)] == media.sum(1).tolist()
    assert result.rounds == ((),)
    assert [len(leaves) for leaves in judge.leaves] == [3, 3]


def test_one_start_without_rounds_by_noisy_steps_is_the_plain_walk():
    chain = gaussian_chain(**WIDE)
    judge, _ = outcome(chain, config=PathConfig(starts=1, sigma=0.0, stochastic=True))
    x = chain.first(chain.seeds, [0])
    for i in range(10):
        x = stepped(chain, x, chain.denoise(x, *chain.levels.at(i)), i, chain.seeds)
    assert torch.equal(judge.best[0][0].x, x[0])


def test_the_papers_numbers_make_four_rounds_on_twenty_steps():
    chain = gaussian_chain(width=8, steps=20)
    _, result = outcome(chain, config=PathConfig())
    assert [each[:3] for each in result.rounds[0]] == [(18, 2, 18), (18, 3, 19), (19, 3, 20), (20, 4, 20)]


def test_levels_are_the_nearest_to_the_given_noise_shares():
    shares = [1.0, 0.99, 0.97, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.0]
    _, result = outcome(gaussian_chain(**WIDE), config=PathConfig(sigma=0.21, up=0.7, down=0.8), sigmas=shares)
    assert [each[:3] for each in result.rounds[0]] == [(7, 3, 8), (8, 4, 10), (10, 4, 10)]
    with pytest.raises(ConfigError, match="3 sigmas"):
        outcome(gaussian_chain(**WIDE), sigmas=[1.0, 0.5, 0.0])


def test_a_round_costs_its_levels_once_per_start_and_branch():
    chain = gaussian_chain(cases=2, cost=2, **WIDE)
    judge, result = outcome(chain, config=PathConfig(starts=2, branches=3, sigma=0.3, up=0.5, down=0.7))
    assert result.rounds[0] == ((7, 2, 9, 3), (9, 4, 10, 3))
    rows = 2 * 7 + 6 * (7 + 1) + 6 * 6
    assert chain.budget.nfe == 2 * 2 * rows == sum(2 * n for _, n in chain.calls)
    assert chain.budget.decodes == chain.budget.reward_calls == 2 * (6 + 6)
    assert len(judge.leaves[0]) == 6


def test_the_rounds_climb_from_a_single_start():
    config = PathConfig(starts=1, branches=4, sigma=0.3, up=0.3, down=0.4)
    searched, result = outcome(gaussian_chain(cases=60, **WIDE), config=config)
    plain, _ = outcome(gaussian_chain(cases=60, **WIDE), config=PathConfig(starts=1, sigma=0.0))
    assert len(result.rounds[0]) == 3
    gain = searched.best_reward() - plain.best_reward()
    assert float(gain.mean()) > 3 * float(gain.std()) / math.sqrt(60)


@pytest.mark.parametrize("limits", [None, Limits(nfe=83), Limits(decodes=11), Limits(reward_calls=2)])
@pytest.mark.parametrize("stochastic", [True, False])
def test_a_batch_gives_each_case_what_it_gets_alone(limits, stochastic):
    config = PathConfig(sigma=0.3, up=0.5, down=0.7, walks=2, stochastic=stochastic)
    together, _ = outcome(gaussian_chain(cases=3, budget=limits, **WIDE), config=config)
    for row in range(3):
        alone, _ = outcome(gaussian_chain(seed=1000 * row, budget=limits, **WIDE), config=config)
        assert rewards_of(alone) == rewards_of(together, row)
        assert torch.equal(alone.best[0][0].x, together.best[row][0].x)


@pytest.mark.parametrize("limit", [10, 19, 20, 36, 45, 77, 120])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_budget_is_never_exceeded_and_always_yields_a_leaf(limit, steps):
    chain = gaussian_chain(cases=2, budget=limit, **WIDE)
    judge = judge_of(chain, total)
    search_paths(chain, judge, SHORT, value=Completion(judge, steps))
    assert chain.budget.nfe == sum(rows for _, rows in chain.calls) <= 2 * limit
    assert 2 * limit - chain.budget.nfe < 2 * 10
    assert len(judge.leaves[0]) == len(judge.leaves[1]) > 0


def test_one_branch_chooses_nothing_and_asks_no_reward_before_the_end():
    chain = gaussian_chain(**WIDE)
    outcome(chain, config=PathConfig(starts=2, branches=1, sigma=0.4, up=0.5, down=0.6))
    assert chain.budget.reward_calls == chain.budget.decodes
    assert all(n == 2 for _, n in chain.calls)


def test_a_flat_reward_keeps_the_first_branches_and_seeds_repeat():
    def flat(media, rows):
        return torch.zeros(len(rows))

    first, _ = outcome(gaussian_chain(**WIDE), flat)
    again, _ = outcome(gaussian_chain(**WIDE), flat)
    assert first.constant
    assert first.best[0][0].number == 0
    assert torch.equal(first.best[0][0].x, again.best[0][0].x)


@pytest.mark.parametrize("wrong", [{"starts": 0}, {"sigma": 1.0}, {"up": 0.5, "down": 0.5}, {"branches": 0}])
def test_a_config_that_cannot_work_is_refused(wrong):
    with pytest.raises(ConfigError, match="paths"):
        PathConfig(**wrong)
