"""Credit over the steps of a chain: how strongly each step trains, and which part of the reward is its own.

Papers: "TempFlow-GRPO: When Timing Matters for GRPO in Flow Models", He et al., 2025 (arXiv 2508.04324):
`tempflow_weights`; "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping", Wang et
al., 2025 (arXiv 2510.22319): `noise_log_ratio` with the weight 1/h; CoCA, "Step-level Reward for Free in RL-based T2I
Diffusion Model Fine-tuning", 2025 (arXiv 2505.19196): `coca`; PSRD, "Mitigating Multimodal Hallucination via Phase-wise
Self-reward", Zhang et al., 2026 (arXiv 2604.17982): `phase_gains`; "DenseGRPO: From Sparse to Dense Reward for Flow
Matching Model Alignment", Deng et al., 2026 (arXiv 2601.20218, section 3.1): `dense_gains`. Step rewards meet the
outcome in `diffalign.shaping.renorm` and are normalised over sets of steps in `diffalign.shaping.step_norm`.

Where we differ: deterministic steps have no ratio and get the weight 0. TempFlow's mean runs over all steps that may
have noise, also where a window trains only some of them: a step weighs the same wherever the window is. The normalised
ratio is computed from noise and change of mean rather than from two log-densities, which loses no digits, and its mean
over elements is taken for each image; the official code takes it over the whole batch. CoCA counts a step away from the
final image as no gain, falls back to even weights where nothing is gained, and does not standardise again per step,
which would undo its weights. Phases of PSRD are read as intervals of noise levels, and a phase's gain is shared evenly
by its steps.

Steps are numbered in sampling order. Letters: N images, T steps, K phases; nu_i is the standard deviation of step i and
h_i its size in noise level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.noise import Convention
from diffalign.shaping import return_to_go

SMALLEST_GAIN = 1e-3  # a chain whose similarities grow by less in all says nothing about its steps


def uniform_weights(nu: Tensor, h: Tensor, reference: float | None = None) -> Tensor:
    """Loss weights (T,) of the plain objective: 1 for every step with noise."""
    return (nu > 0).to(nu)


def tempflow_weights(nu: Tensor, h: Tensor | None = None, reference: float | None = None) -> Tensor:
    """Loss weights (T,) nu_i / `reference`, the mean nu of all steps that may have noise; by default of those given."""
    noisy = nu > 0
    mean = nu.clamp(min=0).sum() / noisy.sum().clamp(min=1) if reference is None else torch.as_tensor(reference).to(nu)
    return torch.where(noisy, nu, 0) / mean.clamp(min=1e-30)


def ratio_norm_weights(nu: Tensor, h: Tensor, reference: float | None = None) -> Tensor:
    """Loss weights (T,) 1 / h_i of the steps with noise, which `noise_log_ratio` goes with."""
    return torch.where(nu > 0, 1 / h, 0)


STEP_WEIGHTS: dict[str, Callable[..., Tensor]] = {  # of nu (T,), h (T,) and tempflow's reference
    "none": uniform_weights,
    "tempflow": tempflow_weights,
    "ratio_norm": ratio_norm_weights,
}


def noise_log_ratio(
    x_next: Tensor, mean_theta: Tensor, mean_old: Tensor, nu: float, convention: Convention = "mean"
) -> Tensor:
    """RatioNorm's log r (N,) = nu (l - l_old + mean(delta^2) / (2 nu^2)) of one step, as mean(eps delta).

    The drift of the plain log-ratio has cancelled, so that the clip is symmetric; the gradient flows through delta.
    """
    if not nu > 0:
        raise ConfigError(
            f"ratio normalisation needs a step with noise, and this one has nu = {nu}. Train SDE steps only."
        )
    eps = (x_next.detach().float() - mean_old.float()) / nu
    products = (eps * (mean_theta.float() - mean_old.float())).flatten(1)
    return products.mean(1) if convention == "mean" else products.sum(1)


def coca(sims: Tensor, window: int = 1, alpha: float = 0.0) -> Tensor:
    """Weights (N, T) of a broadcast advantage, from similarities (N, T + 1) of clean estimates to the final image."""
    if window < 1:
        raise ConfigError(f"credit.window is {window}, but a window of similarities holds at least 1 step.")
    steps = sims.shape[1] - 1
    part = torch.arange(steps, device=sims.device) // window  # (T,) which window a step belongs to
    length = part.bincount().to(sims)
    sums = sims.new_zeros(len(sims), len(length)).index_add(1, part, sims[:, 1:])
    gains = torch.diff(sums / length, dim=1, prepend=sims[:, :1]).clamp(min=0)  # (N, windows)
    total = gains.sum(1, keepdim=True)
    each = (gains / (length * total.clamp(min=SMALLEST_GAIN)))[:, part]  # (N, T), 1 in all
    each = torch.where(total < SMALLEST_GAIN, 1 / steps, each)
    return alpha + (1 - alpha) * returns(each, 1)


def phase_ends(levels: Sequence[float], cuts: Sequence[float]) -> list[int]:
    """Where phases end as step counts: each at the first of `levels` (T + 1) at or below its cut, the last at T."""
    steps = len(levels) - 1
    ends = [next((i for i, level in enumerate(levels) if level <= cut), steps) for cut in cuts] + [steps]
    if any(b <= a for a, b in zip([0, *ends], ends, strict=False)):
        raise ConfigError(
            f"credit.phases {list(cuts)} leaves a phase of {steps} steps empty: phases would end at steps {ends}. "
            "Give falling noise levels that lie further apart, or sample with more steps."
        )
    return ends


def phase_gains(q: Tensor, ends: Sequence[int], T: int) -> Tensor:
    """Step credit (N, T) from values q (N, K + 1) at phase ends: each phase's gain, shared evenly by its steps."""
    ends = list(ends)
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if len(sizes) != q.shape[1] - 1 or sum(sizes) != T or min(sizes) < 1:
        raise ConfigError(
            f"{q.shape[1]} phase values go with {q.shape[1] - 1} rising phase ends, the last of them {T}, not {ends}."
        )
    length = torch.tensor(sizes, device=q.device)
    return (q.diff(dim=1) / length).repeat_interleave(length, 1)


