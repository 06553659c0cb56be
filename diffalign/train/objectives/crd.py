"""CRD: the implicit reward of a denoising error is matched to the outer reward, both centred within a prompt.

Paper: "Diffusion Reinforcement Learning via Centered Reward Distillation", Zhu, Wang, Lathuiliere and Kalogeiton, 2026
(arXiv 2603.14128). How much better than earlier weights the model denoises an image stands for the log-ratio of a
KL-regularised optimum; its unknown normaliser is the same for all images of a prompt, and centring drops it.

Where we differ: means are always over the images of one prompt, also where a batch holds several or a prompt spans
several batches; earlier weights are the factors of a LoRA, followed one by one. Noise levels are drawn for each prompt
and not for each batch, so that what is learnt does not depend on how images are batched; the loss is the mean over
them. The paper's body was not at hand: what its abstract leaves open are settings (`anchor.by: share` is how the
authors' code reads it, `reward` how the abstract does). `temperature` weighs by shares in [0, 1], which leaves out the
published special case of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.shaping.groups import numbered
from diffalign.train.advantage import Advantages
from diffalign.train.forward import ForwardProcess
from diffalign.train.groups import group_sums, in_turn, require_whole_groups
from diffalign.train.job import Job
from diffalign.train.renoised import (
    AnchorConfig,
    Clean,
    FollowConfig,
    ForwardConfig,
    Place,
    Seen,
    mean_error,
    scale_of,
)


@dataclass(frozen=True, kw_only=True)
class CRDAnchor(AnchorConfig):
    """Good images are held more."""

    weight: float = 0.1
    by: Literal["none", "share", "reward"] = "share"


@dataclass(frozen=True, kw_only=True)
class CRDOld(FollowConfig):
    """The weights that implicit rewards are measured from."""

    first: float = 0.25
    slope: float = 0.005
    last: float = 0.999


@dataclass(frozen=True, kw_only=True)
class CRDDrawing(FollowConfig):
    """The weights that draw."""

    start: int = 75
    slope: float = 0.0075
    last: float = 0.999


@dataclass(frozen=True, kw_only=True)
class CRDConfig(ForwardConfig):
    """How rewards are matched, what the model is compared with, and what holds it near its base."""

    beta: float = 1.0  # reward differences per unit of implicit reward; smaller lets the model move further
    match: Literal["square", "bce"] = "square"  # how the two differences are compared
    temperature: float | None = None  # centre on good images, then on bad ones, this sharply; none centres on the mean
    adaptive: bool = True  # divide each model's error by its own size
    draws: int = 20  # noise levels of each image
    old: CRDOld = field(default_factory=CRDOld)
    drawing: CRDDrawing = field(default_factory=CRDDrawing)
    anchor: CRDAnchor = field(default_factory=CRDAnchor)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ConfigError(f"beta is {self.beta}, but it must be above 0. 1 is usual.")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(
                f"temperature is {self.temperature}, but it must be above 0. Leave it out for plain means."
            )


def implicit(prediction: Tensor, old: Tensor, target: Tensor, *, adaptive: bool = True) -> Tensor:
    """How much better than `old` the model predicts `target`: (B,) float64, with the gradient of `prediction`."""
    now, before = mean_error(prediction, target), mean_error(old, target)
    if adaptive:
        now, before = now / scale_of(prediction, target), before / scale_of(old, target)
    return before - now


def pulls(share: Tensor, groups: Tensor, valid: Tensor, temperature: float | None) -> Tensor:
    """Weights (B, W) of the means that images are compared with; those of a group's valid images sum to 1."""
    tilts = (0.0,) if temperature is None else (1 / temperature, -1 / temperature)
    columns = []
    for tilt in tilts:
        high = group_max(tilt * share.double(), groups)  # softmax, without what overflows
        weight = (tilt * share.double() - high).exp() * valid.double()
        columns.append(weight / group_sums(weight, groups).clamp_min(1e-300))
    return torch.stack(columns, 1)


def group_max(values: Tensor, groups: Tensor) -> Tensor:
    """For every row of values (B,) the largest of its group."""
    place = numbered(groups)
    found = values.new_full((int(place.max()) + 1,), -torch.inf)
    return found.scatter_reduce(0, place, values, "amax")[place]


def matched(gain: Tensor, wanted: Tensor, beta: float, match: str) -> Tensor:
    """The loss (B, W) of centred implicit rewards for the centred rewards that are wanted."""
    if match == "square":
        return (beta * gain - wanted).square()
    return torch.nn.functional.binary_cross_entropy_with_logits(beta * gain, wanted.sigmoid(), reduction="none")


class CRD(ForwardProcess):
    """Rewards distilled into differences of denoising errors."""

    name: ClassVar[str] = "crd"
    settings: ClassVar[type[CRDConfig]] = CRDConfig
    OLD: ClassVar[tuple[str, ...]] = ("old", "drawing")
    SAMPLES: ClassVar[str] = "drawing"
    COMPARES: ClassVar[str] = "old"
    figures: ClassVar[tuple[str, ...]] = ("implicit",)
    config: CRDConfig

    def check(self, job: Job) -> None:
        super().check(job)
        require_whole_groups(job, self.name)

    def deal(self, job: Job, step: int, micros: Sequence[Clean], rewards: Tensor, found: Advantages) -> None:
        super().deal(job, step, micros, rewards, found)
        share, groups, weight = Clean.joined(micros, "share", "groups", "weight")
        pull = pulls(share, groups, weight > 0, self.config.temperature)
        wanted = share.double()[:, None] - group_sums(pull * share.double()[:, None], groups)
        for micro, rows in in_turn(micros):
            micro.notes = {"pull": pull[rows], "wanted": wanted[rows]}

    def refresh(self, job: Job, micros: Sequence[Clean]) -> None:
        """The mean implicit reward of prompts whose images stand in several micro-batches."""
        held = [set(micro.groups.tolist()) for micro in micros]
        if sum(map(len, held)) == len(set[int]().union(*held)):
            return
        found = []
        for micro in micros:
            self.remember(job, micro)
            gains = torch.zeros(len(micro.levels), len(micro), dtype=torch.float64)
            with torch.no_grad():
                for place, old in zip(self.visited(job, micro), micro.kept["old"], strict=True):
                    gains[place.draw, place.rows] = self.gain(place, self.seen_by(place, place.driver), old).cpu()
            found.append(gains)
        pull, groups = torch.cat([m.notes["pull"] for m in micros]), torch.cat([m.groups for m in micros])
        centres = [group_sums(pull * gain[:, None], groups) for gain in torch.cat(found, 1)]  # draws x (B, W)
        for micro, rows in in_turn(micros):
            micro.centre = [centre[rows] for centre in centres]

    def gain(self, place: Place, prediction: Tensor, old: Tensor) -> Tensor:
        """The implicit reward (b,) at a place."""
        return implicit(prediction, old, place.target, adaptive=self.config.adaptive)

    def loss(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        assert seen.old is not None
        place, micro = seen.place, seen.micro
        gain = self.gain(place, seen.prediction, seen.old)[:, None]
        if micro.centre:
            centre = micro.centre[place.draw][place.rows].to(gain.device)
        else:
            pull = micro.notes["pull"][place.rows].to(gain.device)
            centre = group_sums(pull * gain.detach(), micro.groups[place.rows])
        wanted = micro.notes["wanted"][place.rows].to(gain.device)
        loss = matched(gain - centre, wanted, self.config.beta, self.config.match).mean(1)
        scale = seen.advantage_clip / self.config.beta
        return (loss * scale).float(), {"implicit": gain[:, 0].abs()}


OBJECTIVE = CRD
