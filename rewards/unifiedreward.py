"""UnifiedReward: a judge writes how good a picture is for its prompt, as one score or as three, from 1 to 5.

Yibin Wang et al.: "Unified Reward Model for Multimodal Understanding and Generation", 2025 (arXiv 2503.05236). Models
of 1.0 end with a line `Final Score:` (`form: point`), those of 2.0 write three: alignment, coherence, style. Weights:
CodeGoat24/UnifiedReward-qwen-7b (point) and CodeGoat24/UnifiedReward-2.0-qwen-3b, -7b, -32b, -72b (three), MIT.

Where we differ:
- The wording is ours unless `wording` names a file with the published text, which the published weights expect.
- The published code takes the first number that fits anywhere, and 0 where there is none; we read the lines that were
  asked for, ask once more where they are malformed, and mark the row as invalid after that.
- How the three scores make one reward is not published: the total is their mean, or the one that `counts` names.
- The range stays 1 to 5; `divide: 5` gives the published reward.
- Pairs are `pairwise`, edits `editscore`, both with these weights as `judge`; videos are not judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from torch import Tensor

from diffalign import vision
from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.judges import wording as words
from diffalign.judges.asking import Backend, Judgement, ask
from diffalign.judges.finding import EMBEDDED
from diffalign.judges.parse import read_final_score, read_labelled
from diffalign.judges.protocols import OURS, Sampling, read_wording, require_images
from diffalign.judges.rewarding import JudgeReward
from diffalign.registry import register_reward

LOW, HIGH = 1.0, 5.0
NAMES = ("alignment", "coherence", "style")
LABELS = tuple(f"{name.capitalize()} Score" for name in NAMES)
POINT = "Final Score"


@register_reward("unifiedreward", range=(LOW, HIGH))
class UnifiedReward(JudgeReward):
    """`form: three` has a part for each score; `size` shows the picture as a square of that many pixels a side."""

    def __init__(
        self,
        judge: str | Mapping[str, Any] | Backend = EMBEDDED,
        log: str | None = None,
        *,
        form: Literal["point", "three"] = "three",
        counts: Literal["mean", "alignment", "coherence", "style"] = "mean",
        divide: float = 1.0,
        size: int | None = None,  # training with the published weights used 512
        wording: str = OURS,
        sampling: Sampling = Sampling(),
    ) -> None:
        super().__init__(judge, log)
        if not 0 < divide < math.inf or (size is not None and size < 1):
            raise ConfigError(f"unifiedreward has divide {divide:g} and size {size}; both are positive and finite.")
        self.form, self.counts, self.divide, self.size, self.sampling = form, counts, divide, size, sampling
        ours = {"point": words.FINAL_SCORE} if form == "point" else {"three": words.THREE_SCORES}
        self.wording = read_wording(wording, ours, self.name)
        self.revision, self.range = f"1 {self.wording.mark}", (LOW / divide, HIGH / divide)
        self.options = self.judge_options | {"form": form, "counts": counts, "divide": divide, "size": size}
        self.options |= {"wording": wording, "sampling": asdict(sampling)}

    def judge(self, media: Tensor, cases: Sequence[Case]) -> list[Judgement]:
        require_images(self.backend, 1, self.name)
        shown = vision.quantise(media)
        if self.size is not None:
            shown = vision.resize_as_pil(shown, (self.size, self.size))
        questions = [
            self.sampling.question(self.wording.say(self.form, prompt=case.prompt), (image,))
            for image, case in zip(shown, cases, strict=True)
        ]
        return [self._judged(*found) for found in ask(self.backend, questions, self._read)]

    def _read(self, text: str) -> tuple[float, ...] | None:
        if self.form == "three":
            return read_labelled(text, LABELS, LOW, HIGH)
        value = read_final_score(text, POINT, LOW, HIGH)
        return None if value is None else (value,)

    def _judged(self, found: tuple[float, ...] | None, raw: tuple[str, ...]) -> Judgement:
        if found is None:
            return Judgement(raw=raw, problem="the scores could not be read")
        parts = dict(zip(NAMES, found, strict=True)) if self.form == "three" else {}
        mean = math.fsum(found) / len(found)
        return Judgement(parts.get(self.counts, mean) / self.divide, parts, raw)
