from __future__ import annotations

import math

import pytest
import torch

from diffalign.budget import Limits
from diffalign.errors import BudgetError, ConfigError
from diffalign.search.anneal import Anneal
from diffalign.search.local import LocalConfig, pcn, random_search, rotated, zero_order
from tests.search.toys import gaussian_chain, judge_of, linear

WIDE = {"width": 8, "steps": 4}


def draws(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def total(media, rows):
    return media.sum(1)


def outcome(search, chain, rate=total, config=LocalConfig(), **options):
    judge = judge_of(chain, rate)
    return judge, search(chain, judge, config, **options)


def rewards_of(judge, row=0):
    return [leaf.reward for leaf in judge.leaves[row]]


@pytest.mark.parametrize("cosine", [0.95, 0.0, -0.5, 1.0])
def test_a_rotated_neighbour_has_the_asked_cosine_and_the_pivots_norm(cosine):
    pivot, direction = draws(50, 4, 5, 5, dtype=torch.float64), draws(50, 4, 5, 5, seed=1, dtype=torch.float64)
    found = rotated(pivot, direction, cosine)
    n, y = pivot.flatten(1), found.flatten(1)
    assert torch.allclose((n * y).sum(1) / n.norm(dim=1) / y.norm(dim=1), torch.tensor(cosine).double(), atol=1e-6)
    assert torch.allclose(y.norm(dim=1), n.norm(dim=1), rtol=1e-12)
    if cosine == 1.0:
        assert torch.allclose(found, pivot, rtol=1e-12)


@pytest.mark.parametrize("move", [rotated, pcn])
def test_neighbours_of_standard_normals_are_standard_normal(move):
    found = move(draws(40_000, 3), draws(40_000, 3, seed=1), 0.8)
    assert torch.allclose(found.mean(0), torch.zeros(3), atol=3 / 200)
    assert torch.allclose(torch.cov(found.T), torch.eye(3), atol=3 * math.sqrt(2) / 200)
    assert float((found**4).mean()) == pytest.approx(3.0, abs=3 * math.sqrt(96 / 120_000))


def test_many_rotations_do_not_let_the_norm_drift():
    pivot = draws(10, 64)
    there = pivot
    for k in range(100):
        there = rotated(there, draws(10, 64, seed=k + 1), 0.95)
    assert torch.allclose(there.norm(dim=1), pivot.norm(dim=1), rtol=1e-4)


def test_a_single_number_cannot_be_rotated():
    with pytest.raises(ConfigError, match="pcn"):
        rotated(torch.ones(1, 1), torch.ones(1, 1), 0.9)


@pytest.mark.parametrize("search", [random_search, zero_order])
def test_the_first_leaf_is_the_plain_image(search):
    chain = gaussian_chain(cases=2, **WIDE)
    judge, _ = outcome(search, chain)
    _, media = chain.generate(chain.noise(chain.seeds, [0, 1]), [0, 1])
    assert [judge.leaves[row][0].reward for row in (0, 1)] == pytest.approx(media.sum(1).tolist(), abs=0)


def test_random_search_follows_the_law_of_the_largest_of_n():
    chain = gaussian_chain(steps=3, cases=600)
    judge, _ = outcome(random_search, chain, linear(1.0), LocalConfig(neighbours=4, rounds=2))
    best, every = judge.best_reward(), torch.tensor([rewards_of(judge, row) for row in range(600)])
    z = (best - every.mean()) / every.std()
    assert float(z.mean()) == pytest.approx(1.4236, abs=3 * 0.611 / math.sqrt(600))  # mean of the largest of 8 normals


def test_random_search_names_the_seed_that_redraws_each_candidate():
    chain = gaussian_chain(cases=2, **WIDE)
    judge, _ = outcome(random_search, chain)
    leaf = judge.best[1][0]
    _, media = chain.generate(chain.noise([leaf.seed], [1]), [1])
    assert torch.equal(media[0], leaf.media)


def test_zero_order_climbs_a_quadratic_to_its_top_on_the_sphere():
    chain = gaussian_chain(cases=20, width=4, steps=3)
    start = chain.noise(chain.seeds, range(20))
    unit, (x, _) = torch.ones(4) / 2, chain.generate(torch.stack([torch.zeros(4), torch.ones(4)]), [0, 0])
    slope, offset = float(x[1, 0] - x[0, 0]), x[0]

    def quadratic(media, rows):
        return -((media - offset) / slope - 9 * unit).square().sum(1)

    config = LocalConfig(neighbours=8, rounds=30, cosine=0.9, restart=False)
    judge, result = outcome(zero_order, chain, quadratic, config)
    assert bool((result.path.diff(dim=1) >= 0).all())
    tops = -((9 - start.norm(dim=1)) ** 2)
    gained = (judge.best_reward() - result.path[:, 0]) / (tops - result.path[:, 0]).clamp(min=1e-3)
    assert float(gained.median()) > 0.95
    assert bool((judge.best_reward() <= tops + 1e-3).all())
    assert torch.allclose(result.pivot.norm(dim=1), start.norm(dim=1), rtol=1e-4)


def test_zero_order_beats_random_search_at_the_same_cost_in_many_dimensions():
    config = LocalConfig(neighbours=4, rounds=12, cosine=0.8, restart=False)
    first, _ = outcome(zero_order, a := gaussian_chain(cases=20, width=64, steps=2), config=config)
    second, _ = outcome(random_search, b := gaussian_chain(cases=20, width=64, steps=2), config=config)
    assert a.budget.nfe == b.budget.nfe == 20 * 48 * 2
    gain = first.best_reward() - second.best_reward()
    assert float(gain.mean()) > 3 * float(gain.std()) / math.sqrt(20)


@pytest.mark.parametrize("restart", [True, False])
def test_every_round_costs_exactly_its_neighbours_and_scores_no_pivot_twice(restart):
    chain = gaussian_chain(cases=3, cost=2, **WIDE)
    judge, result = outcome(zero_order, chain, config=LocalConfig(neighbours=3, rounds=5, restart=restart))
    assert chain.budget.nfe == sum(2 * rows for _, rows in chain.calls) == 3 * 3 * 5 * 4 * 2
    assert chain.budget.reward_calls == chain.budget.decodes == 3 * 15
    assert all(len(set(rewards_of(judge, row))) == 15 for row in range(3))
    assert result.path.shape == (3, 5)


def test_a_pivot_that_no_neighbour_beats_is_redrawn_or_kept_as_asked():
    def falling(chain):
        seen = iter(range(1000))
        return lambda media, rows: torch.tensor([-float(next(seen)) for _ in rows])

    for restart, steady in ((True, False), (False, True)):
        chain = gaussian_chain(**WIDE)
        config = LocalConfig(neighbours=2, rounds=3, restart=restart)
        _, result = outcome(zero_order, chain, falling(chain), config)
        assert (len(set(result.path[0].tolist())) == 1) is steady
        assert torch.equal(result.noise, chain.noise(chain.seeds, [0]))  # the first image stays the best found


def test_a_given_noise_is_where_the_climb_begins():
    chain = gaussian_chain(**WIDE)
    noise = draws(1, 8, seed=9)
    judge, _ = outcome(zero_order, chain, noise=noise)
    _, media = chain.generate(noise, [0])
    assert judge.leaves[0][0].reward == float(media.sum())


def test_a_metropolis_walk_of_pcn_proposals_samples_the_tilted_law():
    chain = gaussian_chain(steps=2, cases=400)
    points, _ = chain.generate(torch.tensor([[0.0], [1.0]]), [0, 0])
    offset, slope = float(points[0]), float(points[1] - points[0])
    config = LocalConfig(neighbours=1, rounds=16, proposal="pcn", cosine=0.5, restart=False, strength=1.0)
    _, result = outcome(zero_order, chain, linear(1.0), config)
    z = result.pivot[:, 0]  # of N(0, 1) tilted by exp(slope z): N(slope, 1)
    assert float(z.mean()) == pytest.approx(slope, abs=3 / math.sqrt(400))
    assert float(z.var()) == pytest.approx(1.0, abs=3 * math.sqrt(2 / 400))
    assert torch.allclose(result.path[:, -1], offset + slope * z, atol=1e-5)


def test_a_metropolis_walk_of_strength_zero_takes_every_proposal():
    config = LocalConfig(neighbours=1, rounds=6, proposal="pcn", restart=False, strength=0.0)
    judge, result = outcome(zero_order, gaussian_chain(), linear(1.0), config)
    assert result.path[0].tolist() == rewards_of(judge)


@pytest.mark.parametrize("search", [random_search, zero_order])
@pytest.mark.parametrize("limits", [None, Limits(nfe=4 * 11), Limits(decodes=7), Limits(reward_calls=5)])
def test_a_batch_gives_each_case_what_it_gets_alone(search, limits):
    config = LocalConfig(neighbours=3, rounds=4, anneal=Anneal())
    together, _ = outcome(search, gaussian_chain(cases=3, budget=limits, **WIDE), config=config)
    for row in range(3):
        alone, _ = outcome(search, gaussian_chain(seed=1000 * row, budget=limits, **WIDE), config=config)
        assert rewards_of(alone) == rewards_of(together, row)
        assert torch.equal(alone.best[0][0].x, together.best[row][0].x)


@pytest.mark.parametrize("search", [random_search, zero_order])
def test_a_budget_is_used_up_to_the_last_affordable_image(search):
    for limit in (4, 7, 8, 45):
        chain = gaussian_chain(cases=2, budget=limit, **WIDE)
        judge, _ = outcome(search, chain)
        assert chain.budget.nfe == 2 * 4 * (limit // 4)
        assert len(judge.leaves[0]) == len(judge.leaves[1]) == limit // 4


@pytest.mark.parametrize("search", [random_search, zero_order])
def test_a_budget_below_one_image_is_refused_before_anything_is_spent(search):
    chain = gaussian_chain(budget=3, **WIDE)
    with pytest.raises(BudgetError, match="at least 4"):
        outcome(search, chain)
    assert chain.budget.nfe == 0


@pytest.mark.parametrize("search", [random_search, zero_order])
def test_invalid_rewards_never_win(search):
    def patchy(media, rows):
        rewards = media.sum(1)
        return rewards.where(rewards < 5.0, math.nan)

    judge, result = outcome(search, gaussian_chain(cases=10, **WIDE), patchy, LocalConfig(rounds=6))
    assert any(math.isnan(reward) for row in range(10) for reward in rewards_of(judge, row))
    assert bool((result.reward[result.reward > -math.inf] < 5.0).all())
    assert torch.equal(result.reward, judge.best_reward())


@pytest.mark.parametrize("search", [random_search, zero_order])
def test_only_invalid_rewards_leave_no_best(search):
    judge, result = outcome(search, gaussian_chain(**WIDE), lambda media, rows: torch.full((len(rows),), math.nan))
    assert not judge.best[0]
    assert result.reward.tolist() == [-math.inf]


@pytest.mark.parametrize("search", [random_search, zero_order])
def test_a_flat_reward_returns_the_plain_image(search):
    judge, _ = outcome(search, gaussian_chain(**WIDE), lambda media, rows: torch.zeros(len(rows)))
    assert judge.best[0][0].number == 0
    assert judge.constant


def test_a_constant_added_to_the_reward_changes_nothing():
    def rounded(shift):
        return lambda media, rows: (media.sum(1) * 64).round() / 64 + shift

    _, plain = outcome(zero_order, gaussian_chain(cases=2, **WIDE), rounded(0.0))
    _, moved = outcome(zero_order, gaussian_chain(cases=2, **WIDE), rounded(8.0))
    assert torch.equal(plain.noise, moved.noise)
    assert torch.equal(plain.path + 8, moved.path)


def test_an_annealed_climb_ends_among_near_neighbours():
    chain = gaussian_chain(width=64, steps=2)
    noises = []
    generate = chain.generate
    chain.generate = lambda noise, rows: (noises.append(noise), generate(noise, rows))[1]
    flat = LocalConfig(rounds=6, restart=False, cosine=0.5, anneal=Anneal(end=0.02))
    outcome(zero_order, chain, lambda media, rows: torch.zeros(len(rows)), flat)
    cosines = [float(torch.cosine_similarity(each[-1:], noises[0][:1])) for each in noises]
    assert cosines[0] == pytest.approx(0.5, abs=1e-5)
    assert cosines[-1] == pytest.approx(0.99, abs=1e-5)


def test_an_interrupt_passes_through_and_leaves_the_best_so_far():
    chain, calls = gaussian_chain(**WIDE), iter(range(3))

    def impatient(media, rows):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return media.sum(1)

    judge = judge_of(chain, impatient)
    with pytest.raises(KeyboardInterrupt):
        zero_order(chain, judge)
    assert len(judge.leaves[0]) == 8
    assert judge.best[0]


@pytest.mark.parametrize(
    "wrong", [{"neighbours": 0}, {"rounds": 0}, {"proposal": "jump"}, {"cosine": 1.5}, {"strength": 1.0}]
)
def test_a_config_that_cannot_work_is_refused(wrong):
    with pytest.raises(ConfigError, match="local"):
        LocalConfig(**wrong)
