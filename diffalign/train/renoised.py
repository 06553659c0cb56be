"""Finished images, made noisy again: where, with which noise, and what models predict there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.drive import Driver
from diffalign.errors import ConfigError
from diffalign.noise import Levels

LEAST_SCALE = 1e-5  # of an error that others are divided by


@dataclass(frozen=True, kw_only=True)
class FollowConfig:
    """How slowly earlier weights follow: the share kept after a step, by the updates k that were made.

    `first` before `start`, then first + slope (k - start), at most `last`. 0 copies the weights, 1 never moves.
    """

    start: int = 0
    first: float = 0.0
    slope: float = 0.001
    last: float = 0.5

    def __post_init__(self) -> None:
        if not (0 <= self.first <= 1 and 0 <= self.last <= 1 and self.slope >= 0 and self.start >= 0):
            raise ConfigError(
                f"a share of earlier weights goes from first {self.first} to last {self.last} by slope {self.slope} "
                f"from update {self.start} on: shares lie in [0, 1], the others are not below 0."
            )

    def at(self, updates: int) -> float:
        """The share kept after so many updates."""
        return self.first if updates < self.start else min(self.first + self.slope * (updates - self.start), self.last)


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """A penalty on how far predictions are from the base model's."""

    weight: float = 1e-4
    guidance: float | None = None  # scale at which the base model predicts; none is that of training
    by: Literal["none", "share", "reward"] = "none"  # hold good images more: by their share in the group, or the reward
    least: float = 1e-4  # weight of the worst image, where `by` is not none

    def __post_init__(self) -> None:
        if not (0 <= self.weight < math.inf and self.least >= 0):
            raise ConfigError(
                f"anchor has weight {self.weight} and least {self.least}, but a penalty's weight is at least 0."
            )
        if self.guidance is not None and not self.guidance > 0:
            raise ConfigError(f"anchor.guidance is {self.guidance}, but a guidance scale is above 0. 1 is none.")

    def weights(self, share: Tensor, reward: Tensor) -> Tensor:
        """The penalty's weight (B,) of images with these shares in [0, 1] and raw rewards."""
        if self.by == "none":
            return torch.full_like(share, self.weight)
        goodness = share if self.by == "share" else reward.nan_to_num(0.0).clamp(0, 1)
        return self.least + goodness * (self.weight - self.least)


@dataclass(frozen=True, kw_only=True)
class NoAnchor(AnchorConfig):
    """None, unless one asks for it."""

    weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """Where images are made noisy again."""

    draws: int = 4  # noise levels of each image; with as many as the sampler has, each of them once
    least_noise: float = 0.01  # levels with a smaller share of noise are left out
    guided: bool = False  # learn what guidance makes of two branches, instead of the prediction for the prompt alone
    anchor: AnchorConfig = field(default_factory=AnchorConfig)

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ConfigError(f"draws is {self.draws}, but an image teaches at 1 or more noise levels.")
        if not 0 < self.least_noise < 1:
            raise ConfigError(f"least_noise is {self.least_noise}, but a share of noise lies between 0 and 1.")


@dataclass
class Clean:
    """A micro-batch of finished images."""

    driver: Driver
    cases: Sequence[Case]
    latents: Tensor  # (B, ...) float32, as the sampler's loop left them
    media: Tensor  # (B, [F,] 3, H, W) in [0, 1]; empty once it is scored
    groups: Tensor = field(default_factory=lambda: torch.empty(0))  # (B,) over all processes
    reward: Tensor = field(default_factory=lambda: torch.empty(0))  # (B,) NaN where there is none
    advantage: Tensor = field(default_factory=lambda: torch.empty(0))  # (B,)
    share: Tensor = field(
        default_factory=lambda: torch.empty(0)
    )  # (B,) the advantage in [0, 1]; 1/2 is the group's mean
    weight: Tensor = field(default_factory=lambda: torch.empty(0))  # (B,) in the policy loss; 0 without a reward
    levels: list[Tensor] = field(default_factory=list)  # draws x (B,) loop indices
    centre: list[Tensor] = field(default_factory=list)  # draws x (B, ...): means over groups that span micro-batches
    notes: dict[str, Tensor] = field(default_factory=dict)  # (B, ...) whatever else the objective knows of an image
    kept: dict[str, list[Tensor]] = field(default_factory=dict)  # predictions of other weights, until the last pass
    contrasted: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)  # errors (b,) of two prompts
    passes: int = 0  # how often it was learnt from
    clip: float = 5.0  # of advantages

    def __len__(self) -> int:
        return len(self.cases)

    @staticmethod
    def joined(micros: Sequence[Clean], *names: str) -> list[Tensor]:
        """Each of these columns over all micro-batches."""
        return [torch.cat([getattr(micro, name) for micro in micros]) for name in names]


@dataclass(frozen=True)
class Place:
    """Rows of a micro-batch that are made noisy at one level."""

    draw: int
    i: int  # loop index of the level
    rows: Tensor
    driver: Driver
    clean: Tensor  # (b, ...)
    noise: Tensor  # (b, ...)

    @property
    def noisy(self) -> Tensor:
        return self.driver.levels.noised(self.clean, self.noise, self.i)

    @property
    def target(self) -> Tensor:
        """What a perfect model would predict here."""
        return self.driver.levels.target(self.clean, self.noise, self.i)


@dataclass(frozen=True)
class Seen:
    """What a loss reads: one place of a micro-batch with its predictions."""

    micro: Clean
    place: Place
    prediction: Tensor  # (b, ...) float32 with its gradient
    old: Tensor | None  # of earlier weights
    base: Tensor | None  # of the base model, where an anchor needs it

    @property
    def levels(self) -> Levels:
        return self.place.driver.levels

    @property
    def advantage_clip(self) -> float:
        return self.micro.clip

    def of(self, values: Tensor) -> Tensor:
        """The rows of this place of values (B,), beside the prediction."""
        return values[self.place.rows].to(self.prediction)


def mean_error(a: Tensor, b: Tensor) -> Tensor:
    """The mean squared difference over elements (B,), float64."""
    return (a.double() - b.double()).square().flatten(1).mean(1)


def scale_of(a: Tensor, b: Tensor) -> Tensor:
    """The mean absolute difference over elements (B,), float64, without a gradient and never nearly 0."""
    return (a.detach().double() - b.double()).abs().flatten(1).mean(1).clamp_min(LEAST_SCALE)


def stratified(count: int, draws: int, shift: Tensor) -> list[Tensor]:
    """`draws` of `count` places, one from each of as many equal strata; `shift` (n, draws) in [0, 1) says where."""
    found = ((torch.arange(draws) + shift.double()) * count / draws).floor().long().clamp(0, count - 1)  # (n, draws)
    return list(found.T)
