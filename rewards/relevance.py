"""Relevance held in check by content and variety: similarity x complexity x distinct patches.

R3 (arXiv 2402.03469) multiplies the relevance of a text by a length incentive and by the share of distinct trigrams,
since relevance alone is won by echoing the query.

Where we differ: the translation to pictures is ours. The similarity is any reward; the length incentive is the mean
absolute difference of neighbouring luminances over `complexity_floor`, at most 1; trigrams are square patches, reduced
to 4 x 4 colours in steps of `tolerance`, and their distinct share counts in full at `variety_floor`. A similarity below
0 stays as it is: a factor below 1 would make it better. The distinct share is a count: it has no gradient of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.registry import register_reward
from diffalign.scoring import Ask, Composite, Score, make_reward
from diffalign.vision import LUMA

GRID = 4  # colours along one side of a patch


@register_reward("relevance", differentiable=True)
class Relevance(Composite):
    """`similarity` (any reward) times two factors in [0, 1]; parts: similarity with its own, complexity, variety."""

    def __init__(
        self,
        similarity: Any = "clip",
        complexity_floor: float = 0.02,
        variety_floor: float = 1.0,
        patch: int = 16,
        tolerance: float = 0.05,
    ) -> None:
        if not all(x > 0 for x in (complexity_floor, variety_floor, tolerance)) or patch < GRID:  # NaN is not above 0
            raise ConfigError(
                f"relevance has complexity_floor {complexity_floor:g}, variety_floor {variety_floor:g}, tolerance "
                f"{tolerance:g} and patch {patch}; the first three are above 0, and a patch has {GRID} pixels or more."
            )
        self.similarity = make_reward(similarity)
        self.rewards = [self.similarity]
        self.options = {"complexity_floor": complexity_floor, "variety_floor": variety_floor}
        self.options |= {"patch": patch, "tolerance": tolerance}
        self.complexity_floor, self.variety_floor = complexity_floor, variety_floor
        self.patch, self.tolerance = patch, tolerance
        self.modality, self.differentiable = self.similarity.modality, self.similarity.differentiable
        ends = self.similarity.range
        self.range = (min(ends[0], 0.0), max(ends[1], 0.0)) if ends else None

    def through(self, media: Tensor, cases: Sequence[Case], ask: Ask) -> Score:
        found = ask(self.similarity, media, cases)
        frames = media.float().flatten(0, 1) if media.ndim == 5 else media.float()
        complexity, variety = (
            factor.view(len(cases), -1).mean(1)
            for factor in (complexity_of(frames), variety_of(frames, self.patch, self.tolerance))
        )
        factor = (complexity / self.complexity_floor).clamp(max=1) * (variety / self.variety_floor).clamp(max=1)
        total = torch.where(found.total < 0, found.total, found.total * factor.to(found.total.device))
        parts = {"similarity": found.total, "complexity": complexity, "variety": variety}
        parts |= {f"similarity/{name}": part for name, part in found.parts.items() if name != self.similarity.name}
        return Score(total, parts, found.valid)


def complexity_of(media: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring luminances: (B, 3, H, W) -> (B,), 0 for a plain picture."""
    luma = (media * media.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1)
    across, down = luma.diff(dim=2).abs(), luma.diff(dim=1).abs()
    return (across.flatten(1).sum(1) + down.flatten(1).sum(1)) / max(1, across[0].numel() + down[0].numel())


def variety_of(media: Tensor, patch: int, tolerance: float) -> Tensor:
    """Distinct patches / patches: (B, 3, H, W) -> (B,); edges that fill no patch are left out."""
    rows, columns = max(1, media.shape[2] // patch), max(1, media.shape[3] // patch)
    inside = media.detach()[..., : rows * patch, : columns * patch]
    grid = F.adaptive_avg_pool2d(inside, (rows * GRID, columns * GRID))
    levels = F.unfold((grid / tolerance).round(), GRID, stride=GRID).transpose(1, 2)  # (B, N, 48)
    distinct = [len(row.unique(dim=0)) / len(row) for row in levels]
    return media.new_tensor(distinct).where(media.isfinite().flatten(1).all(1), torch.nan)
