"""GenEval's rules on what a detector finds: `geneval` passes or fails every clause, or counts how nearly they hold.

Dhruba Ghosh et al.: "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment", 2023 (arXiv
2310.11513), with the soft score of Jie Liu et al.: "Flow-GRPO", 2025 (arXiv 2505.05470). What is asked for is in the
metadata of the case, as GenEval writes it: `include`, `exclude`, `tag`.

Where we differ: see diffalign/rules/geneval.py for the rules and diffalign/detector_models.py for the detector. More
objects than asked for cost nothing in the soft score, as in the strict one, unless an exclude says so. Prompts of the
shapes world need no metadata where the detector is `shapes`: their grammar gives the clauses, and one exclude says that
nothing else is wanted. Sizes and absolute places are no clauses of GenEval, so prompts with them are invalid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.detectors import ANY, EMBEDDED, ColourNamer, Detector, ShapesDetector, detect_rows, find_detector
from diffalign.registry import register_reward
from diffalign.rules.geneval import Detection, Exclude, Include, Request, Verdict, judge, read_request, select
from diffalign.scoring import Score, engine_version
from diffalign.world.compose import OPPOSITE
from diffalign.world.grammar import Clauses
from diffalign.world.verifier import clauses_of


@register_reward("geneval", range=(0.0, 1.0))
class GenEval:
    """`score` soft is the mean of the clauses, strict is 1 where all of them hold; parts show both and each kind."""

    reads_prompt = True
    reads = ("include", "exclude", "tag")

    def __init__(
        self,
        detector: Any = EMBEDDED,
        revision: str | None = None,
        score: Literal["soft", "strict"] = "soft",
        confidence: float = 0.3,
        counting_confidence: float = 0.9,
        most: int = 16,
        nms: float = 1.0,
        flow_grpo_compat: bool = False,
        colour_model: str = "ViT-L-14:openai",
    ) -> None:
        self.score, self.flow_grpo_compat = score, flow_grpo_compat
        self.limits: dict[str, Any] = {
            "confidence": confidence,
            "counting_confidence": counting_confidence,
            "most": most,
            "nms": nms,
        }
        self.options = {
            "detector": detector if isinstance(detector, str) else type(detector).__qualname__,
            "revision": revision,
            "score": score,
            **self.limits,
            "flow_grpo_compat": flow_grpo_compat,
            "colour_model": colour_model,
        }
        if flow_grpo_compat:
            self.range = None  # a count may be missed by more than was asked for
        self._given = detector, revision, min(confidence, counting_confidence)
        self.colours = ColourNamer(colour_model)

    @cached_property
    def detector(self) -> Detector:
        spec, revision, floor = self._given
        return find_detector(spec, revision=revision, floor=floor)

    @property
    def version(self) -> str | None:
        """Our revision of the computation, and which weights it uses."""
        known = engine_version("2", self.detector, self._given[0])
        if known is None or isinstance(self.detector, ShapesDetector):
            return known
        return f"{known} {self.colours.version}"

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        requests = [self._request(case) for case in cases]
        rows = detect_rows(self.detector, media, [request.labels if request else None for request in requests])
        verdicts = [
            None if request is None or row is None else self._verdict(image, request, row)
            for image, request, row in zip(media, requests, rows, strict=True)
        ]
        return _as_score(verdicts, self.score, media.device)

    def _request(self, case: Case) -> Request | None:
        if "include" in case.metadata or "exclude" in case.metadata:
            return read_request(case.metadata)
        if not isinstance(self.detector, ShapesDetector):
            return None
        clauses = clauses_of(case)
        return request_of(clauses) if clauses else None

    def _verdict(self, image: Tensor, request: Request, row: Sequence[Detection]) -> Verdict:
        found = select(request, row, **self.limits)
        for want in request.include:
            if want.colour:  # only where it can matter: colours cost a pass of CLIP each
                found[want.label][: want.count] = self._coloured(image, found[want.label][: want.count])
        return judge(request, found, flow_grpo_compat=self.flow_grpo_compat)

    def _coloured(self, image: Tensor, row: Sequence[Detection]) -> list[Detection]:
        return [one if one.colour else replace(one, colour=self.colours.name(image, one)) for one in row]


def request_of(clauses: Clauses) -> Request | None:
    """The clauses of the shapes world in GenEval's form, None where that form cannot say them."""
    wants, shapes = clauses.wants, [want.shape for want in clauses.wants]
    shared = {shape for shape in shapes if shapes.count(shape) > 1}
    names = [f"{want.colour} {want.shape}" if want.shape in shared else want.shape for want in wants]
    blurred = any(want.shape in shared and not want.colour for want in wants) or len(set(names)) < len(names)
    places = {max(r.a, r.b): (r.kind if r.a > r.b else OPPOSITE[r.kind], min(r.a, r.b)) for r in clauses.relations}
    if blurred or any(want.size or want.place for want in wants) or len(places) < len(clauses.relations):
        return None
    include = [
        Include(name, want.count, want.colour, places.get(k))
        for k, (name, want) in enumerate(zip(names, wants, strict=True))
    ]
    return Request(tuple(include), (Exclude(ANY, clauses.total + 1),), clauses.tag)


def _as_score(verdicts: Sequence[Verdict | None], score: str, device: torch.device) -> Score:
    """Strict, soft and one part per kind of clause, NaN where a row has none."""
    rows: list[Mapping[str, float]] = [
        {} if v is None else {"strict": float(v.strict), "soft": v.soft, **v.by_kind()} for v in verdicts
    ]
    names = dict.fromkeys(("strict", "soft", *(name for row in rows for name in row)))
    parts = {name: torch.tensor([row.get(name, torch.nan) for row in rows], device=device) for name in names}
    return Score(parts[score], parts)
