"""Flow-GRPO: the steps of a stochastic sampler as Gaussian policies, groups of images as baselines, clipped ratios.

Papers: "Flow-GRPO: Training Flow Matching Models via Online RL", Liu et al., 2025 (arXiv 2505.05470), equations 5 to
11; coefficient-preserving sampling (arXiv 2509.05952) as `noise.kernel: cps`; Flow-GRPO-Fast as `noise.window`;
"GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping", Wang et al., 2025 (arXiv
2510.22319), as `credit.weighting: ratio_norm`; "Training Diffusion Models with Reinforcement Learning" (DDPO), Black et
al., 2023 (arXiv 2305.13301), for models that predict noise, as `noise.kernel: ddim` with level 1.

Where we differ: log-densities are true ones also for `cps`, whose published code leaves out constants and the factor 1
/ (2 std^2). Images whose advantage is 0 stay in their micro-batch, so that the ratio stays exactly 1. Trained steps lie
side by side. Statistics are those of the present step; DDPO's history per prompt and KL as a part of the reward are
left out. The published KL's factor h belongs to std = g sqrt(h): only `flow_sde` has it, `cps` and `ddim` take their
step's own std without. A clip range is that of a mean ratio whatever `density` is, and clips the ratio's logarithm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign import noise
from diffalign.errors import ConfigError
from diffalign.noise import Convention, Kernel, Levels, Transition
from diffalign.train.credit import STEP_WEIGHTS, CreditConfig, noise_log_ratio
from diffalign.train.job import Job
from diffalign.train.policy import PolicyGradient, Seen
from diffalign.train.schedules import NoiseConfig, everywhere, noise_levels

LARGEST = 80.0  # a log-ratio whose exponential float32 still holds


@dataclass(frozen=True, kw_only=True)
class FlowGRPOConfig:
    """What is random, how far one update may go, and what holds the model near its base."""

    density: Convention = "mean"  # log-densities per element, as published clip ranges mean; sum is the density itself
    clip: float = 1e-4  # how far the ratio of mean densities may leave 1 before its gradient stops; density: sum stops
    clip_high: float | None = (
        None  # there too, at elements x log(1 +- clip); clip_high is the range above 1, if it differs
    )
    beta: float = 0.0  # weight of the KL to the base model; 0.01 to 0.04 for published recipes, costs a forward
    kl: Literal["code", "path", "velocity"] = "code"  # as published code has it, the exact sum, or of velocities
    same_start: bool = False  # one start noise for the images of a prompt
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1 or (self.clip_high is not None and not self.clip_high > 0):
            raise ConfigError(
                f"clip is {self.clip} and clip_high {self.clip_high}, but a range must be above 0, where there is a "
                "gradient, and clip below 1: no ratio is 0. 1e-4 is usual, 2e-6 with credit.weighting: ratio_norm."
            )
        if not 0 <= self.beta < math.inf:
            raise ConfigError(f"beta is {self.beta}, but a negative KL weight drives the model away from its base.")

    def ranges(self, elements: int) -> tuple[float, float]:
        """How far a log-ratio may fall and rise, in the convention of the log-densities."""
        scale = elements if self.density == "sum" else 1
        above = self.clip if self.clip_high is None else self.clip_high
        return -math.log1p(-self.clip) * scale, min(math.log1p(above) * scale, LARGEST)


def clipped_loss(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """max(-A rho, -A clip(rho)) per image (B,), where log rho is held between -low and high."""
    return torch.maximum(-advantage * log_ratio.exp(), -advantage * log_ratio.clamp(-low, high).exp())


def clip_figures(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Mean ratio, and the shares of images whose gradient the clip stopped on either side."""
    log_ratio = log_ratio.detach()
    return {
        "ratio_mean": log_ratio.exp().mean(),
        "clip_low": ((advantage < 0) & (log_ratio < -low)).float().mean(),
        "clip_high": ((advantage > 0) & (log_ratio > high)).float().mean(),
    }


