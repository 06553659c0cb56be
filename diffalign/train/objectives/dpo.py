"""DPO and KTO for diffusion: what people or rewards prefer is denoised better than by the reference, the rest worse.

Papers: "Diffusion Model Alignment Using Direct Preference Optimization", 2023 (arXiv 2311.12908); its form for flow
matching, Flow-DPO (arXiv 2501.13918); "Aligning Diffusion Models by Optimizing Human Utility" (Diffusion-KTO), 2024
(arXiv 2404.04465) as `loss: kto`. Pairs are drawn and scored on the way, the best and the worst of every prompt, or
come from `data`: search runs, votes of a gallery, preference files.

Where we differ: errors are means over elements and the loss has beta / 2, as in the published code of Diffusion-DPO;
the paper's factor T w(t) is a part of beta there and here. Noise levels are the sampler's own, drawn for each pair,
several at once where `draws` says so. A pair whose rewards are equal is no pair; for kto an image at the mean of its
prompt is neither liked nor disliked. With `reset_every` the reference
follows, and new pairs are drawn by the model of the moment. KTO's reference point is the mean over the
labelled images of an update and all processes.

`regularise` is T-REG, "T-REG: Preference Optimization with Token-Level Reward Regularization", 2024 (arXiv
2412.02685): the reference reads the prompt with a good and with a bad ending, and where the good one explains an
image's velocity better, the image is learnt more at that level. There: words and their probabilities; here: noise
levels and errors, whose difference is divided by its deviation on the images of the first step. A negative
opinion counts a tenth, as an error has no upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.errors import ConfigError
from diffalign.train.advantage import Advantages
from diffalign.train.forward import ForwardProcess
from diffalign.train.groups import group_sums, in_turn
from diffalign.train.job import Job
from diffalign.train.rehearsal import Rehearsal
from diffalign.train.renoised import Clean, ForwardConfig, NoAnchor, Place, Seen, mean_error


@dataclass(frozen=True, kw_only=True)
class RegulariseConfig:
    """How much the reference's opinion of each noise level counts; 0 is plain DPO."""

    weight: float = 0.0  # of the images' errors beside the loss of the pair, whose scale is beta's
    better: str = ", in the best quality"  # what the good prompt ends with
    worse: str = ", blurred, broken and wrong"  # and the bad one
    against: float = 0.1  # weight of negative opinions

    def __post_init__(self) -> None:
        if not (0 <= self.weight < math.inf and 0 <= self.against <= 1):
            raise ConfigError(
                f"regularise has weight {self.weight} and against {self.against}: 0 or more, and a share."
            )


@dataclass(frozen=True, kw_only=True)
class DPOConfig(ForwardConfig):
    """How much better than the reference counts how much."""

    loss: Literal["dpo", "kto"] = "dpo"  # of pairs, or of single images that are liked or not
    beta: float = 2000.0  # of mean squared errors; 100 is usual for flow models with a LoRA
    reset_every: int = 0  # steps after which the reference becomes the model of the moment; 0 never
    liked: float = 1.0  # kto: weight of liked images
    disliked: float = 1.0  # kto: and of the others
    draws: int = 1  # noise levels of each pair
    anchor: NoAnchor = field(default_factory=NoAnchor)
    regularise: RegulariseConfig = field(default_factory=RegulariseConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regularise.weight and self.loss == "kto":
            raise ConfigError("regularise weighs the two of a pair, and kto has single images. Use loss: dpo.")
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"beta is {self.beta}, but it must be above 0. 2000 to 5000 are usual, 100 for flow.")
        if self.reset_every < 0 or min(self.liked, self.disliked) < 0:
            raise ConfigError(
                f"reset_every is {self.reset_every}, liked {self.liked} and disliked {self.disliked}: none is below 0."
            )
        if self.loss == "dpo" and (self.liked, self.disliked) != (1.0, 1.0):
            raise ConfigError("liked and disliked weigh single images, which loss: kto has. Leave them out with dpo.")


def pair_loss(gap: Tensor, beta: float) -> Tensor:
    """-log sigmoid(-(beta / 2) gap), where gap (B,) is the winner's error beyond the reference's less the loser's."""
    return -logsigmoid(-beta / 2 * gap)


