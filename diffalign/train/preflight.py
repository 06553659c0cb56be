"""Before the first step: what cannot work is refused, and what can is tried on the real pipeline and timed."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any

import torch

from diffalign.errors import ConfigError, ModelError
from diffalign.train.job import Job
from diffalign.train.objective import Objective
from diffalign.train.policy import PolicyGradient

TRIES = 4  # micro-batches in which a reward may show a difference


@dataclass(frozen=True)
class Preflight:
    """What a try of one micro-batch told."""

    ratio_off: float  # largest |ratio - 1| before any update
    reached: float  # share of the trained tensors that a gradient reaches
    spread: float  # standard deviation of the reward
    seconds_per_step: float
    nfe_per_step: int
    gigabytes: float  # most memory used so far: of the device, or of this process on a CPU
    trained: int  # numbers that are trained

    def lines(self, job: Job) -> list[str]:
        """The report for people."""
        config = job.config
        hours = self.seconds_per_step * config.steps / 3600
        per = f"{config.groups} prompts x {config.group_size} images = {config.images}"
        share = config.images // job.processes
        micro = -(-share // config.micro_batch)
        found = [
            f"trains {self.trained:,} numbers of {', '.join(job.trained.denoisers)}; a gradient reaches {self.reached:.0%}",
            f"a step: {per} images; {micro} micro-batches of {min(config.micro_batch, share)} in each of {job.processes} "
            f"process(es); {min(config.updates, micro)} update(s)",
            f"ratio before the first update: 1 +- {self.ratio_off:.1e}; spread of the reward: {self.spread:.3g}",
            f"about {self.seconds_per_step:.1f} s and {self.nfe_per_step:,} model rows a step, "
            f"{hours:.1f} h for {config.steps} steps without evaluations; {self.gigabytes:.1f} GB so far",
        ]
        if config.minutes is not None and hours * 60 > config.minutes:
            found.append(
                f"minutes={config.minutes:g} will end it after about {config.minutes * 60 / self.seconds_per_step:.0f}"
            )
        return found


def check(job: Job, objective: Objective) -> None:
    """What is known without running anything: batch arithmetic, and what the objective refuses."""
    config, processes = job.config, job.processes
    if config.groups % processes:
        near = processes * max(1, round(config.groups / processes))
        raise ConfigError(
            f"groups is {config.groups}, but {processes} processes share them evenly, each group on one process. "
            f"Use groups={near}."
        )
    share = config.groups * config.group_size // processes
    if config.micro_batch > share:
        raise ConfigError(
            f"micro_batch is {config.micro_batch}, but a process has only {share} images in a step. "
            f"Use micro_batch={share} or fewer."
        )
    if config.updates > -(-share // config.micro_batch):
        raise ConfigError(
            f"updates is {config.updates}, but a process has only {-(-share // config.micro_batch)} micro-batches in a "
            "step, and an update needs at least one. Lower updates or micro_batch."
        )
    objective.check(job)


def fly(job: Job, objective: Objective) -> Preflight:
    """Try a micro-batch of the first step: ratio, gradient, reward, time and memory. Leaves no trace in the run."""
    if not isinstance(objective, PolicyGradient):
        raise TypeError(type(objective).__name__)
    before = job.budget.nfe
    start = time.perf_counter()
    cases = job.cases_of(0)[: job.config.micro_batch]
    rollouts, rewards = objective.sampled(job, 0, cases)
    off = _ratio_off(objective, rollouts[0])
    rollouts[0].advantages = torch.ones(len(cases), len(rollouts[0].trained))
    rollouts[0].advantages[1::2] = -1.0
    objective.learn(job, rollouts[0], 1.0)
    seconds = time.perf_counter() - start
    rows = job.budget.nfe - before
    reached = _reached(job)
    spread = _spread(job, objective, rewards)
    many = job.config.images / job.processes / len(cases)
    return Preflight(
        off, reached, spread, seconds * many, int(rows * many) * job.processes, _memory(), job.trained.count
    )


def _ratio_off(objective: Any, rollout: Any) -> float:
    """How far the ratio is from 1 where nothing was learnt yet."""
    if rollout.log_probs.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"log-probabilities are {rollout.log_probs.dtype}, whose rounding is larger than a clip range. Compute them in "
            "float32: kernels must return a float32 mean."
        )
    with torch.enable_grad():
        again = rollout.replay(objective.config.density).detach()
    off = float((again - rollout.log_probs).abs().max())
    low, _ = objective.config.ranges(rollout.elements)
    if not off <= low / 10:
        raise ModelError(
            f"the ratio before any update is off by {off:.1e}, too much for a clip range of {low:.1e}: replay and sampling "
            "do not run the same computation. Turn off what is random or differs between them (dropout, compile, another "
            "attention backend), or load the model in float32."
        )
    return off


def _reached(job: Job) -> float:
    """The share of trained tensors with a gradient other than 0; the gradients are cleared."""
    named = job.trained.named_parameters()
    alive = [name for name, p in named if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    for _, parameter in named:
        parameter.grad = None
    if not alive:
        raise ModelError(
            "no gradient reaches what is trained, so nothing would be learnt. Choose other layers with adapter.targets, or "
            "another component with adapter.modules."
        )
    return len(alive) / len(named)


def _spread(job: Job, objective: PolicyGradient, rewards: torch.Tensor) -> float:
    """The reward's standard deviation over the tried images; a reward that is the same for all is refused."""
    for k in range(1, TRIES + 1):
        total = (rewards * job.weights).sum(1)
        known = total[~total.isnan()]
        if len(known) > 1 and float(known.max() - known.min()) > 0:
            return float(known.std())
        if k < TRIES:
            more = job.cases_of(k)[: job.config.micro_batch]
            rewards = torch.cat([rewards, objective.sampled(job, k, more)[1]])
    names = ", ".join(reward.name for reward, _ in job.members)
    if not len(known):
        raise ConfigError(f"reward {names} could not judge any of {len(rewards)} images. See the warnings above.")
    raise ConfigError(
        f"reward {names} is {float(known[0]):g} for all of {len(known)} images, so every advantage would be 0. Use a reward "
        "with partial credit (shapes_soft instead of shapes), prompts that are neither hopeless nor solved, or more noise."
    )


def _memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux
