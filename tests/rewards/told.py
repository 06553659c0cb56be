"""A reward that says what the metadata says, and cases, media and comparisons for rewards made of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.scoring import Score, score

NAN = torch.nan


class Told:
    """Says what the metadata says under its name, plus nothing that depends on pixels; remembers which rows it saw."""

    modality, version, options = "image", None, {}

    def __init__(self, name: str, differentiable: bool = True, ends: tuple[float, float] | None = (0.0, 1.0)) -> None:
        self.name, self.differentiable, self.range = name, differentiable, ends
        self.seen: list[str] = []

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        self.seen += [case.prompt for case in cases]
        told = torch.tensor([float(case.metadata.get(self.name, NAN)) for case in cases])
        sure = torch.tensor([float(case.metadata.get("sure", NAN)) for case in cases])
        return Score(told + 0 * media.flatten(1).sum(1), {"sure": sure, "twice": 2 * told})


def cases_of(**columns: list[Any]) -> list[Case]:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [Case(prompt=f"p{k}", metadata=row) for k, row in enumerate(rows)]


def media_of(rows: int) -> Tensor:
    return torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def rated(reward: Any, cases: list[Case]) -> Score:
    return score(reward, media_of(len(cases)), cases, all_invalid=True)


def same(found: Tensor, *expected: float) -> bool:
    return torch.allclose(found, torch.tensor(expected, dtype=torch.float32), atol=1e-6, equal_nan=True)
