"""Agreement between picture and prompt in a CLIP model.

Alec Radford et al.: "Learning Transferable Visual Models From Natural Language Supervision", 2021 (arXiv 2103.00020).
The reward is the cosine of the two embeddings, without the model's logit scale.

Where we differ: pictures are resized as tensors (bicubic, antialias), so the gradient passes; on pictures
without hard edges that is PIL's result within 8-bit rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.clip_tower import EMBEDDED, ClipTower
from diffalign.registry import register_reward


@register_reward("clip", differentiable=True, range=(-1.0, 1.0))
class CLIPReward:
    """Cosine of picture and prompt; `model` is shapes-clip, `ViT-B-32:laion2b_s34b_b79k`, a hub id or a folder."""

    reads_prompt = True

    def __init__(
        self,
        model: str = EMBEDDED,
        revision: str | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    ) -> None:
        self.options = {"model": model, "revision": revision, "dtype": dtype}
        self.tower = ClipTower(model, revision=revision, dtype=getattr(torch, dtype))

    @property
    def version(self) -> str:
        """Our revision of the computation, and which weights it uses."""
        return f"1 {self.tower.source.version}"

    @property
    def truncated(self) -> int:
        """Prompts so far that were longer than the model reads."""
        return self.tower.truncated

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        texts = self.tower.texts([case.prompt for case in cases], media.device)  # (B, D)
        return (self.tower.images(media) * texts).sum(-1)  # (B,)
