"""Whether a calibrated mixture picks as well as the best hand-tuned weight of two rewards, by a truth of its own.

Per prompt the best image by `first + w second` is picked for every weight w of a wide grid, and the best by the
mixture; and for every two images of which one is better, which one the scores prefer. The tuned weight is judged
twice: as the best of the grid on the very prompts it is judged on, which flatters it, and chosen on one half of the
prompts and judged on the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.intervals import bootstrap

Row = Mapping[str, Any]
Measure = Callable[[Tensor, Tensor], float]  # scores (K,) and truth (K,) of one prompt


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table of scores take part."""

    first: str
    second: str
    mixture: str
    truth: str

    @property
    def names(self) -> tuple[str, str, str, str]:
        return self.first, self.second, self.mixture, self.truth


def compare(rows: Sequence[Row], columns: Columns, *, points: int = 161) -> dict[str, Any]:
    """By either reward alone, by tuned weights and by the mixture: the truth of the best, and pairs told apart."""
    groups, dropped = grouped(rows, columns)
    weights = weight_grid(groups, points)
    split = [g for g in groups if g[3].min() < g[3].max()]  # prompts with a better and a worse image
    if len(split) < 2:
        raise ConfigError(f"only {len(split)} prompts have images that '{columns.truth}' tells apart; 2 are the least.")
    return {
        "prompts": len(groups),
        "prompts_with_pairs": len(split),
        "images": sum(g.shape[1] for g in groups),
        "dropped": dropped,
        "scales": {columns.first: _spread(groups, 0), columns.second: _spread(groups, 1)},
        "best": _measured(groups, weights, columns, truth_of_best),
        "pairs": _measured(split, weights, columns, pairs_right),
    }


def truth_of_best(scores: Tensor, truth: Tensor) -> float:
    """The truth of the image with the highest score (K,); several at the top are drawn from."""
    return float(truth[scores == scores.max()].mean())


def pairs_right(scores: Tensor, truth: Tensor) -> float:
    """The share of pairs of different truth in which the better image has the higher score; a tie is half."""
    better = truth[:, None] > truth  # (K, K)
    found: Tensor = (scores[:, None] > scores).double() + 0.5 * (scores[:, None] == scores)
    return float(found[better].mean())


def _measured(groups: Sequence[Tensor], weights: Tensor, columns: Columns, measure: Measure) -> dict[str, Any]:
    """Mean and interval over prompts for everything that can pick, and the mixture's gain over each."""
    judged = torch.tensor([[measure(_sum(g, float(w)), g[3]) for g in groups] for w in weights])  # (W, P)
    mixture = torch.tensor([measure(g[2], g[3]) for g in groups])
    best = int(judged.mean(1).argmax())
    found = {
        "chance": torch.tensor([float(g[3].mean()) if measure is truth_of_best else 0.5 for g in groups]),
        columns.first: judged[0],
        columns.second: judged[-1],
        "best weight, tuned on these prompts": judged[best],
        "best weight, tuned on the other half": _tuned_elsewhere(judged),
        columns.mixture: mixture,
    }
    gains = {name: bootstrap((mixture - values).tolist()).json() for name, values in found.items()}
    return {
        "truth": {name: bootstrap(values.tolist()).json() for name, values in found.items()},
        "mixture_minus": {name: gain for name, gain in gains.items() if name != columns.mixture},
        "best_weight": float(weights[best]),
    }


def grouped(rows: Sequence[Row], columns: Columns) -> tuple[list[Tensor], int]:
    """A (4, K) float64 tensor for each prompt with two images or more; images with an invalid score are left out."""
    found: dict[str, list[list[float]]] = {}
    dropped = 0
    for row in rows:
        if missing := [name for name in columns.names if name not in row]:
            raise ConfigError(f"there is no column '{missing[0]}' in the scores. It has: {', '.join(map(str, row))}.")
        values = [row[name] for name in columns.names]
        if any(value is None or not math.isfinite(float(value)) for value in values):
            dropped += 1
        else:
            found.setdefault(str(row["prompt"]), []).append([float(value) for value in values])
    groups = [torch.tensor(each, dtype=torch.float64).T for each in found.values() if len(each) > 1]
    if len(groups) < 2:
        raise ConfigError("a comparison needs at least 2 prompts with 2 valid images each.")
    return groups, dropped


def weight_grid(groups: Sequence[Tensor], points: int) -> Tensor:
    """From the first reward alone to the second alone, four decades to either side of equal spread."""
    middle = _spread(groups, 0) / max(_spread(groups, 1), 1e-30)
    inner = torch.logspace(-4, 4, points, dtype=torch.float64) * middle
    return torch.cat([torch.zeros(1, dtype=torch.float64), inner, torch.tensor([math.inf], dtype=torch.float64)])


def _sum(group: Tensor, weight: float) -> Tensor:
    return group[1] if math.isinf(weight) else group[0] + weight * group[1]


def _tuned_elsewhere(judged_by: Tensor) -> Tensor:
    """Every prompt judged by the weight that was best on the half it is not in; halves are even and odd prompts."""
    judged = torch.empty_like(judged_by[0])
    for half in (0, 1):
        judged[half::2] = judged_by[judged_by[:, 1 - half :: 2].mean(1).argmax(), half::2]
    return judged


def _spread(groups: Sequence[Tensor], column: int) -> float:
    """The pooled deviation within prompts."""
    return float(torch.cat([g[column] - g[column].mean() for g in groups]).std(correction=0))
