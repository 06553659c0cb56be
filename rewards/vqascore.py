"""VQAScore: how likely the answer is "Yes" to whether a picture shows a prompt.

Zhiqiu Lin et al.: "Evaluating Text-to-Visual Generation with Image-to-Text Generation", 2024 (arXiv 2404.01291).
`variant: t5` is CLIP-FlanT5: "Yes" and the end of sequence are given to the decoder, and the score is the geometric
mean of their probabilities. `variant: chat` asks any judge: its probability of "Yes".

Where we differ:
- The words asked are our own unless you give the published ones, which CLIP-FlanT5 was trained with.
- The default judge is the embedded one. `probability: pair` weighs "Yes" against "No" alone; the published Qwen path
  takes the softmax over all tokens, which is `probability: vocabulary`. A judge is told to answer Yes or No.
- `variant: t5` has a gradient, which the published code switches off; see diffalign/clip_t5_tower.py.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.clip_t5_tower import HUB, ClipT5Tower
from diffalign.errors import ConfigError
from diffalign.judges.asking import Backend, Decision, Judgement
from diffalign.judges.finding import EMBEDDED
from diffalign.judges.rewarding import JudgeReward
from diffalign.judges.secrets import without_secrets
from diffalign.judges.wording import SHOWS
from diffalign.registry import register_reward
from diffalign.scoring import Score
from diffalign.vision import ROUNDED, Route

PROMPT, PICTURE = "{prompt}", "{picture}"
YES, NO = "Yes", "No"
FRAME = f"USER: {PICTURE}\n{{question}} ASSISTANT: "  # whose turn it is, as CLIP-FlanT5 was trained to read it
T5_SETTINGS = ("model", "revision", "tokenizer", "vision", "dtype")


@register_reward("vqascore", range=(0.0, 1.0))
class VQAScore(JudgeReward):
    """`judge` is what `find_judge` takes; for t5 a hub id, a folder, or a mapping of `model` and more.

    `question` has {prompt} in it; for t5 it may be the whole text, with {picture} before {prompt}.
    """

    def __init__(
        self,
        variant: Literal["t5", "chat"] = "chat",
        judge: str | Mapping[str, Any] | Backend | None = None,  # None: the embedded judge, or CLIP-FlanT5-XXL
        question: str = SHOWS,
        probability: Literal["pair", "vocabulary"] = "pair",
        path: Route = "auto",  # of t5
        micro_batch: int = 8,  # pictures at once, of t5
        checkpointing: bool = False,  # less memory where a gradient is asked for, at a second pass; of t5
        log: str | None = None,
    ) -> None:
        if micro_batch < 1:
            raise ConfigError(f"vqascore.micro_batch is {micro_batch}, but at least 1 picture goes at once.")
        self.variant, self.question, self.probability = variant, question, probability
        self.before, self.after = _around(question, variant)
        self.path, self.micro_batch, self.checkpointing = path, micro_batch, checkpointing
        super().__init__((HUB if variant == "t5" else EMBEDDED) if judge is None else judge, log)
        if variant == "t5":
            self._told = _t5_settings(self._spec)
            self.differentiable, self.no_gradient = path != "reference", ROUNDED

    @property
    def options(self) -> dict[str, Any]:
        """Everything that changes the score."""
        own = {"path": self.path, "probability": self.probability}
        return {"variant": self.variant, "question": self.question, **self.judge_options, **own}

    @property
    def version(self) -> str | None:
        """Our revision of the computation, and which weights answer."""
        return f"{self.revision} {self.tower.version}" if self.variant == "t5" else super().version

    @cached_property
    def tower(self) -> ClipT5Tower:
        """CLIP-FlanT5, loaded at the first use."""
        if self.question == SHOWS:
            warnings.warn(
                "vqascore asks in our own words, and the published weights were trained with other ones, so its scores "
                "are not the published ones. Give `question` the published text, with {picture} and {prompt}.",
                stacklevel=3,
            )
        told = dict(self._told)
        dtype: torch.dtype = getattr(torch, told.pop("dtype", "bfloat16"))
        return ClipT5Tower(**told, dtype=dtype, path=self.path, checkpointing=self.checkpointing)

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        if self.variant == "chat":
            return super().__call__(media, cases)
        rows = range(0, len(cases), self.micro_batch)
        prompts = [case.prompt for case in cases]
        parts = [self._answered(media[k : k + self.micro_batch], prompts[k : k + self.micro_batch]) for k in rows]
        found = torch.cat(parts)
        self._keep(cases, [Judgement(total=value) for value in found.tolist()])
        return Score(found)

    def judge(self, media: Tensor, cases: Sequence[Case]) -> list[Judgement]:
        """The chat variant's word on each row."""
        return self._decided(list(zip(media, (case.prompt for case in cases), strict=True)))

    def matrix(self, media: Tensor, texts: Sequence[str]) -> Tensor:
        """Every one of M pictures (M, 3, H, W) against every one of N texts -> (M, N), NaN where there is no answer."""
        if not texts or not len(media):
            raise ConfigError(f"there are {len(media)} pictures and {len(texts)} texts; a matrix needs one of each.")
        if self.variant == "chat":
            found = self._decided(list(product(media.detach(), texts)))
            return torch.tensor([one.total for one in found], device=media.device).view(len(media), len(texts))
        rows = []
        for picture in media:
            seen = self.tower.look(picture[None])  # once for all texts
            parts = [texts[k : k + self.micro_batch] for k in range(0, len(texts), self.micro_batch)]
            rows.append(torch.cat([self._likelihood(seen.expand(len(some), -1, -1), some) for some in parts]))
        return torch.stack(rows)

    def _answered(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._likelihood(self.tower.look(media), prompts)

    def _likelihood(self, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        asked = [self.after.replace(PROMPT, prompt) for prompt in prompts]
        return self.tower.likelihood(seen, self.before, asked, YES)

    def _decided(self, pairs: Sequence[tuple[Tensor, str]]) -> list[Judgement]:
        """The probability of Yes for each picture (3, H, W) and text."""
        asked = [
            Decision(text=self.question.replace(PROMPT, text), images=(picture,), labels=(YES, NO))
            for picture, text in pairs
        ]
        found = self._decide(asked)
        return [
            Judgement(problem="the judge gave no probability")
            if chances is None or not all(math.isfinite(chance) for chance in chances)
            else Judgement(total=chances[0], raw=(f"{YES} {chances[0]:.6f}, {NO} {chances[1]:.6f}",))
            for chances in found
        ]

    def _decide(self, asked: Sequence[Decision]) -> Sequence[tuple[float, ...] | None]:
        """The probabilities of Yes and No: of the two alone, or of all words."""
        if self.probability == "pair":
            return self.backend.decide(asked)
        decide: Any = self.backend.decide
        if "whole" not in inspect.signature(decide).parameters:
            raise ConfigError(
                f"vqascore.probability is 'vocabulary', but the judge '{self.backend.name}' does not tell the "
                "probability of every word. Use probability: pair, or a judge that runs in this process."
            )
        found: list[tuple[float, ...] | None] = decide(asked, whole=True)
        return found


def _around(question: str, variant: str) -> tuple[str, str]:
    """What t5 reads before the picture and after it."""
    whole = question if PICTURE in question else FRAME.replace("{question}", question)
    before, _, after = whole.partition(PICTURE)
    if PROMPT not in after or PROMPT in before or PICTURE in after:
        raise ConfigError(
            f"vqascore.question is '{question[:80]}', but it needs {PROMPT} where the prompt goes, and {PICTURE} at "
            "most once and before it."
        )
    if variant == "chat" and PICTURE in question:
        raise ConfigError(
            f"vqascore.question has {PICTURE}, which is for variant: t5; a chat has its own place for it."
        )
    return before, after


def _t5_settings(judge: Any) -> dict[str, Any]:
    """What a tower is made with, from a name or a mapping."""
    told = {"model": judge} if isinstance(judge, str) else dict(judge) if isinstance(judge, Mapping) else {}
    unknown = sorted(set(map(str, told)) - set(T5_SETTINGS))
    if unknown or not all(isinstance(value, str) for value in told.values()) or "model" not in told:
        raise ConfigError(
            f"vqascore.judge is {str(without_secrets(judge))[:80]!r}, but variant: t5 takes the hub id or folder of a "
            f"CLIP-FlanT5, or a mapping of {', '.join(T5_SETTINGS)}."
        )
    if told.get("dtype", "bfloat16") not in ("bfloat16", "float32"):
        raise ConfigError(
            f"vqascore.judge.dtype is '{told['dtype']}'; T5 overflows in float16. Use bfloat16 or float32."
        )
    return told
