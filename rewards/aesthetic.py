"""The LAION aesthetic predictor v2: how people rate the look of a picture, from about 1 to 10.

Christoph Schuhmann: "Improved Aesthetic Predictor", 2022 (github.com/christophschuhmann/improved-aesthetic-predictor);
it has no paper. A CLIP ViT-L/14 embedding of length 1 goes through 768-1024-128-64-16-1 without activations, so the
head is one affine map; it was fitted to mean ratings of AVA, Simulacra Aesthetic Captions and logos.

Where we differ:
- The published file is `sac+logos+ava1-l14-linearMSE.pth` of that repository, which has no place on the hub; the
  default `head` is the copy that the DDPO example of TRL reads. Give the published file's path to be sure.
- Where a gradient is asked for, pictures are resized as tensors and not rounded to 8 bits; `path` fixes one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from diffalign import weights
from diffalign.cases import Case
from diffalign.clip_tower import ClipTower, Dtype
from diffalign.errors import ConfigError
from diffalign.registry import register_reward
from diffalign.vision import ROUNDED, Route

MODEL = "openai/clip-vit-large-patch14"
HEAD, FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
WIDTHS = (768, 1024, 128, 64, 16, 1)


@register_reward("aesthetic", differentiable=True)
class Aesthetic:
    """Mean rating of the look; `head` is a file, a folder or a hub id, `model` any CLIP with 768 dimensions."""

    reads_prompt = False

    def __init__(
        self,
        head: str = HEAD,
        model: str = MODEL,
        revision: str | None = None,  # of the model
        dtype: Dtype = "float32",
        path: Route = "auto",
        checkpointing: bool = False,
    ) -> None:
        self.options = {"head": head, "model": model, "revision": revision, "dtype": dtype, "path": path}
        self.place = head
        self.differentiable, self.no_gradient = path != "reference", ROUNDED
        self.tower = ClipTower(model, revision=revision, dtype=dtype, path=path, checkpointing=checkpointing)

    @cached_property  # of what is loaded: a file that changes later does not change it
    def version(self) -> str:
        return f"1 {self.tower.source.version} {weights.digest(self.file)}"

    @cached_property
    def file(self) -> Path:
        return weights.find(self.place, FILE, instead="Give `head` the path of sac+logos+ava1-l14-linearMSE.pth.")

    @cached_property
    def head(self) -> nn.Module:
        """In float32 whatever the tower's type."""
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            made = Head()
        weights.fit(made, weights.read(self.file), f"'{self.file}'")
        return weights.frozen(made, torch.float32)

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        embedded = self.tower.images(media)  # (B, 768)
        if embedded.shape[-1] != WIDTHS[0]:
            raise ConfigError(
                f"the head reads {WIDTHS[0]} dimensions, and '{self.tower.label}' gives {embedded.shape[-1]}. "
                f"Give `model` a ViT-L/14, such as '{MODEL}'."
            )
        with torch.autocast(media.device.type, enabled=False):
            found: Tensor = self.head.to(media.device)(embedded).squeeze(-1)  # (B,)
        return found


class Head(nn.Module):
    """Five matrices under the names of the published file; its dropouts only hold their numbers."""

    def __init__(self) -> None:
        super().__init__()
        made = [nn.Linear(have, give) for have, give in pairwise(WIDTHS)]
        gaps = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
        self.layers = nn.Sequential(made[0], gaps[0], made[1], gaps[1], made[2], gaps[2], made[3], made[4])

    def forward(self, embedded: Tensor) -> Tensor:
        found: Tensor = self.layers(embedded)
        return found
