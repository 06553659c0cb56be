"""What of an evaluation is kept: a few numbers per image, enough to compare every later one with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.train import diversity, signatures

if TYPE_CHECKING:
    from diffalign.train.watch import Evaluation

ROWS = ("own", "others")
NUMBERS = ("within", "across", "vendi")


@dataclass(frozen=True, kw_only=True)
class Look:
    """All that the rules read of an evaluation."""

    prompts: Tensor  # (N,) int64
    proxy: Tensor  # (N,) float64, as all below
    panel: dict[str, Tensor]
    truth: Tensor | None
    prompt_margin: Tensor | None
    tower: bool  # whether the features were given
    statistics: dict[str, Tensor]
    own: Tensor  # mean distance to the other images of the prompt
    others: Tensor  # mean distance to the images of other prompts
    within: float
    across: float
    vendi: float

    @classmethod
    def at(cls, seen: Evaluation) -> Look:
        features = diversity.plain_features(seen.media) if seen.features is None else seen.features
        prompts, variety = seen.prompts.cpu(), diversity.measure(features.detach().cpu(), seen.prompts.cpu())
        statistics = signatures.measure(seen.media) | {"nearest": signatures.crowding(variety.nearest)}
        return cls(
            prompts=prompts,
            proxy=_plain(seen.proxy),
            panel={name: _plain(values) for name, values in seen.panel.items()},
            truth=_optional(seen.truth),
            prompt_margin=_optional(seen.prompt_margin),
            tower=seen.features is not None,
            statistics=statistics,
            own=variety.own,
            others=variety.others,
            within=variety.within,
            across=variety.across,
            vendi=variety.vendi,
        )

    def json(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts.tolist(),
            "proxy": _listed(self.proxy),
            "panel": {name: _listed(values) for name, values in self.panel.items()},
            "truth": None if self.truth is None else _listed(self.truth),
            "prompt_margin": None if self.prompt_margin is None else _listed(self.prompt_margin),
            "tower": self.tower,
            "statistics": {name: _listed(values) for name, values in self.statistics.items()},
            **{name: _listed(getattr(self, name)) for name in ROWS},
            **{name: number(getattr(self, name)) for name in NUMBERS},
        }

    @classmethod
    def of_json(cls, told: Mapping[str, Any]) -> Look:
        return cls(
            prompts=torch.tensor(told["prompts"], dtype=torch.int64),
            proxy=_read(told["proxy"]),
            panel={name: _read(values) for name, values in told["panel"].items()},
            truth=None if told["truth"] is None else _read(told["truth"]),
            prompt_margin=None if told["prompt_margin"] is None else _read(told["prompt_margin"]),
            tower=bool(told["tower"]),
            statistics={name: _read(values) for name, values in told["statistics"].items()},
            own=_read(told["own"]),
            others=_read(told["others"]),
            **{name: math.nan if told[name] is None else float(told[name]) for name in NUMBERS},
        )


def number(value: float) -> float | None:
    """As JSON holds it: NaN and infinity are not there."""
    return value if math.isfinite(value) else None


def _optional(values: Tensor | None) -> Tensor | None:
    return None if values is None else _plain(values)


def _plain(values: Tensor) -> Tensor:
    """As JSON can hold them: an infinite value is invalid too."""
    values = values.detach().double().cpu()
    return torch.where(values.isfinite(), values, torch.nan)


def _listed(values: Tensor) -> list[float | None]:
    return [number(value) for value in values.tolist()]


def _read(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
