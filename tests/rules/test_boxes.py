from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign.rules.boxes import (
    STAGES,
    Layout,
    average_precision,
    containment,
    detection_score,
    giou,
    greedy_match,
    hits,
    hungarian_match,
    iou,
    match_quality,
    mean_average_precision,
    od_length,
    stage_at,
)

box = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 20), st.integers(1, 20)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
boxes = st.lists(box, min_size=1, max_size=5)
labelled = st.lists(st.tuples(st.sampled_from("ab"), box), min_size=1, max_size=5)


def tensor(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(-1, 4)


def layout(rows: list[tuple[str, tuple[int, int, int, int]]]) -> Layout:
    return Layout(tensor([row[1] for row in rows]), tuple(row[0] for row in rows))


NONE = layout([])
ONE = layout([("a", (0, 0, 10, 10))])
SCORES = {
    "od_length": od_length,
    "detection_score": lambda found, truth: detection_score(found, truth)["total"],
    "match_quality": lambda found, truth: match_quality(found, truth)["total"],
    "mean_average_precision": mean_average_precision,
}


@given(a=boxes, b=boxes)
def test_overlaps_are_symmetric_and_in_their_ranges(a: list[object], b: list[object]) -> None:
    one, two = tensor(a), tensor(b)
    for measure, least in ((iou, 0.0), (giou, -1.0)):
        found = measure(one, two)
        assert torch.equal(found, measure(two, one).T)
        assert bool((found >= least).all() and (found <= 1).all())
    assert bool((giou(one, two) > -1).all() and (giou(one, two) <= iou(one, two)).all())
    assert bool((containment(one, two) >= iou(one, two)).all())


@given(a=box, b=box)
def test_overlap_is_one_only_for_identical_boxes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    for measure in (iou, giou):
        assert (float(measure(tensor(a), tensor(b))) == 1.0) == (a == b)


@given(a=box, b=box)
def test_disjoint_boxes_have_a_negative_giou(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    far = tuple(side + 60 for side in b)
    assert float(giou(tensor(a), tensor(far))) < 0
    assert float(iou(tensor(a), tensor(far))) == 0


@given(a=box, b=box, scale=st.sampled_from([0.25, 2.0, 8.0]), shift=st.integers(-40, 40))
def test_continuous_overlap_ignores_scale_and_place(
    a: tuple[int, ...], b: tuple[int, ...], scale: float, shift: int
) -> None:
    one, two = tensor(a), tensor(b)
    for measure in (iou, giou):
        assert torch.allclose(measure(one * scale + shift, two * scale + shift), measure(one, two))


def test_the_pixel_convention_counts_the_last_row_and_column() -> None:
    a, b = tensor((0, 0, 9, 9)), tensor((5, 0, 14, 9))  # 10 by 10 pixels each, 5 by 10 shared
    assert float(iou(a, b, pixels=True)) == pytest.approx(50 / 150)
    assert float(iou(a, b)) == pytest.approx(36 / 126)
    assert float(iou(a, tensor((9, 0, 12, 9)))) == 0  # touching edges share nothing, but a column of pixels
    assert float(iou(a, tensor((9, 0, 12, 9)), pixels=True)) == pytest.approx(10 / 130)


def test_empty_boxes_overlap_with_nothing() -> None:
    point = tensor((3, 3, 3, 3))
    assert float(iou(point, point)) == 0
    assert bool(giou(point, tensor((0, 0, 4, 4))).isfinite().all())
    assert iou(tensor([]), point).shape == (0, 1)


@given(rows=st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=5))
def test_matchings_use_each_side_once_and_hungarian_has_the_better_sum(rows: list[list[int]]) -> None:
    quality = torch.tensor(rows, dtype=torch.float64)
    greedy, best = greedy_match(quality, 0.0), hungarian_match(-quality)
    for pairs in (greedy, best):
        assert len({r for r, _ in pairs}) == len({c for _, c in pairs}) == len(pairs) == min(quality.shape)
    assert sum(quality[p] for p in best) >= sum(quality[p] for p in greedy)


def test_greedy_takes_the_best_pair_first_and_hungarian_the_best_sum() -> None:
    quality = torch.tensor([[0.9, 0.8], [0.8, 0.1]])
    assert sorted(greedy_match(quality, 0.0)) == [(0, 0), (1, 1)]
    assert sorted(hungarian_match(-quality)) == [(0, 1), (1, 0)]
    assert greedy_match(quality, 0.5) == [(0, 0)]


def test_average_precision_by_hand() -> None:
    assert average_precision(torch.tensor([True, True]), 2) == 1
    assert average_precision(torch.tensor([False, False]), 2) == 0
    # one hit of two truths: recall reaches 1/2, so 51 of the 101 recalls have precision 1
    assert average_precision(torch.tensor([True]), 2) == pytest.approx(51 / 101)
    # a miss first halves the precision everywhere; a miss last changes nothing
    assert average_precision(torch.tensor([False, True]), 1) == pytest.approx(0.5)
    assert average_precision(torch.tensor([True, False]), 1) == 1


def test_the_most_confident_box_takes_the_object_and_each_object_is_taken_once() -> None:
    twice = tensor([(0, 0, 10, 10), (0, 0, 10, 9)])
    found = Layout(twice, ("a", "a"), torch.tensor([0.2, 0.9]))
    assert hits(found, ONE).tolist() == [True, False]
    assert hits(found, ONE, at_least=0.95).tolist() == [False, True]  # the surer one is not exact enough


@given(rows=labelled)
def test_perfect_boxes_score_one(rows: list[tuple[str, tuple[int, int, int, int]]]) -> None:
    truth = layout(list(dict.fromkeys(rows)))
    for name, rule in SCORES.items():
        assert rule(truth, truth) == pytest.approx(1.0), name


@given(rows=labelled)
def test_doubled_boxes_get_at_most_half_of_their_map(rows: list[tuple[str, tuple[int, int, int, int]]]) -> None:
    truth = layout(list(dict.fromkeys(rows)))
    for doubled in ([*truth_rows(truth), *truth_rows(truth)], [r for r in truth_rows(truth) for _ in (0, 1)]):
        found = layout(doubled)
        assert od_length(found, truth) == pytest.approx(mean_average_precision(found, truth) / 2)
        assert od_length(found, truth) <= 0.5


@pytest.mark.parametrize("rule", SCORES.values(), ids=SCORES)
def test_both_sides_empty_score_one_and_one_side_empty_scores_zero(rule: object) -> None:
    assert [rule(a, b) for a, b in ((NONE, NONE), (NONE, ONE), (ONE, NONE))] == [1, 0, 0]  # type: ignore[operator]


@given(found=labelled, truth=labelled)
def test_scores_lie_in_the_unit_interval(
    found: list[tuple[str, tuple[int, int, int, int]]], truth: list[tuple[str, tuple[int, int, int, int]]]
) -> None:
    for name, rule in SCORES.items():
        assert 0 <= rule(layout(found), layout(truth)) <= 1, name
    for strictness in STAGES.values():
        assert 0 <= match_quality(layout(found), layout(truth), strictness=strictness)["total"] <= 1


@given(seed=st.integers(0, 99))
def test_the_order_of_boxes_does_not_matter_where_none_tie(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(2, 5, 2, generator=generator)
    found, truth = (Layout(torch.cat([x, x + 0.3], -1), tuple("aabab")) for x in low)
    order = torch.randperm(5, generator=generator).tolist()
    shuffled = Layout(found.boxes[order], tuple(found.labels[k] for k in order))
    assert detection_score(shuffled, truth, at_least=0.1) == pytest.approx(detection_score(found, truth, at_least=0.1))
    for kind in ("hungarian", "greedy"):
        same = [match_quality(f, truth, strictness=STAGES["none"], matching=kind) for f in (found, shuffled)]
        assert same[0] == pytest.approx(same[1])


def test_detection_score_by_hand() -> None:
    truth = layout([("a", (0, 0, 10, 10)), ("a", (20, 0, 30, 10))])
    found = layout([("a", (0, 0, 10, 8)), ("a", (50, 50, 60, 60)), ("b", (20, 0, 30, 10))])
    parts = detection_score(found, truth)  # one match of IoU .8; missed 1/2, surplus 2/3
    assert parts["overlap"] == pytest.approx(0.4)
    assert parts["completeness"] == pytest.approx(1 - (1 / 2 + 2 / 3) / 2)
    assert parts["total"] == pytest.approx(0.7 * parts["overlap"] + 0.3 * parts["completeness"])
    loose = detection_score(found, truth, labelled=False, weights=(0.5, 0.25, 0.25))
    assert (loose["overlap"], loose["label"]) == (pytest.approx(0.9), pytest.approx(0.5))  # the b lies right
    assert detection_score(found, truth, matching="hungarian")["overlap"] == pytest.approx(0.4)


def test_stages_become_stricter() -> None:
    truth = layout([("a", (0, 0, 10, 10))])
    totals = {}
    for width, name in ((4, "poor"), (6, "fair"), (8, "good"), (10, "exact")):
        found = layout([("a", (0, 0, width, 10))])  # GIoU is width / 10
        totals[name] = [match_quality(found, truth, strictness=STAGES[s])["precision"] for s in STAGES]
    assert totals == {
        "poor": [pytest.approx(0.4), 0, 0],
        "fair": [pytest.approx(0.6), pytest.approx(0.6), 0],
        "good": [pytest.approx(0.8), 1, pytest.approx(0.8)],
        "exact": [1, 1, 1],
    }
    assert [stage_at(step) for step in (0, 1499, 1500)] == ["first", "first", "second"]


def test_precision_counts_extra_boxes_unless_it_is_over_the_matched_ones() -> None:
    found = layout([("a", (0, 0, 10, 10)), ("a", (40, 40, 50, 50)), ("b", (0, 0, 10, 10)), ("b", (40, 0, 50, 9))])
    assert match_quality(found, ONE)["precision"] == pytest.approx(1 / 4)
    assert match_quality(found, ONE, over="matched") == {"total": 1, "precision": 1, "recall": 1}
    wrong = layout([("b", (0, 0, 10, 10))])
    assert match_quality(wrong, ONE, over="matched")["total"] == 0  # only boxes of one label are matched


@given(rows=labelled, width=st.integers(1, 9))
def test_a_box_nearer_to_its_truth_never_scores_less(
    rows: list[tuple[str, tuple[int, int, int, int]]], width: int
) -> None:
    truth = layout([("a", (0, 0, 10, 10))])
    for name, rule in SCORES.items():
        near, far = (rule(layout([("a", (0, 0, w, 10))]), truth) for w in (width + 1, width))
        assert near >= far, name


def truth_rows(truth: Layout) -> list[tuple[str, tuple[int, int, int, int]]]:
    return list(zip(truth.labels, map(tuple, truth.boxes.tolist()), strict=True))  # type: ignore[arg-type]
