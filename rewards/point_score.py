"""A judge rates how well a picture shows its prompt, from 1 to 5: by choosing a level, or in words.

Zhiqiu Lin et al.: "Evaluating Text-to-Visual Generation with Image-to-Text Generation", 2024 (arXiv 2404.01291), reads
the probability of an answer in place of the answer; Yibin Wang et al.: "Unified Reward Model for Multimodal
Understanding and Generation", 2025 (arXiv 2503.05236), has the written score from 1 to 5.

Where we differ:
- `decide` asks for one of five described levels and takes the expected level under the judge's probabilities: few
  pictures tie, so a group of them has something to learn from. Neither paper has it.
- `write` is the point score of `unifiedreward` with any judge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

from torch import Tensor

from diffalign import vision
from diffalign.cases import Case
from diffalign.judges import wording as words
from diffalign.judges.asking import Backend, Decision, Judgement, ask, expected
from diffalign.judges.finding import EMBEDDED
from diffalign.judges.parse import read_final_score
from diffalign.judges.protocols import OURS, Sampling, read_wording, require_images
from diffalign.judges.rewarding import JudgeReward
from diffalign.registry import register_reward

LETTERS = ("A", "B", "C", "D", "E")
VALUES = (1.0, 2.0, 3.0, 4.0, 5.0)
LABEL = "Final Score"


@register_reward("point_score", range=(1.0, 5.0))
class PointScore(JudgeReward):
    """With `how: decide` the parts are the likeliest level, its probability and the spread of the levels."""

    def __init__(
        self,
        judge: str | Mapping[str, Any] | Backend = EMBEDDED,
        log: str | None = None,
        *,
        how: Literal["decide", "write"] = "decide",
        wording: str = OURS,
        sampling: Sampling = Sampling(),
    ) -> None:
        super().__init__(judge, log)
        self.how, self.sampling = how, sampling
        self.wording = read_wording(wording, {"points": words.POINTS, "final_score": words.FINAL_SCORE}, self.name)
        self.revision = f"1 {self.wording.mark}"
        self.options = self.judge_options | {"how": how, "wording": wording, "sampling": asdict(sampling)}

    def judge(self, media: Tensor, cases: Sequence[Case]) -> list[Judgement]:
        require_images(self.backend, 1, self.name)
        shown = list(vision.quantise(media))
        return self._decided(shown, cases) if self.how == "decide" else self._written(shown, cases)

    def _decided(self, shown: Sequence[Tensor], cases: Sequence[Case]) -> list[Judgement]:
        asked = [
            Decision(
                text=self.wording.say("points", prompt=case.prompt),
                images=(image,),
                labels=LETTERS,
                described=words.LEVELS,
                ordered=True,
            )
            for image, case in zip(shown, cases, strict=True)
        ]
        return [_expected(found) for found in self.backend.decide(asked)]

    def _written(self, shown: Sequence[Tensor], cases: Sequence[Case]) -> list[Judgement]:
        questions = [
            self.sampling.question(self.wording.say("final_score", prompt=case.prompt), (image,))
            for image, case in zip(shown, cases, strict=True)
        ]
        read = partial(read_final_score, label=LABEL, low=VALUES[0], high=VALUES[-1])
        return [
            Judgement(raw=raw, problem="the score could not be read") if value is None else Judgement(value, {}, raw)
            for value, raw in ask(self.backend, questions, read)
        ]


def _expected(probabilities: tuple[float, ...] | None) -> Judgement:
    if probabilities is None:
        return Judgement(problem="the judge chose none of the levels")
    mean = expected(probabilities, VALUES)
    square = math.fsum(p * (value - mean) ** 2 for p, value in zip(probabilities, VALUES, strict=True))
    likeliest = max(range(len(VALUES)), key=lambda k: probabilities[k])
    parts = {"level": VALUES[likeliest], "sure": probabilities[likeliest], "spread": math.sqrt(square)}
    told = ", ".join(f"{letter} {p:.3f}" for letter, p in zip(LETTERS, probabilities, strict=True))
    return Judgement(min(max(mean, VALUES[0]), VALUES[-1]), parts, (told,))
