"""Noise over the steps of a chain: how much, and in which window of steps.

Papers: EAD, "Let it Calm: Exploratory Annealed Decoding for Verifiable RL", 2025 (arXiv 2510.05251): `anneal`;
Flow-GRPO-Fast (arXiv 2505.05470 and its published code): rule `uniform`; MixGRPO, 2025 (arXiv 2507.21802): rule
`progressive`; "TreeGRPO: Tree-Advantage GRPO for Online RL Post-Training of Diffusion Models", Ding and Ye, 2025 (arXiv
2512.08153): rule `geometric`.

Where we differ: EAD's temperature of a token becomes the noise level of a step, one function serves the rollout and the
loss, and its untempered first tokens and its cap on d are left out. A window's place is a function of seed and training
step, drawn from nothing else, and the same for all groups. Windows of every rule end before the last, nearly
deterministic step unless `train_last` is set; TreeGRPO's starts do so in the paper, MixGRPO's do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from diffalign.cases import derived_seed
from diffalign.errors import ConfigError

Rule = Literal["fixed", "uniform", "progressive", "geometric"]


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Where a training rollout is random; steps without noise follow the deterministic sampler and are not trained."""

    kernel: Literal["auto", "flow_sde", "cps", "ddim"] = "auto"  # auto: flow_sde for flow models, else ddim
    level: float = 0.7  # share of fresh noise at the first step; more explores more and blurs the image
    anneal: float | None = None  # d: at step i the level has fallen by e^(i/d) - 1; none keeps it constant
    least: float = 0.3  # where the fall ends
    growth: float = 0.0  # added to `anneal` with every training step: exploration lasts longer as training goes on
    window: int = 0  # steps with noise; 0 is all from `low` to `high`, fewer cost less to train
    rule: Rule = "fixed"  # where the window starts
    low: int = 0  # first step a window may hold
    high: int | None = None  # the step after the last a window may hold; none is as far as there is noise
    every: int = 25  # training steps before a progressive window moves on
    decay: float = 0.0  # how much sooner, per start past `decay_after`; MixGRPO uses 0.1
    decay_after: int = 13  # the start from which `decay` counts
    fade: float = 0.5  # how much rarer each later start of a geometric window is
    train_last: bool = False  # noise on the last step too, whose ratios are brittle

    def __post_init__(self) -> None:
        if not 0 < self.level < math.inf:
            raise ConfigError(f"noise.level is {self.level}, but without noise there is no ratio. Use 0.7, say.")
        if self.kernel == "cps" and self.level > 1:
            raise ConfigError(f"noise.level is {self.level}, but the cps kernel takes at most 1 (all noise fresh).")
        if self.anneal is not None and not self.anneal > 0:
            raise ConfigError(
                f"noise.anneal is {self.anneal}, but it counts steps above 0. Drop it for constant noise."
            )
        if self.anneal is not None and not 0 < self.least <= self.level:
            raise ConfigError(
                f"noise.least is {self.least}, but it lies above 0 and at most at noise.level {self.level}."
            )
        if not self.growth >= 0:
            raise ConfigError(f"noise.growth is {self.growth}, but `anneal` may only lengthen: give 0 or more.")
        if self.growth and self.anneal is None:
            raise ConfigError(f"noise.growth is {self.growth}, but there is no noise.anneal that it could lengthen.")
        if self.window < 0 or self.low < 0:
            raise ConfigError(f"noise.window is {self.window} and noise.low {self.low}, but neither can be negative.")
        if self.rule != "fixed" and self.window == 0:
            raise ConfigError(
                f"noise.rule is {self.rule}, but noise.window is 0 (all steps). Give a window of 1 or more."
            )
        if self.every < 1 or self.decay < 0:
            raise ConfigError(f"noise.every is {self.every} and noise.decay {self.decay}: at least 1 and 0 are needed.")
        if not 0 <= self.fade < 1:
            raise ConfigError(f"noise.fade is {self.fade}, but it lies from 0 (always the first start) to below 1.")

    def span(self, T: int) -> tuple[int, int]:
        """The steps [low, high) of a chain of T steps that may have noise; an error where a window does not fit."""
        last = T if self.train_last else T - 1
        high = last if self.high is None else self.high
        if high > last:
            hint = "" if self.train_last or high > T else " Set noise.train_last to have noise on the last step."
            raise ConfigError(f"noise.high is {high}, but {T} steps have noise up to step {last - 1} only.{hint}")
        if high - self.low < max(self.window, 1):
            raise ConfigError(
                f"noise.window is {self.window}, but of {T} steps only {max(high - self.low, 0)} may have noise "
                f"(from {self.low} to before {high}). Sample with more steps, or widen the range."
            )
        return self.low, high


