"""What a fine-tuning job is told: one frozen dataclass, with a smaller one for each part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from diffalign.errors import ConfigError
from diffalign.train.adapters import AdapterConfig
from diffalign.train.advantage import AdvantageConfig
from diffalign.train.known import DataConfig
from diffalign.train.relabelled import RelabelConfig
from diffalign.train.watch import WatchConfig

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and the rate it walks at."""

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    epsilon: float = 1e-8
    warmup: int = 0  # updates of linear warm-up
    decay: Literal["constant", "cosine"] = "constant"  # cosine falls to 0 at the last update
    clip_norm: float = 1.0  # largest gradient norm; a larger gradient is scaled down to it

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ConfigError(
                f"optim.learning_rate is {self.learning_rate}, but nothing is learnt unless it is above 0."
            )
        if not (math.isfinite(self.learning_rate) and self.epsilon > 0 and self.weight_decay >= 0 and self.warmup >= 0):
            raise ConfigError(
                f"optim has learning_rate {self.learning_rate}, epsilon {self.epsilon}, weight_decay "
                f"{self.weight_decay} and warmup {self.warmup}: finite, above 0, and the last two not below 0."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas is {list(self.betas)}, but shares of moments that are kept lie in [0, 1).")
        if not self.clip_norm > 0:
            raise ConfigError(f"optim.clip_norm is {self.clip_norm}, but it must be above 0; 1e9 never clips.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is drawn again and again to see where training goes: fixed prompts and seeds, the stock sampler."""

    prompts: str | None = None  # file of prompts
    split: Literal["heldout", "hard", "train"] | None = None  # prompt set of the shapes world
    limit: int = 120  # prompts
    per_prompt: int = 1  # images of each; diversity within prompts needs 2 or more
    every: int = 50  # steps; each evaluation is also a checkpoint
    batch: int = 40  # images at once
    keep: int = 16  # pictures that stay in samples/step-N
    averaged: bool = True  # draw with the averaged weights, those that are saved
    before: str = ""  # put before each prompt where it is drawn, not where it is judged: "quality 9.9 of 10, "
    call: dict[str, Any] = field(default_factory=dict)  # arguments of the stock call, over the model's card
    tower: str | None = (
        "auto"  # CLIP whose embeddings tell variety and whether prompts still count; auto is shapes-clip
    )
    # for embedded models and plain pixels for others; never the CLIP that trains, which would be fooled with it
    kl_prompts: int = 8  # prompts whose stochastic walks measure the divergence from the base model; 0 leaves it out

    def __post_init__(self) -> None:
        if self.prompts is not None and self.split is not None:
            raise ConfigError("evaluate has both prompts and split. Give one of them.")
        for name, least in {"limit": 1, "per_prompt": 1, "every": 1, "batch": 1, "keep": 0, "kl_prompts": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"evaluate.{name} is {getattr(self, name)}, but it must be at least {least}.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tuning job."""

    objective: str | dict[str, Any] = "flow_grpo"  # a name, or the name with its settings
    reward: tuple[str, ...] | dict[str, Any] | str = ()  # what is raised
    truth: str | None = None  # an exact judge where there is one; logged, never trained on
    panel: tuple[str, ...] | dict[str, Any] = ()  # held-out rewards that only watch
    data: DataConfig = field(default_factory=DataConfig)  # pictures to learn from, for objectives that need not draw
    relabel: RelabelConfig = field(default_factory=RelabelConfig)  # of the data: scores into prompts
    prompts: str | None = None  # file of training prompts
    split: Literal["train", "heldout", "hard"] | None = None  # or a prompt set of the shapes world
    limit: int | None = None  # use only so many prompts
    prompt_weights: dict[str, float] = field(default_factory=dict)  # how often, by value of `weigh_by`; 1 where none is
    weigh_by: str = "tag"  # name in a prompt's metadata
    steps: int = 300  # rollouts; each is followed by `updates` optimiser steps
    minutes: float | None = None  # end after the step during which so much time has passed, resumed parts included
    groups: int = 12  # prompts in a step, over all processes
    group_size: int = 12  # images of each; their mean is the baseline
    micro_batch: int = 16  # images at once, sampling and learning alike: the ratio is exactly 1 only then
    updates: int = 1  # optimiser steps from one rollout; from the second on the ratio leaves 1
    passes: int = 1  # times that a rollout is gone through, with `updates` optimiser steps each
    sampling: dict[str, Any] = field(default_factory=dict)  # arguments of the call while training, over the model's
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    ema: float = 0.9  # share of the average kept; 0 evaluates and saves the raw weights
    ema_every: int = 8  # updates between two averagings
    precision: Precision = "no"  # autocast of the denoiser; weights that are trained stay float32
    gradient_checkpointing: bool = False  # a second forward instead of kept activations
    compile: bool = False  # torch.compile of the denoiser: minutes at first, faster after
    overlap: bool = True  # score in a thread while the next batch of the same rollout is sampled
    invalid_limit: float = 0.2  # share of images a reward may fail on before the run stops
    checkpoint_every: int | None = None  # steps; by default at every evaluation
    keep: int = 2  # checkpoints that stay beside the best
    resume: str = "auto"  # auto, never, or the folder of a checkpoint
    force: bool = False  # resume although settings changed
    trackers: tuple[str, ...] = ("auto",)  # tensorboard, trackio, wandb; auto is tensorboard where installed
    preflight: bool = True  # try the ratio, the gradient and the reward on the real pipeline first

    def __post_init__(self) -> None:
        if self.prompts is not None and self.split is not None:
            raise ConfigError("the job has both prompts and split. Give one of them.")
        if self.data.given and (self.prompts is not None or self.split is not None):
            raise ConfigError(
                "the job has data, whose pictures bring their prompts, and prompts or a split beside. Drop one of them."
            )
        if self.data.given and (self.limit is not None or self.prompt_weights):
            raise ConfigError("limit and prompt_weights are for prompts that are drawn. With data, use data.limit.")
        if self.relabel.enabled and not self.data.given:
            raise ConfigError(
                "relabel puts scores of data into prompts, and the job has no data. Give some, or drop it."
            )
        for name in ("steps", "groups", "group_size", "micro_batch", "updates", "passes", "ema_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but it must be at least 1.")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"minutes is {self.minutes}, but a run needs some time. Leave it out for no limit.")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ConfigError(
                f"checkpoint_every is {self.checkpoint_every}, but it counts steps from 1. Leave it out for a "
                "checkpoint at every evaluation."
            )
        for value, weight in self.prompt_weights.items():
            if not 0 <= weight < math.inf:
                raise ConfigError(f"prompt_weights.{value} is {weight}, but a weight is a number of 0 or more.")
        if self.watch.kl_ceiling is not None and not self.evaluate.kl_prompts:
            raise ConfigError(
                "watch.kl_ceiling is set and evaluate.kl_prompts is 0, so no divergence is measured. Use kl_prompts 8."
            )
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}, but the share of the average that is kept lies in [0, 1).")
        if not 0 < self.invalid_limit <= 1:
            raise ConfigError(f"invalid_limit is {self.invalid_limit}, but a share of images lies in (0, 1].")

    @classmethod
    def of(cls, told: Any) -> TrainConfig:
        """The settings of a job out of something that has more of them, such as its command."""
        return cls(**{each.name: getattr(told, each.name) for each in fields(cls)})

    @property
    def images(self) -> int:
        """Images of one step, over all processes."""
        return self.groups * self.group_size

    @property
    def objective_name(self) -> str:
        return named(self.objective)[0]


def named(spec: str | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The name and the settings of `flow_grpo` or `{flow_grpo: {...}}`."""
    if isinstance(spec, str):
        return spec, {}
    if len(spec) != 1:
        raise ConfigError(f"objective has {len(spec)} names ({', '.join(map(str, spec)) or 'none'}). Give exactly one.")
    name, given = next(iter(spec.items()))
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"objective.{name} is {given!r}, but it takes a mapping of settings.")
    return str(name), given or {}
