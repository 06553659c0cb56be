"""Laws of tree search: exact values, the counts of a tree, and that a tree does not care how its growth is cut up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from diffalign.budget import Limits
from diffalign.errors import BudgetError, ConfigError
from diffalign.noise import case_noise, ddim, forked
from diffalign.search.best_of_n import curve
from diffalign.search.nodes import Nodes, soft_value
from diffalign.search.tree import Tree, TreeConfig, grow
from tests.search.toys import FiniteChain, ToyChain, exact, gaussian_chain, judge_of, linear, mixture_chain


def wide(**changes: Any) -> TreeConfig:
    """The tree of the spec's laws, whatever the defaults are; `changes` on top."""
    return TreeConfig(**{"strength": 2.0, "c_uct": 1.0, "width": 2.0, "growth": 0.5} | changes)


DTS = wide(mode="sample", scale="given", strength=1.0)
DTS_STAR = wide(scale="given", strength=2.0)


def grown(chain: ToyChain, config: TreeConfig = DTS_STAR, iterations: int | None = None, rate=linear(1.0)) -> Tree:
    return grow(chain, judge_of(chain, rate), config, iterations=iterations)


def rounded(media: Tensor, rows: Sequence[int]) -> Tensor:
    """Rewards on a grid, so that adding a constant or doubling is exact."""
    return (media[:, 0] * 256).round() / 256


def spotty(media: Tensor, rows: Sequence[int]) -> Tensor:
    """A third of the rewards is invalid."""
    return torch.where((media[:, 0] * 1000).long() % 3 == 0, torch.nan, media[:, 0])


def same(a: Nodes, b: Nodes) -> bool:
    """Equal to the last bit: shape, visits, values, latents, predictions, walks in flight."""
    lists = all(getattr(a, name) == getattr(b, name) for name in ("parent", "level", "seeds", "visits", "queue"))
    values = torch.tensor(a.value, dtype=torch.float64), torch.tensor(b.value, dtype=torch.float64)
    tensors = [(x, y) for name in ("x", "prediction") for x, y in zip(getattr(a, name), getattr(b, name), strict=True)]
    equal = all((x is None and y is None) or torch.equal(x, y) for x, y in tensors)
    return lists and equal and values[0].allclose(values[1], rtol=0, atol=0, equal_nan=True)


def shape_of(tree: Tree) -> list[tuple[list[int], list[int]]]:
    return [(nodes.parent, nodes.visits) for nodes in tree.cases]


def test_dts_estimates_the_soft_value_and_samples_the_tilted_law() -> None:
    chain = gaussian_chain(steps=3, cases=6)
    tree = grown(chain, DTS, 1000)
    value = tree.result().value
    # .552 +- .018 over 8 trees and 1512 NFE: simulated apart from this code; the exact value is .5534
    assert abs(float(value.mean()) - 0.552) < 3 * 0.018 / math.sqrt(6)
    assert abs(chain.budget.nfe / 6 - 1512) < 15
    mean, deviation = exact(chain).tilted(1.0)
    rewards = torch.stack([tree.sample(b, 400)[1] for b in range(6)])
    assert abs(float(rewards.mean()) - mean) < 3 * float(rewards.mean(1).std()) / math.sqrt(6) + 0.01  # finite-M bias
    assert float(rewards.std()) == pytest.approx(deviation, abs=0.02)


def test_a_tree_of_fixed_shape_is_unbiased_for_the_partition_function() -> None:
    chain = gaussian_chain(steps=6, cases=200, seed=7)
    tree = grown(chain, wide(scale="given", strength=1.0, fixed=(2, 2, 2, 2), parallel=4), 100)
    z = tree.result().value.double().exp()
    assert abs(float(z.mean()) - math.exp(exact(chain).log_z(1.0))) < 3 * float(z.std()) / math.sqrt(200)
    assert tree.result().population.unique(dim=0).tolist() == [[2, 4, 8, 16, 16, 16, 16]]
    assert chain.budget.nfe == 200 * (2 + 4 + 8 + 16 + 16 + 16)