def kl_code(mean: Tensor, base: Tensor, std: float, h: float) -> Tensor:
    """mean (mu - mu_ref)^2 / (2 g^2) per image (B,) with std = g sqrt(h): the published code's form."""
    return (mean - base).square().flatten(1).mean(1) * h / (2 * std**2)


def kl_path(mean: Tensor, base: Tensor, std: float) -> Tensor:
    """The exact KL ||mu - mu_ref||^2 / (2 std^2) of one step per image (B,)."""
    return (mean - base).square().flatten(1).sum(1) / (2 * std**2)


def kl_velocity(levels: Levels, x: Tensor, prediction: Tensor, base: Tensor, i: int) -> Tensor:
    """mean (v - v_ref)^2 per image (B,): what is left of the KL without the step's noise."""
    gap = levels.velocity(x, prediction, i) - levels.velocity(x, base, i)
    return gap.square().flatten(1).mean(1)


class FlowGRPO(PolicyGradient):
    """One reward per image, shared by all its steps or spread by `credit`."""

    name: ClassVar[str] = "flow_grpo"
    settings: ClassVar[type[FlowGRPOConfig]] = FlowGRPOConfig

    def __init__(self, config: FlowGRPOConfig) -> None:
        self.config = config
        self.spread = 0.0  # mean deviation of all steps that may have noise, at the latest training step

    def check(self, job: Job) -> None:
        super().check(job)
        prediction = job.levels.prediction
        if self.config.credit.weighting == "ratio_norm" and prediction != "flow":
            raise ConfigError(
                f"credit.weighting is ratio_norm, which divides by steps of a flow's noise level, but this model "
                f"predicts {prediction}. Use tempflow."
            )

    def noise(self, job: Job, step: int) -> tuple[Kernel, range]:
        """Kernel and window, with a note of how much noise there is on average wherever the window may be."""
        levels, zero = job.levels, torch.zeros(1, 1)
        make = noise.KERNELS[self.kernel_name(levels.prediction)]
        shares = noise_levels(step, job.length, everywhere(self.config.noise))
        found = [make(share)(levels, zero, zero, i).std for i, share in enumerate(shares) if share > 0]
        self.spread = math.fsum(found) / len(found)
        return super().noise(job, step)

    def step_weights(self, nu: Tensor, h: Tensor) -> Tensor:
        """Loss weights (S,) of trained steps with deviations nu (S,) and sizes h (S,)."""
        return STEP_WEIGHTS[self.config.credit.weighting](nu, h, self.spread or None)

    def loss(self, seen: Seen) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The clipped policy loss and the weighted KL of one step."""
        log_ratio = seen.log_prob - seen.old
        if self.config.credit.weighting == "ratio_norm":
            move, old, now = seen.micro.walk.moves[seen.i], seen.micro.means[seen.i], seen.transition
            log_ratio = noise_log_ratio(move, now.mean, old, now.std, self.config.density)
        low, high = self.config.ranges(seen.micro.elements)
        policy = clipped_loss(log_ratio, seen.advantage, low, high)
        told = clip_figures(log_ratio, seen.advantage, low, high)
        penalty = torch.zeros_like(policy)
        if seen.base is not None:
            levels, x = seen.micro.driver.levels, seen.micro.walk.latents[seen.i]
            told["kl"] = self.divergence(levels, x, seen.i, (seen.transition, seen.prediction), seen.base)
            penalty = self.config.beta * told["kl"]
        return policy, penalty, told

    def divergence(
        self, levels: Levels, x: Tensor, i: int, now: tuple[Transition, Tensor], base: tuple[Transition, Tensor]
    ) -> Tensor:
        """How far step i from x (B, ...) is from the base model's (B,), each given with its prediction."""
        (step, prediction), (other, predicted) = now, base
        if self.config.kl == "path":
            return kl_path(step.mean, other.mean, step.std)
        if self.config.kl == "velocity":
            return kl_velocity(levels, x, prediction, predicted, i)
        h = float(levels.sigma[i] - levels.sigma[i + 1]) if self.kernel_name(levels.prediction) == "flow_sde" else 1.0
        return kl_code(step.mean, other.mean, step.std, h)


OBJECTIVE = FlowGRPO
