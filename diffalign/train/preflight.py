"""Before the first step: what cannot work is refused, and what can is tried on the real pipeline and timed."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch

from diffalign.errors import ConfigError, ModelError
from diffalign.train.advantage_config import AdvantageConfig
from diffalign.train.ema import whole
from diffalign.train.job import Job
from diffalign.train.objective import Objective, Rehearses
from diffalign.train.precision import DTYPES
from diffalign.train.rehearsal import Rehearsal

STEP_SETS = ("group_step", "group_all", "batch_step")


@dataclass(frozen=True)
class Preflight:
    """What a try of the first step told."""

    ratio_off: float | None  # largest |ratio - 1| before any update, where the objective has a ratio
    reached: float  # share of the trained layers that a gradient reaches
    spread: float | None  # standard deviation of the reward, where the objective tried one
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
        passes = f" in each of {config.passes} passes" if config.passes > 1 else ""
        found = [
            f"trains {self.trained:,} numbers of {', '.join(job.trained.denoisers)}; a gradient reaches "
            f"{self.reached:.0%} of the layers",
            f"a step: {per} images; {micro} micro-batches of {min(config.micro_batch, share)} in each of "
            f"{job.processes} process(es); {min(config.updates, micro)} update(s){passes}",
            *self._measured(),
            f"about {self.seconds_per_step:.1f} s and {self.nfe_per_step:,} model rows a step, "
            f"{hours:.1f} h for {config.steps} steps without evaluations; about {self.gigabytes:.1f} GB",
        ]
        if config.minutes is not None and hours * 60 > config.minutes:
            found.append(
                f"minutes={config.minutes:g} will end it after about {config.minutes * 60 / self.seconds_per_step:.0f}"
            )
        return found

    def _measured(self) -> list[str]:
        """The line of what only some objectives have."""
        told = [] if self.ratio_off is None else [f"ratio before the first update: 1 +- {self.ratio_off:.1e}"]
        told += [] if self.spread is None else [f"spread of the reward: {self.spread:.3g}"]
        return ["; ".join(told)] if told else []


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
    if job.stock is not None and not getattr(objective, "takes_data", False):
        raise ConfigError(
            f"the job has data, but {objective.name} draws its own images. Drop data, or use sft, nft, crd, dpo."
        )
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


def require_advantages(job: Job, *, stepwise: bool, objective: str) -> None:
    """Refuse advantages that need what this job does not have; `stepwise` says whether there is a reward per step."""
    told = job.config.advantage
    if stepwise and told.step_norm not in STEP_SETS:
        raise ConfigError(
            f"advantage.step_norm is {told.step_norm}, but there is a reward for every step. Use group_step, which "
            "compares the images of a prompt at each step, or group_all, which keeps small gains small."
        )
    if not stepwise and told.step_norm != "none":
        raise ConfigError(
            f"advantage.step_norm is {told.step_norm}, but an image has one reward. Leave it out, or set credit.phases."
        )
    if told.renorm or told.mu != 1 or told.credit == "return":
        raise ConfigError(
            "advantage has renorm, mu or credit, but in a training job the objective credits its steps, before it "
            f"keeps those that train. Set objective.{objective}.credit: process: renorm, mu or gamma: 1 instead."
        )
    if told.hardness in ("responsiveness", "both"):
        raise ConfigError(
            f"advantage.hardness is {told.hardness}, which compares with the reward of a demonstration, and a training "
            "job has none. Use data, or off."
        )
    if told.hardness == "data" and job.tower is None:
        raise ConfigError(
            "advantage.hardness is data, which measures how far an image is from its prompt, but there is no CLIP to "
            "measure it with. Set evaluate.tower, or hardness to off."
        )
    named = any(told.task_by in case.metadata for case in job.prompts)
    if told.task_by != AdvantageConfig.task_by and not named:
        raise ConfigError(
            f"advantage.task_by is '{told.task_by}', but no prompt has it in its metadata. Give a .jsonl file whose "
            "prompts do, or leave it out."
        )


def fly(job: Job, objective: Objective) -> Preflight:
    """Try the first step: what the objective rehearses, then gradient and memory.

    It leaves no trace in the run: neither in weights nor in what the run has cost.
    """
    spent = vars(job.budget).copy()
    found = objective.rehearse(job) if isinstance(objective, Rehearses) else _tried(job, objective)
    reached = _reached(job)
    vars(job.budget).update(spent)
    count = job.trained.count
    return Preflight(found.ratio_off, reached, found.spread, found.seconds, found.rows, _memory(count), count)


def _tried(job: Job, objective: Objective) -> Rehearsal:
    """A whole first step of an objective that rehearses nothing itself, without its update."""
    state, before, start = objective.state(), job.budget.nfe, time.perf_counter()
    micros = objective.collect(job, 0).micros
    for micro in micros:
        objective.learn(job, micro, len(micro) / sum(map(len, micros)))
    objective.restore(state)
    return Rehearsal(time.perf_counter() - start, (job.budget.nfe - before) * job.processes)


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


def _memory(trained: int) -> float:
    """What was needed so far, and what the first update adds: two float32 moments of every trained number."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    used = used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1000  # kilobytes on Linux
    return (used + 8 * trained) / 1e9
