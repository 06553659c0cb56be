"""PickScore: which of several pictures of one prompt the users of a web application picked.

Yuval Kirstain et al.: "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", 2023
(arXiv 2305.01569), equation 1: exp(logit scale) * cosine in a CLIP-H fine-tuned on version 1 of their data.

Where we differ:
- `scale: unit` divides by 26, as the code of Flow-GRPO does; the default is the paper's score.
- The weights come without a tokenizer; the one that all released CLIPs share is that of the paper's processor.
- Where a gradient is asked for, pictures are resized as tensors and not rounded to 8 bits; `path` fixes one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from diffalign.cases import Case
from diffalign.clip_tower import ClipTower, Dtype
from diffalign.registry import register_reward
from diffalign.scoring import Score
from diffalign.vision import ROUNDED, Route

HUB = "yuvalkirstain/PickScore_v1"
UNIT = 26.0


@register_reward("pickscore", differentiable=True)
class PickScore:
    """Comparable between pictures of one prompt; the part `cosine` is the score without its scale."""

    reads_prompt = True

    def __init__(
        self,
        model: str = HUB,
        scale: Literal["logits", "unit"] = "logits",
        revision: str | None = None,
        dtype: Dtype = "float32",
        path: Route = "auto",
        checkpointing: bool = False,
    ) -> None:
        self.scale = scale
        self.options = {"model": model, "scale": scale, "revision": revision, "dtype": dtype, "path": path}
        self.differentiable, self.no_gradient = path != "reference", ROUNDED
        self.tower = ClipTower(model, revision=revision, dtype=dtype, path=path, checkpointing=checkpointing)

    @property
    def version(self) -> str:
        return f"1 {self.tower.source.version}"

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        cosine = self.tower.cosines(media, [case.prompt for case in cases])  # (B,)
        scale = self.tower.scale / (UNIT if self.scale == "unit" else 1.0)
        return Score(scale * cosine, {"cosine": cosine})
