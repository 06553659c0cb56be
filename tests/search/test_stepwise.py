from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from diffalign.budget import Limits
from diffalign.errors import ConfigError
from diffalign.noise import case_noise, ddim
from diffalign.search.anneal import Anneal
from diffalign.search.stepwise import StepwiseConfig, candidates, search_steps
from diffalign.search.values import CleanPrediction, Completion
from tests.search.common import plain, rewards_of, total
from tests.search.toys import FiniteChain, exact, gaussian_chain, judge_of, linear

WIDE = {"width": 8, "steps": 5}  # ddim(1) draws at steps 0..3; the last one is deterministic
COUNTS = StepwiseConfig(candidates=3, rounds=2)


def outcome(chain, rate=total, config=COUNTS, **options):
    judge = judge_of(chain, rate)
    return judge, search_steps(chain, judge, config, **options)


def fresh_candidates(pivot, k, **options):
    given = {"n": 4, "epsilon": 0.0, "distance": 0.15, "project": True} | options
    return candidates(pivot, range(len(pivot)), k, **given)


def test_projected_candidates_have_the_norm_of_their_dimension():
    pivot = case_noise(range(3), torch.zeros(3, 4, 5, 5), "pivot")
    for epsilon in (0.0, 0.5, 1.0):
        assert torch.allclose(fresh_candidates(pivot, 0, epsilon=epsilon).flatten(2).norm(dim=2), torch.tensor(10.0))


def test_without_projection_the_norm_grows_with_the_rounds_and_with_it_it_does_not():
    """Steps of length U(0, 1) lam sqrt(d) in random directions add lam^2 d / 3 to the squared norm each."""
    for project in (False, True):
        pivot = case_noise(range(40), torch.zeros(40, 256), "pivot")
        start = float((pivot**2).sum(1).mean())
        for k in range(20):
            pivot = fresh_candidates(pivot, k, n=1, project=project)[:, 0]
        grown = float((pivot**2).sum(1).mean()) - start
        expected = 0.0 if project else 20 * 0.15**2 * 256 / 3
        assert grown == pytest.approx(expected, abs=0.15 * 256 if not project else 6.0)


def test_near_candidates_stay_within_their_distance_and_fresh_ones_are_standard_normal():
    pivot = case_noise(range(50), torch.zeros(50, 64), "pivot")
    near = fresh_candidates(pivot, 0, project=False)
    assert float((near - pivot[:, None]).norm(dim=2).max()) <= 0.15 * 8
    fresh = fresh_candidates(pivot, 0, epsilon=1.0, project=False, n=10).flatten()
    assert float(fresh.mean()) == pytest.approx(0.0, abs=3 / math.sqrt(len(fresh)))
    assert float(fresh.var()) == pytest.approx(1.0, abs=3 * math.sqrt(2 / len(fresh)))


def test_no_rounds_are_the_plain_walk_bit_for_bit_at_its_cost():
    chain = gaussian_chain(cases=2, **WIDE)
    judge, _ = outcome(chain, config=StepwiseConfig(rounds=0))
    assert torch.equal(torch.stack([kept[0].x for kept in judge.best]), plain(chain))
    assert chain.budget.nfe == 2 * 5
    assert chain.budget.decodes == 2


def test_a_flat_reward_with_a_pivot_that_competes_is_the_plain_walk():
    chain = gaussian_chain(cases=2, **WIDE)
    judge, _ = outcome(chain, lambda media, rows: torch.zeros(len(rows)), StepwiseConfig(keep=True, rounds=3))
    assert torch.equal(torch.stack([kept[0].x for kept in judge.best]), plain(chain))


def test_a_flat_reward_leaves_the_law_of_the_plain_walk():
    chain = gaussian_chain(steps=4, cases=800)
    config = StepwiseConfig(candidates=2, rounds=1, epsilon=1.0, project=False)
    judge, _ = outcome(chain, lambda media, rows: torch.zeros(len(rows)), config)
    x = torch.stack([kept[0].x for kept in judge.best])[:, 0]
    mean, variance = exact(chain).prior
    assert float(x.mean()) == pytest.approx(mean, abs=3 * math.sqrt(variance / 800))
    assert float(x.var()) == pytest.approx(variance, abs=3 * variance * math.sqrt(2 / 800))


@pytest.mark.parametrize(("candidates", "rounds", "every"), [(1, 1, 1), (3, 2, 1), (4, 1, 2)])
def test_a_searched_step_costs_rounds_times_candidates_with_the_next_prediction_in_it(candidates, rounds, every):
    chain = gaussian_chain(cases=2, cost=3, **WIDE)
    _, result = outcome(chain, config=StepwiseConfig(candidates=candidates, rounds=rounds, every=every))
    searched = len(range(0, 4, every))
    tries = searched * candidates * rounds
    assert chain.budget.nfe == 2 * 3 * (1 + (4 - searched) + tries)
    assert chain.budget.nfe == sum(3 * rows for _, rows in chain.calls)
    assert chain.budget.decodes == chain.budget.reward_calls == 2 * (tries + 1)
    assert int(result.rounds.sum()) == searched * rounds


