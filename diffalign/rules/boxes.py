"""Boxes held against boxes: overlap, matching, average precision, and the detection rewards of VLM-R1 and Vision-R1.

Haozhan Shen et al.: "VLM-R1: A Stable and Generalizable R1-style Large Vision-Language Model", 2025 (arXiv 2504.07615):
`od_length`, `detection_score`. Yufei Zhan et al.: "Vision-R1: Evolving Human-Free Alignment in Large Vision-Language
Models via Vision-Guided Reinforcement Learning", 2025 (arXiv 2503.18013): `match_quality`. Hamid Rezatofighi et al.:
"Generalized Intersection over Union", 2019 (arXiv 1902.09630): `giou`. Average precision is COCO's, at 101 recalls.

A box is left, top, right, bottom with y down, in any one unit; boxes are (N, 4). Both sides empty score 1, one empty 0.

Where we differ: coordinates are continuous, and `pixels=True` has the older convention in which a box holds its last
pixel; boxes are only matched within a label; `match_quality` has no format term and divides precision by all boxes
found, which `over="matched"` undoes; a map of thresholds is COCO's ten unless others are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

COCO = tuple(0.5 + 0.05 * k for k in range(10))  # overlaps that count as a hit, in turn
RECALLS = 101
FORBIDDEN = 1e6  # the cost of a pair that may not be matched
Matching = Literal["greedy", "hungarian"]


@dataclass(frozen=True, eq=False)
class Layout:
    """The labelled boxes of one picture."""

    boxes: Tensor  # (N, 4)
    labels: tuple[str, ...]
    confidence: Tensor | None = None  # (N,); None: all alike, in the order given

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, label: str) -> Layout:
        """Those of one label."""
        rows = [k for k, own in enumerate(self.labels) if own == label]
        confidence = None if self.confidence is None else self.confidence[rows]
        return Layout(self.boxes[rows], (label,) * len(rows), confidence)


@dataclass(frozen=True, kw_only=True)
class Strictness:
    """How good a match has to be: below `low` it counts 0, above `high` 1; from `hit` on an object is found."""

    low: float
    high: float
    hit: float

    def clamp(self, quality: Tensor) -> Tensor:
        return quality.where(quality >= self.low, 0.0).where(quality <= self.high, 1.0)


STAGES = {
    "none": Strictness(low=0.0, high=1.0, hit=0.5),
    "first": Strictness(low=0.5, high=0.75, hit=0.5),
    "second": Strictness(low=0.75, high=0.9, hit=0.75),
}


def stage_at(step: int, switch: int = 1500) -> str:
    """The stage of Vision-R1's rules at a training step."""
    return "first" if step < switch else "second"


def iou(a: Tensor, b: Tensor, *, pixels: bool = False) -> Tensor:
    """Intersection over union of (N, 4) with (M, 4): (N, M) float64, 0 where both boxes are empty."""
    shared, union = _shared(a, b, float(pixels))
    return _share(shared, union)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """IoU less the share of the common hull that neither box fills: (N, M) float64 in (-1, 1]."""
    shared, union = _shared(a, b, 0.0)
    low = torch.minimum(a[:, None, :2], b[None, :, :2]).double()
    high = torch.maximum(a[:, None, 2:], b[None, :, 2:]).double()
    hull = (high - low).prod(-1)
    return _share(shared, union) - _share(hull - union, hull)


def containment(a: Tensor, b: Tensor, *, pixels: bool = False) -> Tensor:
    """The share of the smaller box that the other covers: (N, M) float64."""
    shared, _ = _shared(a, b, float(pixels))
    return _share(shared, torch.minimum(_area(a, float(pixels))[:, None], _area(b, float(pixels))))


def greedy_match(quality: Tensor, at_least: float) -> list[tuple[int, int]]:
    """Pairs of rows and columns of (N, M), the best first, each used once, none below `at_least`."""
    pairs: list[tuple[int, int]] = []
    rows, columns = set[int](), set[int]()
    for place in quality.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(place, quality.shape[1])
        if not float(quality[row, column]) >= at_least:
            break
        if row not in rows and column not in columns:
            pairs.append((row, column))
            rows.add(row)
            columns.add(column)
    return pairs


def hungarian_match(cost: Tensor) -> list[tuple[int, int]]:
    """The pairs of rows and columns of (N, M) of least total cost, as many as the shorter side has."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost.detach().cpu().numpy())
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def hits(found: Layout, truth: Layout, at_least: float = 0.5) -> Tensor:
    """Whether each box found, most confident first, takes a truth that none before it took: (N,) bool."""
    order = _order(found)
    overlap = iou(found.boxes, truth.boxes)
    hit = torch.zeros(len(found), dtype=torch.bool)
    if not len(truth):
        return hit
    for rank, row in enumerate(order):
        best = int(overlap[row].argmax())
        if float(overlap[row, best]) >= at_least:
            overlap[:, best] = -1.0
            hit[rank] = True
    return hit


def average_precision(hit: Tensor, truths: int) -> float:
    """The mean over COCO's 101 recalls of the best precision from there on; `hit` (N,) has the most confident first."""
    if not truths or not len(hit):
        return float(not truths and not len(hit))
    true = hit.double().cumsum(0)
    precision = true / torch.arange(1, len(hit) + 1)
    beyond = precision.flip(0).cummax(0).values.flip(0)
    wanted = torch.linspace(0, 1, RECALLS, dtype=torch.float64)
    first = torch.searchsorted(true / truths, wanted - 1e-12)  # the recall 1/3 is reached by one hit of three
    return float(torch.cat([beyond, beyond.new_zeros(1)])[first].mean())


