from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.errors import ConfigError
from diffalign.rules.geneval import (
    Box,
    Detection,
    Request,
    Verdict,
    judge,
    read_request,
    relations,
    select,
    task_scores,
)

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
side = st.integers(0, 40)
box = st.tuples(side, side, st.integers(1, 20), st.integers(1, 20)).map(
    lambda b: (float(b[0]), float(b[1]), float(b[0] + b[2]), float(b[1] + b[3]))
)


def at(x: float, y: float = 0.0, label: str = "dog", confidence: float = 0.95, colour: str | None = None) -> Detection:
    return Detection(label, confidence, (x, y, x + 10, y + 10), colour)


def verdict(metadata: dict[str, Any], detections: list[Detection], **options: Any) -> Verdict:
    request = read_request(metadata)
    return judge(request, select(request, detections), **options)


def dogs(count: int, **more: Any) -> list[Detection]:
    return [at(20.0 * k, **more) for k in range(count)]


def test_position_by_hand() -> None:
    a, b = (0, 0, 10, 10), (30, 0, 40, 10)
    assert relations(a, b) == {"left of"}
    assert relations(b, a) == {"right of"}
    assert relations(a, a) == set()
    assert relations(a, (30, 30, 40, 40)) == {"left of", "above"}
    assert relations(a, (1.9, 0, 11.9, 10)) == set()  # within a tenth of both widths
    # the cone: an offset of (-30, 0) leaves 28 of 30; of (-3, 0) one of 3, which is too little
    assert relations(a, (3, 0, 13, 10)) == set()
    assert relations(a, (5, 0, 15, 10)) == {"left of"}


@given(a=box, b=box)
def test_relations_turn_round_with_their_sides(a: Box, b: Box) -> None:
    assert relations(b, a) == {OPPOSITE[name] for name in relations(a, b)}
    assert not {"left of", "right of"} <= relations(a, b)


@given(a=box, b=box, shift=st.integers(-30, 30))
def test_relations_do_not_depend_on_the_place(a: Box, b: Box, shift: int) -> None:
    def moved(one: Box) -> Box:
        return (one[0] + shift, one[1] - shift, one[2] + shift, one[3] - shift)

    assert relations(moved(a), moved(b)) == relations(a, b)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_counting_passes_at_exactly_the_count(count: int) -> None:
    metadata = {
        "tag": "counting",
        "include": [{"class": "dog", "count": count}],
        "exclude": [{"class": "dog", "count": count + 1}],
    }
    passes = [verdict(metadata, dogs(n)).strict for n in (count - 1, count, count + 1)]
    assert passes == [False, True, False]
    assert [verdict(metadata, dogs(n)).soft == 1 for n in (count - 1, count, count + 1)] == passes


def test_without_an_exclude_more_than_the_count_is_perfect_unless_compatible() -> None:
    metadata = {"include": [{"class": "dog", "count": 2, "color": "red"}]}
    one, many = dogs(1, colour="red"), dogs(5, colour="red")
    assert (verdict(metadata, many).strict, verdict(metadata, many).soft) == (True, 1)
    assert verdict(metadata, one).by_kind() == {"count": 0.5, "colour": 0}
    published = verdict(metadata, many, flow_grpo_compat=True)
    assert (published.strict, published.terms) == (False, (("count", -0.5), ("colour", 0)))
    other = {**metadata, "exclude": [{"class": "dog", "count": 7}, {"class": "cat", "count": 3}]}
    assert verdict(other, many).soft == 1  # neither exclude is of one more of the same class


