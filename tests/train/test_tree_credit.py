from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.train import tree_credit
from tests.train import bench_chain

NAN = float("nan")
# A 2 x 2 tree of two levels: the root 0, its children 1 and 2, leaves 3 4 | 5 6 with rewards 1 0 | 0 0.
PARENT = torch.tensor([-1, 0, 0, 1, 1, 2, 2])
DEPTH = torch.tensor([0, 1, 1, 2, 2, 2, 2])
REWARDS = torch.tensor([NAN, NAN, NAN, 1, 0, 0, 0], dtype=torch.float64)
VALUE = tree_credit.node_rewards(PARENT, DEPTH, REWARDS)
FLAT = torch.zeros(7, dtype=torch.float64)


@st.composite
def forests(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parent, depth, rewards (some NaN) and edge log-densities of a few random trees."""
    parent, depth = [-1], [0]
    for node in range(1, draw(st.integers(2, 25))):
        above = draw(st.integers(-1, node - 1))
        parent.append(above)
        depth.append(depth[above] + 1 if above >= 0 else 0)
    size = len(parent)
    rewards = draw(st.lists(st.one_of(st.floats(-10, 10), st.just(NAN)), min_size=size, max_size=size))
    log_prob = draw(st.lists(st.floats(-5, 5), min_size=size, max_size=size))
    doubles = [torch.tensor(each, dtype=torch.float64) for each in (rewards, log_prob)]
    return torch.tensor(parent), torch.tensor(depth), doubles[0], doubles[1]


def paths(parent: Tensor, node: int) -> list[int]:
    above = [node]
    while int(parent[above[-1]]) >= 0:
        above.append(int(parent[above[-1]]))
    return above


@given(forests())
def test_a_node_is_worth_the_mean_of_the_valid_leaves_below_it(forest: tuple[Tensor, ...]) -> None:
    parent, depth, rewards, _ = forest
    found = tree_credit.node_rewards(parent, depth, rewards)
    ends = [k for k in range(len(parent)) if k not in parent.tolist()]
    assert tree_credit.leaves(parent).nonzero().flatten().tolist() == ends
    for node in range(len(parent)):
        below = [float(rewards[k]) for k in ends if node in paths(parent, k) and not math.isnan(rewards[k])]
        assert float(found[node]) == pytest.approx(sum(below) / len(below) if below else NAN, nan_ok=True)
        assert int(tree_credit.tree_of(parent)[node]) == paths(parent, node)[-1]


def test_depth_wise_advantages_are_those_of_the_spec() -> None:
    # credit_assignment.md 3.3
    found = tree_credit.depth_advantages(PARENT, DEPTH, VALUE)
    assert found.tolist() == pytest.approx([0, 0.70711, -0.70711, 1.5, -0.5, -0.5, -0.5], abs=5e-6)


def test_sibling_advantages_are_those_of_the_spec() -> None:
    # credit_assignment.md 3.3
    found = tree_credit.sibling_advantages(PARENT, VALUE)
    assert found.tolist() == pytest.approx([0, 0.9996, -0.9996, 0.9998, -0.9998, 0, 0], abs=5e-5)


def test_softmax_fusion_is_that_of_the_spec() -> None:
    # credit_assignment.md 3.3: log p (-.1, -.3, -.2), A (1, 0, -1)
    parent, depth = torch.tensor([-1, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 2, 2])
    log_prob = torch.tensor([0, 0, -0.1, -0.3, -0.2], dtype=torch.float64)
    weights = tree_credit.fusion_weights(parent, log_prob)
    assert weights.tolist() == pytest.approx([0, 1, 0.36717, 0.30061, 0.33222], abs=5e-6)
    leaf = torch.tensor([0, 0, 1, 0, -1], dtype=torch.float64)
    found = tree_credit.fused_advantages(parent, depth, leaf, log_prob)
    assert found.tolist() == pytest.approx([0, 0.034940, 1, 0, -1], abs=5e-7)
    assert tree_credit.effective_children(parent, weights).tolist() == pytest.approx([1, 2.98018, 0, 0, 0], abs=5e-6)
    summed = tree_credit.fusion_weights(parent, 65536 * log_prob)
    assert float(tree_credit.effective_children(parent, summed)[1]) == 1  # what summed log-densities do


@given(forests())
def test_equal_log_densities_fuse_to_the_mean_of_children(forest: tuple[Tensor, ...]) -> None:
    parent, depth, rewards, log_prob = forest
    found = tree_credit.fused_advantages(parent, depth, rewards, torch.full_like(log_prob, -3e4))
    valid = ~tree_credit.node_rewards(parent, depth, rewards).isnan()
    for node in range(len(parent)):
        below = [float(found[k]) for k in range(len(parent)) if parent[k] == node and valid[k]]
        if parent[node] >= 0 and not tree_credit.leaves(parent)[node]:
            assert float(found[node]) == pytest.approx(sum(below) / len(below) if below else 0)


@given(forests(), st.floats(0, 1))
def test_every_advantage_is_finite_and_0_at_roots_and_where_nothing_valid_hangs(
    forest: tuple[Tensor, ...], alpha: float
) -> None:
    parent, depth, rewards, log_prob = forest
    value = tree_credit.node_rewards(parent, depth, rewards)
    overall = tree_credit.global_advantages(parent, depth, rewards)
    ends = tree_credit.leaf_advantages(parent, rewards)
    for A in (
        tree_credit.sibling_advantages(parent, value, overall=overall, alpha=alpha),
        tree_credit.depth_advantages(parent, depth, value),
        tree_credit.fused_advantages(parent, depth, torch.where(rewards.isnan(), NAN, ends), log_prob),
    ):
        assert bool(A.isfinite().all())
        assert not A[(parent < 0) | value.isnan()].any()


@given(forests(), st.floats(0.1, 10), st.floats(-10, 10))
def test_sibling_advantages_sum_to_0_and_do_not_see_shift_or_order(
    forest: tuple[Tensor, ...], scale: float, shift: float
) -> None:
    parent, depth, rewards, _ = forest
    value = tree_credit.node_rewards(parent, depth, rewards)
    A = tree_credit.sibling_advantages(parent, value)
    gaps = tree_credit.sibling_advantages(parent, value, scale=False)
    for node in set(parent.tolist()) - {-1}:
        children = (parent == node) & ~value.isnan()
        assert float(A[children].sum()) == pytest.approx(0, abs=1e-6)
        if int(children.sum()) < 2:
            assert not A[parent == node].any()
    moved = tree_credit.sibling_advantages(parent, scale * value + shift, scale=False)
    torch.testing.assert_close(moved, scale * gaps, atol=1e-9, rtol=1e-6)
    order = torch.randperm(len(parent), generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    renumbered = torch.where(parent[order] < 0, -1, place[parent[order].clamp(min=0)])
    again = tree_credit.sibling_advantages(renumbered, value[order])
    torch.testing.assert_close(again, A[order])


def below_root(depth: Tensor, value: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same nodes with a root above them."""
    top = torch.zeros(1)
    return torch.cat([torch.tensor([0]), depth + 1]), torch.cat([top, value]), torch.cat([top, log_prob])


def test_a_nan_leaf_leaves_its_siblings_statistics_alone() -> None:
    parent, depth = torch.tensor([-1, 0, 0, 0]), torch.tensor([0, 1, 1, 1])
    value = tree_credit.node_rewards(parent, depth, torch.tensor([NAN, 1.0, NAN, 0.0]))
    assert tree_credit.sibling_advantages(parent, value).tolist() == pytest.approx([0, 0.9998, 0, -0.9998], abs=5e-5)
    assert tree_credit.depth_advantages(parent, depth, value).tolist() == pytest.approx(
        [0, 0.7071, 0, -0.7071], abs=5e-5
    )
    log_prob = torch.tensor([0.0, -1, 9, -1])
    under = torch.cat([torch.tensor([-1]), parent + 1])
    whole = tree_credit.fused_advantages(under, *below_root(depth, value, log_prob))
    assert float(whole[1]) == 0.5


def plain_grpo(r: Tensor) -> Tensor:
    return (r - r.mean()) / (r.std(correction=0) + 1e-4)


def star(arms: int, length: int) -> tuple[Tensor, Tensor]:
    """One branching at the start, then single walks of `length` more steps."""
    parent, depth = [-1], [0]
    above = [0] * arms
    for level in range(1, length + 2):
        parent += above
        depth += [level] * arms
        above = list(range(len(parent) - arms, len(parent)))
    return torch.tensor(parent), torch.tensor(depth)


@pytest.mark.parametrize("length", [0, 3])
def test_a_tree_with_one_branching_is_plain_grpo(length: int) -> None:
    parent, depth = star(6, length)
    ends = torch.rand(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rewards = torch.full((len(parent),), NAN, dtype=torch.float64)
    rewards[-6:] = ends
    wanted = torch.cat([torch.zeros(1).double()] + [plain_grpo(ends)] * (length + 1))
    value = tree_credit.node_rewards(parent, depth, rewards)
    overall = tree_credit.global_advantages(parent, depth, rewards)
    log_prob = torch.randn(len(parent), dtype=torch.float64)
    torch.testing.assert_close(overall, wanted)
    leaf = tree_credit.leaf_advantages(parent, rewards)
    torch.testing.assert_close(tree_credit.fused_advantages(parent, depth, leaf, log_prob), wanted)
    own = tree_credit.sibling_advantages(parent, value)
    torch.testing.assert_close(own[:7], wanted[:7])
    assert not own[7:].any()  # an only child teaches nothing about its own noise
    blended = tree_credit.sibling_advantages(parent, value, overall=overall, alpha=0.0)
    torch.testing.assert_close(blended, wanted)
    levelled = tree_credit.depth_advantages(parent, depth, value)
    torch.testing.assert_close(levelled * ends.std() / (ends.std(correction=0)), wanted, rtol=1e-3, atol=0)


def test_groups_join_trees_of_one_prompt() -> None:
    parent, depth = torch.tensor([-1, 0, 0, -1, 3, 3]), torch.tensor([0, 1, 1, 0, 1, 1])
    rewards = torch.tensor([NAN, 1, 0, NAN, 5, 2], dtype=torch.float64)
    gid = torch.zeros(6, dtype=torch.int64)
    joined = tree_credit.leaf_advantages(parent, rewards, gid)
    torch.testing.assert_close(joined[[1, 2, 4, 5]], plain_grpo(rewards[[1, 2, 4, 5]]))
    torch.testing.assert_close(tree_credit.global_advantages(parent, depth, rewards, gid), joined)
    alone = tree_credit.leaf_advantages(parent, rewards)
    torch.testing.assert_close(alone[[1, 2]], plain_grpo(rewards[[1, 2]]))
    value = tree_credit.node_rewards(parent, depth, rewards)
    levelled = tree_credit.depth_advantages(parent, depth, value, gid)
    r = rewards[[1, 2, 4, 5]]
    torch.testing.assert_close(levelled[[1, 2, 4, 5]], (r - r.mean()) / r.std(), rtol=1e-6, atol=0)


def test_eps_is_added_to_the_deviation_that_global_advantages_divide_by() -> None:
    r = REWARDS[3:]
    found = tree_credit.global_advantages(PARENT, DEPTH, REWARDS, eps=0.5)
    torch.testing.assert_close(found[3:], (r - r.mean()) / (r.std(correction=0) + 0.5))


def test_blending_needs_something_to_blend_with() -> None:
    with pytest.raises(ConfigError, match=r"alpha is 0\.5"):
        tree_credit.sibling_advantages(PARENT, VALUE, alpha=0.5)
    half = tree_credit.sibling_advantages(PARENT, VALUE, alpha=0.5, overall=FLAT + 1)
    torch.testing.assert_close(half, 0.5 * tree_credit.sibling_advantages(PARENT, VALUE) + 0.5)


def test_nodes_that_tie_at_a_depth_have_no_advantage() -> None:
    tied = torch.full((7,), 0.1)  # whose float32 mean is off by a rounding
    assert not tree_credit.depth_advantages(PARENT, DEPTH, tied).any()
    assert not tree_credit.sibling_advantages(PARENT, tied).any()
    close = tied.double() + 1e-8 * torch.arange(7)
    assert not tree_credit.depth_advantages(PARENT, DEPTH, close).any()


def test_pruning_keeps_the_best_child_and_what_hangs_below_it() -> None:
    assert tree_credit.keep_best(PARENT, DEPTH, VALUE).tolist() == [False, True, False, True, False, False, False]
    assert tree_credit.keep_best(PARENT, DEPTH, VALUE, share=1).tolist() == [False] + [True] * 6
    with pytest.raises(ConfigError, match="share of children"):
        tree_credit.keep_best(PARENT, DEPTH, VALUE, share=0)


def test_pruning_to_extremes_drops_the_middle() -> None:
    parent, depth = torch.tensor([-1, 0, 0, 0, 0, 2]), torch.tensor([0, 1, 1, 1, 1, 2])
    value = torch.tensor([0, 3, 2, NAN, 1, 2])
    assert tree_credit.keep_extremes(parent, depth, value).tolist() == [False, True, False, False, True, False]
    assert tree_credit.keep_extremes(PARENT, DEPTH, VALUE).tolist() == [False] + [True] * 6


@given(forests())
def test_pruning_keeps_a_child_of_every_valid_parent_it_keeps(forest: tuple[Tensor, ...]) -> None:
    parent, depth, rewards, _ = forest
    value = tree_credit.node_rewards(parent, depth, rewards)
    for kept in (tree_credit.keep_best(parent, depth, value), tree_credit.keep_extremes(parent, depth, value)):
        for node in range(len(parent)):
            children = [k for k in range(len(parent)) if parent[k] == node]
            alive = bool(kept[node]) or int(parent[node]) < 0
            valid = [k for k in children if not math.isnan(value[k])]
            held = [k for k in children if kept[k]]
            assert bool(held) == (alive and bool(valid))
            if held:
                assert max(value[k] for k in held) == max(value[k] for k in valid)


# The bench chain as a tree whose leaves average later noise out exactly.

TREE = bench_chain.tree(4)


def leaf_rewards() -> Tensor:
    return torch.where(tree_credit.leaves(TREE.parent), TREE.x, NAN)


def test_bench_node_rewards_are_the_values_of_their_latents() -> None:
    torch.testing.assert_close(tree_credit.node_rewards(TREE.parent, TREE.depth, leaf_rewards()), TREE.x)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_bench_siblings_see_true_credit_and_depths_one_over_root_depth_of_it(level: int) -> None:
    value = tree_credit.node_rewards(TREE.parent, TREE.depth, leaf_rewards())
    at = TREE.depth == level
    own = tree_credit.sibling_advantages(TREE.parent, value)
    assert bench_chain.correlation(own[at], TREE.eps[at]) == pytest.approx(1)
    levelled = tree_credit.depth_advantages(TREE.parent, TREE.depth, value)
    assert bench_chain.correlation(levelled[at], TREE.eps[at]) == pytest.approx(1 / math.sqrt(level))
    leaf = tree_credit.leaf_advantages(TREE.parent, leaf_rewards())
    fused = tree_credit.fused_advantages(TREE.parent, TREE.depth, leaf, TREE.log_prob)
    assert bench_chain.correlation(fused[at], TREE.eps[at]) == pytest.approx(1 / math.sqrt(level))
    overall = tree_credit.global_advantages(TREE.parent, TREE.depth, leaf_rewards())
    assert bench_chain.correlation(overall[at], TREE.eps[at]) == pytest.approx(1 / math.sqrt(level))


def test_bench_with_random_children_siblings_still_see_true_credit_within_each_parent() -> None:
    generator = torch.Generator().manual_seed(0)
    made = bench_chain.tree(3, torch.randn(8, generator=generator, dtype=torch.float64))
    own = tree_credit.sibling_advantages(made.parent, made.x)
    for node in range(5):
        children = made.parent == node
        assert bench_chain.correlation(own[children], made.eps[children]) == pytest.approx(1)


def test_bench_branch_credit_is_the_noise_of_the_step_less_its_mean() -> None:
    # TempFlow: walk to step k without noise, branch once, walk on without noise
    generator = torch.Generator().manual_seed(5)
    eps, nu, start = torch.randn(6, generator=generator, dtype=torch.float64), 0.4, 1.7
    parent, depth = star(6, 0)
    rewards = torch.cat([torch.tensor([NAN], dtype=torch.float64), start + nu * eps])
    value = tree_credit.node_rewards(parent, depth, rewards)
    found = tree_credit.sibling_advantages(parent, value, scale=False)
    torch.testing.assert_close(found[1:], nu * (eps - eps.mean()))