def mean_average_precision(found: Layout, truth: Layout, thresholds: Sequence[float] = COCO) -> float:
    """COCO's mAP of one picture: over the labels of the truth and the thresholds; other labels found do not count."""
    if not len(truth):
        return float(not len(found))
    labels = dict.fromkeys(truth.labels)
    each = [
        average_precision(hits(found.of(label), truth.of(label), least), truth.labels.count(label))
        for label in labels
        for least in thresholds
    ]
    return sum(each) / len(each)


def od_length(found: Layout, truth: Layout, thresholds: Sequence[float] = COCO) -> float:
    """mAP with all boxes alike, times min(1, truths / found): more boxes than objects never pay."""
    if not len(found) or not len(truth):
        return float(len(found) == len(truth))
    alike = Layout(found.boxes, found.labels)
    return mean_average_precision(alike, truth, thresholds) * min(1.0, len(truth) / len(found))


def detection_score(
    found: Layout,
    truth: Layout,
    *,
    at_least: float = 0.5,
    weights: tuple[float, float, float] = (0.7, 0.0, 0.3),
    matching: Matching = "greedy",
    labelled: bool = True,
) -> dict[str, float]:
    """VLM-R1's `total` of how well boxes lie (`overlap`), their labels (`label`), and how few are missed or surplus."""
    if not len(found) or not len(truth):
        return dict.fromkeys(("total", "overlap", "label", "completeness"), float(len(found) == len(truth)))
    same = _same(found, truth)
    quality = iou(found.boxes, truth.boxes).where(same | (not labelled), -1.0)
    pairs = greedy_match(quality, at_least) if matching == "greedy" else hungarian_match(-quality)
    pairs = [pair for pair in pairs if float(quality[pair]) >= at_least]
    missed, surplus = 1 - len(pairs) / len(truth), 1 - len(pairs) / len(found)
    parts = {
        "overlap": sum(float(quality[pair]) for pair in pairs) / len(truth),
        "label": sum(bool(same[pair]) for pair in pairs) / len(truth),
        "completeness": 1 - (missed + surplus) / 2,
    }
    return {"total": sum(w * v for w, v in zip(weights, parts.values(), strict=True)) / sum(weights), **parts}


def match_quality(
    found: Layout,
    truth: Layout,
    *,
    strictness: Strictness = STAGES["first"],
    matching: Matching = "hungarian",
    over: Literal["found", "matched"] = "found",
) -> dict[str, float]:
    """Vision-R1's `precision` (GIoU of matches) and `recall` (share of objects found), and their mean as `total`."""
    if not len(found) or not len(truth):
        return dict.fromkeys(("total", "precision", "recall"), float(len(found) == len(truth)))
    same, quality = _same(found, truth), giou(found.boxes, truth.boxes)
    if matching == "greedy":
        pairs = greedy_match(quality.where(same, -2.0), -1.0)
    else:
        cost = torch.cdist(found.boxes.double(), truth.boxes.double(), p=1) - quality
        pairs = [pair for pair in hungarian_match(cost.where(same, FORBIDDEN)) if same[pair]]
    matched = torch.stack([quality[pair] for pair in pairs]) if pairs else quality.new_zeros(0)
    recall = strictness.clamp((matched >= strictness.hit).double().sum() / len(truth))
    among = len(found) if over == "found" else min(len(found), len(truth))
    precision = strictness.clamp(matched).sum() / among
    return {"total": float(precision + recall) / 2, "precision": float(precision), "recall": float(recall)}


def _same(found: Layout, truth: Layout) -> Tensor:
    """Which pairs have one label: (N, M) bool."""
    return torch.tensor([[a == b for b in truth.labels] for a in found.labels])


def _order(found: Layout) -> list[int]:
    if found.confidence is None:
        return list(range(len(found)))
    order: list[int] = found.confidence.argsort(descending=True, stable=True).tolist()
    return order


def _shared(a: Tensor, b: Tensor, edge: float) -> tuple[Tensor, Tensor]:
    """Area of the intersection and of the union of every pair: (N, M) each."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2]).double()
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:]).double()
    shared = (high - low + edge).clamp(min=0).prod(-1)
    return shared, _area(a, edge)[:, None] + _area(b, edge) - shared


def _area(boxes: Tensor, edge: float) -> Tensor:
    return (boxes[:, 2:].double() - boxes[:, :2].double() + edge).clamp(min=0).prod(-1)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0)
