"""What a reward model is taught by: losses of scores whose order people, or a judge, have told.

Follows: Bradley and Terry 1952, with soft labels and a margin; ties as Rao and Kupper 1967, in the form of HPSv3 (arXiv
2508.03789) and VideoAlign (arXiv 2501.13918); HPSv3's uncertainty; the two-way cross-entropy of PickScore (arXiv
2305.01569), whose ties cost nothing where the scores are equal; the ranking loss of ImageReward (arXiv 2304.05977).

Where we differ: every loss is per pair (N,), and `weighted` makes one number of them, so that weights, labels and ties
mean the same for all. Uncertainty is computed with given standard normals, and none are drawn inside.

Letters: the gap (N,) is the first score less the second, label p is the chance that the first is better: 1, 0, 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.errors import ConfigError


def bradley_terry(gap: Tensor, label: Tensor, margin: float = 0.0) -> Tensor:
    """-p log sigma(gap - margin) - (1 - p) log sigma(-gap - margin)."""
    return -label * logsigmoid(gap - margin) - (1 - label) * logsigmoid(-gap - margin)


def with_ties(gap: Tensor, label: Tensor, k: float = 5.0) -> Tensor:
    """-log of the chance of what was told, where win, loss and tie are all possible; k > 1 is how common ties are."""
    if not k > 1:
        raise ConfigError(f"k is {k}, but ties need k above 1; towards 1 they vanish, and bradley_terry has none.")
    shift = math.log(k)
    win, lose = -logsigmoid(gap - shift), -logsigmoid(-gap - shift)
    tie = win + lose - math.log(k * k - 1)
    return torch.where(label == 0.5, tie, torch.where(label > 0.5, win, lose))


def uncertain(gap: Tensor, deviation: Tensor, label: Tensor, normals: Tensor) -> Tensor:
    """Bradley-Terry as a mean over noisy gaps: gap + deviation * normals (D, N), with the difference's deviation."""
    return bradley_terry(gap + deviation * normals, label).mean(0)


def pick(gap: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of the two-way softmax, less that of the label itself: 0 for a tie at equal scores."""
    return bradley_terry(gap, label) - (label == 0.5).to(gap) * math.log(2)


def ranked_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """Every ordered pair (better, worse) of a ranking, 1 is best; equal ranks make none."""
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]


def best_of_all(scores: Tensor, best: int) -> Tensor:
    """Cross-entropy of the softmax over all of a prompt's scores (n,): with two it is Bradley-Terry."""
    return torch.logsumexp(scores, 0) - scores[best]


def weighted(losses: Tensor, weights: Tensor, total: Tensor | float | None = None) -> Tensor:
    """The weighted mean of losses (N,); `total` is the weight of all processes, by default of these."""
    return (losses * weights).sum() / (weights.sum() if total is None else total)
