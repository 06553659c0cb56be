"""Tree GRPO: chains are Flow-GRPO, siblings sum to zero, prefixes are shared, and trees cost what they need."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign import config, noise
from diffalign.errors import ConfigError
from diffalign.train import tree_credit
from diffalign.train.objectives.tree_grpo import TreeGRPOConfig
from diffalign.train.trees_of_walks import forest
from tests.train import jobs
from tests.train.jobs import Brightness

GUIDED = 2  # model rows of a latent: guidance asks twice


@contextmanager
def trees(
    family: str = "sd3", *, window: int = 2, low: int = 1, branches: int = 2, steps: int = 5, **settings: Any
) -> Iterator[tuple[Any, Any]]:
    """A tree job on a model that is not its base, one tree of each of two prompts unless told otherwise."""
    leaves = branches**window
    outer = {name: settings.pop(name) for name in ("group_size", "micro_batch", "reward") if name in settings}
    size = outer.setdefault("group_size", max(2, leaves))
    outer = {"micro_batch": size, "reward": Brightness(100), **outer}
    told = {"noise": {"window": window, "rule": "fixed", "low": low}, "branches": branches, **settings}
    with jobs.job(family, {"tree_grpo": told}, call={"num_inference_steps": steps}, **outer) as (job, chosen):
        jobs.touched(job)
        yield job, chosen


def by_parent(layer: Any) -> Tensor:
    """Advantages (P, branches) of a layer, a row for each parent."""
    return layer.advantages.view(len(layer.x), -1)


@pytest.mark.parametrize(
    "family", ["sd3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sd15_ddim", "flux", "wan21"))]
)
@pytest.mark.parametrize("low", [0, 1])
def test_trees_of_one_branch_with_fused_advantages_are_flow_grpo(family: str, low: int) -> None:
    told = {"noise": {"window": 2, "rule": "fixed", "low": low}}
    chains = {"branches": 1, "advantage": "fused"}
    found: dict[str, Any] = {}
    for name, settings in {"flow_grpo": told, "tree_grpo": told | chains}.items():
        call = {"num_inference_steps": 4}
        with jobs.job(family, {name: settings}, reward=Brightness(100), call=call) as (job, chosen):
            jobs.touched(job)
            micros = chosen.collect(job, 0).micros
            found[name] = micros, jobs.learn(job, chosen, micros), jobs.gradients(job)
    for flow, tree in zip(found["flow_grpo"][0], found["tree_grpo"][0], strict=True):
        assert torch.equal(flow.media, tree.media)
        assert [case.seed for case in flow.cases] == [case.seed for case in tree.leaves]
        for k, layer in enumerate(tree.layers):
            assert torch.equal(flow.walk.latents[low + k], layer.x)
            assert torch.equal(flow.walk.latents[low + k + 1], layer.moves)
            assert torch.equal(flow.log_probs[k], layer.log_probs)
            torch.testing.assert_close(layer.advantages, flow.advantages[:, k], rtol=1e-4, atol=1e-5)
    told_flow, told_tree = found["flow_grpo"][1], found["tree_grpo"][1]
    assert told_flow == pytest.approx(told_tree, abs=1e-5)
    flow, tree = found["flow_grpo"][2], found["tree_grpo"][2]
    assert float((flow - tree).norm()) < 1e-4 * float(flow.norm())


@pytest.mark.parametrize("kernel", ["flow_sde", "cps"])
def test_leaves_share_their_prefixes_to_the_bit_and_part_where_they_branch(kernel: str) -> None:
    noisy = {"kernel": kernel, "window": 2, "rule": "fixed", "low": 1}
    with trees(noise=noisy) as (job, chosen), torch.no_grad():
        grove = chosen.sampled(job, 0, job.cases_of(0))[0][0]
        first, second = grove.layers
        assert [len(layer.x) for layer in grove.layers] == [1, 2]
        assert len(grove) == 4
        assert first.parent.tolist() == [0, 0]
        assert second.parent.tolist() == [0, 0, 1, 1]
        assert torch.equal(first.moves, second.x)
        prefix = first.driver.rollout(noise.KERNELS[kernel](0.0), stop=1, output_type="latent", dtype=torch.float32)
        assert torch.equal(prefix.latents[-1], first.x)
        assert len(second.moves.flatten(1).unique(dim=0)) == len(grove.media.flatten(1).unique(dim=0)) == 4
        rest = job.driver(grove.leaves).rollout(
            noise.KERNELS[kernel](0.0), x=second.moves, start=3, dtype=torch.float32
        )
        assert torch.equal(rest.media.float(), grove.media)


def test_the_first_branches_are_the_walk_that_no_tree_would_have_left() -> None:
    with trees() as (job, chosen), torch.no_grad():
        grove = chosen.sampled(job, 0, job.cases_of(0))[0][0]
        assert grove.leaves[0].seed == job.cases_of(0)[0].seed
        assert len({leaf.seed for leaf in grove.leaves}) == 4
        kernel, _ = chosen.noise(job, 0)
        alone = job.driver(job.cases_of(0)[:1]).rollout(kernel, dtype=torch.float32)
        torch.testing.assert_close(alone.latents[3], grove.layers[1].moves[:1], rtol=1e-4, atol=1e-5)


def test_sibling_advantages_sum_to_zero_for_every_parent_and_point_to_the_better_half() -> None:
    with trees(window=2, group_size=8) as (job, chosen):
        for grove in chosen.collect(job, 0).micros:
            rewards = job.score(grove.media, grove.leaves)[:, 0]
            for layer in grove.layers:
                found = by_parent(layer)
                torch.testing.assert_close(found.sum(1), torch.zeros(len(found)), rtol=0, atol=1e-5)
                worth = rewards.view(len(layer.moves), -1).mean(1).view_as(found)
                assert torch.equal(found.argmax(1), worth.argmax(1))


@pytest.mark.parametrize("settings", [{"advantage": "fused"}, {"alpha": 0.0}, {"advantage": "depth"}])
def test_other_advantages_are_those_of_tree_credit(settings: dict[str, Any]) -> None:
    with trees(group_size=8, **settings) as (job, chosen):
        grove = chosen.collect(job, 0).micros[0]
        rewards = job.score(grove.media, grove.leaves)[:, 0]
        parent, depth, log_prob, leaf = forest(grove, rewards)
        one = torch.zeros_like(parent)  # both trees are of one prompt
        if settings == {"advantage": "fused"}:
            own = tree_credit.leaf_advantages(parent, leaf, one)
            expected = tree_credit.fused_advantages(parent, depth, own, log_prob)
            torch.testing.assert_close(own[-8:].sum(), torch.tensor(0.0), rtol=0, atol=1e-4)
        elif settings == {"alpha": 0.0}:
            expected = tree_credit.global_advantages(parent, depth, leaf, one)
        else:
            value = tree_credit.node_rewards(parent, depth, leaf)
            expected = tree_credit.depth_advantages(parent, depth, value, one, eps=1e-4)
        got = torch.cat([layer.advantages for layer in grove.layers])
        assert got.any()
        torch.testing.assert_close(got, expected[2:].float())


@pytest.mark.parametrize("settings", [{"advantage": "fused"}, {"alpha": 0.0}, {"advantage": "depth"}, {}])
def test_a_large_eps_makes_every_kind_of_advantage_small(settings: dict[str, Any]) -> None:
    sizes = []
    for eps in (1e-4, 1e6):
        told = {"tree_grpo": {"noise": {"window": 2, "rule": "fixed"}, **settings}}
        outer = {"group_size": 4, "micro_batch": 4, "reward": Brightness(100), "advantage": {"eps": eps}}
        with jobs.job("sd3", told, **outer) as (job, chosen):
            layers = [layer for grove in chosen.collect(job, 0).micros for layer in grove.layers]
            sizes.append(float(torch.cat([layer.advantages for layer in layers]).abs().max()))
    assert sizes[0] > 0.5
    assert sizes[1] < 1e-3


def test_fused_advantages_are_the_same_for_summed_and_mean_densities_and_tell_their_effective_children() -> None:
    values, told = [], []
    for density in ("mean", "sum"):
        with trees(branches=3, window=1, density=density, advantage="fused") as (job, chosen):
            found = chosen.collect(job, 0)
            grove = found.micros[0]
            values.append(torch.cat([layer.advantages for layer in grove.layers]))
            told.append(found.stats["tree_ess"])
        with trees(window=2, density=density, advantage="fused") as (job, chosen):
            found = chosen.collect(job, 0)
            values.append(torch.cat([layer.advantages for layer in found.micros[0].layers]))
    torch.testing.assert_close(values[0], values[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(values[1], values[3], rtol=1e-3, atol=1e-3)
    assert told == pytest.approx([3, 3], abs=0.1)  # densities per element hardly differ between siblings
    with trees() as (job, chosen):
        assert "tree_ess" not in chosen.collect(job, 0).stats


@pytest.mark.filterwarnings("ignore:reward 'brightness' failed")
def test_a_failed_leaf_does_not_dilute_the_fused_advantage_of_its_parent() -> None:
    reward = FailsOn()
    with trees(reward=reward, advantage="fused") as (job, chosen):
        groves, _ = chosen.sampled(job, 0, job.cases_of(0))
        reward.seeds = {groves[0].leaves[1].seed}
        first, last = chosen.collect(job, 0).micros[0].layers
        torch.testing.assert_close(first.advantages[0], last.advantages[0])


def test_tempflow_weighs_a_layer_as_its_step_wherever_the_window_is() -> None:
    moving = {"window": 1, "rule": "progressive", "every": 1, "low": 1}
    with trees(window=1, steps=5, noise=moving, credit={"weighting": "tempflow"}) as (job, chosen):
        sigma = job.levels.sigma
        nu = [0.7 * math.sqrt(float(s / (1 - s) * (s - after))) for s, after in itertools.pairwise(sigma[1:5])]
        for step in range(3):  # which is where the window is, from step 1 of the chain on
            grove = chosen.collect(job, step).micros[0]
            assert [layer.i for layer in grove.layers] == [1 + step]
            grove.layers[0].advantages = torch.ones(2)
            found = jobs.learn(job, chosen, [grove])["loss"]
            assert found == pytest.approx(-nu[step] / (sum(nu) / 3), rel=1e-4)


def test_unscaled_siblings_stay_in_units_of_the_groups_deviation() -> None:
    with trees(group_size=8, scale=False) as (job, chosen):
        grove = chosen.collect(job, 0).micros[0]
        rewards = job.score(grove.media, grove.leaves)[:, 0]
        last = rewards.view(4, 2)
        expected = (last - last.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
        torch.testing.assert_close(by_parent(grove.layers[-1]), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("window", "low", "branches", "steps"), [(2, 1, 2, 5), (1, 0, 3, 3), (2, 0, 3, 4)])
def test_a_tree_costs_a_model_call_for_every_node_and_less_than_its_leaves_would(
    window: int, low: int, branches: int, steps: int
) -> None:
    with trees(window=window, low=low, branches=branches, steps=steps) as (job, chosen):
        cases = job.cases_of(0)
        chosen.sampled(job, 0, cases)  # what is found out about a pipeline once is not counted
        before = job.budget.nfe
        groves, _ = chosen.sampled(job, 0, cases)
        leaves = branches**window
        assert all(len({leaf.seed for leaf in grove.leaves}) == len(grove) == leaves for grove in groves)
        nodes = low + sum(branches**k for k in range(window)) + leaves * (steps - low - window)
        assert job.budget.nfe - before == GUIDED * 2 * nodes  # two prompts
        assert nodes < leaves * steps
        before = job.budget.nfe
        jobs.learn(job, chosen, chosen.collect(job, 0).micros)
        trained = sum(branches**k for k in range(window))
        assert job.budget.nfe - before == GUIDED * 2 * (nodes + 3 * trained)  # a backward costs two forwards


@pytest.mark.parametrize("prune", ["best", "extremes"])
def test_pruned_edges_give_no_gradient(prune: str) -> None:
    with trees(branches=3, window=1, steps=3, prune=prune) as (job, chosen):
        grove = chosen.collect(job, 0).micros[0]
        layer = grove.layers[0]
        rewards = job.score(grove.media, grove.leaves)[:, 0]
        dropped = rewards < rewards.max() if prune == "best" else rewards == rewards.median()
        assert not layer.advantages[dropped].any()
        assert bool((layer.advantages[~dropped] != 0).all())
        jobs.learn(job, chosen, [grove])
        plain = jobs.gradients(job)
        layer.moves[dropped] += 1.0  # what they did does not matter
        jobs.learn(job, chosen, [grove])
        assert torch.equal(jobs.gradients(job), plain)
        assert plain.any()


def test_what_hangs_below_a_pruned_branch_is_pruned_too() -> None:
    with trees(prune="best") as (job, chosen):
        grove = chosen.collect(job, 0).micros[0]
        kept = [layer.advantages != 0 for layer in grove.layers]
        assert [int(each.sum()) for each in kept] == [1, 1]
        assert bool(kept[0][grove.layers[1].parent[kept[1]]].all())


class FailsOn(Brightness):
    """Brightness that fails on cases of these seeds."""

    def __init__(self) -> None:
        super().__init__(100)
        self.seeds: set[int] = set()

    def __call__(self, media: Tensor, cases: Any) -> Tensor:
        lost = torch.tensor([case.seed in self.seeds for case in cases])
        return torch.where(lost, torch.nan, super().__call__(media, cases))


@pytest.mark.parametrize("advantage", ["sibling", "fused", "depth"])
@pytest.mark.filterwarnings("ignore:reward 'brightness' failed")
def test_a_leaf_that_a_reward_fails_on_counts_nowhere(advantage: str) -> None:
    reward = FailsOn()
    with trees(reward=reward, advantage=advantage) as (job, chosen):
        groves, _ = chosen.sampled(job, 0, job.cases_of(0))
        reward.seeds = {groves[0].leaves[1].seed}
        found = chosen.collect(job, 0)
        assert found.stats["invalid"] == pytest.approx(1 / 8)
        first, last = found.micros[0].layers
        assert float(last.advantages[1]) == 0
        assert all(layer.advantages.isfinite().all() for grove in found.micros for layer in grove.layers)
        assert bool((first.advantages != 0).all())
        assert bool((last.advantages[2:] != 0).all())
        if advantage == "sibling":  # left alone, a valid child has no sibling to differ from
            assert float(last.advantages[0]) == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group_size": 6}, "group_size is 6, but branches 2 at 2 steps make 4 leaves"),
        ({"micro_batch": 2}, "trees of a prompt stay together: use 4"),
        ({"advantage": {"normalise": "dr"}}, "a tree does not read"),
        ({"advantage": {"step_norm": "group_step"}}, "step_norm is group_step"),
    ],
)
def test_jobs_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    told = {"tree_grpo": {"noise": {"window": 2, "rule": "fixed"}}}
    outer = {"group_size": 4, "micro_batch": 4} | settings
    if "group_size" in settings:
        outer["micro_batch"] = 6
    with pytest.raises(ConfigError, match=said), jobs.job("sd3", told, **outer):
        pass


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"branches": 0}, "branches is 0"),
        ({"noise": {"window": 0}}, "noise.window is 0"),
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"same_start": True}, "same_start belongs"),
        ({"advantage": "fused", "alpha": 0.5}, "belong to advantage: sibling"),
        ({"advantage": "depth", "scale": False}, "belong to advantage: sibling"),
        ({"credit": {"similarity": "coca"}}, "credits its steps by what grows"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.build(TreeGRPOConfig, settings)
