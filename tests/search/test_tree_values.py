"""Laws of a tree whose unfinished nodes are judged: opinions guide its growth, cost what they say, bend no value."""

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
from diffalign.search.judge import Judge
from diffalign.search.nodes import soft_value
from diffalign.search.tree import Tree, TreeConfig, grow
from diffalign.search.values import CleanPrediction, Completion, Rollouts, Value
from tests.search.test_svdd import Exact
from tests.search.test_tree import DTS, rounded, same, shape_of, wide
from tests.search.toys import ToyChain, exact, gaussian_chain, judge_of, linear


def valued(chain: ToyChain, make: Any, config: TreeConfig, iterations: int | None = 40, rate=linear(1.0)) -> Tree:
    judge = judge_of(chain, rate)
    return grow(chain, judge, config, iterations=iterations, value=make(judge))


def test_exact_values_take_away_the_bias_of_growing_by_what_was_found() -> None:
    cases = 40

    def tree_of(weight: float) -> tuple[Tensor, Tensor]:
        chain = gaussian_chain(cases=cases)
        config = wide(mode="sample", scale="given", strength=1.0, value_weight=weight)
        tree = valued(chain, lambda judge: Exact(chain, 2.0), config, 100, linear(2.0))
        return tree.result().value.double().exp(), torch.stack([tree.sample(b, 50)[0].mean() for b in range(cases)])

    z, drawn = tree_of(1e9)  # choices do not look at leaves, so nothing but the prior is averaged
    law = exact(gaussian_chain())
    assert abs(float(z.mean()) - math.exp(law.log_z(2.0))) < 3 * float(z.std()) / math.sqrt(cases)
    assert abs(float(drawn.mean()) - law.tilted(2.0)[0]) < 3 * float(drawn.std()) / math.sqrt(cases)
    z, drawn = tree_of(0.0)
    assert float(z.mean()) + 3 * float(z.std()) / math.sqrt(cases) < math.exp(law.log_z(2.0))
    assert float(drawn.mean()) + 3 * float(drawn.std()) / math.sqrt(cases) < law.tilted(2.0)[0]


def test_an_opinion_counts_as_its_weight_in_visits_and_is_never_backed_up() -> None:
    chain = gaussian_chain(steps=5)
    tree = valued(chain, lambda judge: Exact(chain, 1.0), DTS, 60)
    nodes = tree.cases[0]
    stored = list(nodes.value)
    nodes.renew()
    assert nodes.value == pytest.approx(stored, abs=1e-9, nan_ok=True)
    node = nodes.children[0][0]
    x, (value, opinion, visits) = nodes.x[node], (nodes.value[node], nodes.opinion[node], nodes.visits[node])
    assert x is not None
    assert opinion == pytest.approx(float(exact(chain).value(x[None], 0, 1.0)), abs=1e-6)
    mixed = math.log((visits * math.exp(value) + math.exp(opinion)) / (visits + 1))
    assert nodes.esteem(node) == pytest.approx(mixed)
    leaf = nodes.leaves[0]
    assert nodes.esteem(leaf) == nodes.value[leaf]
    grow(chain, judge_of(chain, linear(1.0)), DTS, tree, 1)  # without a value its old opinions rest
    assert nodes.esteem(node) == nodes.value[node]


@pytest.mark.parametrize("mode", ["search", "sample"])
def test_a_silent_or_weightless_value_changes_nothing(mode) -> None:
    class Silent(Exact):
        def __call__(self, x: Tensor, *args: Any) -> Tensor:
            return torch.full((len(x),), math.nan)

    chains = [gaussian_chain(cases=2) for _ in range(3)]
    alone = valued(chains[0], lambda judge: None, wide(mode=mode))
    silent = valued(chains[1], lambda judge: Silent(chains[1], 1.0), wide(mode=mode))
    light = valued(chains[2], lambda judge: Completion(judge, 3), wide(mode=mode, value_weight=0.0))
    for other in (silent, light):
        assert all(same(a, b) for a, b in zip(alone.cases, other.cases, strict=True))
    assert chains[2].budget.spent() | {"seconds": 0} == chains[0].budget.spent() | {"seconds": 0}


@pytest.mark.parametrize("mode", ["search", "sample"])
@pytest.mark.parametrize("scale", ["given", "std"])
def test_adding_a_constant_to_rewards_and_values_changes_no_choice(mode, scale) -> None:
    config = wide(mode=mode, scale=scale)
    trees = []
    for constant in (0.0, 8.0):

        def shifted(media: Tensor, rows: Sequence[int], constant: float = constant) -> Tensor:
            return rounded(media, rows) + constant

        trees.append(valued(gaussian_chain(cases=2), CleanPrediction, config, 60, shifted))
    assert shape_of(trees[0]) == shape_of(trees[1])


def values(judge: Judge) -> list[Value]:
    return [CleanPrediction(judge), Completion(judge, 2), Rollouts(judge, 2)]