def utility_loss(gain: Tensor, sign: Tensor, centre: Tensor | float, beta: float) -> Tensor:
    """1 - sigmoid(sign beta (gain - centre)) of images (B,), liked (sign 1) or not (-1)."""
    return 1 - torch.sigmoid(sign * beta * (gain - centre))


def opinion(better: Tensor, worse: Tensor, spread: float) -> Tensor:
    """sigmoid((worse - better) / spread) - 1/2 in [-1/2, 1/2] of errors (B,) under a good and a bad prompt."""
    return torch.sigmoid((worse - better) / spread) - 0.5 if spread > 0 else torch.zeros_like(better)


def ends(advantage: Tensor, kept: Tensor, groups: Tensor) -> Tensor:
    """(B,) 1 for the best row of each group, -1 for its worst, 0 for all others and where none is better."""
    sign = torch.zeros(len(groups))
    for group in sorted(set(groups.tolist())):
        rows = ((groups == group) & kept).nonzero().flatten()
        if len(rows) > 1 and float(advantage[rows].max()) > float(advantage[rows].min()):
            sign[rows[advantage[rows].argmax()]], sign[rows[advantage[rows].argmin()]] = 1.0, -1.0
    return sign


class DPO(ForwardProcess):
    """Preferences as differences of denoising errors."""

    name: ClassVar[str] = "dpo"
    settings: ClassVar[type[DPOConfig]] = DPOConfig
    OLD: ClassVar[tuple[str, ...]] = ("reference",)
    COMPARES: ClassVar[str] = "reference"
    figures: ClassVar[tuple[str, ...]] = ("winner", "loser", "agrees")
    config: DPOConfig

    def check(self, job: Job) -> None:
        super().check(job)
        size = job.config.group_size
        if self.config.loss == "dpo" and job.config.micro_batch % size:
            raise ConfigError(
                f"micro_batch is {job.config.micro_batch}, but the two of a pair are learnt together: use a multiple "
                f"of group_size, {size}."
            )

    def __init__(self, config: DPOConfig) -> None:
        super().__init__(config)
        self.spreads: dict[str, float] = {}  # of the reference's opinion, by the loop index of the level

    def state(self) -> dict[str, Any]:
        return super().state() | ({"spreads": self.spreads} if self.config.regularise.weight else {})

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore({name: each for name, each in state.items() if name != "spreads"})
        self.spreads = dict(state.get("spreads", {}))

    def prepare(self, job: Job) -> None:
        """Measure how much the two prompts differ at each level, on the images of a first step."""
        if not self.config.regularise.weight or self.spreads:
            return
        micros, _ = self.sampled(job, 0, job.cases_of(0))
        for i in self.places(job):
            gaps = []
            for micro in micros:
                micro.groups, micro.weight = torch.arange(len(micro)), torch.ones(len(micro))
                micro.levels = [torch.full((len(micro),), i)]
                gaps += [worse - better for better, worse in self.contrasted(job, micro).values()]
            self.spreads[str(i)] = float(job.gather(torch.cat(gaps).cpu()).std(correction=0))

    def rehearse(self, job: Job) -> Rehearsal:
        self.prepare(job)
        return super().rehearse(job)

    def contrasted(self, job: Job, micro: Clean) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """The reference's errors (b,) under the good and the bad prompt, by draw and first row of every place."""
        told, errors = self.config.regularise, list[dict[tuple[int, int], Tensor]]()
        for ending in (told.better, told.worse):
            driver = self.learner(job, [replace(case, prompt=case.prompt + ending) for case in micro.cases])
            with torch.no_grad(), self.old(job, "reference"):
                errors.append({
                    (place.draw, int(place.rows[0])): mean_error(
                        self.seen_by(place, driver.select(place.rows.tolist())), place.target
                    )
                    for place in self.visited(job, micro)
                })  # fmt: skip
        return {key: (errors[0][key], errors[1][key]) for key in errors[0]}

    def remember(self, job: Job, micro: Clean) -> None:
        super().remember(job, micro)
        if self.config.regularise.weight and not micro.contrasted:
            micro.contrasted = self.contrasted(job, micro)

    def follow(self, job: Job, step: int) -> None:
        reference = self._olds(job)["reference"]
        if step and self.config.reset_every and step % self.config.reset_every == 0:
            reference.follow(0.0)

    def deal(self, job: Job, step: int, micros: Sequence[Clean], rewards: Tensor, found: Advantages) -> None:
        super().deal(job, step, micros, rewards, found)
        if self.config.loss == "kto":
            sign = torch.where(found.kept, found.values, 0.0).sign()  # of all processes; the mean is neither
        else:
            sign = ends(found.values, found.kept, job.group_ids)
        weight = (sign != 0).float() * len(sign) / max(int((sign != 0).sum()), 1)
        if self.config.loss == "kto":
            weight = weight * torch.where(sign > 0, self.config.liked, self.config.disliked)
        sign, weight = job.own(sign), job.own(weight)
        for micro, rows in in_turn(micros):
            micro.weight, micro.notes = weight[rows], {"sign": sign[rows]}

    def noise_seeds(self, micro: Clean) -> Sequence[int]:
        """A pair has one noise: that of the first image of its prompt; for kto each image has its own."""
        if self.config.loss == "kto":
            return micro.driver.seeds
        pairs = list(zip(micro.groups.tolist(), micro.driver.seeds, strict=True))
        first = dict(reversed(pairs))
        return [first[group] for group in micro.groups.tolist()]

    def refresh(self, job: Job, micros: Sequence[Clean]) -> None:
        """KTO's reference point: by how much more than the reference the model likes the images, on average."""
        if self.config.loss != "kto":
            return
        sums, counts = torch.zeros(self.config.draws, dtype=torch.float64), torch.zeros(self.config.draws)
        for micro in micros:
            self.remember(job, micro)
            with torch.no_grad():
                for place, old in zip(self.visited(job, micro), micro.kept["reference"], strict=True):
                    gain = -self.excess(place, self.seen_by(place, place.driver), old)
                    counted = (micro.notes["sign"][place.rows] != 0).to(gain)
                    sums[place.draw] += float((gain * counted).sum())
                    counts[place.draw] += float(counted.sum())
        both = job.gather(torch.stack([sums, counts.double()])[None]).sum(0)
        centre = (both[0] / both[1].clamp_min(1)).clamp_min(0)
        for micro in micros:
            micro.centre = list(centre)

    def excess(self, place: Place, prediction: Tensor, old: Tensor) -> Tensor:
        """By how much the model's error (b,) at a place is beyond the reference's."""
        return mean_error(prediction, place.target) - mean_error(old, place.target)

    def loss(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        assert seen.old is not None
        place, micro = seen.place, seen.micro
        excess, sign = self.excess(place, seen.prediction, seen.old), seen.of(micro.notes["sign"]).double()
        told = {"winner": (excess * (sign > 0) * 2).detach(), "loser": (excess * (sign < 0) * 2).detach()}
        if self.config.loss == "kto":
            centre = micro.centre[place.draw].to(excess) if micro.centre else 0.0
            liked = (-excess - centre) * sign > 0
            return utility_loss(-excess, sign, centre, self.config.beta).float(), told | {"agrees": liked.float()}
        gap = group_sums(sign * excess, micro.groups[place.rows])
        loss = pair_loss(gap, self.config.beta)
        if self.config.regularise.weight:
            loss = loss + self.regular(seen, gap.detach())
        return loss.float(), told | {"agrees": (gap < 0).float()}

    def regular(self, seen: Seen, gap: Tensor) -> Tensor:
        """T-REG's part of the loss (b,): errors weighed by opinions, where the pair is not told apart yet."""
        place, told = seen.place, self.config.regularise
        better, worse = seen.micro.contrasted[place.draw, int(place.rows[0])]
        says = opinion(better, worse, self.spreads[str(place.i)])
        says = torch.where(says < 0, told.against * says, says)
        unsure = torch.sigmoid(self.config.beta / 2 * gap)
        error = mean_error(seen.prediction, place.target)
        return 2 * told.weight * self.config.beta / 2 * unsure * says.to(error) * error


OBJECTIVE = DPO
