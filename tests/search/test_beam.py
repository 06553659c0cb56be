from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from diffalign.budget import Limits
from diffalign.errors import ConfigError, InvalidReward
from diffalign.noise import ddim
from diffalign.search.anneal import Anneal
from diffalign.search.beam import BeamConfig, search_beam
from diffalign.search.values import CleanPrediction, Completion
from tests.search.common import flat, plain, rewards_of, total
from tests.search.toys import FiniteChain, gaussian_chain, judge_of, linear

WIDE = {"width": 8, "steps": 6}
SMALL = BeamConfig(beams=2, children=2, every=2)  # blocks 0-2, 2-4, 4-6


def outcome(chain, rate=total, config=SMALL, **options):
    judge = judge_of(chain, rate)
    return judge, search_beam(chain, judge, config, **options)


@pytest.mark.parametrize("every", [1, 2, 4, 9])
def test_one_beam_of_one_child_is_the_plain_walk_bit_for_bit_at_its_cost(every):
    chain = gaussian_chain(cases=2, **WIDE)
    judge, _ = outcome(chain, config=BeamConfig(beams=1, children=1, every=every))
    assert torch.equal(torch.stack([kept[0].x for kept in judge.best]), plain(chain))
    assert chain.budget.nfe == 2 * 6
    assert chain.budget.decodes == chain.budget.reward_calls == 2


def test_a_flat_reward_returns_the_plain_walk():
    chain = gaussian_chain(cases=2, **WIDE)
    judge, _ = outcome(chain, flat, BeamConfig(beams=2, children=3, every=2))
    assert torch.equal(torch.stack([kept[0].x for kept in judge.best]), plain(chain))
    assert judge.constant


@pytest.mark.parametrize("lookahead", [1, 2, 3])
def test_a_block_costs_its_children_times_its_steps_and_their_look_ahead(lookahead):
    chain = gaussian_chain(cases=2, cost=3, **WIDE)
    outcome(chain, config=BeamConfig(beams=2, children=3, every=2, lookahead=lookahead))
    ahead = sum(min(lookahead, 6 - level) - 1 for level in (2, 4))
    rows = 2 + 6 * 2 + 6 * 2 + 6 * 1 + 6 * ahead  # starts, then children at levels 1-2, 3-4 and 5
    assert chain.budget.nfe == 2 * 3 * rows == sum(3 * n for _, n in chain.calls)
    assert chain.budget.decodes == chain.budget.reward_calls == 2 * 6 * 3


def test_wide_beams_find_the_exact_optimum_of_a_finite_chain():
    chain = FiniteChain(states=3, steps=3)
    judge, _ = outcome(chain, linear(1.0), BeamConfig(beams=3, children=12, every=1, lookahead=1), value=Exact(chain))
    assert judge.best[0][0].reward == 2.0


class Exact:
    """The exact expected reward of a state, by dynamic programming."""

    def __init__(self, chain):
        self.levels = [torch.arange(float(chain.states))]
        for i in reversed(range(chain.length)):
            self.levels.insert(0, chain.odds[i] @ self.levels[0])

    def cost(self, i):
        return 0, 0

    def __call__(self, x, prediction, i, rows, seeds):
        return self.levels[i][x[:, 0].long()]


def test_beams_beat_the_plain_walk():
    searched, _ = outcome(gaussian_chain(cases=60, **WIDE))
    alone, _ = outcome(gaussian_chain(cases=60, **WIDE), config=BeamConfig(beams=1, children=1))
    gain = searched.best_reward() - alone.best_reward()
    assert float(gain.mean()) > 3 * float(gain.std()) / math.sqrt(60)