@pytest.mark.parametrize("which", range(3))
def test_the_cost_is_foretold_exactly_and_no_limit_exceeded(which) -> None:
    chain = gaussian_chain(steps=6)
    nodes = valued(chain, lambda judge: values(judge)[which], wide(), 25).cases[0]
    walked = [level for level in nodes.level if 0 <= level < 6]
    extra = [values(judge_of(chain, linear(1.0)))[which].cost(level) for level in walked]
    assert chain.budget.nfe == len(walked) + sum(nfe for nfe, _ in extra)
    assert chain.budget.decodes == chain.budget.reward_calls == len(nodes.leaves) + sum(scored for _, scored in extra)
    for limits in (Limits(nfe=90), Limits(decodes=40), Limits(reward_calls=33, nfe=200)):
        small = gaussian_chain(steps=6, cases=2, budget=limits)
        tree = valued(small, lambda judge: values(judge)[which], wide(parallel=2), None)
        assert all(nodes.leaves for nodes in tree.cases)
        for name in ("nfe", "decodes", "reward_calls"):
            limit = getattr(limits, name)
            assert limit is None or getattr(small.budget, name) <= 2 * limit


def test_a_budget_below_one_judged_walk_is_refused_before_anything_is_spent() -> None:
    chain = gaussian_chain(steps=6, budget=Limits(decodes=6))
    with pytest.raises(BudgetError, match="first walk"):
        valued(chain, CleanPrediction, wide(), None)
    assert chain.budget.nfe == 0
    fewer = gaussian_chain(steps=6, budget=Limits(decodes=6))
    assert valued(fewer, CleanPrediction, wide(value_levels=(2, 4)), None).cases[0].leaves


def test_values_are_asked_at_the_named_levels_only() -> None:
    def asked(**shape: Any) -> set[int]:
        nodes = valued(gaussian_chain(steps=6), CleanPrediction, wide(**shape)).cases[0]
        return {level for level, opinion in zip(nodes.level, nodes.opinion, strict=True) if not math.isnan(opinion)}

    assert asked(value_levels=(1, 4)) == {1, 4}
    assert asked(levels=(0, 3)) == {0, 3}  # no choice is made at the others
    assert asked(levels=(0, 3), value_levels=(3, 5)) == {3}
    assert asked(fixed=(2, 2)) == set()
    with pytest.raises(ConfigError, match="value_levels"):
        TreeConfig(value_levels=(-1,))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("parallel", [1, 3])
def test_a_judged_case_grows_the_same_tree_alone_and_in_a_batch(which, parallel) -> None:
    batch = valued(gaussian_chain(cases=3), lambda judge: values(judge)[which], wide(parallel=parallel), 25)
    for b, nodes in enumerate(batch.cases):
        alone = valued(gaussian_chain(seed=1000 * b), lambda judge: values(judge)[which], wide(parallel=parallel), 25)
        assert same(nodes, alone.cases[0])
        assert nodes.opinion == pytest.approx(alone.cases[0].opinion, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("mode", ["search", "sample"])
def test_a_saved_judged_tree_grows_on_as_if_never_stopped(mode) -> None:
    def run(tree: Tree | None, iterations: int) -> Tree:
        chain = gaussian_chain(steps=5, cases=2)
        judge = judge_of(chain, linear(1.0))
        return grow(chain, judge, wide(mode=mode), tree, iterations, value=Completion(judge, 2))

    whole = run(None, 50)
    resumed = run(Tree.restore(load(save(run(None, 17).state()))), 33)
    assert all(same(a, b) for a, b in zip(whole.cases, resumed.cases, strict=True))
    assert torch.equal(whole.sample(1, 20)[1], resumed.sample(1, 20)[1])


def test_nodes_that_cannot_branch_keep_no_latents() -> None:
    def held(config: TreeConfig) -> list[int]:
        nodes = valued(gaussian_chain(steps=6), lambda judge: None, config).cases[0]
        for node in nodes.leaves:
            assert nodes.x[node] is not None
        return sorted({nodes.level[k] for k, aim in enumerate(nodes.prediction) if aim is not None})

    assert held(wide()) == [0, 1, 2, 3, 4]  # the last step draws no noise
    assert held(wide(levels=(0, 3))) == [2]
    assert held(wide(fixed=(2, 1, 2))) == [1]
    narrow = valued(gaussian_chain(steps=6, cases=1), lambda judge: None, wide(levels=(0, 3)))
    chain = gaussian_chain(steps=6, cases=1)
    with pytest.raises(ConfigError, match="without siblings at level"):
        grow(chain, judge_of(chain, linear(1.0)), wide(), narrow, 40)
    again = grow(chain, judge_of(chain, linear(1.0)), wide(levels=(0,)), narrow, 10)
    assert again is narrow
    assert held(wide(width=1.0, growth=0.0)) == [0, 1, 2, 3, 4]


def test_weights_of_a_soft_mean_are_counts() -> None:
    assert soft_value([1.0, 3.0], 0.0, (3, 1)) == pytest.approx(1.5)
    assert soft_value([1.0, 3.0], 2.0, (3, 1)) == pytest.approx(soft_value([1.0, 1.0, 1.0, 3.0], 2.0))
    assert soft_value([math.nan, 3.0], 2.0, (3, 1)) == 3.0
    assert math.isnan(soft_value([1.0, 2.0], 1.0, (0, 0)))


def test_a_search_takes_the_plain_mean_in_which_a_poor_opinion_counts() -> None:
    chain = gaussian_chain(steps=5)
    nodes = valued(chain, CleanPrediction, wide(scale="given", strength=50.0, value_weight=3.0), 30).cases[0]
    node = nodes.children[0][0]
    value, opinion, visits = nodes.value[node], nodes.opinion[node], nodes.visits[node]
    assert nodes.esteem(node) == pytest.approx((visits * value + 3 * opinion) / (visits + 3))