def everywhere(config: NoiseConfig) -> NoiseConfig:
    """The same noise at all steps that any window of this one may ever hold."""
    return replace(config, window=0, rule="fixed")


def constant(T: int, a: float) -> list[float]:
    """The same level at all T steps."""
    return [a] * T


def anneal(i: float, a_max: float, d: float, a_min: float) -> float:
    """EAD's level at step i: max(1 + a_max - e^(i / d), a_min), which starts at a_max and falls ever faster."""
    rise = math.exp(min(i / d, 700.0))  # beyond 700 a float overflows, and the floor holds long before
    return max(1 + a_max - rise, a_min)


def annealed(T: int, a_max: float, d: float, a_min: float) -> list[float]:
    """Levels of T steps that fall from a_max to a_min."""
    return [anneal(i, a_max, d, a_min) for i in range(T)]


def geometric_probabilities(starts: int, r: float) -> list[float]:
    """TreeGRPO's probabilities (1 - r) r^i / (1 - r^starts) of each start."""
    return [(1 - r) * r**i / (1 - r**starts) for i in range(starts)]


def stays(starts: int, every: int, decay: float = 0.0, after: int = 13) -> list[int]:
    """Training steps that MixGRPO's window spends at each start: ceil(every e^(-decay max(start - after, 0)))."""
    return [math.ceil(every * math.exp(-decay * max(start - after, 0))) for start in range(starts)]


def window_start(step: int, T: int, config: NoiseConfig, *, seed: int = 0) -> int:
    """The first step of the window at training step `step`; rules that draw do so from (seed, step) alone."""
    low, high = config.span(T)
    if config.window == 0 or config.rule == "fixed":
        return low
    starts = high - config.window - low + 1
    if config.rule == "progressive":
        return low + _progressive(step, starts, config, low)
    draw = derived_seed(seed, "window", step)
    if config.rule == "uniform":
        return low + draw % starts
    place, reached = draw / 2**48, 0.0
    for start, probability in enumerate(geometric_probabilities(starts, config.fade)):
        reached += probability
        if place < reached:
            return low + start
    return high - config.window  # where rounding leaves the sum below 1


def _progressive(step: int, starts: int, config: NoiseConfig, low: int) -> int:
    """How many starts past the first the window is: on by one after each stay, back to the first after the last."""
    durations = stays(low + starts, config.every, config.decay, config.decay_after)[low:]
    left = step % sum(durations)
    for start, duration in enumerate(durations):
        if left < duration:
            return start
        left -= duration
    raise AssertionError("a remainder is below the sum")


def noise_levels(step: int, T: int, config: NoiseConfig, *, seed: int = 0) -> list[float]:
    """Noise levels of the T steps at training step `step`: 0 outside the window, for the rollout and the loss alike."""
    start = window_start(step, T, config, seed=seed)
    end = start + config.window if config.window else config.span(T)[1]
    if config.anneal is None:
        levels = constant(T, config.level)
    else:
        levels = annealed(T, config.level, config.anneal + config.growth * step, config.least)
    return [level if start <= i < end else 0.0 for i, level in enumerate(levels)]
