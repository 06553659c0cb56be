"""DenseGRPO: each step is credited with what it adds to the reward of the image that would follow without more noise.

Paper: "DenseGRPO: From Sparse to Dense Reward for Flow Matching Model Alignment", Deng et al., 2026 (arXiv 2601.20218),
sections 3.1 (step rewards by deterministic completion) and 3.2 (exploration calibrated per step, here `calibrate`).

Where we differ: where a walk has no noise after its window, the completion of the window's end is the image itself and
is not drawn again. What the paper leaves open are settings: the number of samples, when a calibration ends (every step
within one change for a few rounds), and bounds of psi. All steps that a window may ever hold are calibrated together,
by the signs of plain gains, whatever `value` and `credit` make of them. Fewer completion steps than the schedule has
left (`completion`) skip evenly through it; the paper finds that worse. The last step is trained only with
`noise.train_last`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign import media, noise
from diffalign.cases import Case, derived_seed
from diffalign.errors import ConfigError
from diffalign.noise import Kernel
from diffalign.train.credit import dense_gains
from diffalign.train.data import PromptSampler
from diffalign.train.job import Job
from diffalign.train.objectives.flow_grpo import FlowGRPO, FlowGRPOConfig
from diffalign.train.rollout import Rollout
from diffalign.train.schedules import everywhere, noise_levels


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How much noise each step gets: as much as leaves gains and losses in balance."""

    enabled: bool = False  # costs `rounds` x `samples` completed walks before the first step
    samples: int = 24  # images of a round, one of each prompt
    rounds: int = 20  # most rounds
    tolerance: int = 2  # a step is balanced while its gains and losses differ by fewer images than this
    change: float = 0.01  # what psi rises or falls by in a round
    floor: float = 0.01  # least psi
    cap: float = 2.0  # largest psi, or where it starts: with a reward of 0 and 1 ties on neither side let psi grow
    settled: int = 4  # rounds within one change that end it

    def __post_init__(self) -> None:
        if not 0 < self.floor < self.cap or not self.change > 0 or min(self.samples, self.rounds, self.settled) < 1:
            raise ConfigError(
                f"calibrate has floor {self.floor}, cap {self.cap} and change {self.change}, {self.samples} samples, "
                f"{self.rounds} rounds and {self.settled} settled: psi moves by a change above 0 between floor and "
                "cap, and the counts are at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class DenseGRPOConfig(FlowGRPOConfig):
    """Flow-GRPO's settings, and where step rewards come from."""

    completion: int | None = None  # model calls that finish an image from a step; none is all the schedule has left
    value: Literal["gain", "level"] = "gain"  # level rewards a step with the completed image itself, the ablation
    calibrate: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.completion is not None and self.completion < 1:
            raise ConfigError(
                f"completion is {self.completion}, but an image takes at least 1 call. Leave it out for all."
            )


def calibrated(psi: Sequence[float], gains: Tensor, config: CalibrationConfig) -> list[float]:
    """One round: psi of a step rises where its gains (N, S) are balanced in sign, else it falls."""
    more, fewer = (gains > 0).sum(0), (gains < 0).sum(0)
    balanced = ((more - fewer).abs() < config.tolerance).tolist()
    moved = [p + config.change if fine else p - config.change for p, fine in zip(psi, balanced, strict=True)]
    return [min(max(p, config.floor), config.cap) for p in moved]


def settled(history: Sequence[Sequence[float]], config: CalibrationConfig) -> bool:
    """Whether every step has stayed within one change for the last rounds."""
    last = history[-config.settled - 1 :]
    if len(last) <= config.settled:
        return False
    slack = config.change * (1 + 1e-6)
    return all(max(column) - min(column) <= slack for column in zip(*last, strict=True))


def thinned(start: int, steps: int, count: int) -> list[int]:
    """`count` levels to call the model at, spread evenly from `start` over the levels before `steps`."""
    count = min(count, steps - start)
    return [start + round(k * (steps - start) / count) for k in range(count)]


def share_of(cases: Sequence[Case], rank: int, processes: int) -> list[Case]:
    """One of `processes` neighbouring shares of equal length; what the last ones lack is the last case over again."""
    count = -(-len(cases) // processes)
    padded = [*cases, *[cases[-1]] * (count * processes - len(cases))]
    return padded[rank * count : (rank + 1) * count]


class DenseGRPO(FlowGRPO):
    """Flow-GRPO with a reward for every step."""

    name: ClassVar[str] = "dense_grpo"
    settings: ClassVar[type[DenseGRPOConfig]] = DenseGRPOConfig
    dense: ClassVar[bool] = True
    config: DenseGRPOConfig

    def __init__(self, config: DenseGRPOConfig) -> None:
        super().__init__(config)
        self.psi: list[float] = []  # of every step, once calibrated

    def check(self, job: Job) -> None:
        super().check(job)
        if not self.config.calibrate.enabled:
            return
        prediction = job.levels.prediction
        if prediction != "flow":
            raise ConfigError("calibrate is on, but psi is the noise of a flow model's steps. Leave it off here.")
        if (kernel := self.kernel_name(prediction)) != "flow_sde":
            raise ConfigError(
                f"calibrate is on and noise.kernel is {kernel}, but psi is the noise of the flow SDE. Use flow_sde, or "
                "leave calibrate off."
            )

    def state(self) -> dict[str, Any]:
        return {"psi": list(self.psi)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.psi = [float(p) for p in state["psi"]]

    def noise(self, job: Job, step: int) -> tuple[Kernel, range]:
        """The calibrated psi inside the window, where there is one."""
        kernel, trained = super().noise(job, step)
        if not self.psi:
            return kernel, trained
        sigma = job.levels.sigma.tolist()
        found = [p * math.sqrt(a - b) for p, (a, b) in zip(self.psi, pairwise(sigma), strict=True) if p > 0]
        self.spread = math.fsum(found) / max(len(found), 1)
        return noise.diffused([p if i in trained else 0.0 for i, p in enumerate(self.psi)]), trained

    def still(self, job: Job) -> Kernel:
        """The deterministic sampler that completes: that of the walks, without noise."""
        return noise.KERNELS[self.kernel_name(job.levels.prediction)](0.0)

    def step_rewards(self, job: Job, rollouts: Sequence[Rollout], rewards: Tensor) -> Tensor:
        """Rewards (n, S) of the trained steps: what each adds to the completed image."""
        levels = self.ladder(job, rollouts, rewards)
        chosen = levels[:, 1:] if self.config.value == "level" else dense_gains(levels)
        return self.through_steps(chosen, job.total(rewards)[:, None])

    def ladder(self, job: Job, rollouts: Sequence[Rollout], rewards: Tensor) -> Tensor:
        """Values (n, S + 1): of the images completed before each trained step, and after the last of them."""
        trained, steps = rollouts[0].trained, rollouts[0].driver.length
        ends_here = self.config.completion is None or trained.stop == steps
        places = list(trained) if ends_here else [*trained, trained.stop]
        columns = self.values(job, rollouts, places)
        return torch.cat([columns, job.total(rewards)[:, None]], 1) if ends_here else columns

    def values(self, job: Job, rollouts: Sequence[Rollout], places: Sequence[int]) -> Tensor:
        """Rewards (n, len(places)) of the images completed from those levels."""
        return self.worth(job, rollouts, places, partial(self.complete, job))

    def complete(self, job: Job, rollout: Rollout, i: int) -> Tensor:
        """Media (B, ...) of the walks at level i, finished without noise."""
        driver, x = rollout.driver, rollout.walk.latents[i]
        if self.config.completion is None or self.config.completion >= driver.length - i:
            walk = driver.rollout(self.still(job), x=x, start=i, quiet=True, dtype=torch.float32)
            return media.to_tensor(walk.media).float()
        places = [*thinned(i, driver.length, self.config.completion), driver.length]
        for place, following in pairwise(places):
            x = driver.levels.jump(x, driver.predict(x, place), place, following)
        return media.to_tensor(driver.decode(x)).float()

    def prepare(self, job: Job) -> None:
        """Find psi before the first step, then leave it."""
        if not self.config.calibrate.enabled:
            return
        told = self.config.calibrate
        shares = noise_levels(0, job.length, everywhere(self.config.noise))
        psi = [noise.flow_diffusion(job.levels, i, share) if share else 0.0 for i, share in enumerate(shares)]
        where, history = [i for i, p in enumerate(psi) if p > 0], []
        told = replace(told, floor=min(told.floor, *(psi[i] for i in where)), cap=max(told.cap, *psi))
        for k in range(told.rounds):
            self.psi = psi
            gains = self._round(job, k)
            moved = calibrated([psi[i] for i in where], gains, told)
            history.append(moved)
            psi = [0.0] * len(psi)
            for i, p in zip(where, moved, strict=True):
                psi[i] = p
            if settled(history, told):
                break
        last = history[-2:]
        self.psi = [0.0] * len(psi)
        for column, i in enumerate(where):
            self.psi[i] = math.fsum(row[column] for row in last) / len(last)
        job.say(f"psi after {len(history)} rounds: " + " ".join(f"{p:.3f}" for p in self.psi))

    def _round(self, job: Job, k: int) -> Tensor:
        """Gains (N, S) of fresh walks over all steps with noise; every process walks its share."""
        count = self.config.calibrate.samples
        drawn = PromptSampler(job.prompts, derived_seed(job.seed, "calibrate"))
        cases = share_of(drawn.cases_of(k, count, 1), job.rank, job.processes)
        trained = [i for i, p in enumerate(self.psi) if p > 0]
        kernel, span = noise.diffused(self.psi), range(trained[0], trained[-1] + 1)
        found = []
        for some in [cases[a : a + job.config.micro_batch] for a in range(0, len(cases), job.config.micro_batch)]:
            rollout = self.walk(job, some, kernel, span)
            found.append(dense_gains(self.ladder(job, [rollout], job.score(rollout.media, some))))
        return job.gather(torch.cat(found))[:count]


OBJECTIVE = DenseGRPO