def test_without_strength_the_root_is_the_mean_of_leaves_weighted_by_their_siblings() -> None:
    nodes = grown(gaussian_chain(steps=4), wide(mode="sample", scale="given", strength=0.0), 60).cases[0]
    weighted = 0.0
    for leaf in nodes.leaves:
        node, weight = leaf, 1.0
        while node:
            node = nodes.parent[node]
            weight /= len(nodes.children[node])
        weighted += weight * nodes.value[leaf]
    assert nodes.value[0] == pytest.approx(weighted, abs=1e-9)
    weak = grown(gaussian_chain(steps=4), wide(mode="sample", scale="given", strength=1e-7), 60)
    assert weak.value(0) == pytest.approx(weighted, abs=0.05)  # nearly uniform descents: nearly the same tree


@pytest.mark.parametrize("scale", ["given", "std"])
def test_a_constant_reward_is_the_value_of_every_node(scale) -> None:
    tree = grown(gaussian_chain(cases=2), wide(scale=scale), 40, lambda media, rows: torch.full((len(rows),), 3.0))
    assert all(set(nodes.value) == {3.0} for nodes in tree.cases)
    assert all(
        max(nodes.visits[child] for child in nodes.children[0]) <= 40 / 4 for nodes in tree.cases
    )  # no favourite


@pytest.mark.parametrize("mode", ["search", "sample"])
@pytest.mark.parametrize("scale", ["given", "std"])
def test_adding_a_constant_shifts_every_value_and_changes_no_choice(mode, scale) -> None:
    config = wide(mode=mode, scale=scale)
    plain = grown(gaussian_chain(cases=2, steps=5), config, 50, rounded)
    moved = grown(gaussian_chain(cases=2, steps=5), config, 50, lambda media, rows: rounded(media, rows) + 16)
    assert shape_of(plain) == shape_of(moved)
    for a, b in zip(plain.cases, moved.cases, strict=True):
        assert torch.tensor(b.value).allclose(torch.tensor(a.value) + 16, atol=1e-5)


def test_strength_and_unit_of_reward_are_one_setting() -> None:
    def doubled(media: Tensor, rows: Sequence[int]) -> Tensor:
        return 2 * rounded(media, rows)

    for mode in ("search", "sample"):
        strong = wide(mode=mode, scale="given", strength=2.0, c_uct=1.0)
        weak = wide(mode=mode, scale="given", strength=1.0, c_uct=2.0)
        a = grown(gaussian_chain(cases=2, steps=5), strong, 50, rounded)
        b = grown(gaussian_chain(cases=2, steps=5), weak, 50, doubled)
        assert shape_of(a) == shape_of(b)
        assert b.value(0) == pytest.approx(2 * a.value(0), abs=1e-9)
        free = wide(mode=mode, scale="std")
        a, b = (grown(gaussian_chain(cases=2, steps=5), free, 50, rate) for rate in (rounded, doubled))
        assert shape_of(a) == shape_of(b)
        assert b.value(1) == pytest.approx(2 * a.value(1), abs=1e-9)


def test_the_deviation_is_that_of_the_first_leaves_and_stays() -> None:
    config = wide(calibration=5, strength=3.0)
    chain = gaussian_chain()
    judge = judge_of(chain, linear(1.0))
    tree = grow(chain, judge, config, iterations=5)
    first = torch.tensor([leaf.reward for leaf in judge.leaves[0]], dtype=torch.float64)
    assert tree.cases[0].strength == pytest.approx(3.0 / float(first.std()))
    kept = tree.cases[0].strength
    assert grow(chain, judge, config, tree, iterations=60).cases[0].strength == kept


