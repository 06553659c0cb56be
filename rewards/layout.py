"""Whether objects are where a layout puts them: boxes asked for against boxes found, as VLM-R1 and Vision-R1 do it.

Haozhan Shen et al.: "VLM-R1", 2025 (arXiv 2504.07615); Yufei Zhan et al.: "Vision-R1", 2025 (arXiv 2503.18013). There a
language model writes boxes and the picture is given; here the boxes are given and a detector reads the picture. The
metadata of a case has `boxes: [{label: cat, box: [left, top, right, bottom]}]` in shares of width and height, y down.

Where we differ: see diffalign/rules/boxes.py. Coordinates are shares, so an L1 distance weighs no more than an overlap;
the default `strictness` is Vision-R1's first stage, and `step` or `second` asks for the later one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.detectors import EMBEDDED, Detector, detect_rows, find_detector
from diffalign.errors import ConfigError
from diffalign.registry import register_reward
from diffalign.rules.boxes import (
    COCO,
    STAGES,
    Layout,
    Matching,
    detection_score,
    match_quality,
    mean_average_precision,
    od_length,
    stage_at,
)
from diffalign.rules.geneval import Detection
from diffalign.scoring import Score, engine_version


@register_reward("layout", range=(0.0, 1.0))
class LayoutReward:
    """`metric` is vision_r1 (precision and recall), vlm_r1 (overlap and completeness) or od_length (mAP and number)."""

    reads_prompt = True
    reads = ("boxes",)

    def __init__(
        self,
        detector: Any = EMBEDDED,
        revision: str | None = None,
        metric: Literal["vision_r1", "vlm_r1", "od_length"] = "vision_r1",
        matching: Literal["published", "hungarian", "greedy"] = "published",
        strictness: Literal["none", "first", "second"] = "first",
        step: int | None = None,
        precision_over: Literal["found", "matched"] = "found",
        thresholds: tuple[float, ...] = COCO,
        confidence: float = 0.3,
    ) -> None:
        self.detector_name = detector if isinstance(detector, str) else type(detector).__qualname__
        self.revision, self.metric, self.matching, self.strictness = revision, metric, matching, strictness
        self.precision_over: Literal["found", "matched"] = precision_over
        self.step = step  # a trainer may move it: from 1500 on the second stage holds
        self.thresholds, self.confidence, self._spec = tuple(thresholds), confidence, detector

    @property
    def options(self) -> dict[str, Any]:
        """Everything that changes the score, the stage as it is now."""
        return {
            "detector": self.detector_name,
            "revision": self.revision,
            "metric": self.metric,
            "matching": self.matching,
            "strictness": self.stage,
            "precision_over": self.precision_over,
            "thresholds": list(self.thresholds),
            "confidence": self.confidence,
        }

    @property
    def stage(self) -> str:
        """The strictness that holds: that of `step` where one is given."""
        return self.strictness if self.step is None else stage_at(self.step)

    @cached_property
    def detector(self) -> Detector:
        return find_detector(self._spec, revision=self.revision, floor=self.confidence)

    @property
    def version(self) -> str | None:
        """Our revision of the computation, and which weights it uses."""
        return engine_version("1", self.detector, self._spec)

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        asked = [_asked(case.metadata) for case in cases]
        rows = detect_rows(self.detector, media, [list(dict.fromkeys(a.labels)) if a else None for a in asked])
        scale = torch.tensor([media.shape[-1], media.shape[-2]] * 2, dtype=torch.float64)
        found = [
            {} if a is None or row is None else self._judge(self._found(row, scale), a)
            for a, row in zip(asked, rows, strict=True)
        ]
        names = dict.fromkeys(("total", *(name for row in found for name in row)))
        columns = {n: torch.tensor([row.get(n, torch.nan) for row in found], device=media.device) for n in names}
        return Score(columns.pop("total"), columns)

    def _found(self, row: Sequence[Detection], scale: Tensor) -> Layout:
        sure = sorted((one for one in row if one.confidence > self.confidence), key=lambda one: -one.confidence)
        boxes = torch.tensor([one.box for one in sure], dtype=torch.float64).view(-1, 4) / scale
        confidence = torch.tensor([one.confidence for one in sure])
        return Layout(boxes, tuple(one.label for one in sure), confidence)

    def _judge(self, found: Layout, asked: Layout) -> dict[str, float]:
        if self.metric == "od_length":
            precision = mean_average_precision(Layout(found.boxes, found.labels), asked, self.thresholds)
            return {"total": od_length(found, asked, self.thresholds), "map": precision}
        if self.metric == "vlm_r1":
            return detection_score(found, asked, matching=self._matching("greedy"))
        return match_quality(
            found,
            asked,
            strictness=STAGES[self.stage],
            matching=self._matching("hungarian"),
            over=self.precision_over,
        )

    def _matching(self, published: Matching) -> Matching:
        return published if self.matching == "published" else self.matching


def _asked(metadata: Mapping[str, Any]) -> Layout | None:
    """The layout of a case, None where it has no boxes."""
    rows = metadata.get("boxes")
    if rows is None or rows == []:
        return None
    if not isinstance(rows, list | tuple):
        raise ConfigError(f"a case has the boxes {rows!r}, but boxes are a list of {{label: ..., box: [...]}}.")
    boxes = [_box(row, k) for k, row in enumerate(rows)]
    return Layout(torch.tensor(boxes, dtype=torch.float64), tuple(row["label"] for row in rows))


def _box(row: Any, place: int) -> list[float]:
    if not isinstance(row, Mapping) or not isinstance(row.get("label"), str) or not row["label"].strip():
        raise ConfigError(f"boxes[{place}] is {row!r}, but it needs a 'label' and a 'box'.")
    box: Any = row.get("box")
    numbers = isinstance(box, list | tuple) and len(box) == 4 and all(isinstance(side, int | float) for side in box)
    if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ConfigError(
            f"boxes[{place}] has the box {box!r}; write [left, top, right, bottom] in shares of the picture, "
            "each from 0 to 1, left before right and top before bottom."
        )
    return [float(side) for side in box]
