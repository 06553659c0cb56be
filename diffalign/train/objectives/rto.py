"""RTO on images: what a preference training learnt becomes a reward for every step, beside the reward of the image.

Paper: "DPO Meets PPO: Reinforced Token Optimization for RLHF", Zhong et al., 2024 (arXiv 2404.18922). A model tuned by
preferences says of every word how much likelier it makes it than the model it came from. Here a word is a step of the
stochastic sampler, and the two models are the base model with and without a LoRA that `dpo` trained.

Where we differ: the paper's actor and critic are Flow-GRPO's clipped ratios with the group as the baseline. Step
rewards are centred and divided by their deviation on walks of the base model, measured for every step before the first
update: step sizes differ a hundredfold, and the mean of a good preference model lies far from 0. So `scale` and `limit`
are in units of the image's reward. The penalty on leaving the base model is `beta`, in the loss instead of the reward.
The image's reward comes with the last trained step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.cases import derived_seed
from diffalign.errors import ConfigError
from diffalign.noise import Transition
from diffalign.train.carried import Carried
from diffalign.train.credit import CreditConfig
from diffalign.train.data import PromptSampler
from diffalign.train.job import Job
from diffalign.train.objective import Collected
from diffalign.train.objectives.dense_grpo import share_of
from diffalign.train.objectives.flow_grpo import FlowGRPO, FlowGRPOConfig
from diffalign.train.rehearsal import Rehearsal
from diffalign.train.rollout import Rollout

PREFERRED = "preferred"  # the adapter's name while it is carried
SMALLEST = 1e-12  # deviation of step rewards below which the LoRA says nothing


@dataclass(frozen=True, kw_only=True)
class ReturnsConfig(CreditConfig):
    """Credit where a step has all that follows it, the image's reward too."""

    gamma: Literal[0, 1] = 1


