from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.errors import ConfigError
from diffalign.rules.compbench import (
    NEAR,
    RELATIONS,
    SIDES,
    attribute,
    distinct,
    numeracy,
    position,
    spatial,
    three_in_one,
)
from diffalign.rules.geneval import Box, Detection

side = st.integers(0, 400)
box = st.tuples(side, side, st.integers(1, 200), st.integers(1, 200)).map(
    lambda b: (float(b[0]), float(b[1]), float(b[0] + b[2]), float(b[1] + b[3]))
)
LEFT = "on the left of"


def seen(label: str, where: Box, confidence: float = 1.0) -> Detection:
    return Detection(label, confidence, where)


def test_one_object_missing_scores_zero() -> None:
    dog = seen("dog", (0, 0, 10, 10))
    for found in ([], [dog], [seen("cat", (0, 0, 10, 10))]):
        assert spatial(found, "dog", "cat", LEFT)["total"] == 0


def test_right_order_with_an_overlap_of_a_fifth_scores_three_quarters() -> None:
    # two 3 by 1 boxes, one shared: 1 / 5
    found = [seen("dog", (0, 0, 30, 10)), seen("cat", (20, 0, 50, 10))]
    assert spatial(found, "dog", "cat", LEFT)["total"] == pytest.approx(0.75)
    assert spatial(found, "cat", "dog", LEFT)["total"] == 0.5  # both there, in the wrong order: just on the cut


def test_scores_under_one_half_are_cut() -> None:
    found = [seen("dog", (0, 0, 10, 10), 0.9), seen("cat", (100, 0, 110, 10), 0.9)]
    assert spatial(found, "dog", "cat", LEFT)["total"] == pytest.approx(0.95)
    wrong = spatial(found, "cat", "dog", LEFT)
    assert (wrong["total"], wrong["objects"], wrong["position"]) == (0, pytest.approx(0.9), 0)


def test_the_offset_must_dominate_the_other_axis() -> None:
    a = (0.0, 0.0, 10.0, 10.0)
    assert position(a, (100, 60, 110, 70), LEFT) == 1
    assert position(a, (60, 100, 70, 110), LEFT) == 0
    assert position(a, (60, 100, 70, 110), "on the top of") == 1


def test_on_top_of_is_a_relation_unless_compatible() -> None:
    a, b = (0.0, 0.0, 10.0, 10.0), (0.0, 100.0, 10.0, 110.0)
    assert position(a, b, "on top of") == position(a, b, "on the top of") == 1
    assert position(a, b, "on top of", compat=True) == 0
    assert position(a, b, "on the top of", compat=True) == 1


def test_near_is_one_within_the_distance_on_either_axis_and_falls_off() -> None:
    a = (0.0, 0.0, 10.0, 10.0)
    assert position(a, (149, 400, 159, 410), "next to") == 1
    assert position(a, (300, 200, 310, 210), "near") == pytest.approx(0.5)
    assert position(a, (300, 200, 310, 210), "near", near=30) == pytest.approx(0.1)


@given(a=box, b=box)
def test_opposite_relations_turn_round_with_their_sides_and_near_is_symmetric(a: Box, b: Box) -> None:
    for one, other in (("left", "right"), ("top", "bottom")):
        assert position(a, b, f"on the {one} of") == position(b, a, f"on the {other} of")
    assert all(position(a, b, name) == position(b, a, name) for name in NEAR)
    assert sum(position(a, b, name) > 0 for name in SIDES) <= 1
    assert all(0 <= position(a, b, name) <= 1 for name in RELATIONS)


@given(boxes=st.lists(box, min_size=2, max_size=2), sure=st.tuples(*[st.floats(0, 1)] * 4))
def test_spatial_scores_are_zero_or_at_least_one_half_and_grow_with_confidence(
    boxes: list[Box], sure: tuple[float, float, float, float]
) -> None:
    def total(p: float, q: float) -> float:
        return spatial([seen("dog", boxes[0], p), seen("cat", boxes[1], q)], "dog", "cat", LEFT)["total"]

    low = total(min(sure[:2]), min(sure[2:]))
    assert low == 0 or 0.5 <= low <= 1
    assert total(max(sure[:2]), max(sure[2:])) >= low


def test_two_objects_of_one_class_are_two_detections() -> None:
    pair = [seen("dog", (0, 0, 10, 10), 0.9), seen("dog", (100, 0, 110, 10), 0.8)]
    assert spatial(pair, "dog", "dog", "next to")["total"] == pytest.approx((0.9 + 0.8) / 4 + 0.5)
    assert spatial(pair[:1], "dog", "dog", "next to")["total"] == 0


def test_numeracy_is_half_for_presence_and_half_for_the_exact_count() -> None:
    found = [seen("dog", (0, 0, 10, 10)), seen("dog", (50, 0, 60, 10)), seen("cat", (0, 50, 10, 60))]
    assert numeracy(found, {"dog": 2, "cat": 1})["total"] == 1
    assert numeracy(found, {"dog": 3, "cat": 1})["total"] == 0.75
    assert numeracy(found, {"dog": 3})["total"] == 0.5
    assert numeracy(found, {"cow": 1})["total"] == 0
    assert numeracy(found, {"dog": 2, "cow": 1}) == {"total": 0.5, "there": 0.5, "count": 0.5}


def test_boxes_that_overlap_or_hold_one_another_are_one_object() -> None:
    big, small, apart = (
        seen("dog", (0, 0, 100, 100), 0.8),
        seen("dog", (5, 5, 20, 20), 0.9),
        seen("dog", (200, 0, 300, 9)),
    )
    assert distinct([big, small, apart]) == [apart, small]
    assert len(distinct([seen("dog", (0, 0, 100, 100)), seen("dog", (0, 0, 100, 96))])) == 1
    assert len(distinct([seen("dog", (0, 0, 100, 100)), seen("dog", (50, 0, 150, 100))])) == 2


@given(boxes=st.lists(box, max_size=5), data=st.data())
def test_numeracy_does_not_depend_on_the_order_of_detections(boxes: list[Box], data: st.DataObject) -> None:
    found = [seen("dog", b, 0.9 - k / 100) for k, b in enumerate(boxes)]
    assert numeracy(data.draw(st.permutations(found)), {"dog": 2}) == numeracy(found, {"dog": 2})


def test_a_factor_of_zero_makes_the_product_zero_and_a_missing_phrase_counts_one() -> None:
    assert attribute([0.9, 0.0, 0.8]) == 0
    assert attribute([0.5, None, 0.5]) == 0.25
    assert attribute([]) == 1


def test_three_in_one_is_the_mean_of_what_applies() -> None:
    assert three_in_one(0.9, 0.3, None) == pytest.approx(0.6)
    assert three_in_one(0.9, 0.3, 0.0) == pytest.approx(0.4)
    assert math.isnan(three_in_one(None, None, None))


def test_an_unknown_relation_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="'inside' is no relation of T2I-CompBench; it has on the left of"):
        position((0, 0, 1, 1), (2, 2, 3, 3), "inside")
