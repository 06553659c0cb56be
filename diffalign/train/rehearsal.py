"""One micro-batch of the first step, tried before training: ratio, noise, reward, time and model rows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.errors import ConfigError, ModelError
from diffalign.train.job import Job
from diffalign.train.objective import Refreshes

if TYPE_CHECKING:
    from diffalign.train.forward import ForwardProcess
    from diffalign.train.objective import Objective
    from diffalign.train.policy import PolicyGradient

LEAST_NOISE = 1e-4  # of a step, beside latents of about 1: what float32 still tells from rounding
MOST_NOISE = 3.0  # of a step, beside the latents' own level: beyond it the next level is not where the model knows it
TRIES = 4  # micro-batches in which a reward may show a difference


@dataclass(frozen=True)
class Rehearsal:
    """What a try of an objective told; its gradient is left in what is trained."""

    seconds: float  # of a whole step
    rows: int  # model rows of a whole step, over all processes
    ratio_off: float | None = None  # largest |ratio - 1| before any update, where there is a ratio
    spread: float | None = None  # standard deviation of the reward, where there is one


class Cost:
    """Seconds and model rows of some images, and what a step of them all takes."""

    def __init__(self, job: Job) -> None:
        self.job, self.seconds, self.rows = job, 0.0, 0

    @contextmanager
    def of(self, times: int = 1) -> Iterator[None]:
        """Count a block, as if it ran so many times."""
        before, start = self.job.budget.nfe, time.perf_counter()
        yield
        self.rows += times * (self.job.budget.nfe - before)
        self.seconds += times * (time.perf_counter() - start)

    def step(self, images: int) -> tuple[float, int]:
        """Seconds of a step, and its rows over all processes, where so many images of one process were counted."""
        many = self.job.config.images / self.job.processes / images
        return self.seconds * many, round(self.rows * many) * self.job.processes


def rehearse(job: Job, objective: PolicyGradient) -> Rehearsal:
    """Sample, score and replay a micro-batch; the test of the ratio is no part of a step and is not charged."""
    _require_noise(job, objective)
    cases = job.cases_of(0)[: job.config.micro_batch]
    cost = Cost(job)
    with cost.of():
        rollouts, rewards = objective.sampled(job, 0, cases)
        objective.step_rewards(job, rollouts, rewards)
    off = _ratio_off(job, objective, rollouts[0])
    objective.pretend(rollouts[0])
    with cost.of(times=job.config.passes):
        objective.learn(job, rollouts[0], 1.0)
    return Rehearsal(*cost.step(len(cases)), off, _spread(job, objective, rewards))


def of_images(job: Job, objective: ForwardProcess) -> Rehearsal:
    """Draw and score a micro-batch, and learn from it as if some were better and some worse."""
    state, cases = objective.state(), job.cases_of(0)[: job.config.micro_batch]
    cost = Cost(job)
    with cost.of():
        micros, rewards = objective.sampled(job, 0, cases)
    objective.pretend(job, micros)
    with cost.of(times=job.config.passes):
        if isinstance(objective, Refreshes):
            objective.refresh(job, micros)
        for micro in micros:
            objective.learn(job, micro, 1.0)
    spread = _spread(job, objective, rewards) if objective.draws else float(rewards.std(correction=0))
    objective.restore(state)
    return Rehearsal(*cost.step(len(cases)), spread=spread)


def of_one(job: Job, objective: Objective, micro: Any) -> Rehearsal:
    """Learn from one micro-batch of the first step, where drawing it is a part of that."""
    cost = Cost(job)
    with cost.of(times=job.config.passes):
        objective.learn(job, micro, 1.0)
    return Rehearsal(*cost.step(len(micro)))


def _require_noise(job: Job, objective: PolicyGradient) -> None:
    """Refuse a trained step that is deterministic but for rounding, or that throws the latents out of their range."""
    kernel, trained = objective.noise(job, 0)
    driver = job.driver(job.prompts[:1])
    x = driver.start()
    for i in trained:
        std, level = float(kernel(driver.levels, x, x, i).std), math.hypot(*driver.levels.at(i))
        if not std > LEAST_NOISE:
            raise ConfigError(
                f"step {i} of the sampler has noise of deviation {std:.1e}, which is next to none: its log-density is "
                "rounding, and images hardly differ. Raise noise.level, or leave the step out with noise.low or "
                "noise.high."
            )
        if not std <= MOST_NOISE * level:
            raise ConfigError(
                f"step {i} of the sampler has noise of deviation {std:.3g} beside latents of about {level:.3g}: what "
                "follows is noise that the model has never seen. Lower noise.level (0.7 is usual), or sample with "
                "more steps."
            )


def _ratio_off(job: Job, objective: Any, micro: Any) -> float:
    """How far the ratio is from 1 where nothing was learnt yet."""
    before, again = objective.replayed(job, micro)
    if before.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"log-probabilities are {before.dtype}, whose rounding is larger than a clip range. Compute them in "
            "float32: kernels must return a float32 mean."
        )
    off = float((again - before).abs().max())
    low, _ = objective.config.ranges(micro.elements)
    if not off <= low / 10:
        raise ModelError(
            f"the ratio before any update is off by {off:.1e}, too much for a clip range of {low:.1e}: replay and "
            "sampling do not run the same computation. Turn off what is random or differs between them (dropout, "
            "compile, another attention backend), or load the model in float32."
        )
    return off


def _spread(job: Job, objective: PolicyGradient | ForwardProcess, rewards: Tensor) -> float:
    """The reward's largest deviation inside a tried group; one that tells no images of a prompt apart is refused."""
    size, most = job.config.group_size, max(job.config.micro_batch, job.config.group_size)
    if len(rewards) < size:  # a try is at least one whole group
        rest = job.cases_of(0)[len(rewards) : size]
        rewards = torch.cat([rewards, objective.sampled(job, 0, rest)[1]])
    seen = []
    for k in range(1, TRIES + 1):
        total = job.total(rewards)
        seen.append(total)
        within = float(job.gather(_within(total, size)[None]).max())
        if within > 0:
            return within
        if k < TRIES:
            rewards = objective.sampled(job, k, job.cases_of(k)[:most])[1]
    known = (every := job.gather(torch.cat(seen)))[~every.isnan()]
    names = ", ".join(reward.name for reward, _ in job.members)
    if not len(known):
        raise ConfigError(f"reward {names} could not judge any of {len(every)} images. See the warnings above.")
    alike = (
        f"{float(known[0]):g} for all" if float(known.max()) == float(known.min()) else "the same for every prompt's"
    )
    raise ConfigError(
        f"reward {names} is {alike} of {len(known)} images, so every advantage would be 0. Use a reward with partial "
        "credit (shapes_soft instead of shapes), prompts that are neither hopeless nor solved, or more noise."
    )


def _within(total: Tensor, size: int) -> Tensor:
    """The largest deviation inside a group, of rewards (n,) that stand group by group; 0 where none can be told."""
    rows = [part[~part.isnan()] for part in torch.split(total, size)]
    spreads = [part.std() for part in rows if len(part) > 1 and float(part.max() - part.min()) > 0]
    return torch.stack(spreads).max() if spreads else torch.zeros(())
