from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from diffalign.budget import Limits
from diffalign.errors import ConfigError
from diffalign.search.decisive import (
    DecisiveConfig,
    explained,
    search_decisive,
    sibling_advantages,
    variance_parts,
)
from diffalign.search.gated import Tree
from diffalign.search.stepwise import stepped
from diffalign.search.values import Completion
from tests.search.common import flat, rewards_of, total
from tests.search.toys import exact, gaussian_chain, judge_of, linear

WIDE = {"width": 8, "steps": 6}
SMALL = DecisiveConfig(levels=3, children=2, expansions=6)


def outcome(chain, rate=total, config=SMALL, **options):
    judge = judge_of(chain, rate)
    return judge, search_decisive(chain, judge, config, **options)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_variance_parts_are_unbiased_for_a_nested_tree():
    runs, parts = 1000, torch.tensor([4.0, 1.0, 0.25])
    tree = (2 * normals(runs, 2, 1, 1) + normals(runs, 2, 3, 1, seed=1)) + 0.5 * normals(runs, 2, 3, 2, seed=2)
    found = torch.stack([variance_parts(each) for each in tree])
    error = found.std(0) / math.sqrt(runs)
    assert bool(((found.mean(0) - parts).abs() < 3 * error).all())


def test_variance_parts_leave_invalid_rewards_out_and_shares_always_sum_to_one():
    tree = normals(2, 3, 4)
    tree[0, 0, 1] = math.nan
    assert bool(variance_parts(tree).isfinite().all())
    assert float(explained(tree).sum()) == pytest.approx(1.0)
    assert explained(torch.ones(2, 2)).tolist() == [0.5, 0.5]
    assert explained(torch.full((2, 2, 2), math.nan)).tolist() == pytest.approx([1 / 3] * 3)


def test_a_pilot_measures_what_each_segment_of_a_gaussian_chain_explains():
    chain = gaussian_chain(cases=250, steps=6)
    judge, _ = outcome(chain, linear(1.0), DecisiveConfig(levels=3, expansions=1))
    trees = torch.tensor([rewards_of(judge, row)[:8] for row in range(250)]).view(250, 2, 2, 2)
    found = torch.stack([variance_parts(tree) for tree in trees])
    law = exact(chain)
    ladder = [law.prior[1], law.variance[2], law.variance[4], law.variance[6]]
    expected = torch.tensor([a - b for a, b in pairwise(ladder)])
    assert float(expected.sum()) == pytest.approx(law.prior[1])
    assert bool(((found.mean(0) - expected).abs() < 3 * found.std(0) / math.sqrt(250)).all())


def test_branches_go_where_the_shares_are_largest_and_one_child_elsewhere():
    chain = gaussian_chain(**WIDE)
    config = DecisiveConfig(levels=3, branching=1, children=3, expansions=3)
    judge, found = outcome(chain, config=config, shares=torch.tensor([0.1, 0.7, 0.2]))
    assert found.branching == ((1,),)
    assert found.bounds == (0, 2, 4)
    assert len({path[0] for path in found.paths[0]}) == 1
    assert len({path[1] for path in found.paths[0]}) == 3
    assert chain.budget.nfe == 6 + 3 + 3  # one walk, and two more from level 2, whose prediction is at hand
    assert len(judge.leaves[0]) == 3


def test_the_first_leaf_is_the_plain_walk():
    for pilot in (1, 2):
        chain = gaussian_chain(cases=2, **WIDE)
        judge, _ = outcome(chain, config=DecisiveConfig(pilot=pilot))
        x = chain.first(chain.seeds, [0, 1])
        for i in range(6):
            x = stepped(chain, x, chain.denoise(x, *chain.levels.at(i)), i, chain.seeds)
        assert [judge.leaves[row][0].reward for row in (0, 1)] == x.sum(1).tolist()


def test_a_pilot_costs_its_tree_and_its_siblings_share_a_prediction():
    chain = gaussian_chain(cases=2, cost=2, **WIDE)
    judge, _ = outcome(chain, config=DecisiveConfig(levels=3, pilot=2, expansions=1))
    pilot = 2 * 2 + (2 + 4) + (4 + 8)
    assert chain.budget.nfe == 2 * 2 * (pilot + 6) == sum(2 * n for _, n in chain.calls)
    assert len(judge.leaves[0]) == 8 + 1


def tree_of(values, **options):
    given = {"width": 3, "spread": 0.0, "explore": 0.0} | options
    tree = Tree([2], **given)
    nodes = [tree.add(tree.root, 2, torch.zeros(1), torch.zeros(1), value) for value in values]
    return tree, nodes


def leaf(tree, node, value):
    tree.close(tree.add(node, 4, None, None, value))


