"""What the training of a reward model is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from diffalign import own_rewards
from diffalign.errors import ConfigError
from diffalign.train.known import DataConfig
from diffalign.train.settings import OptimConfig, Precision
from diffalign.valued import HOLE

Loss = Literal["bradley_terry", "ties", "uncertain", "pick", "best_of_all"]
INSTRUCTION = "How well does this picture show the following, and how good does it look?\n{prompt}"


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What a pair of pictures costs."""

    kind: Loss = "bradley_terry"
    k: float = 5.0  # of `ties`: how common ties are, above 1
    margin: float = 0.0  # of `bradley_terry`: by how much the better one has to lead
    draws: int = 100  # of `uncertain`: noisy gaps that are averaged
    soft: bool = False  # the share of the voters is the label, where it was counted

    def __post_init__(self) -> None:
        if not self.k > 1 or self.draws < 1 or not math.isfinite(self.margin):
            raise ConfigError(
                f"loss has k {self.k}, draws {self.draws} and margin {self.margin}: k is above 1, draws at least 1."
            )
        if self.soft and self.kind in ("ties", "best_of_all"):
            raise ConfigError(f"loss.soft is set, but '{self.kind}' takes no shares. Use bradley_terry, say.")


@dataclass(frozen=True, kw_only=True)
class RewardOptim(OptimConfig):
    """AdamW, slow and warmed up, as weights that know something want it."""

    learning_rate: float = 1e-5
    warmup: int = 20
    decay: Literal["constant", "cosine"] = "cosine"


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """What a reward model is judged by while it learns: prompts that teach nothing."""

    share: float = 0.2  # of the prompts, chosen by what they say, so that they are the same in every run
    pairs: tuple[str, ...] = ()  # preference files instead, or
    from_search: tuple[str, ...] = ()  # run folders instead
    images: str | None = None  # where their paths start
    limit: int | None = 1000  # entries at most
    every: int = 50  # steps; each look is also a checkpoint
    batch: int = 64  # pictures at once
    averaged: bool = True  # look with the averaged weights, those that are saved

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(
                f"evaluate.share is {self.share}, but the share of prompts held out lies between 0 and 1."
            )
        for name in ("every", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluate.{name} is {getattr(self, name)}, but it must be at least 1.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"evaluate.limit is {self.limit}, but a look needs at least 1 prompt.")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One training of a reward model."""

    objective: Literal["reward"] = "reward"
    name: str | None = None  # under which every verb knows the result
    model: str = "shapes-clip"  # what it is made of
    tower: Literal["clip", "vlm"] = "clip"  # two encoders, or a vision language model with a head and a LoRA
    freeze: float = 0.0  # of a clip: share of the layers that stay as they are, from the input on
    rank: int = 16  # of a vlm: of its LoRA
    instruction: str = INSTRUCTION  # of a vlm: what it is asked
    pixels: int | None = None  # of a vlm: of a picture at most
    data: DataConfig = field(default_factory=DataConfig)  # preference files, votes, search runs
    min_confidence: float | None = None  # leave out what fewer of the voters agree on, where they were counted
    tie_below: float = 0.0  # scores that differ by less are a tie
    by_prompt: bool = True  # every prompt weighs the same, however many pairs it has
    loss: LossConfig = field(default_factory=LossConfig)
    evaluate: HeldOutConfig = field(default_factory=HeldOutConfig)
    steps: int = 500
    minutes: float | None = None  # end after the step during which so much time has passed, resumed parts included
    batch: int = 32  # entries of a step, over all processes: a pair, or the pictures of a ranking
    micro_batch: int = 32  # entries at once
    pictures: int = 4  # of an entry in a step at most; others are drawn the next time
    patience: int = 5  # looks without a lower loss on held-out prompts after which it ends
    optim: RewardOptim = field(default_factory=RewardOptim)
    ema: float = 0.0  # share of the average kept; 0 looks at and saves the raw weights
    ema_every: int = 1
    precision: Precision = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: int | None = None
    keep: int = 2
    resume: str = "auto"
    force: bool = False
    trackers: tuple[str, ...] = ("auto",)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "patience", "rank", "ema_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but it must be at least 1.")
        if self.pictures < 2:
            raise ConfigError(f"pictures is {self.pictures}, but a comparison takes at least 2.")
        if not 0 <= self.freeze < 1:
            raise ConfigError(f"freeze is {self.freeze}, but the share of layers that stay lies in [0, 1).")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}, but the share of the average that is kept lies in [0, 1).")
        if self.min_confidence is not None and not 0 <= self.min_confidence <= 1:
            raise ConfigError(f"min_confidence is {self.min_confidence}, but a share of voters lies in [0, 1].")
        if not self.tie_below >= 0:
            raise ConfigError(f"tie_below is {self.tie_below}, but a difference of scores is 0 or more.")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"minutes is {self.minutes}, but a run needs some time. Leave it out for no limit.")
        if self.tower == "vlm" and HOLE not in self.instruction:
            raise ConfigError(f"instruction has no {HOLE} where the prompt goes.")
        if self.tower == "clip" and (self.instruction != INSTRUCTION or self.pixels is not None):
            raise ConfigError("instruction and pixels are for tower: vlm; a clip is asked nothing. Drop them.")
        if self.tower == "vlm" and self.freeze:
            raise ConfigError("freeze is for tower: clip; a vlm learns a LoRA and a head alone. Drop it.")
        if self.name is not None:
            own_rewards.require_name(self.name)
        if not self.data.given:
            raise ConfigError(
                "the training has no data. Give preference files (data.pairs), votes of a gallery (data.from_votes), "
                "or run folders of `diffalign generate` with a reward (data.from_search)."
            )

    updates = 1  # optimiser steps of a step
    passes = 1

    @property
    def images(self) -> int:
        """Pictures of one step at most, over all processes."""
        return self.batch * self.pictures

    @classmethod
    def of(cls, told: Any) -> RewardConfig:
        """The settings out of something that has more of them, such as their command."""
        from dataclasses import fields

        return cls(**{each.name: getattr(told, each.name) for each in fields(cls)})
