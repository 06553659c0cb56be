"""T2I-CompBench's scores for spatial relations and numbers of objects, by the `category` in the metadata of a case.

Kaiyi Huang et al.: "T2I-CompBench", 2023 (arXiv 2307.06350). A spatial case has `objects: [cat, chair]` and `relation:
on the left of`; a numeracy case has `objects: {dog: 2, cat: 1}`; without `objects` they are read from the prompt. Other
categories need more than boxes, and prompts that follow no template cannot be read: both are invalid.

Where we differ: prompts are read by their templates and not by a language model; see diffalign/rules/compbench.py for
the rules; the detector is one of ours and not UniDet, so scores are not the benchmark's to the digit, and `confidence`
0.5 is that of UniDet's own program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.detectors import EMBEDDED, Detector, detect_rows, find_detector
from diffalign.errors import ConfigError
from diffalign.registry import register_reward
from diffalign.rules.compbench import NEAR_PIXELS, numeracy, require_relation, spatial
from diffalign.rules.geneval import Detection
from diffalign.rules.phrases import numbers_of, relation_of
from diffalign.scoring import Score, engine_version

JUDGED = ("spatial", "numeracy")


@register_reward("compbench", range=(0.0, 1.0))
class CompBench:
    """Spatial: confidence and position; numeracy: presence and exact count; `near` is in pixels of the picture."""

    reads_prompt = True
    reads = ("category", "objects", "relation")

    def __init__(
        self,
        detector: Any = EMBEDDED,
        revision: str | None = None,
        confidence: float = 0.5,
        near: float = NEAR_PIXELS,
        compat: bool = False,
    ) -> None:
        self.confidence, self.near, self.compat = confidence, near, compat
        self.options = {
            "detector": detector if isinstance(detector, str) else type(detector).__qualname__,
            "revision": revision,
            "confidence": confidence,
            "near": near,
            "compat": compat,
        }
        self._given = detector, revision

    @cached_property
    def detector(self) -> Detector:
        spec, revision = self._given
        return find_detector(spec, revision=revision, floor=self.confidence)

    @property
    def version(self) -> str | None:
        """Our revision of the computation, and which weights it uses."""
        return engine_version("1", self.detector, self._given[0])

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        tasks = [_task(case) for case in cases]
        asked = [_objects(task) if task else None for task in tasks]
        rows = detect_rows(self.detector, media, [list(objects) if objects else None for objects in asked])
        found = [
            self._judge(task, objects, row) if task and objects and row is not None else {}
            for task, objects, row in zip(tasks, asked, rows, strict=True)
        ]
        names = dict.fromkeys(("total", *(name for row in found for name in row)))
        columns = {n: torch.tensor([row.get(n, torch.nan) for row in found], device=media.device) for n in names}
        return Score(columns.pop("total"), columns)

    def _judge(self, task: Mapping[str, Any], objects: Mapping[str, int], row: Sequence[Detection]) -> dict[str, float]:
        sure = [one for one in row if one.confidence > self.confidence]
        if task["category"] == "numeracy":
            return numeracy(sure, objects)
        a, b = task["objects"]
        return spatial(sure, a, b, task["relation"], near=self.near, compat=self.compat)


def _task(case: Case) -> Mapping[str, Any] | None:
    """Category, objects and relation, from the metadata or else the prompt; None where the case is not for us."""
    category = case.metadata.get("category")
    if not isinstance(category, str) or category not in JUDGED:
        return None  # other benchmarks have categories too
    if case.metadata.get("objects") is not None:
        return case.metadata
    if category == "numeracy":
        counts = numbers_of(case.prompt)
        return {"category": category, "objects": counts} if counts else None
    told = relation_of(case.prompt)
    return {"category": category, "objects": [told[0], told[2]], "relation": told[1]} if told else None


def _objects(task: Mapping[str, Any]) -> dict[str, int]:
    """The classes to look for with their counts."""
    category, objects = task.get("category"), task.get("objects")
    if category == "spatial":
        require_relation(task.get("relation"))
        if isinstance(objects, list | tuple) and len(objects) == 2 and all(isinstance(o, str) and o for o in objects):
            return {str(name): objects.count(name) for name in objects}
        raise ConfigError(
            f"a spatial case has the objects {objects!r}; give the two names, the first one's place is asked."
        )
    if isinstance(objects, Mapping) and objects and all(_is_count(count) for count in objects.values()):
        return {str(name): count for name, count in objects.items()}
    raise ConfigError(
        f"a numeracy case has the objects {objects!r}; give each class its count, as in {{dog: 2, cat: 1}}."
    )


def _is_count(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given > 0