def test_children_of_one_parent_have_their_own_priority():
    tree, nodes = tree_of([0.0, 2.0, 1.0])
    assert [tree.priority(node) for node in nodes] == [0.0, 2.0, 1.0]
    assert tree.select(tree.nodes) is nodes[1]


def test_the_gate_passes_only_what_reaches_the_mean_of_its_level():
    tree, nodes = tree_of([0.0, 2.0, 1.0])
    assert tree.gated(nodes) == [nodes[1], nodes[2]]
    assert tree.gated([tree.root]) == [tree.root]
    equal, peers = tree_of([0.1, 0.1, 0.1])
    assert equal.gated(peers) == peers


def test_every_walk_visits_all_nodes_above_its_leaf_and_a_full_node_is_left_alone():
    tree, nodes = tree_of([0.0, 2.0, 1.0])
    for k in range(3):
        leaf(tree, nodes[1], 2.0)
        assert nodes[1].visits == tree.root.visits == k + 1
    assert tree.select(tree.nodes) is nodes[2]  # the best is full, the gate shuts the worst out
    assert tree.paths[0] == (nodes[1].number, nodes[1].children[0].number)


def test_gated_nodes_are_expanded_once_nothing_else_is_open_so_that_selection_never_spins():
    tree, nodes = tree_of([0.0, 2.0, 1.0], width=1)
    for _ in range(20):
        node = tree.select(nodes)
        leaf(tree, node, node.value)
    assert [node.visits for node in nodes] == [6, 7, 7]


def test_the_visit_bonus_turns_to_what_was_visited_less():
    tree, nodes = tree_of([1.0, 1.05], width=9, explore=1.0)
    chosen = [tree.select(nodes)]
    for _ in range(3):
        leaf(tree, chosen[-1], 1.0)
        chosen.append(tree.select(nodes))
    assert set(chosen) == {nodes[1]}  # the gate stands before the bonus
    even, peers = tree_of([1.0, 1.0], width=9, explore=1.0)
    leaf(even, peers[0], 1.0)
    assert even.select(peers) is peers[1]


def test_disagreeing_children_make_a_node_worth_more_and_invalid_values_never_pass():
    tree, nodes = tree_of([1.0, 1.0, math.nan], spread=0.5)
    for value in (0.0, 2.0):
        leaf(tree, nodes[1], value)
    assert tree.priority(nodes[1]) == pytest.approx(1.5)
    assert tree.gated(nodes) == [nodes[1]]
    assert tree.priority(nodes[2]) == -math.inf


def test_search_beats_as_many_independent_walks_when_it_may_branch_late():
    config = DecisiveConfig(levels=3, pilot=1, branching=3, children=3, expansions=12)
    tree, _ = outcome(gaussian_chain(cases=40, **WIDE), config=config)
    cost = tree.chain.budget.nfe / 40
    walks, _ = outcome(
        gaussian_chain(cases=40, **WIDE), config=DecisiveConfig(levels=1, branching=1, pilot=1, expansions=1)
    )
    assert cost < 12 * 6  # branches share their beginnings
    gain = tree.best_reward() - walks.best_reward()
    assert float(gain.mean()) > 3 * float(gain.std()) / math.sqrt(40)


@pytest.mark.parametrize("limits", [None, Limits(nfe=97), Limits(nfe=31), Limits(decodes=13), Limits(reward_calls=40)])
def test_a_batch_gives_each_case_what_it_gets_alone(limits):
    together, found = outcome(gaussian_chain(cases=4, budget=limits, **WIDE))
    for row in range(4):
        alone, single = outcome(gaussian_chain(seed=1000 * row, budget=limits, **WIDE))
        assert rewards_of(alone) == rewards_of(together, row)
        assert single.paths[0] == found.paths[row]
        assert torch.equal(alone.best[0][0].x, together.best[row][0].x)


@pytest.mark.parametrize("limit", [6, 7, 11, 25, 43, 44, 100])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_budget_is_never_exceeded_and_spent_down_to_the_cheapest_branch(limit, steps):
    chain = gaussian_chain(cases=3, budget=limit, **WIDE)
    judge = judge_of(chain, total)
    search_decisive(chain, judge, SMALL, value=Completion(judge, steps))
    assert chain.budget.nfe == sum(rows for _, rows in chain.calls) <= 3 * limit
    assert 3 * limit - chain.budget.nfe < 3 * (6 + 2 * steps)
    assert all(judge.best)


def test_a_flat_reward_returns_the_plain_walk_and_seeds_repeat():
    first, found = outcome(gaussian_chain(**WIDE), flat)
    again, _ = outcome(gaussian_chain(**WIDE), flat)
    assert first.best[0][0].number == 0
    assert torch.equal(first.best[0][0].x, again.best[0][0].x)
    assert found.shares[0].tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("wrong", [{"levels": 0}, {"pilot": 0}, {"branching": 4}, {"spread": -1.0}, {"children": 0}])
