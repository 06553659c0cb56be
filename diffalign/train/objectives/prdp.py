"""PRDP: log-ratios of walks predict their rewards, by regression on the differences within a prompt.

Paper: "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models", Deng, Wang,
Wei, Grundmann and Hou, CVPR 2024 (arXiv 2402.08714). Of two walks for one prompt the difference of log-ratios to the
base model must be the difference of rewards over beta; where it is for all pairs, the model is the optimum of the
KL-regularised reward. Ratios that leave those of the weights that drew the walk by more than `clip` count as clipped,
and the larger of the two losses is taken, per pair.

The loss is a function of few numbers, the log-densities of images and steps, so its slope is found first and every step
is then replayed by itself with that slope: the exact gradient at the memory of one step.

Where we differ: any kernel of `noise` and any flow model, not DDPM alone; windows of trained steps, whose other steps
have no noise and the ratio 1. Rewards that are equal make no pair, as in the paper's code; with `pairs: all` the two
walks of such a pair are drawn together, as in its text. An image without a reward is in no pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.noise import Convention
from diffalign.train.credit import CreditConfig
from diffalign.train.groups import in_turn, require_no_advantage, require_whole_groups
from diffalign.train.job import Job
from diffalign.train.objective import Collected
from diffalign.train.objectives.flow_grpo import clip_figures
from diffalign.train.policy import FIGURES, PolicyGradient, Seen
from diffalign.train.rollout import Rollout
from diffalign.train.schedules import NoiseConfig


@dataclass(frozen=True, kw_only=True)
class PRDPConfig:
    """What a reward is worth in log-ratio, and how far a step may go at once."""

    beta: float = 3e-5  # reward differences over log-ratio differences, in the conventions below
    clip: float = 1e-4  # how far a step's log-ratio may leave that of the weights that drew it, in that of a mean
    density: Convention = "mean"  # log-densities per element, as published figures mean; sum is the density itself
    over_steps: Literal["mean", "sum"] = "mean"  # of a walk's log-ratios: as the paper's code has it, or its text
    pairs: Literal["unequal", "all"] = "unequal"  # whether walks with one reward are a pair too
    same_start: bool = False  # one start noise for the images of a prompt
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"beta is {self.beta}, but it must be above 0. Rewards of about 1 go with 0.1 to 10.")
        if not self.clip > 0:
            raise ConfigError(f"clip is {self.clip}, but it must be above 0. 1e-4 is usual; 1e9 never clips.")
        if self.credit != CreditConfig():
            raise ConfigError("credit has settings, but prdp explains one reward by a whole walk. Leave them out.")

    def ranges(self, elements: int) -> tuple[float, float]:
        """How far a log-ratio may fall and rise, in the convention of the log-densities."""
        width = self.clip * (elements if self.density == "sum" else 1)
        return width, width

    def over(self, ratios: Tensor) -> Tensor:
        """Log-ratios (S, B) of steps as those of walks (B,)."""
        return ratios.mean(0) if self.over_steps == "mean" else ratios.sum(0)


def pair_loss(ratio: Tensor, clipped: Tensor, reward: Tensor, beta: float, *, every: bool = False) -> Tensor:
    """The mean over pairs of one prompt of the larger of both squared errors; 0 where there is no pair.

    ratio, clipped and reward are (B,); a pair is two walks with unequal rewards, or with `every` any two.
    """
    known = ~reward.isnan()
    ratio, clipped, reward = ratio[known], clipped[known], reward[known]
    gap = reward[:, None] - reward[None]
    mask = gap > 0
    if every:
        mask = torch.ones_like(mask).triu(1)
    errors = [(each[:, None] - each[None] - gap / beta).square() for each in (ratio, clipped)]
    chosen = torch.maximum(*errors)[mask]
    return chosen.mean() if len(chosen) else ratio.sum() * 0


def clipped_ratio(ratio: Tensor, old: Tensor, low: float, high: float) -> Tensor:
    """Log-ratios to the base model, held near those of the weights that drew."""
    return torch.minimum(torch.maximum(ratio, old - low), old + high)


class PRDP(PolicyGradient):
    """Regression on reward differences."""

    name: ClassVar[str] = "prdp"
    settings: ClassVar[type[PRDPConfig]] = PRDPConfig
    figures: ClassVar[tuple[str, ...]] = (*FIGURES, "regression")
    config: PRDPConfig

    def __init__(self, config: PRDPConfig) -> None:
        self.config = config
        self._fresh = True  # whether the weights are those that drew the walks
        self._loss = torch.zeros(())

    def check(self, job: Job) -> None:
        super().check(job)
        require_whole_groups(job, self.name)
        require_no_advantage(job, "prdp learns differences of the rewards themselves, and beta sets their scale.")

    @property
    def penalised(self) -> bool:
        return False  # the base model stands in the loss itself

    def collect(self, job: Job, step: int) -> Collected:
        """Walks with their rewards and the base model's log-densities."""
        rollouts, rewards = self.sampled(job, step, job.cases_of(step))
        _, told = self.judge(job, step, rollouts, rewards)
        total = job.total(rewards)
        for rollout, rows in in_turn(rollouts):
            rollout.walk.predictions = []
            with torch.no_grad(), job.trained.reference():
                base = rollout.replay(self.config.density, grad=False).detach()
            rollout.notes = {"base": base, "reward": total[rows], "group": job.own_groups[rows]}
        self._fresh = True
        return Collected(rollouts, told)

    def refresh(self, job: Job, micros: Sequence[Rollout]) -> None:
        """The slope of the loss for every log-density under the present weights."""
        now = [micro.log_probs if self._fresh else self.replayed(job, micro)[1] for micro in micros]
        self._fresh = False
        base, reward, group = (
            torch.cat([micro.notes[name].cpu() for micro in micros], -1) for name in ("base", "reward", "group")
        )
        old = torch.cat([micro.log_probs.cpu() for micro in micros], 1).double() - base
        leaf = torch.cat([each.cpu() for each in now], 1).double().requires_grad_()
        with torch.enable_grad():
            ratio, ranges = leaf - base, self.config.ranges(micros[0].elements)
            walked = self.config.over(ratio), self.config.over(clipped_ratio(ratio, old, *ranges))
            every, told = self.config.pairs == "all", []
            for rows in [group == each for each in sorted(set(group.tolist()))]:
                told.append(pair_loss(walked[0][rows], walked[1][rows], reward[rows], self.config.beta, every=every))
            loss = torch.stack(told).mean()
            (slope,) = torch.autograd.grad(loss, leaf)
        self._loss = loss.detach().float()
        for micro, rows in in_turn(micros):
            micro.advantages = (-slope[:, rows] * slope.numel()).T.float().contiguous()

    def loss(self, seen: Seen) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The slope of the regression, along the log-density of one step."""
        policy = -seen.advantage * seen.log_prob
        told = clip_figures(seen.log_prob - seen.old, seen.advantage, *self.config.ranges(seen.micro.elements))
        return policy, torch.zeros_like(policy), told | {"regression": self._loss}


OBJECTIVE = PRDP
