"""Whether a calibrated mixture picks as well as the best hand-tuned weight of two rewards, by a truth of its own.

Per prompt the best image by `first + w second` is picked for every weight w of a wide grid, and the best by the
mixture. The tuned weight is judged twice: as the best of the grid on the very prompts it is judged on, which flatters
it, and chosen on one half of the prompts and judged on the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.intervals import bootstrap

Row = Mapping[str, Any]


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
    """Truth of the picks by either reward alone, by tuned weights, and by the mixture."""
    groups, dropped = grouped(rows, columns)
    weights = weight_grid(groups, points)
    picked = torch.stack([_picks(groups, float(w)) for w in weights])  # (W, P)
    mixture = torch.tensor([float(g[3][g[2].argmax()]) for g in groups])
    tuned = _tuned_elsewhere(picked)
    best = int(picked.mean(1).argmax())
    draw = torch.tensor([float(g[3].mean()) for g in groups])
    found = {
        "any image": draw,
        columns.first: picked[0],
        columns.second: picked[-1],
        "best weight, tuned on these prompts": picked[best],
        "best weight, tuned on the other half": tuned,
        columns.mixture: mixture,
        "best image there is": torch.tensor([float(g[3].max()) for g in groups]),
    }
    against = {name: bootstrap((mixture - values).tolist()).json() for name, values in found.items()}
    return {
        "prompts": len(groups),
        "images": sum(len(g[0]) for g in groups),
        "dropped": dropped,
        "best_weight": float(weights[best]),
        "scales": {columns.first: _spread(groups, 0), columns.second: _spread(groups, 1)},
        "truth": {name: bootstrap(values.tolist()).json() for name, values in found.items()},
        "mixture_minus": {name: gain for name, gain in against.items() if name != columns.mixture},
    }


def grouped(rows: Sequence[Row], columns: Columns) -> tuple[list[Tensor], int]:
    """A (4, K) float64 tensor for each prompt with two images or more; images with an invalid score are left out."""
    found: dict[str, list[list[float]]] = {}
    dropped = 0
    for row in rows:
        if missing := [name for name in columns.names if name not in row]:
            raise ConfigError(f"there is no column '{missing[0]}' in the scores. It has: {', '.join(map(str, row))}.")
        values = [row[name] for name in columns.names]
        if any(value is None for value in values):
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


def _picks(groups: Sequence[Tensor], weight: float) -> Tensor:
    """The truth (P,) of the image with the highest weighted sum of each prompt."""
    sums = (g[1] if math.isinf(weight) else g[0] + weight * g[1] for g in groups)
    return torch.tensor([float(g[3][s.argmax()]) for g, s in zip(groups, sums, strict=True)])


def _tuned_elsewhere(picked: Tensor) -> Tensor:
    """Every prompt judged by the weight that was best on the half it is not in; halves are even and odd prompts."""
    judged = torch.empty_like(picked[0])
    for half in (0, 1):
        judged[half::2] = picked[picked[:, 1 - half :: 2].mean(1).argmax(), half::2]
    return judged


def _spread(groups: Sequence[Tensor], column: int) -> float:
    """The pooled deviation within prompts."""
    return float(torch.cat([g[column] - g[column].mean() for g in groups]).std(correction=0))