def dense_gains(R: Tensor) -> Tensor:
    """Reward gains (N, T) of the steps, from the values R (N, T + 1) before each step and of the final image."""
    return R.diff(dim=1)


def returns(gains: Tensor, gamma: int = 0) -> Tensor:
    """Return-to-go (N, T) of step gains: with gamma 0 a step has its own gain, with 1 all that follow too."""
    if gamma not in (0, 1):
        raise ConfigError(f"credit.gamma is {gamma}, but only 0 (immediate) and 1 (all that follows) keep the sum.")
    return return_to_go(gains) if gamma else gains


def shuffled(A: Tensor, generator: torch.Generator) -> Tensor:
    """Null control: advantages (N, T) dealt anew over the steps of each image."""
    return A.gather(1, torch.rand(A.shape, generator=generator).argsort(1).to(A.device))


def averaged(weights: Tensor) -> Tensor:
    """Null control: step weights (N, T) replaced by their average over images, a fixed schedule."""
    return weights.mean(0, keepdim=True).expand_as(weights)


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """How a step's share of the loss and of the reward is found; weighting evens out steps, the rest moves credit."""

    weighting: Literal["none", "tempflow", "ratio_norm"] = "none"  # none trains late steps up to 25 times as hard
    similarity: Literal["none", "coca"] = "none"  # coca needs the clean estimates of all steps
    window: int = 1  # steps that coca averages over; more is calmer and coarser
    alpha: float = 0.0  # share of the plain broadcast advantage that coca keeps
    phases: tuple[float, ...] = ()  # falling noise levels between phases, such as [0.8, 0.4]; a decode and reward each
    gamma: Literal[0, 1] = 0  # 1 credits a step with all later gains too: less bias, more variance
    process: Literal["none", "renorm"] = "none"  # renorm adds the outcome to every step's reward
    mu: float = 1.0  # centre of renorm; cancels in group-relative advantages

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"credit.window is {self.window}, but a window of similarities holds at least 1 step.")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(
                f"credit.alpha is {self.alpha}, but a share lies between 0 (coca alone) and 1 (none of it)."
            )
        if self.similarity == "none" and (self.window != 1 or self.alpha != 0):
            raise ConfigError(
                "credit.window and credit.alpha belong to coca. Set credit.similarity: coca, or drop them."
            )
        if self.similarity == "coca" and (self.phases or self.gamma or self.process != "none"):
            raise ConfigError(
                "credit.similarity is coca, which spreads one advantage over the steps, but phases, gamma and process "
                "need rewards per step. Choose one of the two."
            )
        if any(not 0 < cut < math.inf for cut in self.phases) or list(self.phases) != sorted(set(self.phases))[::-1]:
            raise ConfigError(f"credit.phases is {list(self.phases)}, but it takes falling noise levels above 0.")
        if self.process == "none" and self.mu != 1:
            raise ConfigError(
                f"credit.mu is {self.mu}, but only renorm reads it. Set credit.process: renorm, or drop it."
            )

    def require_source(self, dense: bool) -> None:
        """Refuse settings that go with rewards per step where there are none, and the other way round."""
        if dense and (self.similarity != "none" or self.phases):
            named = (
                f"similarity is {self.similarity}" if self.similarity != "none" else f"phases is {list(self.phases)}"
            )
            raise ConfigError(f"credit.{named}, but the objective has rewards per step of its own. Drop the setting.")
        if not dense and not self.phases and (self.gamma or self.process != "none"):
            named = f"gamma is {self.gamma}" if self.gamma else f"process is {self.process}"
            raise ConfigError(
                f"credit.{named}, but one reward per image has no steps to go over. "
                "Set credit.phases, or train with dense_grpo."
            )