def test_a_prior_prefers_likely_noise_and_costs_nothing_and_without_one_the_reward_decides_alone():
    neutral = BeamConfig(beams=1, children=6, every=2)
    a, _ = outcome(gaussian_chain(cases=10, **WIDE), flat, neutral)
    b, _ = outcome(gaussian_chain(cases=10, **WIDE), flat, replace(neutral, prior=0.1))
    usual = plain(a.chain)
    spread = [torch.stack([kept[0].x for kept in judge.best]).std() for judge in (a, b)]
    assert all(torch.equal(kept[0].x, x) for kept, x in zip(a.best, usual, strict=True))
    assert sum(not torch.equal(kept[0].x, x) for kept, x in zip(b.best, usual, strict=True)) >= 7
    assert spread[1] < spread[0]
    assert a.chain.budget.nfe == b.chain.budget.nfe


def test_vetoed_leaves_are_never_returned():
    def veto(media, rows):
        return media.sum(1) > 4.0

    chain = gaussian_chain(cases=20, **WIDE)
    judge = judge_of(chain, total, top_k=3)
    found = search_beam(chain, judge, BeamConfig(redraws=20), veto=veto)
    assert all(kept and all(leaf.reward <= 4.0 for leaf in kept) for kept in judge.best)
    assert any(math.isnan(reward) for row in range(20) for reward in rewards_of(judge, row)) or sum(found.redrawn)


@pytest.mark.parametrize("value", [None, CleanPrediction])
def test_a_block_whose_children_are_all_vetoed_is_drawn_again(value):
    asked = []

    def first_time(media, rows):
        asked.append(len(rows))
        return torch.full((len(rows),), len(asked) == 1)

    chain = gaussian_chain(**WIDE)
    judge = judge_of(chain, total)
    found = search_beam(chain, judge, SMALL, veto=first_time, value=None if value is None else value(judge))
    assert found.redrawn == (1,)
    assert found.lost == (0,)
    assert asked == [4, 4, 4, 4]  # the first block twice, with new noise
    assert judge.best[0]
    level_one = [n for level, n in chain.calls if level == 1]
    assert level_one == [4, 4]


def test_a_redrawn_block_draws_new_noise():
    seen = []

    def first_time(media, rows):
        seen.append(media)
        return torch.full((len(rows),), len(seen) == 1)

    outcome(gaussian_chain(**WIDE), veto=first_time)
    first, second = {float(v) for v in seen[0][:, 0]}, {float(v) for v in seen[1][:, 0]}
    assert len(first) == len(second) == 4
    assert not first & second


def test_only_the_case_that_lost_everything_is_drawn_again():
    asked = []

    def second_case_once(media, rows):
        asked.append(list(rows))
        return torch.tensor([row == 1 and len(asked) == 1 for row in rows])

    _, found = outcome(gaussian_chain(cases=3, **WIDE), veto=second_case_once)
    assert found.redrawn == (0, 1, 0)
    assert asked[1] == [1, 1, 1, 1]


def test_a_veto_of_everything_ends_in_a_clear_error_after_bounded_redraws():
    chain = gaussian_chain(**WIDE)
    judge = judge_of(chain, total)
    with pytest.raises(InvalidReward, match="every branch of case 0 was vetoed, even after 2 redraws"):
        search_beam(chain, judge, BeamConfig(redraws=2), veto=lambda media, rows: torch.ones(len(rows)).bool())
    assert not judge.best[0]


def test_one_hopeless_case_does_not_take_the_others_images():
    chain = gaussian_chain(cases=2, **WIDE)
    judge = judge_of(chain, total)
    with pytest.raises(InvalidReward, match="case 0"):
        search_beam(chain, judge, SMALL, veto=lambda media, rows: torch.tensor([row == 0 for row in rows]))
    assert judge.best[1]


def test_a_deterministic_sampler_is_not_redrawn_in_vain():
    chain = gaussian_chain(kernel=ddim(0.0), **WIDE)
    judge = judge_of(chain, total)
    with pytest.raises(InvalidReward, match="0 redraws"):
        search_beam(chain, judge, SMALL, veto=lambda media, rows: torch.ones(len(rows)).bool())
    chain = gaussian_chain(kernel=ddim(0.0), **WIDE)
    outcome(chain)
    assert chain.budget.nfe == 2 * 6  # children of a deterministic step would be copies


