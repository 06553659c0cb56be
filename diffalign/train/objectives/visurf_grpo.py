"""ViSurf on walks: a reference picture stands in every group as one more walk, which a bridge leads to it.

Paper: "ViSurf: Visual Supervised-and-Reinforcement Fine-Tuning for Large Vision-and-Language Models", 2025 (arXiv
2510.10606), with its own objective: clipped ratios of draws and of a label alike, here of Flow-GRPO's steps.

Where we differ: a label of words is likely or not as it stands, a picture needs a walk. From its own start noise each
step goes where the sampler would go if the model pointed at the reference's latents, fresh noise included; at a level
with noise sigma the walk then has the mean alpha times the reference and the deviation sigma. Its steps' densities are
the model's. The kernel is the coefficient-preserving one: under the flow SDE a straight bridge has too little noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.noise import Kernel, Levels, Transition
from diffalign.train.job import Job
from diffalign.train.known import latents
from diffalign.train.objectives.flow_grpo import FlowGRPO, FlowGRPOConfig
from diffalign.train.objectives.visurf import WithReferences
from diffalign.train.rollout import Rollout, sample
from diffalign.train.schedules import NoiseConfig


@dataclass(frozen=True, kw_only=True)
class ViSurfGRPOConfig(FlowGRPOConfig):
    """Flow-GRPO's settings, and how the reference's reward is held in check."""

    smooth: bool = True  # a reference that some draw equals gets the mean of the draws, and so teaches nothing
    free: tuple[str, ...] = ()  # rewards that a reference gets for nothing; they count 0 for it
    noise: NoiseConfig = field(default_factory=lambda: NoiseConfig(kernel="cps"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise.kernel not in ("cps", "ddim"):
            raise ConfigError(
                f"noise.kernel is {self.noise.kernel}, but bridges keep the coefficients. Use cps, or ddim where the "
                "model predicts noise."
            )
        if self.credit.similarity != "none" or self.credit.phases:
            raise ConfigError(
                "credit.similarity and credit.phases look at clean estimates, which a bridge has none of."
            )


def bridged(kernel: Kernel, clean: Tensor, given: Tensor) -> Kernel:
    """The kernel of a batch in which the model, in the rows `given` (B,), points at `clean` (B, ...) at every step."""
    rows = given.view(-1, *[1] * (clean.ndim - 1))

    def step(levels: Levels, x: Tensor, prediction: Tensor, i: int) -> Transition:
        alpha, sigma = levels.at(i)
        noise = (x.float() - alpha * clean) / sigma
        return kernel(levels, x, torch.where(rows, levels.target(clean, noise, i).to(prediction), prediction), i)

    return step


class ViSurfGRPO(WithReferences, FlowGRPO):
    """Flow-GRPO on groups that hold a reference."""

    name: ClassVar[str] = "visurf_grpo"
    settings: ClassVar[type[Any]] = ViSurfGRPOConfig
    config: ViSurfGRPOConfig

    def check(self, job: Job) -> None:
        self.require_references(job)
        super().check(job)

    def sampled(self, job: Job, step: int, cases: Sequence[Case]) -> tuple[list[Rollout], Tensor]:
        """Walks of the sampler and bridges to the references in micro-batches; the last of a group is the bridge."""
        kernel, trained = self.noise(job, step)
        starts = self.starts(job, cases)

        def make(first: int, chunk: Sequence[Case]) -> Rollout:
            given, pictures = self.references(job, step, first, len(chunk))
            start = job.driver(starts[first : first + len(chunk)]).start()
            rows = torch.tensor(given, device=start.device)
            clean = torch.zeros_like(start, dtype=torch.float32)
            if pictures:
                clean[rows] = latents(job, [c for c, g in zip(chunk, given, strict=True) if g], pictures).to(clean)
            return self.towards(job, chunk, kernel, trained, start, clean, rows)

        return self.scored(job, cases, make)

    def towards(
        self,
        job: Job,
        chunk: Sequence[Case],
        kernel: Kernel,
        trained: range,
        start: Tensor,
        clean: Tensor,
        rows: Tensor,
    ) -> Rollout:
        """Walks from `start` (B, ...) of which some `rows` end at `clean`; densities are the model's for all."""
        driver, keep = job.driver(chunk), self.config.credit.weighting == "ratio_norm"
        levels = driver.levels
        unit = 1.0 if levels.prediction == "flow" else math.hypot(*levels.at(0))  # what starts are scaled by
        noise = start.float() / unit
        wide = rows.view(-1, *[1] * (start.ndim - 1))
        x = torch.where(wide, levels.noised(clean, noise, 0).to(start), start)
        found = sample(driver, bridged(kernel, clean, rows), trained, convention=self.config.density, x=x)
        walk, found.kernel = found.walk, kernel
        steps = [kernel(levels, x, p, i) for i, (x, p) in enumerate(zip(walk.latents, walk.predictions, strict=False))]
        walk.log_probs = torch.stack([
            step.log_prob(move, self.config.density) for step, move in zip(steps, walk.moves, strict=True)
        ])  # fmt: skip
        if keep:
            found.means = {i: steps[i].mean for i in trained}
        return found


OBJECTIVE = ViSurfGRPO
