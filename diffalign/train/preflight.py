"""Before the first step: what cannot work is refused, and what can is tried on the real pipeline and timed."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any

import torch

from diffalign.errors import ConfigError, ModelError
from diffalign.train.ema import whole
from diffalign.train.job import Job
from diffalign.train.objective import Objective
from diffalign.train.policy import PolicyGradient
from diffalign.train.precision import DTYPES

LEAST_NOISE = 1e-4  # of a step, beside latents of about 1: what float32 still tells from rounding
TRIES = 4  # micro-batches in which a reward may show a difference


@dataclass(frozen=True)
class Preflight:
    """What a try of one micro-batch told."""

    ratio_off: float  # largest |ratio - 1| before any update
    reached: float  # share of the trained layers that a gradient reaches
    spread: float  # standard deviation of the reward
    seconds_per_step: float
    nfe_per_step: int
    gigabytes: float  # most memory of a step: of the device, or of this process on a CPU
    trained: int  # numbers that are trained

    def lines(self, job: Job) -> list[str]:
        """The report for people."""
        config = job.config
        hours = self.seconds_per_step * config.steps / 3600
        per = f"{config.groups} prompts x {config.group_size} images = {config.images}"
        share = config.images // job.processes
        micro = -(-share // config.micro_batch)
        found = [
            f"trains {self.trained:,} numbers of {', '.join(job.trained.denoisers)}; a gradient reaches "
            f"{self.reached:.0%} of the layers",
            f"a step: {per} images; {micro} micro-batches of {min(config.micro_batch, share)} in each of "
            f"{job.processes} process(es); {min(config.updates, micro)} update(s)",
            f"ratio before the first update: 1 +- {self.ratio_off:.1e}; spread of the reward: {self.spread:.3g}",
            f"about {self.seconds_per_step:.1f} s and {self.nfe_per_step:,} model rows a step, "
            f"{hours:.1f} h for {config.steps} steps without evaluations; about {self.gigabytes:.1f} GB",
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
    if len(job.monitor) < 2:
        raise ConfigError(
            f"an evaluation has {len(job.monitor)} picture, which tells nothing. Raise evaluate.per_prompt or "
            "evaluate.limit."
        )
    if len(job.monitor) // config.evaluate.per_prompt < processes:
        raise ConfigError(
            f"an evaluation has {len(job.monitor) // config.evaluate.per_prompt} prompts, but {processes} processes "
            f"share them. Raise evaluate.limit to at least {processes}."
        )
    _require_one_precision(job)
    objective.check(job)


def _require_one_precision(job: Job) -> None:
    """Refuse whole weights in float32 beside text in half precision: no layer takes both without autocast."""
    if job.config.adapter.kind != "full" or job.config.precision != "no":
        return
    for name, part in job.pipe.components.items():
        parameters = part.parameters() if isinstance(part, torch.nn.Module) else ()
        if half := next((p.dtype for p in parameters if p.dtype in DTYPES.values()), None):
            raise ConfigError(
                f"adapter.kind is full, whose weights are float32 in training, but '{name}' is in {half} and precision "
                "is no. Set precision=bf16, or load the model in float32 (dtype=float32)."
            )


def fly(job: Job, objective: Objective) -> Preflight:
    """Try a micro-batch of the first step: ratio, gradient, reward, time and memory.

    It leaves no trace in the run: neither in weights nor in what the run has cost.
    """
    if not isinstance(objective, PolicyGradient):
        raise TypeError(type(objective).__name__)
    spent = vars(job.budget).copy()
    _require_noise(job, objective)
    before = job.budget.nfe
    start = time.perf_counter()
    cases = job.cases_of(0)[: job.config.micro_batch]
    rollouts, rewards = objective.sampled(job, 0, cases)
    off = _ratio_off(job, objective, rollouts[0])
    objective.pretend(rollouts[0])
    objective.learn(job, rollouts[0], 1.0)
    seconds = time.perf_counter() - start
    rows = job.budget.nfe - before
    reached = _reached(job)
    spread = _spread(job, objective, rewards)
    vars(job.budget).update(spent)
    many = job.config.images / job.processes / len(cases)
    return Preflight(
        off,
        reached,
        spread,
        seconds * many,
        int(rows * many) * job.processes,
        _memory(job.trained.count),
        job.trained.count,
    )


def _require_noise(job: Job, objective: PolicyGradient) -> None:
    """Refuse a sampler that is deterministic but for rounding in a step that is to be trained."""
    kernel, trained = objective.noise(job, 0)
    driver = job.driver(job.prompts[:1])
    x = driver.start()
    for i in trained:
        if not (std := float(kernel(driver.levels, x, x, i).std)) > LEAST_NOISE:
            raise ConfigError(
                f"step {i} of the sampler has noise of deviation {std:.1e}, which is next to none: its log-density is "
                "rounding, and images hardly differ. Raise noise.level, or leave the step out with noise.low or "
                "noise.high."
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


def _reached(job: Job) -> float:
    """The share of trained layers with a gradient other than 0; the gradients are cleared."""
    named = job.trained.named_parameters()
    layers = {_layer(name) for name, _ in named}
    alive = {_layer(name) for name, p in named if p.grad is not None and bool(whole(p.grad.abs().sum()) > 0)}
    for _, parameter in named:
        parameter.grad = None
    if not alive:
        raise ModelError(
            "no gradient reaches what is trained, so nothing would be learnt. Choose other layers with "
            "adapter.targets, or another component with adapter.modules."
        )
    return len(alive) / len(layers)


def _layer(name: str) -> str:
    """Where a tensor belongs; of a LoRA only one of two factors has a gradient at first, as the other is 0."""
    return name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]


def _spread(job: Job, objective: PolicyGradient, rewards: torch.Tensor) -> float:
    """The reward's standard deviation over the tried images; a reward that is the same for all is refused."""
    rewards = job.gather(rewards)
    for k in range(1, TRIES + 1):
        total = (rewards * job.weights).sum(1)
        known = total[~total.isnan()]
        if len(known) > 1 and float(known.max() - known.min()) > 0:
            return float(known.std())
        if k < TRIES:
            more = job.cases_of(k)[: job.config.micro_batch]
            rewards = torch.cat([rewards, job.gather(objective.sampled(job, k, more)[1])])
    names = ", ".join(reward.name for reward, _ in job.members)
    if not len(known):
        raise ConfigError(f"reward {names} could not judge any of {len(rewards)} images. See the warnings above.")
    raise ConfigError(
        f"reward {names} is {float(known[0]):g} for all of {len(known)} images, so every advantage would be 0. Use a "
        "reward with partial credit (shapes_soft instead of shapes), prompts that are neither hopeless nor solved, or "
        "more noise."
    )


def _memory(trained: int) -> float:
    """What was needed so far, and what the first update adds: two float32 moments of every trained number."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    used = used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1000  # kilobytes on Linux
    return (used + 8 * trained) / 1e9
