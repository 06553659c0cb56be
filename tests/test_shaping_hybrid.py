"""Rewards of steps, rules joined with models, length terms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign import shaping
from diffalign.errors import ConfigError

unit = st.floats(0, 1)
SETS = ["group_step", "group_all", "batch_step"]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GID = torch.arange(12) % 3


def near(found: Tensor, *expected: float, atol: float = 1e-6) -> bool:
    return torch.allclose(found.double().flatten(), double(*expected), atol=atol, rtol=0)


def test_renorm_has_the_published_values() -> None:
    assert near(shaping.renorm(double(0.3, 0.3).view(2, 1), double(1, 0)), 0.3, -0.7)


@given(st.lists(unit, min_size=1, max_size=8))
def test_process_credit_never_rewards_a_failure_nor_punishes_a_success(process: list[float]) -> None:
    steps = double(*process).expand(2, -1)
    won, lost = shaping.renorm(steps, double(1, 0))
    assert ((won >= 0) & (won <= 1)).all()
    assert ((lost >= -1) & (lost <= 0)).all()


def test_the_constant_of_renorm_cancels_where_all_have_the_same_steps() -> None:
    steps, outcome = draws(12, 5).sigmoid(), (draws(12, seed=1) > 0).double()
    for over in SETS:
        for finish in (shaping.return_to_go, lambda r: r):
            found = [shaping.step_norm(finish(shaping.renorm(steps, outcome, mu)), GID, over) for mu in (0, 1)]
            alike = torch.allclose(*found)
            assert alike or (over == "group_all" and finish is shaping.return_to_go)  # there mu grows along the steps


def test_equal_process_rewards_leave_outcome_grpo() -> None:
    outcome = draws(12)
    found = shaping.step_norm(shaping.renorm(torch.full((12, 4), 0.5), outcome), GID)
    expected = shaping.adv_grpo(outcome, GID).unsqueeze(-1).expand(12, 4)
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_returns_sum_from_each_step_to_the_last() -> None:
    assert shaping.return_to_go(torch.tensor([[1, 2, 3]])).tolist() == [[6, 5, 3]]


def test_a_terminal_reward_at_every_step_is_the_plain_advantage() -> None:
    r = draws(12)
    r[4] = torch.nan
    expected = shaping.adv_grpo(r, GID).unsqueeze(-1).repeat(1, 6)
    for over in ("group_step", "group_all"):
        assert torch.allclose(shaping.step_norm(r.unsqueeze(-1).repeat(1, 6), GID, over), expected)


def test_statistics_of_one_step_forget_its_scale_and_those_of_all_steps_do_not() -> None:
    q = draws(12, 1)
    r = q * double(1, 5, 0.01) + double(3, -1, 0)
    by_step = shaping.step_norm(r, GID, formula=partial(shaping.adv_grpo, eps=0))
    assert torch.allclose(by_step[:, 0], by_step[:, 1])
    assert torch.allclose(by_step[:, 0], by_step[:, 2])
    over_all = shaping.step_norm(r, GID, "group_all")
    assert not torch.allclose(over_all[:, 0], over_all[:, 1])


def test_every_set_is_normalised_on_its_own() -> None:
    r = draws(12, 4)
    by_step, over_all, batch = (shaping.step_norm(r, GID, over) for over in SETS)
    for g in range(3):
        assert torch.allclose(by_step[g == GID].std(0, correction=0), torch.ones(4, dtype=torch.float64), atol=1e-3)
        assert float(over_all[g == GID].mean()) == pytest.approx(0, abs=1e-9)
    assert torch.allclose(batch.mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-9)
    assert batch.std(0, correction=0).allclose(torch.ones(4, dtype=torch.float64), atol=1e-3)
    assert not torch.allclose(by_step, batch)


# The 2 x 2 tree with the leaves [1, 0 | 0, 0]: four rollouts of two steps, which share their first step in pairs.
LEAVES = double(1, 0, 0, 0).unsqueeze(-1).expand(4, 2)
PARENT = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]])
NODE = torch.tensor([[1, 3], [1, 4], [2, 5], [2, 6]])
ROOT = torch.zeros(4, dtype=torch.int64)


def test_siblings_and_depths_of_a_tree_have_the_published_values() -> None:
    siblings = shaping.step_norm(LEAVES, ROOT, "siblings", ids=PARENT, nodes=NODE)
    assert near(siblings, 0.9996, 0.9998, 0.9996, -0.9998, -0.9996, 0, -0.9996, 0, atol=1e-6)
    z = partial(shaping.adv_grpo, ddof=1, eps=1e-8)
    depth = torch.tensor([[1, 2]]).expand(4, 2)
    depths = shaping.step_norm(LEAVES, ROOT, "tree_depth", z, ids=depth, nodes=NODE)
    assert near(depths, 0.70711, 1.5, 0.70711, -0.5, -0.70711, -0.5, -0.70711, -0.5, atol=1e-5)


def test_ids_of_nodes_need_to_be_unique_in_their_group_only() -> None:
    r = draws(8, 2)
    gid = torch.arange(8) // 4
    parents, nodes = PARENT.repeat(2, 1), NODE.repeat(2, 1)
    for over, ids in (("siblings", parents), ("tree_depth", torch.tensor([[1, 2]]).expand(8, 2))):
        both = shaping.step_norm(r, gid, over, ids=ids, nodes=nodes)
        each = [shaping.step_norm(part, ROOT, over, ids=ids[:4], nodes=NODE) for part in r.split(4)]
        assert torch.allclose(both, torch.cat(each))


def test_an_only_child_and_a_twin_that_is_the_same_node_teach_nothing() -> None:
    found = shaping.step_norm(
        LEAVES, ROOT, "siblings", ids=PARENT, nodes=torch.tensor([[1, 3], [1, 3], [1, 5], [1, 5]])
    )
    assert (found == 0).all()


def test_flat_nodes_of_a_tree_work_as_well() -> None:
    found = shaping.step_norm(
        double(0.5, 0, 1, 0, 0, 0), torch.zeros(6, dtype=torch.int64), "siblings", ids=torch.tensor([0, 0, 1, 1, 2, 2])
    )
    assert near(found, 0.9996, -0.9996, 0.9998, -0.9998, 0, 0)


@given(st.integers(0, 1000), st.permutations(range(12)))
def test_order_of_rows_and_nan_do_not_disturb_steps(seed: int, order: list[int]) -> None:
    r = draws(12, 3, seed=seed)
    r[seed % 12, seed % 3] = torch.nan
    parent = torch.stack([GID * 0, GID * 0 + 1 + torch.arange(12) % 2, torch.arange(12) // 3], 1)
    for over in ("group_step", "group_all", "batch_step", "siblings", "tree_depth"):
        found = shaping.step_norm(r, GID, over, ids=parent)
        assert torch.allclose(shaping.step_norm(r[order], GID[order], over, ids=parent[order]), found[order])
        assert (found[r.isnan()] == 0).all()
        assert found.isfinite().all()


def test_a_set_says_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match="node that each step starts from"):
        shaping.step_norm(LEAVES, ROOT, "siblings")
    with pytest.raises(ConfigError, match="group_all"):
        shaping.step_norm(LEAVES, ROOT, "all")


def test_hybrid_goes_from_the_model_to_the_rule() -> None:
    rule, model = double(1, torch.nan, 0.4), double(torch.nan, 0.2, 0.8)
    assert near(shaping.hybrid(rule, model, double(1, 0, 0.25)), 1, 0.2, 0.7)
    assert shaping.hybrid(rule, model, 0.5).isnan().tolist() == [True, True, False]
    with pytest.raises(ConfigError, match=r"1\.5"):
        shaping.hybrid(rule, model, double(0, 1.5, 1))


def test_length_penalties_have_the_published_values() -> None:
    assert near(shaping.length_penalty(double(3, 6, 0, 4.5), double(3)), 0, -0.5, -0.5, -0.25)
    assert near(shaping.length_penalty(double(3, 4), double(torch.nan)), 0, 0)
    assert near(shaping.length_penalty(double(0, 1), double(0)), 0, -0.5)
    assert near(shaping.length_penalty(double(30), double(3), most=0.2, tau=3), -0.2)
    with pytest.raises(ConfigError, match="above 0"):
        shaping.length_penalty(double(3), double(3), tau=0)


@given(st.floats(0, 100), st.floats(0.01, 100), st.floats(0, 3), st.floats(0.1, 5))
def test_a_length_penalty_is_bounded_and_free_at_the_reference(s: float, ref: float, most: float, tau: float) -> None:
    found = float(shaping.length_penalty(double(s), double(ref), most=most, tau=tau))
    assert -most <= found <= 0
    assert float(shaping.length_penalty(double(ref), double(ref), most=most, tau=tau)) == 0


def test_the_reference_length_is_the_mean_over_correct_samples() -> None:
    found = shaping.group_reference(
        double(1, 3, 100, 7), torch.tensor([True, True, False, False]), torch.tensor([4, 4, 4, 2])
    )
    assert near(found[:3], 2, 2, 2)
    assert found[3].isnan()


def test_the_mask_keeps_its_bounds_and_the_other_columns() -> None:
    r = draws(6, 3)
    r[0, 1] = torch.nan
    ratio = double(0.49, 0.5, 1, 2, 2.01, torch.nan)
    found = shaping.length_mask(r, ratio, [1])
    assert torch.equal(found[:, ::2], r[:, ::2])
    assert torch.equal(found[1:4], r[1:4])
    assert found[:, 1].isnan().tolist() == [True, False, False, False, False, True]
    assert float(found[4, 1]) == 0
    assert shaping.outside(ratio).tolist() == [True, False, False, False, True, False]
    with pytest.raises(ConfigError, match="low < high"):
        shaping.outside(ratio, 2, 0.5)
