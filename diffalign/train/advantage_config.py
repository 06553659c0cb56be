"""Which stages turn rewards into advantages, and how; `advantage.py` says in which order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from diffalign.errors import ConfigError

Normalise = Literal["grpo", "dr", "rloo", "global_std", "pooled_std", "tmn", "batch"]
StepNorm = Literal["none", "group_step", "group_all", "batch_step", "siblings", "tree_depth"]
TREES = ("siblings", "tree_depth")
UNDIVIDED = ("dr", "rloo")


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """Which stages run, and how."""

    order: Literal["combine_normalise", "normalise_combine"] = "combine_normalise"  # the second needs no common unit
    missing: Literal["auto", "renormalise", "invalid", "zero"] = "auto"  # a member is NaN: its weight to the rest, the
    # row out, or a reward of 0; auto: renormalise for normalise_combine, invalid for sums of raw rewards
    filter: float | tuple[float, ...] | None = None  # reward units: groups at or below this std are left out, and
    # the loss is the mean over the rest; none is drawn again in their place; one
    # number for each member with normalise_combine, where one member above its own is enough
    win_rate: bool = False  # ranks in the group instead of rewards: no tiny spread is blown up, and distances are lost
    normalise: Normalise = "grpo"  # dr: hard and easy prompts weigh alike, but adv_scale must fit the reward's unit
    ddof: int = 0  # 0: population std, 1: sample std, sqrt(G / (G - 1)) larger; tmn always takes 1
    eps: float = 1e-4  # reward units, added to the std
    std_floor: float | tuple[float, ...] = 0.0  # reward units, least std; about a tenth of the base model's std keeps
    # noise small; one number for each member with normalise_combine
    trim_low: float = 0.0  # share of a group's lowest rewards that its mean and std leave out
    trim_high: float = 0.0  # the same of its highest; one failed image no longer sets the scale
    tmn_alpha: float = 0.8  # weight of the prompt's own mean in the bar for a success; the rest is its task's
    tmn_gamma: float = 1.0  # nats: rare successes on hard prompts count up to e^(gamma/2) as much; 0: all alike
    task_by: str = "tag"  # name in a prompt's metadata that tells tmn its task; prompts without it are one task
    batch_norm: bool = True  # with normalise_combine: keeps the size of advantages independent of the member count
    step_norm: StepNorm = "none"  # one advantage per image, or per step: over which steps statistics are taken
    # the next three are for callers of `advantages`; a training job has the objective's credit.gamma, process and mu
    credit: Literal["step", "return"] = "step"  # a step's own reward, or the sum from it to the last: more noise
    renorm: bool = False  # each step's reward plus the outcome minus mu; both in [0, 1], as calibrated rewards are
    mu: float = 1.0  # reward units; cancels wherever every group has all its steps and a mean is subtracted
    hardness: Literal["off", "data", "responsiveness", "both"] = "off"  # hard images count more, by at most about 1.5;
    # in a training job data alone: 1 - the cosine of an image and its prompt by the CLIP of evaluate.tower
    hardness_denominator: Literal["prompt", "batch"] = "prompt"  # batch compares prompts, prompt the images of one
    hardness_tau: float = math.inf  # squared reward units: gaps farther from their prompt's mean are outliers
    adv_scale: float = 1.0  # factor on the advantages, as one on the learning rate but before the clip
    clip: float = 5.0  # largest absolute advantage; .inf leaves all as they are

    def __post_init__(self) -> None:
        for wrong in (self._numbers(), self._formula(), self._steps()):
            if wrong:
                raise ConfigError(f"advantage.{wrong}")

    def _numbers(self) -> str:
        positive = {"clip": self.clip, "adv_scale": self.adv_scale, "hardness_tau": self.hardness_tau}
        for name, value in positive.items():
            if not value > 0:
                return f"{name} is {value:g}, but it must be above 0."
        least = {"eps": self.eps, "std_floor": self.std_floor, "filter": self.filter or 0.0}
        for name, given in least.items() | {"tmn_gamma": self.tmn_gamma}.items():
            for value in given if isinstance(given, tuple) else (given,):
                if not 0 <= value < math.inf:
                    return f"{name} is {value:g}, but it must be at least 0 and finite."
        if not 0 <= self.tmn_alpha <= 1:
            return f"tmn_alpha is {self.tmn_alpha:g}, but a weight between two means is in [0, 1]."
        if self.ddof not in (0, 1):
            return f"ddof is {self.ddof}. Give 0 for the population std or 1 for the sample std."
        if min(self.trim_low, self.trim_high) < 0 or self.trim_low + self.trim_high >= 1:
            return f"trim_low and trim_high are {self.trim_low:g} and {self.trim_high:g}, which leaves nothing or less."
        return ""

    def _formula(self) -> str:
        joint = self.order == "combine_normalise"
        for name in ("filter", "std_floor"):
            if joint and isinstance(getattr(self, name), tuple):
                return (
                    f"{name} has a number for each member, but with order combine_normalise there is one total. "
                    "Give one number, or set order to normalise_combine."
                )
        if self.normalise in UNDIVIDED and self.std_floor != 0.0:
            return f"std_floor has no effect with normalise {self.normalise}, which divides by no std. Leave it out."
        if (self.trim_low or self.trim_high) and self.normalise not in ("grpo", "dr"):
            return (
                f"trim_low and trim_high have no effect with normalise {self.normalise}. Leave them out, or use grpo."
            )
        if self.win_rate and self.std_floor != 0.0:
            return "std_floor is in reward units, but win_rate replaces rewards by ranks. Leave one of the two out."
        return ""

    def _steps(self) -> str:
        stepwise = self.step_norm != "none"
        if stepwise and self.order == "normalise_combine":
            return f"step_norm {self.step_norm} needs one reward per step. Set order to combine_normalise."
        if stepwise and self.normalise in ("tmn", "batch"):
            other = (
                "step_norm to batch_step and normalise to grpo" if self.normalise == "batch" else "step_norm to none"
            )
            return f"normalise {self.normalise} has no meaning for step_norm {self.step_norm}. Set {other}."
        if stepwise and self.win_rate and not self.renorm and self.step_norm not in TREES:
            return "win_rate ranks outcomes, which step rewards replace. Set renorm to true, or win_rate to false."
        if not stepwise and (self.renorm or self.credit == "return"):
            name = "renorm" if self.renorm else "credit return"
            return f"{name} needs rewards of steps. Set step_norm to group_step, or leave {name} out."
        return ""

    @property
    def decoupled(self) -> bool:
        """Whether members are normalised before they are combined."""
        return self.order == "normalise_combine"

    @property
    def on_missing(self) -> Literal["renormalise", "invalid", "zero"]:
        """What a missing member leads to."""
        if self.missing == "auto":
            return "renormalise" if self.decoupled else "invalid"
        return self.missing
