"""EditScore: how good an edit is, by two questions to a judge, each answered with two scores, asked several times.

Xin Luo et al.: "EditScore: Unlocking Online RL for Image Editing via High-Fidelity Reward Modeling", 2025 (arXiv
2509.23909). One question shows the source, the edited picture and the instruction: how fully it was carried out, how
little else was changed. The other shows the edited picture alone: how natural it looks, how free it is of artefacts.
The overall score is the geometric mean of the smaller of each two; `diffalign/rules/edit_scores.py` has the arithmetic.

Where we differ:
- The wording is ours unless `wording` names a file with the published texts, which the published weights expect.
- A malformed reply is asked for once more; then its pass is left out, and without `min_passes` valid ones the row is
  invalid. The published code puts a random number or half the scale in its place.
- The perceptual question sees the edited picture only, which the published batch path does not hold to.
- A score outside the scale makes a reply malformed; `out_of_range: clamp` moves it to the nearer end.
- `unedited_above`, our own, gives 0 to an edit that equals its source, without asking.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.judges import wording as words
from diffalign.judges.asking import Backend, Judgement, Question, ask
from diffalign.judges.editing import EditReward
from diffalign.judges.finding import EMBEDDED
from diffalign.judges.parse import read_scores
from diffalign.judges.protocols import OURS, Sampling, read_wording
from diffalign.judges.rewarding import instruction_of, require_decibel
from diffalign.registry import register_reward
from diffalign.rules.edit_scores import TOP, Pass, Reduction, accepted, ensemble

PUBLISHED = Sampling(temperature=0.7, top_p=0.9, top_k=20, max_tokens=512, seed=42)
FAR = 1e6  # with `clamp`, a number beyond is malformed all the same


@register_reward("editscore", modality="edit", range=(0.0, 1.0))
class EditScore(EditReward):
    """Parts are on 0 to 10, the total is `overall` over `divide`; `scale` is that of the judge's own scores."""

    def __init__(
        self,
        judge: str | Mapping[str, Any] | Backend = EMBEDDED,
        log: str | None = None,
        *,
        passes: int = 1,
        scale: int = 25,
        reduce: Reduction = "average_last",
        min_passes: int = 1,
        out_of_range: Literal["invalid", "clamp"] = "invalid",
        at_source_size: bool = True,
        unedited_above: float | None = None,
        divide: float = TOP,
        wording: str = OURS,
        sampling: Sampling = PUBLISHED,
    ) -> None:
        super().__init__(judge, log)
        if scale < 1 or not 0 < divide < math.inf or not 1 <= min_passes <= passes:
            raise ConfigError(
                f"editscore has scale {scale}, divide {divide:g}, passes {passes} and min_passes {min_passes}; scale "
                "and passes are at least 1, divide is positive and finite, and min_passes from 1 to passes."
            )
        require_decibel(unedited_above, self.name)
        self.passes, self.scale, self.min_passes, self.divide = passes, scale, min_passes, divide
        self.reduce, self.out_of_range, self.sampling = reduce, out_of_range, sampling
        self.at_source_size, self.unedited_above = at_source_size, unedited_above
        ours = {"semantics": words.EDIT_SEMANTICS, "looks": words.EDIT_LOOKS}
        self.wording = read_wording(wording, ours, self.name)
        self.revision, self.range = f"1 {self.wording.mark}", (0.0, TOP / divide)
        self.options = self.edit_options | {"passes": passes, "scale": scale, "reduce": reduce, "wording": wording}
        self.options |= {"min_passes": min_passes, "out_of_range": out_of_range, "divide": divide}
        self.options |= {"sampling": asdict(sampling)}

    def judge_edits(self, pairs: Sequence[tuple[Tensor, Tensor]], cases: Sequence[Case]) -> list[Judgement]:
        questions = [q for pair, case in zip(pairs, cases, strict=True) for q in self._questions(*pair, case)]
        found = ask(self.backend, questions, self._read)
        each = 2 * self.passes
        return [self._judged(found[k * each : (k + 1) * each]) for k in range(len(cases))]

    def _questions(self, source: Tensor, edited: Tensor, case: Case) -> list[Question]:
        """Both questions of every pass."""
        told = self.wording.say("semantics", instruction=instruction_of(case), scale=self.scale)
        looks = self.wording.say("looks", scale=self.scale)
        asked = ((told, (source, edited)), (looks, (edited,)))
        return [
            self.sampling.question(text, images, number, schema=words.pair_schema(self.scale))
            for number in range(self.passes)
            for text, images in asked
        ]

    def _read(self, text: str) -> tuple[float, ...] | None:
        if self.out_of_range == "invalid":
            return read_scores(text, 2, 0, self.scale)
        found = read_scores(text, 2, -FAR, FAR, of=self.scale)
        return None if found is None else tuple(min(max(said, 0.0), float(self.scale)) for said in found)

    def _judged(self, found: Sequence[tuple[tuple[float, ...] | None, tuple[str, ...]]]) -> Judgement:
        raw = tuple(text for _, texts in found for text in texts)
        passes = [
            None if semantics is None or looks is None else Pass.of(semantics, looks, self.scale)
            for (semantics, _), (looks, _) in zip(found[::2], found[1::2], strict=True)
        ]
        parts = ensemble(passes, self.reduce, self.min_passes)
        if parts is None:
            valid = sum(one is not None for one in passes)
            problem = f"{valid} of {self.passes} passes could be read, and {self.min_passes} are needed"
            return Judgement(raw=raw, problem=problem)
        return Judgement(parts["overall"] / self.divide, parts | {"accepted": accepted(parts["overall"])}, raw)

    def untouched(self) -> dict[str, float]:
        return dict.fromkeys(("prompt_following", "overall", "accepted"), 0.0)