@pytest.mark.parametrize("limits", [None, Limits(nfe=41), Limits(nfe=97), Limits(decodes=9), Limits(reward_calls=31)])
def test_a_batch_gives_each_case_what_it_gets_alone_vetoes_and_all(limits):
    def veto(media, rows):
        return media.sum(1) < 3.0

    def run(chain):
        judge = judge_of(chain, total)
        with suppress(InvalidReward):
            search_beam(chain, judge, BeamConfig(every=2, walks=2, redraws=1, anneal=Anneal()), veto=veto)
        return judge

    together = run(gaussian_chain(cases=4, budget=limits, **WIDE))
    for row in range(4):
        alone = run(gaussian_chain(seed=1000 * row, budget=limits, **WIDE))
        mine, theirs = rewards_of(alone), rewards_of(together, row)
        assert torch.equal(torch.tensor(mine).nan_to_num(9e9), torch.tensor(theirs).nan_to_num(9e9))
        assert [leaf.reward for leaf in alone.best[0]] == [leaf.reward for leaf in together.best[row]]


@pytest.mark.parametrize("limit", [6, 7, 11, 12, 20, 33, 41, 80])
@pytest.mark.parametrize("vetoed", [False, True])
@pytest.mark.parametrize("value", [Completion, CleanPrediction])
def test_a_budget_is_never_exceeded_and_always_yields_a_leaf(limit, vetoed, value):
    chain = gaussian_chain(cases=2, budget=limit, **WIDE)
    judge = judge_of(chain, total)
    veto = (lambda media, rows: media.sum(1) > 6.0) if vetoed else None
    search_beam(chain, judge, BeamConfig(every=2), value=value(judge), veto=veto)
    assert chain.budget.nfe == sum(rows for _, rows in chain.calls) <= 2 * limit
    assert judge.leaves[0]
    assert judge.leaves[1]
    if not vetoed:
        assert 2 * limit - chain.budget.nfe < 2 * 6


@pytest.mark.parametrize("limits", [Limits(decodes=1), Limits(decodes=10), Limits(reward_calls=10)])
@pytest.mark.parametrize("vetoed", [False, True])
def test_limits_on_decodes_and_rewards_hold_too(limits, vetoed):
    chain = gaussian_chain(cases=2, budget=limits, **WIDE)
    judge = judge_of(chain, total)
    veto = (lambda media, rows: media.sum(1) > 20.0) if vetoed else None
    search_beam(chain, judge, SMALL, value=CleanPrediction(judge), veto=veto)
    assert chain.budget.decodes <= 2 * (limits.decodes or 10**6)
    assert chain.budget.reward_calls <= 2 * (limits.reward_calls or 10**6)
    assert judge.best[0]


def test_annealed_children_thin_out_to_one():
    chain = gaussian_chain(**WIDE)
    outcome(chain, config=BeamConfig(beams=1, children=4, every=2, lookahead=1, anneal=Anneal(end=0.0)))
    assert [n for level, n in chain.calls if level in (1, 3, 5)] == [4, 3, 1]


def test_seeds_repeat_and_walks_differ():
    config = BeamConfig(beams=2, children=2, every=2, walks=2)
    first, _ = outcome(gaussian_chain(**WIDE), config=config)
    again, _ = outcome(gaussian_chain(**WIDE), config=config)
    assert rewards_of(first) == rewards_of(again)
    assert len(set(rewards_of(first))) == 8


@pytest.mark.parametrize("wrong", [{"beams": 0}, {"children": 0}, {"every": 0}, {"redraws": -1}, {"prior": math.inf}])
def test_a_config_that_cannot_work_is_refused(wrong):
    with pytest.raises(ConfigError, match="beam"):
        BeamConfig(**wrong)