def test_the_soft_value_stays_finite_and_ignores_what_is_invalid() -> None:
    assert soft_value([1e4, 1e4 + 1], 1e3) == pytest.approx(1e4 + 1, abs=1e-3)
    assert soft_value([math.nan, 2.0, 4.0], 0.0) == 3.0
    assert soft_value([math.nan, 1.5], 7.0) == 1.5
    assert math.isnan(soft_value([math.nan], 1.0))
    assert soft_value([0.0, 1.0], 2.0) == pytest.approx(math.log((1 + math.exp(2)) / 2) / 2)


def test_values_of_a_finite_chain_approach_dynamic_programming() -> None:
    rewards = torch.tensor([0.0, 1.0, -1.0, 2.0])
    errors = {}
    for fixed in ((3, 2, 2, 1), (40, 4, 2, 1)):  # of a fixed shape, for a tree that follows its values is biased low
        chain = FiniteChain(cases=8)
        tree = grown(
            chain,
            wide(scale="given", strength=1.0, fixed=fixed, parallel=4),
            400,
            lambda media, rows: rewards[media[:, 0].long()],
        )
        errors[fixed[0]] = tree.result().value - chain.values(rewards, 1.0)[-1]
    assert errors[40].square().mean() < errors[3].square().mean() / 4
    assert abs(float(errors[40].mean())) < 3 * float(errors[40].std()) / math.sqrt(8)
    assert float(errors[40].abs().max()) < 0.15


@pytest.mark.parametrize("mode", ["search", "sample"])
@pytest.mark.parametrize("start", [0, 1])
def test_the_counts_of_a_tree_add_up(mode, start) -> None:
    chain = gaussian_chain(steps=5, cases=2, cost=3)
    tree = grown(chain, wide(mode=mode, visits_start=start), 150)
    for nodes in tree.cases:
        assert nodes.visits[0] == 150
        assert all(nodes.level[leaf] == 5 and not nodes.children[leaf] for leaf in nodes.leaves)
        for node, children in enumerate(nodes.children):
            if not children:
                assert nodes.level[node] == 5
                continue
            assert len(children) <= math.ceil(2 * max(1, nodes.visits[node]) ** 0.5)
            if start == 0:
                assert nodes.visits[node] == sum(nodes.visits[child] for child in children)
    result = tree.result()
    assert chain.budget.nfe == 3 * int((result.nodes - result.leaves).sum()) == 3 * sum(rows for _, rows in chain.calls)
    assert (result.population.sum(1) == result.nodes).all()
    assert (result.population[:, 5] == result.leaves).all()
    assert (result.depth > 0).all()


def test_values_recomputed_from_the_leaves_are_the_stored_ones() -> None:
    for config in (wide(), DTS, wide(parallel=4)):
        nodes = grown(gaussian_chain(steps=5), config, 60, spotty).cases[0]
        stored = torch.tensor(nodes.value, dtype=torch.float64)
        nodes.renew()
        assert torch.tensor(nodes.value, dtype=torch.float64).allclose(stored, rtol=0, atol=0, equal_nan=True)


def test_on_one_smooth_hill_search_does_about_as_well_as_best_of_n() -> None:
    chain = gaussian_chain(cases=16, budget=455)
    judge = judge_of(chain, linear(2.0))
    grow(chain, judge, DTS_STAR)
    mean, variance = exact(chain).prior
    pool = mean + math.sqrt(variance) * torch.randn(20000, generator=torch.Generator().manual_seed(0))
    best_of_45 = float(curve(2 * pool, ns=[45]))
    assert float(judge.best_reward().mean()) == pytest.approx(best_of_45, abs=0.5)


