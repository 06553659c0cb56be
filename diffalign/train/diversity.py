"""How different the images are from one another: within a prompt, across prompts, and as an effective number.

Paper: "The Vendi Score: A Diversity Evaluation Metric for Machine Learning", Friedman and Dieng, 2022
(arXiv 2210.02410): exp of the entropy of the eigenvalues of K / n, K the cosine Gram matrix.

Features are (N, D), one row per image; `prompts` (N,) says which images share a prompt.

Where we differ: `plain_features` stands in where no tower is given; a row of zeros is unlike every other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.vision import LUMA

POOL, CELLS, DIRECTIONS = 8, 4, 6  # of `plain_features`: side of the pooled picture, of its cells, bins of direction
CHUNK = 16  # pictures looked at together
ANCHOR = 0.25  # length of the constant part, beside which an empty picture still has a direction


@dataclass(frozen=True)
class Diversity:
    """Mean 1 - cosine and, per image, the parts that means hide."""

    within: float  # over pairs that share a prompt; NaN where no prompt has two images
    across: float  # over pairs that do not; NaN for a single prompt
    vendi: float  # effective number of different images, 1 to N
    own: Tensor  # (N,) mean distance to the other images of the same prompt
    others: Tensor  # (N,) mean distance to the images of other prompts
    nearest: Tensor  # (N,) distance to the most similar image

    @property
    def prompt_effect(self) -> float:
        """The share of the variety that the prompts explain: 1 - within / across."""
        return 1 - self.within / self.across if self.across > 0 else math.nan


def measure(features: Tensor, prompts: Tensor) -> Diversity:
    """All of them from features (N, D)."""
    gram = cosine_gram(features)  # (N, N)
    far = (1 - gram).clamp(min=0)
    other = ~torch.eye(len(gram), dtype=torch.bool, device=gram.device)
    same = (prompts[:, None] == prompts).to(gram.device)
    own, others = same & other, ~same
    return Diversity(
        within=_mean(far, own),
        across=_mean(far, others),
        vendi=vendi_of_kernel(gram),
        own=_rows(far, own),
        others=_rows(far, others),
        nearest=torch.where(other, far, torch.inf).amin(-1).nan_to_num(nan=math.nan, posinf=math.nan),
    )


def cosine_gram(features: Tensor) -> Tensor:
    """Cosines (N, N) in float64, exactly 1 on the diagonal."""
    rows = F.normalize(features.double(), dim=-1)
    gram = (rows @ rows.T).clamp(-1, 1)
    return gram.fill_diagonal_(1.0)


def vendi(features: Tensor) -> float:
    """Effective number of different rows of (N, D)."""
    return vendi_of_kernel(cosine_gram(features))


def vendi_of_kernel(kernel: Tensor) -> float:
    """The same from similarities (N, N) with ones on the diagonal."""
    share = torch.linalg.eigvalsh(kernel.double() / len(kernel)).clamp(min=0)
    return math.exp(-float(torch.xlogy(share, share).sum()))


def plain_features(media: Tensor) -> Tensor:
    """Features (N, 289) from pixels alone: the picture at 8 x 8, directions of its edges in 4 x 4 cells, a constant.

    It sees layout, colour and drawing, not meaning: a stand-in for a tower, blind to what a tower would call alike.
    """
    if media.ndim == 5:
        return torch.stack([plain_features(video).mean(0) for video in media])
    return torch.cat([_plain_features(part.float()) for part in torch.split(media, CHUNK)])


def _plain_features(media: Tensor) -> Tensor:
    pooled = (F.adaptive_avg_pool2d(media, POOL) - 0.5).flatten(1) * 2 / math.sqrt(3 * POOL * POOL)
    luma = torch.einsum("nchw,c->nhw", media, torch.tensor(LUMA, device=media.device))
    dy, dx = (luma[:, 1:, :-1] - luma[:, :-1, :-1]), (luma[:, :-1, 1:] - luma[:, :-1, :-1])
    strength = torch.hypot(dx, dy)  # (N, H - 1, W - 1)
    turn = (torch.atan2(dy, dx) + math.pi) / (2 * math.pi)
    edges = [k / DIRECTIONS for k in range(DIRECTIONS + 1)]
    bins = [strength * ((turn >= low) & ((turn < high) | (high == 1.0))) for low, high in pairwise(edges)]
    cells = torch.stack([F.adaptive_avg_pool2d(each, CELLS) for each in bins], 1)  # (n, 6, 4, 4)
    drawn = cells.flatten(1).sqrt() / math.sqrt(CELLS)
    return torch.cat([pooled, drawn, torch.full_like(pooled[:, :1], ANCHOR)], -1)


def _mean(far: Tensor, pairs: Tensor) -> float:
    return float(far[pairs].mean()) if pairs.any() else math.nan


def _rows(far: Tensor, pairs: Tensor) -> Tensor:
    count = pairs.sum(-1)
    return (far * pairs).sum(-1) / torch.where(count > 0, count, torch.nan)
