"""How small, or how large, a picture is as a JPEG.

Kevin Black et al.: "Training Diffusion Models with Reinforcement Learning", 2023 (arXiv 2305.13301), section 5.1: the
file size at quality 95 is an objective that needs no model. Compressibility is minus bytes / 500 000, incompressibility
bytes / 1000, the scales of the paper's code.

Where we differ: the part `kilobytes` shows the size itself under either goal.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from diffalign.cases import Case
from diffalign.registry import register_reward
from diffalign.scoring import Score
from diffalign.vision import to_pil

QUALITY = 95


@register_reward("jpeg_size", version="1")
class JPEGSize:
    """Higher is smaller with the goal `compressible`, larger with `incompressible`."""

    def __init__(self, goal: Literal["compressible", "incompressible"] = "compressible") -> None:
        self.goal = goal
        self.options = {"goal": goal}

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        size = torch.tensor([float(_bytes(image)) for image in to_pil(media)], device=media.device)  # (B,)
        readable = media.isfinite().flatten(1).all(1)  # a JPEG of NaN says nothing
        total = -size / 500_000 if self.goal == "compressible" else size / 1000
        return Score(total, {"kilobytes": size / 1000}, readable)


def _bytes(image: Image.Image) -> int:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=QUALITY)
    return file.tell()