def plain_draws(chain: ToyChain, n: int) -> Tensor:
    """Final latents (n,) of the plain sampler."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, generator=generator)
    for i in range(chain.length):
        step = chain.transition(x, chain.predict(x, i, [0] * n), i)
        x = step.sample(torch.randn(n, 1, generator=generator))
    return x[:, 0]


def test_search_reaches_a_rare_mode_in_a_fifth_of_the_budget_of_best_of_n() -> None:
    modes = {"weights": (0.6, 0.39, 0.01), "means": (-1.5, 0.0, 1.5), "deviation": 0.3}
    chain = mixture_chain(**modes, cases=32, budget=600, seed=77)
    judge = judge_of(chain, lambda media, rows: -(media[:, 0] - 1.5).abs())
    grow(chain, judge, TreeConfig())
    pool = plain_draws(mixture_chain(**modes), 20000)
    assert float(((pool - 1.5).abs() < 0.6).float().mean()) < 0.01
    with_five_times_as_much = float(curve(-(pool - 1.5).abs(), ns=[5 * 60]))
    assert float(judge.best_reward().mean()) > with_five_times_as_much


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("mode", ["search", "sample"])
def test_a_case_grows_the_same_tree_alone_and_in_a_batch(mode, parallel) -> None:
    config = wide(mode=mode, parallel=parallel)
    batch = grown(gaussian_chain(cases=3, budget=150), config, rate=spotty)
    for k in range(3):
        alone = grown(gaussian_chain(seed=1000 * k, budget=150), config, rate=spotty)
        assert same(batch.cases[k], alone.cases[0])


def test_seeds_repeat() -> None:
    a, b, other = (grown(gaussian_chain(seed=seed), wide(mode="sample"), 30).cases[0] for seed in (3, 3, 4))
    assert same(a, b)
    assert not same(a, other)


@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("mode", ["search", "sample"])
@pytest.mark.parametrize("cut", [5, 9, 26])
def test_a_saved_tree_grows_on_as_if_never_stopped(mode, parallel, cut) -> None:
    config = wide(mode=mode, parallel=parallel)
    noise = torch.randn(2, 3, 1, generator=torch.Generator().manual_seed(0))

    def run(tree: Tree | None, iterations: int) -> Tree:
        chain = gaussian_chain(steps=5, cases=2)
        start = noise if tree is None else None
        return grow(chain, judge_of(chain, spotty), config, tree, iterations, start)

    whole = run(None, 60)
    saved = load(save(run(None, cut).state()))
    resumed = run(Tree.restore(saved), 60 - cut)
    assert all(same(a, b) for a, b in zip(whole.cases, resumed.cases, strict=True))
    assert torch.equal(whole.sample(1, 20)[1], resumed.sample(1, 20)[1])


def test_a_restored_tree_answers_as_the_saved_one() -> None:
    tree = grown(gaussian_chain(cases=2, seed=-5), wide(parallel=3), 40, spotty)
    again = Tree.restore(load(save(tree.state())))
    assert all(same(a, b) for a, b in zip(tree.cases, again.cases, strict=True))
    for name, held in vars(tree.result()).items():
        assert torch.equal(held, getattr(again.result(), name))
    assert all(torch.equal(a, b) for a, b in zip(tree.sample(1, 9, "x"), again.sample(1, 9, "x"), strict=True))
    empty = Tree.restore(load(save(Tree([1 << 70, 2], 4).state())))
    assert [nodes.seed for nodes in empty.cases] == [1 << 70, 2]


@pytest.mark.parametrize("parallel", [1, 4])
def test_small_budgets_and_an_interruption_change_no_tree(parallel) -> None:
    config = wide(parallel=parallel)
    whole = grown(gaussian_chain(), config, 50).cases[0]
    tree = Tree(gaussian_chain().seeds, 10)
    for limit in (37, 55):
        grown_on = gaussian_chain(budget=limit)
        grow(grown_on, judge_of(grown_on, linear(1.0)), config, tree)
        assert 0 < grown_on.budget.nfe <= limit
    asked = 0

    def breaking(media: Tensor, rows: Sequence[int]) -> Tensor:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise KeyboardInterrupt
        return media[:, 0]

    chain, nodes = gaussian_chain(), tree.cases[0]
    with pytest.raises(KeyboardInterrupt):
        grow(chain, judge_of(chain, breaking), config, tree, 40)
    grow(chain, judge_of(chain, linear(1.0)), config, tree, 50 - nodes.visits[0] + len(nodes.queue))
    assert same(whole, nodes)


@pytest.mark.parametrize(
    "limits", [Limits(nfe=83), Limits(decodes=7), Limits(reward_calls=15), Limits(nfe=99, decodes=4)]
)
@pytest.mark.parametrize("parallel", [1, 5])
def test_no_limit_is_ever_exceeded(limits, parallel) -> None:
    chain = gaussian_chain(cases=3, budget=limits, cost=2)
    judge = judge_of(chain, linear(1.0), rewards=2)
    tree = grow(chain, judge, wide(parallel=parallel))
    budget = chain.budget
    assert budget.nfe == 2 * sum(rows for _, rows in chain.calls)
    assert budget.decodes == budget.reward_calls // 2 == int(tree.result().leaves.sum())
    for name in ("nfe", "decodes", "reward_calls"):
        limit = getattr(limits, name)
        assert limit is None or getattr(budget, name) <= 3 * limit
    assert min(len(row) for row in judge.leaves) > 1


def test_a_budget_below_one_walk_is_refused_before_anything_is_spent() -> None:
    chain = gaussian_chain(cases=2, budget=9)
    with pytest.raises(BudgetError, match="10"):
        grown(chain, iterations=3)
    assert chain.budget.nfe == 0


def test_each_level_is_one_model_call_for_all_cases_and_walks() -> None:
    chain = gaussian_chain(steps=4, cases=3)
    grown(chain, wide(parallel=2), 2)
    assert chain.calls == [(i, 6) for i in range(4)]


def test_the_first_walks_are_what_the_plain_sampler_draws() -> None:
    chain = gaussian_chain(steps=4)
    nodes = grown(chain, wide(parallel=3), 3).cases[0]
    for k in range(3):
        seeds = forked(chain.seeds, [0], [k])
        x = chain.first(seeds, [0])
        for i in range(4):
            step = chain.transition(x, chain.predict(x, i, [0]), i)
            x = step.sample(case_noise(seeds, x, "step", i) if step.std else None, dtype=x.dtype)
        assert torch.equal(nodes.x[nodes.leaves[k]], x[0])


def test_given_noise_starts_the_first_children_of_the_root() -> None:
    chain = gaussian_chain(cases=2)
    noise = [torch.full((6, 1), 0.25) + torch.arange(6.0)[:, None], torch.full((1, 1), -2.0)]
    tree = grow(chain, judge_of(chain, linear(1.0)), iterations=8, noise=noise)
    for b, given in enumerate(noise):
        nodes = tree.cases[b]
        starts = torch.stack([nodes.x[child] for child in nodes.children[0]])
        assert torch.equal(starts[: len(given)], given)
    with pytest.raises(ConfigError, match="either tree or noise"):
        grow(chain, judge_of(chain, linear(1.0)), tree=tree, noise=noise)
    with pytest.raises(ConfigError, match="there are 2"):
        grow(chain, judge_of(chain, linear(1.0)), noise=noise[:1])


def test_a_step_without_noise_has_one_child() -> None:
    nodes = grown(gaussian_chain(steps=5), iterations=120).cases[0]
    last = [node for node in range(len(nodes.parent)) if nodes.level[node] == 4]
    assert all(len(nodes.children[node]) == 1 for node in last)
    plain = grown(gaussian_chain(steps=5, kernel=ddim(0.0)), iterations=50)
    population = plain.result().population[0]
    assert (population == population[0]).all()
    assert population[0] == math.ceil(2 * math.sqrt(49))
    assert plain.cases[0].visits[0] == 50


def test_siblings_live_at_the_named_levels_only() -> None:
    tree = grown(gaussian_chain(steps=6), wide(levels=(0, 3)), 100)
    population = tree.result().population[0].tolist()
    assert population[0] == population[1] == population[2] < population[3] == population[6]


def test_invalid_leaves_are_counted_and_never_win() -> None:
    chain = gaussian_chain(cases=4)
    judge = judge_of(chain, spotty)
    result = grow(chain, judge, iterations=60).result()
    assert (result.invalid > 0).all()
    assert result.invalid.tolist() == [sum(math.isnan(leaf.reward) for leaf in row) for row in judge.leaves]
    assert result.best.equal(judge.best_reward())
    assert result.value.isfinite().all()
    assert (result.descent <= result.best).all()


def test_with_invalid_leaves_only_the_root_keeps_drawing() -> None:
    tree = grown(gaussian_chain(), wide(parallel=2), 20, lambda media, rows: torch.full((len(rows),), math.nan))
    result = tree.result()
    assert result.leaves.tolist() == result.invalid.tolist() == result.population[:, 0].tolist() == [20]
    assert math.isnan(tree.value(0))
    assert tree.descend(0) is None
    assert len(tree.sample(0, 5)[1]) == 0


def test_a_tree_that_cannot_widen_ends() -> None:
    for config in (wide(width=1, growth=0, patience=20), wide(fixed=(1,))):
        chain = gaussian_chain(budget=1000)
        assert grown(chain, config).result().leaves.tolist() == [1]
        assert chain.budget.nfe == 10


def test_the_descent_follows_the_largest_values_and_samples_cost_nothing() -> None:
    chain = gaussian_chain(cases=2)
    tree = grown(chain, iterations=80)
    spent = chain.budget.nfe
    found = tree.descend(1)
    assert found is not None
    node = 0
    while children := tree.cases[1].children[node]:
        node = max(children, key=tree.cases[1].value.__getitem__)
    assert (found.node, found.reward) == (node, pytest.approx(float(found.x[0])))
    x, rewards = tree.sample(1, 50)
    assert torch.equal(x[:, 0], rewards)
    assert not torch.equal(rewards, tree.sample(1, 50, "other")[1])
    assert chain.budget.nfe == spent


def test_samples_follow_the_softmax_at_every_level() -> None:
    tree = grown(gaussian_chain(steps=3), DTS, 12)
    nodes = tree.cases[0]
    odds = {}
    for leaf in nodes.leaves:
        node, odds[leaf] = leaf, 1.0
        while node:
            siblings = nodes.children[nodes.parent[node]]
            odds[leaf] *= math.exp(nodes.value[node]) / sum(math.exp(nodes.value[child]) for child in siblings)
            node = nodes.parent[node]
    assert sum(odds.values()) == pytest.approx(1.0)
    drawn = tree.sample(0, 4000)[1]
    for leaf, p in odds.items():
        share = float((drawn == torch.tensor(nodes.value[leaf])).float().mean())
        assert abs(share - p) < 3.5 * math.sqrt(p * (1 - p) / 4000) + 1e-9


def test_another_call_cannot_take_over_a_tree() -> None:
    tree = grown(gaussian_chain(), iterations=3)
    for chain in (gaussian_chain(seed=1), gaussian_chain(steps=4)):
        with pytest.raises(ConfigError, match="Repeat the call"):
            grow(chain, judge_of(chain, linear(1.0)), tree=tree)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "dts"},
        {"scale": "auto"},
        {"strength": -1.0},
        {"c_uct": math.inf},
        {"width": 0.0},
        {"growth": 1.5},
        {"parallel": 0},
        {"calibration": 1},
        {"visits_start": 2},
        {"levels": (0,), "fixed": (2,)},
        {"levels": (-1,)},
        {"fixed": (0,)},
    ],
)
def test_a_wrong_setting_names_itself(wrong) -> None:
    with pytest.raises(ConfigError, match=f"tree.{next(iter(wrong))}"):
        TreeConfig(**wrong)


def test_what_is_left_out_of_a_config_follows_the_mode() -> None:
    hunt, draw = TreeConfig(), TreeConfig(mode="sample", growth=0.8)
    assert (hunt.width, hunt.growth, hunt.c_uct, hunt.strength) == (1.0, 0.25, 0.5, 5.0)
    assert (draw.width, draw.growth, draw.c_uct, draw.strength) == (2.0, 0.8, 1.0, 2.0)
