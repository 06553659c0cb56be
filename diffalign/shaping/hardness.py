"""Advantages that count more where the data are hard or the model responds.

Paper: "Inverse Reinforcement Learning with Dynamic Reward Scaling for LLM Alignment", 2025 (arXiv 2503.18991). Data
hardness is sigma(delta) / sigma(mean delta), where delta = 1 - similarity to a demonstration; responsiveness is
sigma(mean gap without outliers) / sigma(mean gap), where gap = reward of the demonstration - reward of the sample.

Where we differ: the sources disagree on what the means below the line run over, so `denominator` chooses between the
prompt and the batch, for both; outliers are those far from the mean of their prompt; a prompt of outliers alone, and a
sample without a number, are scaled by 1. The sign of the gap is the one under which a larger gap is harder.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from diffalign.shaping.groups import columns, restored, statistics

Denominator = Literal["prompt", "batch"]


def hardness_scale(
    advantage: Tensor,
    gid: Tensor,
    *,
    delta: Tensor | None = None,
    gap: Tensor | None = None,
    denominator: Denominator = "prompt",
    tau: float = math.inf,
) -> Tensor:
    """Advantages (N,) or (N, T) times the data hardness and the responsiveness of their samples, as far as given."""
    factor = torch.ones(len(advantage), dtype=torch.float64)
    if delta is not None:
        factor = factor * columns(data_hardness(delta, gid, denominator=denominator)).squeeze(-1)
    if gap is not None:
        factor = factor * columns(responsiveness(gap, gid, denominator=denominator, tau=tau)).squeeze(-1)
    return restored(columns(advantage) * factor.unsqueeze(-1), advantage)


def data_hardness(delta: Tensor, gid: Tensor, *, denominator: Denominator = "prompt") -> Tensor:
    """sigma(delta) / sigma(mean delta) for every sample (N,); delta is 1 - similarity to what was wanted."""
    x = columns(delta)
    return restored(_ratio(x, _mean(x, gid, denominator)), delta)


def responsiveness(gap: Tensor, gid: Tensor, *, denominator: Denominator = "prompt", tau: float = math.inf) -> Tensor:
    """sigma(mean gap of the prompt) / sigma(mean gap) for every sample (N,).

    The mean above the line leaves out gaps whose squared distance from the prompt's mean is above `tau`.
    """
    x = columns(gap)
    inside = torch.where((x - _mean(x, gid, "prompt")).square() <= tau, x, torch.nan)
    return restored(_ratio(_mean(inside, gid, "prompt"), _mean(x, gid, denominator)), gap)


def _mean(x: Tensor, gid: Tensor, over: Denominator) -> Tensor:
    """For every row (N, 1) the mean of its prompt, or of the batch."""
    found = statistics(x, gid if over == "prompt" else torch.zeros(len(x), dtype=torch.int64))
    return found.mean[found.index]


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    ratio = above.sigmoid() / below.sigmoid()
    return torch.where(ratio.isnan(), 1, ratio)