def test_the_look_ahead_asks_the_model_at_the_next_level():
    chain = gaussian_chain(**WIDE)
    outcome(chain, config=StepwiseConfig(candidates=3, rounds=1))
    assert chain.calls == [(0, 1), (1, 3), (2, 3), (3, 3), (4, 3)]


def test_a_stochastic_last_step_is_searched_among_leaves():
    chain = FiniteChain(states=6, steps=3)
    judge, _ = outcome(chain, linear(1.0), StepwiseConfig(candidates=5, rounds=2, epsilon=1.0, project=False))
    assert len(judge.leaves[0]) == 10
    assert [calls for calls in chain.calls if calls[0] == 0] == [(0, 1)]


def test_many_candidates_pick_the_exactly_best_step_of_a_finite_chain():
    chain = FiniteChain(states=3, steps=1)
    judge, _ = outcome(chain, linear(1.0), StepwiseConfig(candidates=60, rounds=1, epsilon=1.0, project=False))
    assert judge.best[0][0].reward == 2.0


def test_search_beats_the_plain_walk_and_a_kept_pivot_never_falls():
    walks = {}
    for rounds in (0, 2):
        judge, _ = outcome(gaussian_chain(cases=60, **WIDE), config=StepwiseConfig(rounds=rounds))
        walks[rounds] = judge.best_reward()
    gain = walks[2] - walks[0]
    assert float(gain.mean()) > 3 * float(gain.std()) / math.sqrt(60)


@pytest.mark.parametrize("limits", [None, Limits(nfe=47), Limits(decodes=23), Limits(reward_calls=3)])
@pytest.mark.parametrize("keep", [True, False])
def test_a_batch_gives_each_case_what_it_gets_alone(limits, keep):
    config = StepwiseConfig(candidates=3, rounds=2, keep=keep, walks=2, anneal=Anneal())
    together, _ = outcome(gaussian_chain(cases=3, budget=limits, **WIDE), config=config)
    for row in range(3):
        alone, _ = outcome(gaussian_chain(seed=1000 * row, budget=limits, **WIDE), config=config)
        assert rewards_of(alone) == rewards_of(together, row)
        assert torch.equal(alone.best[0][0].x, together.best[row][0].x)


@pytest.mark.parametrize("limit", [5, 7, 9, 16, 25, 26, 31, 60])
@pytest.mark.parametrize("value", [CleanPrediction, Completion])
def test_a_budget_is_never_exceeded_and_always_yields_a_leaf(limit, value):
    chain = gaussian_chain(cases=2, budget=limit, **WIDE)
    judge = judge_of(chain, total)
    search_steps(chain, judge, COUNTS, value=value(judge))
    assert chain.budget.nfe == sum(rows for _, rows in chain.calls) <= 2 * limit
    assert 2 * limit - chain.budget.nfe < 2 * 5  # not even a plain walk is left
    assert all(len(leaves) == len(judge.leaves[0]) > 0 for leaves in judge.leaves)


def test_later_walks_start_from_other_noise_and_seeds_repeat():
    first, _ = outcome(gaussian_chain(**WIDE), config=StepwiseConfig(walks=3))
    again, _ = outcome(gaussian_chain(**WIDE), config=StepwiseConfig(walks=3))
    assert len(set(rewards_of(first))) == 3
    assert rewards_of(first) == rewards_of(again)


@dataclass
class Third:
    """A value that knows which candidate it likes: the third of each four; the others are worth `else_`."""

    else_: float

    def cost(self, i):
        return 0, 0

    def __call__(self, x, prediction, i, rows, seeds):
        return torch.tensor([1.0 if k % 4 == 2 else self.else_ for k in range(len(x))])


@pytest.mark.parametrize("keep", [True, False])
def test_invalid_values_never_win(keep):
    config = StepwiseConfig(candidates=4, rounds=2, keep=keep)
    valid, _ = outcome(gaussian_chain(cases=2, **WIDE), config=config, value=Third(0.0))
    patchy, _ = outcome(gaussian_chain(cases=2, **WIDE), config=config, value=Third(math.nan))
    assert all(torch.equal(a[0].x, b[0].x) for a, b in zip(valid.best, patchy.best, strict=True))


def test_where_every_reward_is_invalid_the_walk_still_ends_at_the_same_cost():
    chain = gaussian_chain(**WIDE)
    judge, _ = outcome(chain, lambda media, rows: torch.full((len(rows),), math.nan))
    assert chain.budget.nfe == 1 + 4 * 6
    assert not judge.best[0]
    assert len(judge.leaves[0]) == 1


def test_a_deterministic_sampler_leaves_nothing_to_search():
    chain = gaussian_chain(kernel=ddim(0.0), **WIDE)
    _, result = outcome(chain)
    assert chain.budget.nfe == 5
    assert int(result.rounds.sum()) == 0


@pytest.mark.parametrize("wrong", [{"candidates": 0}, {"rounds": -1}, {"epsilon": 1.2}, {"distance": -1}, {"every": 0}])
def test_a_config_that_cannot_work_is_refused(wrong):
    with pytest.raises(ConfigError, match="stepwise"):
        StepwiseConfig(**wrong)
