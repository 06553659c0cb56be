"""Agreement between picture and prompt in a CLIP model.

Alec Radford et al.: "Learning Transferable Visual Models From Natural Language Supervision", 2021 (arXiv 2103.00020).
The reward is the cosine of the two embeddings; `scale: logits` multiplies it by exp(logit scale), as the model's own
logits do (about 100 in released CLIPs).

Where we differ: where a gradient is asked for, pictures are resized as tensors (bicubic, antialias) and not rounded to
8 bits; on pictures without hard edges that is the published result within 8-bit rounding. `path` fixes one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from diffalign.cases import Case
from diffalign.clip_tower import EMBEDDED, ClipTower, Dtype
from diffalign.registry import register_reward
from diffalign.vision import ROUNDED, Route


@register_reward("clip", differentiable=True, range=(-1.0, 1.0))
class CLIPReward:
    """Cosine of picture and prompt; `model` is shapes-clip, `ViT-B-32:laion2b_s34b_b79k`, a hub id or a folder."""

    reads_prompt = True

    def __init__(
        self,
        model: str = EMBEDDED,
        scale: Literal["cosine", "logits"] = "cosine",
        revision: str | None = None,
        dtype: Dtype = "float32",
        path: Route = "auto",
        checkpointing: bool = False,
    ) -> None:
        self.scale = scale
        self.range = (-1.0, 1.0) if scale == "cosine" else None
        self.options = {"model": model, "scale": scale, "revision": revision, "dtype": dtype, "path": path}
        self.differentiable, self.no_gradient = path != "reference", ROUNDED
        self.tower = ClipTower(model, revision=revision, dtype=dtype, path=path, checkpointing=checkpointing)

    @property
    def version(self) -> str:
        """Our revision of the computation, and which weights it uses."""
        return f"2 {self.tower.source.version}"

    @property
    def truncated(self) -> int:
        """Prompts so far that were longer than the model reads."""
        return self.tower.truncated

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        cosine = self.tower.cosines(media, [case.prompt for case in cases])  # (B,)
        return cosine if self.scale == "cosine" else self.tower.scale * cosine