def test_five_found_for_two_is_clipped_unless_compatible() -> None:
    metadata = {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    assert verdict(metadata, dogs(5)).soft == 0
    assert verdict(metadata, dogs(3)).by_kind() == {"count": 0.5, "exclude": 0}
    assert verdict(metadata, dogs(5), flow_grpo_compat=True).soft == -0.5


def test_a_confidence_at_the_threshold_is_dropped() -> None:
    for tag, threshold in (("single_object", 0.3), ("counting", 0.9)):
        request = read_request({"tag": tag, "include": [{"class": "dog"}]})
        for confidence, kept in ((threshold, 0), (math.nextafter(threshold, 1), 1)):
            assert len(select(request, dogs(1, confidence=confidence))["dog"]) == kept


def test_sixteen_of_a_class_are_kept_and_overlap_only_counts_under_nms() -> None:
    request = read_request({"include": [{"class": "dog"}]})
    heap = [at(0, confidence=0.5 + k / 100) for k in range(20)]
    kept = select(request, heap)["dog"]
    assert [one.confidence for one in kept] == [0.5 + k / 100 for k in range(19, 3, -1)]
    assert len(select(request, heap, nms=0.5)["dog"]) == 1
    # boxes of 11 by 11 pixels that share an edge share 11 of 231 pixels
    assert len(select(request, [at(0), at(10)], nms=0.047)["dog"]) == 1
    assert len(select(request, [at(0), at(10)], nms=0.048)["dog"]) == 2


def test_colour_looks_at_the_most_confident_objects_only() -> None:
    metadata = {"include": [{"class": "dog", "count": 1, "color": "red"}]}
    red, blue = at(0, confidence=0.9, colour="red"), at(20, confidence=0.8, colour="blue")
    assert verdict(metadata, [blue, red]).strict
    assert not verdict(metadata, [red, at(20, confidence=0.99, colour="blue")]).strict


def test_colour_terms_count_the_right_ones_and_are_zero_where_the_count_is_wrong() -> None:
    metadata = {"include": [{"class": "dog", "count": 2, "color": "red"}]}
    pair = [at(0, colour="red"), at(20, colour="blue")]
    assert verdict(metadata, pair).by_kind() == {"count": 1, "colour": 0.5}
    assert verdict(metadata, pair[:1]).by_kind() == {"count": 0.5, "colour": 0}
    assert verdict(metadata, pair[:1], flow_grpo_compat=True).terms == (("count", 0.5), ("colour", 0))


BESIDE = {
    "tag": "position",
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
}


def test_attribution_and_position_need_both_sides() -> None:
    cat = at(40, label="cat")
    assert verdict(BESIDE, [at(0), cat]).strict
    for wrong in ([at(0)], [cat], [at(80), cat], [at(40), cat]):
        assert not verdict(BESIDE, wrong).strict
    two = {"include": [{"class": "cat", "color": "red"}, {"class": "dog", "color": "blue"}]}
    assert verdict(two, [at(0, colour="blue"), at(40, label="cat", colour="red")]).strict
    assert not verdict(two, [at(0, colour="red"), at(40, label="cat", colour="blue")]).strict


def test_every_pair_must_stand_in_the_relation() -> None:
    many = {"include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 2, "position": ["left of", 0]}]}
    cats = [at(100, label="cat"), at(140, label="cat")]
    assert verdict(many, [at(0), at(30), *cats]).strict
    assert not verdict(many, [at(0), at(120), *cats]).strict


def test_a_failed_position_is_one_term_and_two_when_compatible() -> None:
    wrong = [at(80), at(40, label="cat")]
    assert verdict(BESIDE, wrong).terms == (("count", 1), ("count", 1), ("position", 0))
    assert verdict(BESIDE, wrong, flow_grpo_compat=True).terms[2:] == (("position", 0), ("position", 1))
    lost = verdict(BESIDE, [at(0)], flow_grpo_compat=True)  # no cat: a relation to nothing is one 0
    assert lost.terms == (("count", 0), ("count", 1), ("position", 0))


def test_excludes_count_unless_compatible() -> None:
    metadata = {"include": [{"class": "dog"}], "exclude": [{"class": "cat", "count": 1}]}
    both = [at(0), at(40, label="cat")]
    assert (verdict(metadata, both).strict, verdict(metadata, both).soft) == (False, 0.5)
    published = verdict(metadata, both, flow_grpo_compat=True)
    assert (published.strict, published.soft) == (True, 1)


found = st.lists(
    st.tuples(st.sampled_from(["dog", "cat", "cow"]), box, st.sampled_from(["red", "blue"])), max_size=6
).map(lambda rows: [Detection(n, 0.99 - k / 100, b, c) for k, (n, b, c) in enumerate(rows)])
asked = st.sampled_from(
    [
        BESIDE,
        {"include": [{"class": "dog", "count": 2, "color": "red"}], "exclude": [{"class": "dog", "count": 3}]},
        {"include": [{"class": "dog"}, {"class": "cat", "color": "blue"}], "exclude": [{"class": "cow", "count": 1}]},
        {"include": [{"class": "cat", "count": 3}]},
    ]
)


@given(metadata=asked, detections=found, data=st.data())
def test_the_order_of_detections_does_not_matter(
    metadata: dict[str, Any], detections: list[Detection], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(detections))
    for compat in (False, True):
        assert verdict(metadata, shuffled, flow_grpo_compat=compat) == verdict(
            metadata, detections, flow_grpo_compat=compat
        )


@given(metadata=asked, detections=found)
def test_the_soft_score_is_in_the_unit_interval_and_one_only_for_a_pass(
    metadata: dict[str, Any], detections: list[Detection]
) -> None:
    clean = verdict(metadata, detections)
    assert 0 <= clean.soft <= 1
    assert clean.strict or clean.soft < 1
    assert verdict(metadata, detections, flow_grpo_compat=True).soft <= 1


name, colour = st.sampled_from(["dog", "cat"]), st.sampled_from([None, "red", "blue"])
counts = st.integers(1, 3)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    include = []
    for place in range(draw(st.integers(1, 3))):
        clause: dict[str, Any] = {"class": draw(name), "count": draw(counts), "color": draw(colour)}
        if place and draw(st.booleans()):
            clause["position"] = [draw(st.sampled_from(sorted(OPPOSITE))), draw(st.integers(0, place - 1))]
        include.append(clause)
    counted = [{"class": c["class"], "count": c["count"] + 1} for c in include if draw(st.booleans())]
    others = draw(st.lists(st.fixed_dictionaries({"class": name, "count": counts}), max_size=1))
    return {"include": include, "exclude": counted + others}


@given(metadata=st.one_of(asked, requests()), detections=found)
def test_the_soft_score_is_one_exactly_where_the_strict_one_passes(
    metadata: dict[str, Any], detections: list[Detection]
) -> None:
    clean = verdict(metadata, detections)
    assert clean.strict == (clean.soft == 1)


@given(metadata=asked, detections=found)
def test_objects_of_other_classes_change_nothing(metadata: dict[str, Any], detections: list[Detection]) -> None:
    assert verdict(metadata, [*detections, at(0, label="kite")]) == verdict(metadata, detections)


@given(wanted=st.integers(1, 4), seen=st.integers(0, 8))
def test_a_count_nearer_to_the_wanted_one_never_scores_less(wanted: int, seen: int) -> None:
    metadata = {"include": [{"class": "dog", "count": wanted}]}
    nearer = seen + (seen < wanted) - (seen > wanted)
    for compat in (False, True):
        assert (
            verdict(metadata, dogs(nearer), flow_grpo_compat=compat).soft
            >= verdict(metadata, dogs(seen), flow_grpo_compat=compat).soft
        )


def test_the_overall_score_is_the_mean_of_the_tasks_and_not_of_the_images() -> None:
    tasks, overall = task_scores([("colors", 1), ("colors", 1), ("colors", 1), ("position", 0), ("position", math.nan)])
    assert (tasks, overall) == ({"colors": 1, "position": 0}, 0.5)
    assert math.isnan(task_scores([])[1])


def test_metadata_is_read_as_geneval_writes_it() -> None:
    row = {
        "tag": "counting",
        "prompt": "a photo of three dogs",
        "include": [{"class": "dog", "count": 3}],
        "exclude": [{"class": "dog", "count": 4}],
    }
    request = read_request(row)
    assert isinstance(request, Request)
    assert (request.tag, request.labels, request.exclude[0].count) == ("counting", ("dog",), 4)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "asks for nothing"),
        ({"include": "dog"}, "it is a list of clauses"),
        ({"include": [{"count": 2}]}, r"include\[0\] is .* the name of a 'class'"),
        ({"include": [{"class": "dog", "colour": "red"}]}, "unknown key 'colour'. A clause knows class, count, color"),
        ({"include": [{"class": "dog", "color": "mauve"}]}, "the color 'mauve'; GenEval's are red, orange"),
        ({"include": [{"class": "dog", "count": 0}]}, "the count 0"),
        ({"include": [{"class": "dog", "count": True}]}, "the count True"),
        ({"exclude": [{"class": "dog", "color": "red"}]}, r"exclude\[0\] has the unknown key 'color'"),
        ({"include": [{"class": "dog", "position": ["near", 0]}]}, "the relation one of left of"),
        ({"include": [{"class": "dog", "position": ["left of", 0]}]}, "only earlier ones"),
    ],
)
def test_a_wrong_clause_is_one_clear_error(row: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_request(row)
