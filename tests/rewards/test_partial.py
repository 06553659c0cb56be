from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.errors import ConfigError, NotDifferentiable
from diffalign.scoring import make_reward, require_gradient
from tests.rewards.told import NAN, Told, cases_of, rated, same


def partial(**options: Any) -> Any:
    terms = {"right": Told("right"), "near": Told("near"), "neat": Told("neat")}
    return make_reward({"partial": {"terms": terms, **options}})


CASES = cases_of(right=[1, 0, 0.5], near=[1, 1, 0.5], neat=[0.5, 1, NAN])


def test_partial_is_the_weighted_sum_and_a_weight_of_0_only_shows() -> None:
    found = rated(partial(weights={"right": 2.0, "near": -1.0, "neat": 0.0}), CASES)
    assert same(found.total, 1, -1, 0.5)
    assert same(found.parts["neat"], 0.5, 1, NAN)
    assert same(found.parts["near/twice"], 2, 2, 1)
    assert same(rated(partial(), CASES).total, 2.5, 2, NAN)


def test_a_gated_term_counts_only_where_the_other_reaches_the_threshold() -> None:
    found = rated(partial(gates={"near": ["right", 0.5], "neat": ["right", 1.0]}), CASES)
    assert same(found.total, 2.5, 0, 1.0)
    assert same(found.parts["neat/open"], 1, 0, 0)
    assert same(rated(partial(gates={"right": ["neat", 0.0]}, weights={"neat": 0.0}), CASES).total, 2, 1, NAN)


def test_bounds_bring_a_term_to_0_and_1_before_weights_and_gates() -> None:
    reward = partial(bounds={"right": [0.5, 1.5]}, weights={"near": 0.0, "neat": 0.0})
    assert same(rated(reward, CASES).total, 0.5, 0, 0)
    assert same(rated(reward, CASES).parts["right"], 1, 0, 0.5)  # the part stays raw


def test_shaping_fades_by_the_step() -> None:
    reward = partial(outcome="right", anneal=10, weights={"neat": 0.0})
    totals = []
    for step in (0, 5, 10, 99):
        reward.step = step
        totals.append(rated(reward, CASES).total[0].item())
    assert totals == pytest.approx([2, 1.5, 1, 1])
    assert reward.range == (0, 2)
    assert partial(outcome="right", anneal=10, step=5, schedule="cosine").weights_at(5)["near"] == pytest.approx(0.5)


def test_a_dominant_outcome_is_checked_or_made() -> None:
    with pytest.raises(ConfigError, match="a correct 'right' only 1"):
        partial(outcome="right", dominance="check")
    reward = partial(outcome="right", dominance="rescale")
    assert reward.weights == pytest.approx({"right": 1, "near": 0.45, "neat": 0.45})
    found = rated(reward, cases_of(right=[1, 0], near=[0, 1], neat=[0, 1])).total
    assert found[0] > found[1]
    with pytest.raises(ConfigError, match="range of the term 'near' is unknown"):
        make_reward(
            {
                "partial": {
                    "terms": {"right": Told("right"), "near": Told("near", ends=None)},
                    "outcome": "right",
                    "dominance": "check",
                }
            }
        )


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_a_partial_score_lies_in_its_range(weights: list[float], values: list[float]) -> None:
    names = ["right", "near", "neat"]
    reward = partial(weights=dict(zip(names, weights, strict=True)), gates={"neat": ["near", 0.5]})
    total = rated(reward, cases_of(**{name: [value] for name, value in zip(names, values, strict=True)})).total
    assert reward.range[0] - 1e-5 <= float(total) <= reward.range[1] + 1e-5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": {"write": 1.0}}, "the term 'write', but has: right, near, neat"),
        ({"gates": {"near": ["lost", 0.5]}}, "the term 'lost'"),
        ({"outcome": "lost"}, "the term 'lost'"),
        ({"terms": {}}, "needs a term"),
        ({"anneal": -1}, "0 steps or more"),
        ({"anneal": 5}, "none is named"),
        ({"dominance": "check"}, "none is named"),
        ({"bounds": {"near": [1.0, 1.0]}}, "the first is below the second"),
        ({"bounds": {"near": [0.0, math.nan]}}, "near is 0 to nan"),
        ({"bounds": {"near": [-math.inf, 0.0]}}, "both are finite"),
    ],
)
def test_terms_that_do_not_fit_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        partial(**options)


def test_a_partial_without_gradient_names_the_term() -> None:
    reward = make_reward({"partial": {"terms": {"light": "brightness", "size": "jpeg_size"}, "weights": {"size": 0.0}}})
    assert reward.differentiable  # a weight of 0 does not count
    with pytest.raises(NotDifferentiable, match="jpeg_size"):
        require_gradient(make_reward({"partial": {"terms": {"size": "jpeg_size"}}}), "noise optimisation")