@dataclass(frozen=True, kw_only=True)
class RTOConfig(FlowGRPOConfig):
    """Flow-GRPO's settings, and how much the preference training says at a step."""

    preferred: str = ""  # folder OUT/lora of a training with objective dpo, on the same model
    scale: float = 0.05  # of a step's reward, whose deviation is 1 before; in units of the image's reward
    limit: float = 0.1  # largest step reward; what it is taught by can be gamed too
    keep_total: bool = False  # less their mean over the steps, so that they move credit and add none
    samples: int = 48  # walks of the base model that the deviations are measured on
    credit: ReturnsConfig = field(default_factory=ReturnsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.preferred:
            raise ConfigError("rto needs preferred: the folder OUT/lora that a training with objective dpo saved.")
        if not (0 <= self.scale < math.inf and self.limit > 0) or self.samples < 2:
            raise ConfigError(
                f"scale is {self.scale}, limit {self.limit} and samples {self.samples}: 0 or more, above 0, at least 2."
            )
        if self.noise.rule != "fixed" or self.noise.growth:
            raise ConfigError(
                f"noise has rule '{self.noise.rule}' and growth {self.noise.growth}, but rto measures its steps once. "
                "Use fixed, and no growth."
            )
        if not self.credit.gamma:
            raise ConfigError("credit.gamma is 0, so that the last step alone would have the image's reward. Use 1.")


def step_gap(x: Tensor, preferred: Tensor, base: Tensor, std: float) -> Tensor:
    """log p_preferred(x) - log p_base(x) per element (B,), of two Gaussians with means (B, ...) and one deviation."""
    preferred, base = preferred.double(), base.double()
    return ((preferred - base) * (2 * x.double() - preferred - base)).flatten(1).mean(1) / (2 * std**2)


def step_rewards(gaps: Tensor, base: Tensor, total: Tensor, config: RTOConfig) -> Tensor:
    """Rewards (N, S) of steps from gaps (N, S), whose mean and deviation `base` (2, S) has; the image's own (N,) is in
    the last."""
    mean, deviation = base
    scaled = torch.where(deviation > SMALLEST, (gaps - mean) / deviation.clamp(min=SMALLEST), 0.0) * config.scale
    scaled = scaled.clamp(-config.limit, config.limit)
    if config.keep_total:
        scaled = scaled - scaled.mean(1, keepdim=True)
    found = scaled.to(total)
    found[:, -1] = found[:, -1] + total
    return found


class RTO(FlowGRPO):
    """Flow-GRPO with a preference training's opinion of every step."""

    name: ClassVar[str] = "rto"
    settings: ClassVar[type[RTOConfig]] = RTOConfig
    dense: ClassVar[bool] = True
    config: RTOConfig

    def __init__(self, config: RTOConfig) -> None:
        super().__init__(config)
        self.carried: Carried | None = None
        self.spreads = torch.empty(2, 0)  # mean and deviation of each trained step's gaps, on walks of the base model
        self.limited = 0.0  # share of the latest step rewards that were cut off

    def check(self, job: Job) -> None:
        if job.sharded:
            raise ConfigError("rto carries a second LoRA, which weights shared out over processes cannot take in.")
        self.carried = Carried(job.trained, self.config.preferred, PREFERRED)
        super().check(job)

    def state(self) -> dict[str, Any]:
        return {"spreads": self.spreads}

    def restore(self, state: Any) -> None:
        self.spreads = state["spreads"]

    def prepare(self, job: Job) -> None:
        """Measure how far apart the two models are at each step, on walks of the base model."""
        if self.spreads.shape[1]:
            return
        drawn = PromptSampler(job.prompts, derived_seed(job.seed, "deviations"))
        cases = share_of(drawn.cases_of(0, self.config.samples, 1), job.rank, job.processes)
        (kernel, trained), size = self.noise(job, 0), job.config.micro_batch
        found = []
        with job.trained.reference():
            for k in range(0, len(cases), size):
                rollout = self.walk(job, cases[k : k + size], kernel, trained)
                found.append(self.gaps(job, rollout))
        every = job.gather(torch.cat(found))[: self.config.samples]
        self.spreads = torch.stack([every.mean(0), every.std(0, correction=0)])
        if not bool((self.spreads[1] > SMALLEST).any()):
            job.say(f"'{self.config.preferred}' moves no step: rto is flow_grpo here.")

    def step_rewards(self, job: Job, rollouts: Sequence[Rollout], rewards: Tensor) -> Tensor:
        """Rewards (n, S) of the trained steps."""
        gaps, total = torch.cat([self.gaps(job, rollout) for rollout in rollouts]), job.total(rewards)
        found = step_rewards(gaps, self.spreads, total, self.config)
        own = found - torch.nn.functional.pad(total[:, None], (found.shape[1] - 1, 0))
        self.limited = job.mean({"limited": float((own.abs() > 0.999 * self.config.limit).float().mean())})["limited"]
        return self.through_steps(found, total[:, None])

    def collect(self, job: Job, step: int) -> Collected:
        found = super().collect(job, step)
        return replace(found, stats=found.stats | {"limited": self.limited})

    def rehearse(self, job: Job) -> Rehearsal:
        self.prepare(job)
        return super().rehearse(job)

    def gaps(self, job: Job, rollout: Rollout) -> Tensor:
        """By how much likelier the preferred model makes each trained step (B, S) float64, per element."""
        assert self.carried is not None
        preferred = self._means(rollout, self.carried.instead())
        base = self._means(rollout, job.trained.reference())
        walk, columns = rollout.walk, []
        for i in rollout.trained:
            columns.append(step_gap(walk.moves[i], preferred[i].mean, base[i].mean, base[i].std).cpu())
        return torch.stack(columns, 1)

    def _means(self, rollout: Rollout, model: AbstractContextManager[None]) -> dict[int, Transition]:
        found: dict[int, Transition] = {}

        def keep(i: int, prediction: Tensor, transition: Transition, log_prob: Tensor) -> None:
            found[i] = transition

        with torch.no_grad(), model:
            rollout.replay(self.config.density, keep, grad=False)
        return found


OBJECTIVE = RTO
