from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.rules.partial import (
    Call,
    call_score,
    dominant_weights,
    gated,
    group_reference,
    hybrid,
    length_mask,
    length_penalty,
    progress,
    scheduled_weights,
)

NAN = torch.nan
arguments = st.dictionaries(st.sampled_from("xyz"), st.integers(0, 2), max_size=3)
calls = st.lists(st.tuples(st.sampled_from("fgh"), arguments), max_size=4)
numbers = st.floats(-10, 10, width=32)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(-99.0), b.nan_to_num(-99.0))


@given(wanted=calls, order=st.randoms())
def test_exactly_the_wanted_calls_in_any_order_are_3(wanted: list[Call], order: Any) -> None:
    made = list(wanted)
    order.shuffle(made)
    assert call_score(made, wanted) == pytest.approx(3)


@given(made=calls, wanted=calls)
def test_a_call_score_lies_between_minus_3_and_3(made: list[Call], wanted: list[Call]) -> None:
    assert -3 <= call_score(made, wanted) <= 3 + 1e-9


def test_calls_of_worked_examples() -> None:
    one = [("crop", {"x": 1, "y": 2})]
    assert call_score([], one) == call_score(None, one) == call_score([("blur", {})], one) == -3
    assert call_score(None, []) == call_score(one, []) == -3
    assert call_score([], []) == 3
    # the name (1) + the keys (1) + one value of two, of 1 + 1 + 2
    assert call_score([("crop", {"x": 1, "y": 9})], one) == pytest.approx(6 * 3 / 4 - 3)
    # names 1/2, then the better of the two calls: everything
    assert call_score([("crop", {"x": 0}), *one], one) == pytest.approx(6 * (0.5 + 3) / 4 - 3)


def test_a_gate_opens_at_its_threshold() -> None:
    term, monitor = column(5, 5, NAN, 5, NAN), column(0.5, 0.4, 0.4, NAN, 0.5)
    assert same(gated(term, monitor, 0.5), column(5, 0, 0, NAN, NAN))


def test_the_mask_keeps_both_bounds_and_gives_0_not_nan() -> None:
    ratio = column(0.49, 0.5, 1, 2, 2.01, NAN)
    assert same(length_mask(torch.ones(6), ratio), column(0, 1, 1, 1, 0, NAN))
    assert same(length_mask(column(NAN, NAN), column(3, 1)), column(0, NAN))


@given(seed=st.integers(0, 99), chosen=st.sets(st.integers(0, 2)))
def test_the_mask_leaves_other_columns_bitwise_unchanged(seed: int, chosen: set[int]) -> None:
    rng = torch.Generator().manual_seed(seed)
    rewards, ratio = torch.randn(7, 3, generator=rng), torch.rand(7, generator=rng) * 3
    before = rewards.clone()
    found = length_mask(rewards, ratio, columns=sorted(chosen))
    for k in range(3):
        assert torch.equal(found[:, k], length_mask(rewards[:, k], ratio) if k in chosen else rewards[:, k])
    assert torch.equal(rewards, before)
    assert torch.equal(length_mask(rewards, ratio), length_mask(rewards, ratio, columns=[0, 1, 2]))


def test_the_penalty_of_the_worked_examples() -> None:
    assert length_penalty(column(3, 6, 0, 4.5, 99), column(3, 3, 3, 3, 3)).tolist() == [0, -0.5, -0.5, -0.25, -0.5]
    assert length_penalty(column(9), column(NAN)).tolist() == [0]
    assert length_penalty(column(0, 1), column(0, 0)).tolist() == [0, -0.5]
    assert length_penalty(column(4), column(3), worst=1, tolerance=0.5).tolist() == pytest.approx([-2 / 3])


@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=8), st.floats(0.1, 5), st.floats(0.1, 2))
def test_the_penalty_stays_between_minus_worst_and_0(lengths: list[float], worst: float, tolerance: float) -> None:
    found = length_penalty(torch.tensor(lengths), torch.full((len(lengths),), 10.0), worst=worst, tolerance=tolerance)
    assert ((found <= 0) & (found >= -worst - 1e-6)).all()


def test_the_reference_length_is_the_mean_over_the_correct_samples_of_the_group() -> None:
    length, group = column(2, 4, 100, 7, NAN), torch.tensor([0, 0, 0, 1, 0])
    correct = torch.tensor([True, True, False, False, False])
    found = group_reference(length, correct, group)
    assert same(found, column(3, 3, 3, NAN, 3))
    assert length_penalty(length, found)[3] == 0  # no correct sample: skipped


