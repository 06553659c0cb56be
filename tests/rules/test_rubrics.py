"""Rubric arithmetic: laws of sums, gates and versions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.errors import ConfigError
from diffalign.rules.rubrics import (
    KINDS,
    VALUES,
    Item,
    aggregate,
    by_kind,
    passed,
    require_arithmetic,
    require_one_version,
    values_of,
)

GATES = st.sampled_from(["hard", "soft", "none"])
TOTALS = st.sampled_from(["mean", "sum"])


@st.composite
def judged(draw: st.DrawFn) -> tuple[list[float], list[Item]]:
    count = draw(st.integers(1, 8))
    values = draw(st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0]), min_size=count, max_size=count))
    items = [
        Item(
            id=f"q{k}",
            question=f"question {k}?",
            type=draw(st.sampled_from(KINDS)),
            must=draw(st.booleans()),
            weight=draw(st.floats(0.01, 100)),
        )
        for k in range(count)
    ]
    return values, items


def items(*musts: bool) -> list[Item]:
    return [Item(id=f"q{k}", question=f"question {k}?", must=must) for k, must in enumerate(musts)]


@given(judged(), GATES, TOTALS, st.randoms())
def test_the_order_of_the_items_does_not_matter(row, gate, total, rng):
    values, own = row
    order = list(range(len(own)))
    rng.shuffle(order)
    shuffled = aggregate([values[k] for k in order], [own[k] for k in order], gate=gate, total=total)
    assert shuffled == pytest.approx(aggregate(values, own, gate=gate, total=total))


@given(judged(), GATES, st.floats(0, 1))
def test_the_mean_stays_between_0_and_1(row, gate, strength):
    assert 0 <= aggregate(*row, gate=gate, strength=strength) <= 1


@given(judged(), GATES, TOTALS, st.floats(0, 1), st.data())
def test_no_better_label_lowers_the_total(row, gate, total, strength, data):
    values, own = row
    k = data.draw(st.integers(0, len(own) - 1))
    better = [*values]
    better[k] = data.draw(st.floats(values[k], 1))
    low = aggregate(values, own, gate=gate, strength=strength, total=total)
    assert aggregate(better, own, gate=gate, strength=strength, total=total) >= low - 1e-9 * abs(low)


@given(judged(), GATES)
def test_all_yes_is_1_and_the_sum_of_weights(row, gate):
    _, own = row
    assert aggregate([1.0] * len(own), own, gate=gate) == 1
    total = aggregate([1.0] * len(own), own, gate=gate, total="sum")
    assert total == pytest.approx(sum(item.weight for item in own))


@pytest.mark.parametrize("label", ["no", "unsure"])
def test_any_violated_must_is_0_with_the_hard_gate(label):
    values = [1.0, VALUES[label], 1.0]
    assert aggregate(values, items(False, True, False), gate="hard") == 0
    assert aggregate(values, items(False, True, False), gate="soft", strength=0.5) == pytest.approx(1 / 3)
    assert aggregate(values, items(False, True, False), gate="none") == pytest.approx(2 / 3)
    assert aggregate(values, items(True, False, True), gate="hard") == pytest.approx(2 / 3)


@given(judged(), TOTALS)
def test_a_soft_gate_of_0_is_hard_and_of_1_is_none(row, total):
    hard = aggregate(*row, gate="hard", total=total)
    assert aggregate(*row, gate="soft", strength=0.0, total=total) == hard
    assert aggregate(*row, gate="soft", strength=1.0, total=total) == aggregate(*row, gate="none", total=total)


@given(judged(), GATES, st.data())
def test_a_duplicate_with_half_the_weight_each_changes_nothing(row, gate, data):
    values, own = row
    k = data.draw(st.integers(0, len(own) - 1))
    half = replace(own[k], weight=own[k].weight / 2)
    twice = [*own[:k], half, *own[k + 1 :], replace(half, id="again")]
    for total in ("mean", "sum"):
        found = aggregate([*values, values[k]], twice, gate=gate, total=total)
        assert found == pytest.approx(aggregate(values, own, gate=gate, total=total))


@given(judged(), GATES)
def test_doubling_a_rubric_leaves_the_mean_and_doubles_the_sum(row, gate):
    values, own = row
    twice = own + [replace(item, id=f"{item.id}-again") for item in own]
    assert aggregate(values * 2, twice, gate=gate) == pytest.approx(aggregate(values, own, gate=gate))
    once = aggregate(values, own, gate=gate, total="sum")
    assert aggregate(values * 2, twice, gate=gate, total="sum") == pytest.approx(2 * once)


@pytest.mark.parametrize(
    "values", [[], [1.0], [1.0, 1.0, 1.0], [1.0, math.nan], [1.0, 1.5], [1.0, -0.1], [1, math.inf]]
)
@pytest.mark.parametrize("total", ["mean", "sum"])
def test_a_wrong_count_or_value_is_invalid_and_not_zero(values, total):
    assert math.isnan(aggregate(values, items(False, False), total=total))


def test_labels_have_the_values_of_the_spec():
    assert values_of(["yes", "partial", "no", "unsure"]) == (1.0, 0.5, 0.0, 0.0)
    with pytest.raises(KeyError):
        values_of(["maybe"])


def test_each_type_has_its_mean_without_the_gate():
    own = [
        Item(id="a", question="a?", type="follow", must=True, weight=3.0),
        Item(id="b", question="b?", type="follow"),
        Item(id="c", question="c?", type="keep"),
    ]
    assert by_kind([0.0, 1.0, 0.5], own) == {"follow": 0.25, "keep": 0.5}
    assert passed([0.0, 1.0, 0.5], own, gate="soft", strength=0.3) == 0.3


def test_rows_of_one_group_under_two_rubrics_are_refused():
    require_one_version(["a", "a", "b"], ["1", "1", "2"])
    with pytest.raises(ConfigError, match="group 'a' is judged by the rubrics 1 and 2"):
        require_one_version(["a", "b", "a"], ["1", "1", "2"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gate": "firm"}, "gate is 'firm'; it is one of hard, soft, none"),
        ({"total": "max"}, "total is 'max'"),
        ({"strength": 1.5}, "strength is 1.5; it is a factor from 0"),
        ({"strength": math.nan}, "strength is nan"),
        ({"strength": True}, "strength is True"),
    ],
)
def test_unknown_arithmetic_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        require_arithmetic(**{"gate": "soft", "strength": 0.5, "total": "mean", **settings}, who="rubric")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"id": "a/b"}, "the id 'a/b'"),
        ({"id": ""}, "the id ''"),
        ({"question": " "}, "no question"),
        ({"weight": 0.0}, "the weight 0"),
        ({"weight": math.inf}, "the weight inf"),
        ({"weight": math.nan}, "the weight nan"),
    ],
)
def test_an_item_that_cannot_be_asked_is_refused(fields, says):
    with pytest.raises(ConfigError, match=says):
        Item(**{"id": "q1", "question": "Is it red?", **fields})