def test_a_config_that_cannot_work_is_refused(wrong):
    with pytest.raises(ConfigError, match="decisive"):
        DecisiveConfig(**wrong)
    with pytest.raises(ConfigError, match="shares"):
        outcome(gaussian_chain(**WIDE), shares=torch.ones(2))


PATHS = [(1, 3), (1, 3), (1, 4), (2, 5), (2, 6), (2, 7)]
REWARDS = torch.tensor([1.0, 2.0, 0.0, 4.0, 1.0, 7.0])


def test_sibling_advantages_sum_to_zero_over_the_children_of_each_parent():
    found = sibling_advantages(REWARDS, PATHS, ["a"] * 6)
    assert found.shape == (6, 2)
    assert float(found[0, 0] + found[3, 0]) == pytest.approx(0.0, abs=1e-6)
    assert float(found[0, 1] + found[2, 1]) == pytest.approx(0.0, abs=1e-6)
    assert float(found[3:, 1].sum()) == pytest.approx(0.0, abs=1e-6)
    assert found[0].tolist() == found[1].tolist()  # leaves of one child share its advantage


def test_sibling_advantages_take_the_mean_of_the_leaves_and_weigh_children_equally():
    found = sibling_advantages(REWARDS, PATHS, ["a"] * 6)
    means = torch.tensor([1.0, 4.0])
    expected = (means - 2.5) / (1.5 + 1e-4)
    assert found[[0, 3], 0].tolist() == pytest.approx(expected.tolist())


def test_sibling_advantages_survive_a_positive_affine_map_of_the_rewards():
    first = sibling_advantages(REWARDS, PATHS, ["a"] * 6)
    second = sibling_advantages(3 * REWARDS + 10, PATHS, ["a"] * 6)
    assert torch.allclose(first, second, atol=1e-3)
    assert torch.allclose(
        sibling_advantages(REWARDS, PATHS, ["a"] * 6, epsilon=0.0),
        sibling_advantages(3 * REWARDS + 10, PATHS, ["a"] * 6, epsilon=0.0),
        atol=1e-6,
    )


def test_a_tree_that_branches_only_at_the_root_gives_the_plain_group_advantage():
    found = sibling_advantages(REWARDS, [(k,) for k in range(6)], [0] * 6)
    expected = (REWARDS - REWARDS.mean()) / (REWARDS.std(correction=0) + 1e-4)
    assert torch.allclose(found[:, 0], expected, atol=1e-6)


def test_parents_with_one_child_and_equal_children_teach_nothing():
    assert not bool(sibling_advantages(REWARDS, [(1, 2, 3)] * 6, [0] * 6).any())
    assert not bool(sibling_advantages(torch.full((6,), 0.1), PATHS, [0] * 6).any())


def test_prompts_with_the_same_prefixes_do_not_influence_each_other():
    both = sibling_advantages(torch.cat([REWARDS, REWARDS * 5]), PATHS * 2, ["a"] * 6 + ["b"] * 6)
    assert torch.equal(both[:6], sibling_advantages(REWARDS, PATHS, ["a"] * 6))
    assert torch.equal(both[6:], sibling_advantages(REWARDS * 5, PATHS, ["b"] * 6))


def test_two_siblings_come_out_at_one_whatever_their_gap_unless_a_least_deviation_says_otherwise():
    for gap in (0.01, 1.0):
        pair = torch.tensor([0.0, gap])
        assert sibling_advantages(pair, [(0,), (1,)], [0, 0], epsilon=0.0)[:, 0].tolist() == pytest.approx([-1, 1])
    held = sibling_advantages(torch.tensor([0.0, 0.01]), [(0,), (1,)], [0, 0], least_std=0.05, epsilon=0.0)
    assert held[:, 0].tolist() == pytest.approx([-0.1, 0.1])


def test_invalid_leaves_are_left_out_of_their_siblings_means():
    rewards = REWARDS.clone()
    rewards[1] = math.nan
    found = sibling_advantages(rewards, PATHS, ["a"] * 6)
    keep = [0, 2, 3, 4, 5]
    without = sibling_advantages(rewards[keep], [PATHS[k] for k in keep], ["a"] * 5)
    assert torch.equal(found[keep], without)
    assert not bool(found[1].any())


def test_a_search_hands_over_what_sibling_advantages_need():
    _, found = outcome(gaussian_chain(cases=2, **WIDE))
    paths = [path for each in found.paths for path in each]
    prompts = [row for row, each in enumerate(found.paths) for _ in each]
    rewards = torch.tensor([reward for each in found.rewards for reward in each])
    advantages = sibling_advantages(rewards, paths, prompts)
    assert advantages.shape[0] == 12
    assert bool(advantages.isfinite().all())
    assert bool(advantages.any())