def test_a_length_that_is_not_known_spoils_no_reference() -> None:
    length, group = column(2, NAN, 4, 7, torch.inf), torch.tensor([0, 0, 0, 1, 2])
    found = group_reference(length, torch.tensor([True] * 5), group)
    assert same(found, column(3, 3, 3, 7, NAN))


@given(rule=numbers, model=numbers, k=st.floats(0, 1, width=32))
def test_a_hybrid_lies_between_its_sides(rule: float, model: float, k: float) -> None:
    found = float(hybrid(column(rule), column(model), k))
    assert min(rule, model) - 1e-4 <= found <= max(rule, model) + 1e-4
    assert float(hybrid(column(rule), column(model), 1.0)) == rule
    assert float(hybrid(column(rule), column(model), 0.0)) == model


def test_an_invalid_rule_leaves_the_model_alone_and_is_never_a_0() -> None:
    rule, model = column(NAN, 1, NAN, 1, 1, 1), column(4, 4, NAN, NAN, NAN, 4)
    found = hybrid(rule, model, column(0.7, 0, 1, 1, 0.5, NAN))
    assert same(found, column(4, 4, NAN, 1, NAN, 4))


def test_the_gradient_of_a_hybrid_reaches_the_sides_that_count() -> None:
    rule, model = column(NAN, 1).requires_grad_(), column(4, 2).requires_grad_()
    hybrid(rule, model, 0.25).sum().backward()
    assert rule.grad is not None
    assert model.grad is not None
    assert rule.grad.tolist() == [0, 0.25]
    assert model.grad.tolist() == [1, 0.75]


@given(steps=st.integers(1, 50), kind=st.sampled_from(["linear", "cosine"]))
def test_a_schedule_rises_smoothly_from_0_to_1(steps: int, kind: Any) -> None:
    walk = [progress(step, steps, kind) for step in range(-1, steps + 2)]
    assert walk[:2] == [0, 0]
    assert walk[-2:] == pytest.approx([1, 1])
    assert all(0 <= b - a <= 1.6 / steps for a, b in itertools.pairwise(walk))
    assert progress(7, 0, kind) == 0
    assert progress(5, 10, kind) == pytest.approx(0.5)


def test_shaping_fades_and_the_outcome_stays() -> None:
    weights = {"right": 2.0, "near": 1.0}
    assert scheduled_weights(weights, "right", 0.25) == {"right": 2.0, "near": 0.75}
    assert scheduled_weights(weights, None, 1.0) == {"right": 0.0, "near": 0.0}


UNIT = dict.fromkeys(["right", "near", "far"], (0.0, 1.0))


@given(right=st.floats(0.01, 10), near=st.floats(-10, 10), far=st.floats(-10, 10))
def test_after_rescaling_no_shaping_makes_a_wrong_answer_beat_a_right_one(
    right: float, near: float, far: float
) -> None:
    found = dominant_weights({"right": right, "near": near, "far": far}, "right", UNIT, rescale=True)
    shaping = [found["near"], found["far"]]
    best_wrong, worst_right = sum(max(w, 0) for w in shaping), found["right"] + sum(min(w, 0) for w in shaping)
    assert best_wrong < worst_right
    assert found["near"] * far == pytest.approx(found["far"] * near, abs=1e-6)  # their proportion stays


def test_dominant_weights_pass_as_they_are_and_others_are_refused() -> None:
    fine = {"right": 1.0, "near": 0.5, "far": -0.4}
    assert dominant_weights(fine, "right", UNIT) == fine
    with pytest.raises(ConfigError, match=r"worth up to 1 together and a correct 'right' only 1"):
        dominant_weights({"right": 1.0, "near": 0.5, "far": 0.5}, "right", UNIT)
    with pytest.raises(ConfigError, match="range of the term 'far' is unknown"):
        dominant_weights(fine, "right", {**UNIT, "far": None})
    with pytest.raises(ConfigError, match="being correct pays nothing"):
        dominant_weights({"right": 0.0, "near": 0.5}, "right", UNIT, rescale=True)
    wide = {**UNIT, "near": (-3.0, 3.0)}
    assert dominant_weights({"right": 1.0, "near": 1.0, "far": 0.0}, "right", wide, rescale=True)[
        "near"
    ] == pytest.approx(0.15)
