"""What objectives of the forward process share: finished images, made noisy again at levels of the sampler.

A step draws images with any sampler, scores and compares them, and then learns at some noise levels of each: no walk is
stored and no density is needed. Earlier weights (`Averages`) and the base model predict the same noisy latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign import media
from diffalign.cases import Case, batched, derived_seed
from diffalign.drive import Driver
from diffalign.errors import ConfigError
from diffalign.noise import case_noise
from diffalign.train import rehearsal
from diffalign.train.advantage import Advantages, advantages
from diffalign.train.ema import Averages
from diffalign.train.groups import Grouped, Made
from diffalign.train.job import Job
from diffalign.train.known import Stock, latents
from diffalign.train.objective import Collected
from diffalign.train.rehearsal import Rehearsal
from diffalign.train.renoised import Clean, Place, Seen, mean_error, stratified


class ForwardProcess(Grouped):
    """Base of the objectives that learn from noisy copies of finished images; `config` is a ForwardConfig."""

    OLD: ClassVar[tuple[str, ...]] = ()  # names of the earlier weights it keeps, each a FollowConfig of its config
    SAMPLES: ClassVar[str] = ""  # those that draw the images; the trained weights where it is empty
    COMPARES: ClassVar[str] = ""  # those whose predictions the loss reads
    takes_data: ClassVar[bool] = True
    least_group: ClassVar[int] = 2  # pictures of a prompt, where they are given

    def __init__(self, config: Any) -> None:
        self.config = config
        self._old: dict[str, Averages] | None = None
        self._restored: Mapping[str, Any] = {}

    def check(self, job: Job) -> None:
        if job.stock is None:
            self.require_groups(job)
        else:
            self._require_stock(job, job.stock)
        if not self.places(job):
            raise ConfigError(
                f"least_noise is {self.config.least_noise}, and no level of the sampler has so much noise. Lower it."
            )
        if self.config.anchor.guidance is not None and self.config.anchor.weight:
            self.guided(job, job.prompts[:1])

    def _require_stock(self, job: Job, stock: Stock) -> None:
        """Refuse data with fewer pictures than a group takes, and advantages that need drawn images."""
        size = job.config.group_size
        if not self.least_group <= size <= stock.least:
            raise ConfigError(
                f"group_size is {size}, but some prompts of the data have {stock.least} pictures, and {self.name} "
                f"needs {self.least_group} or more. Use group_size={max(stock.least, self.least_group)}, or other data."
            )
        if job.config.advantage.hardness != "off":
            raise ConfigError("advantage.hardness looks at images that are drawn, and the job learns from data.")

    def state(self) -> dict[str, Any]:
        return {name: old.state_dict() for name, old in (self._old or {}).items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._old, self._restored = None, state

    # earlier weights

    def old(self, job: Job, name: str) -> AbstractContextManager[None]:
        """A block with earlier weights in the model; without a name, with the trained ones."""
        return self._olds(job)[name].swapped() if name else nullcontext()

    def _olds(self, job: Job) -> dict[str, Averages]:
        if self._old is None:
            self._old = {name: Averages(job.trained.named_parameters()) for name in self.OLD}
            for name, state in self._restored.items():
                self._old[name].load_state_dict(state)
        return self._old

    def follow(self, job: Job, step: int) -> None:
        """Let earlier weights follow what the step before learnt."""
        olds = self._olds(job)
        if step:
            for name, old in olds.items():
                old.follow(getattr(self.config, name).at(step * job.updates_each))

    # collecting

    def collect(self, job: Job, step: int) -> Collected:
        """Draw the groups of this process, score and compare them, and choose the levels they are learnt at."""
        self.follow(job, step)
        cases = job.cases_of(step)
        micros, rewards = self.sampled(job, step, cases)
        found, told = self.judge(job, step, micros, rewards)
        self.deal(job, step, micros, rewards, found)
        return Collected(micros, told)

    def sampled(self, job: Job, step: int, cases: Sequence[Case]) -> tuple[list[Clean], Tensor]:
        """Finished images in micro-batches and their rewards (n, K)."""

        def make(_: int, chunk: Sequence[Case]) -> Clean:
            driver = job.driver(chunk)
            walk = driver.rollout(quiet=True)
            return Clean(driver, list(chunk), walk.latents[-1].float(), media.to_tensor(walk.media).float())

        if job.stock is not None:
            return self.given(job, job.stock, step, len(cases))
        with torch.no_grad(), self.old(job, self.SAMPLES):
            return self.scored(job, cases, make)

    def given(self, job: Job, stock: Stock, step: int, count: int) -> tuple[list[Clean], Tensor]:
        """The pictures of a step in micro-batches and their scores (n, 1); the first `count` of this process."""
        groups = stock.of(step, job.config.groups, job.config.group_size)
        rows = [row for group in job.groups_of(job.rank) for row in groups[group]][:count]
        micros = []
        for part in batched(rows, job.config.micro_batch):
            cases = [case for case, _, _ in part]
            clean = latents(job, cases, [picture for _, picture, _ in part])
            micros.append(Clean(job.driver(cases), cases, clean, torch.empty(0)))
        return micros, torch.tensor([[score] for _, _, score in rows])

    def judge(
        self, job: Job, step: int, made: Sequence[Made], rewards: Tensor, gains: Tensor | None = None
    ) -> tuple[Advantages, dict[str, float]]:
        if job.stock is None:
            return super().judge(job, step, made, rewards, gains)
        scores = job.gather(rewards)
        found = advantages(scores, torch.ones(1), job.group_ids, job.config.advantage)
        return found, {"score": float(scores.mean()), **found.stats}

    def deal(self, job: Job, step: int, micros: Sequence[Clean], rewards: Tensor, found: Advantages) -> None:
        """Give every image its rewards, its advantage, and the levels that its group is learnt at."""
        groups = torch.tensor([each for each in job.groups_of(job.rank) for _ in range(job.config.group_size)])
        share = (found.values / (2 * job.config.advantage.clip) + 0.5).clamp(0, 1)
        weight, first = self.weight(job, found), 0
        every, total = job.rank * len(rewards), self.worth(job, rewards)
        for micro in micros:
            here = slice(first, first + len(micro))
            rows = slice(every + first, every + first + len(micro))
            micro.groups, micro.reward, micro.media = groups[here], total[here], micro.media[:0]
            micro.advantage, micro.share = found.values[rows], share[rows]
            micro.weight, micro.clip = found.kept[rows].float() * weight, job.config.advantage.clip
            micro.levels = self.drawn(job, step, micro.groups)
            first += len(micro)

    def worth(self, job: Job, rewards: Tensor) -> Tensor:
        """One number (n,) for each image: its reward, or the score that came with it."""
        return job.total(rewards) if job.stock is None else rewards[:, 0]

    def places(self, job: Job) -> list[int]:
        """The loop indices where images may be made noisy again."""
        levels = job.levels
        blind = levels.prediction == "epsilon"  # pure noise tells such a model nothing about the image
        found = []
        for i in range(job.length):
            alpha, sigma = levels.at(i)
            if sigma / (alpha + sigma) >= self.config.least_noise and not (blind and alpha == 0):
                found.append(i)
        return found

    def drawn(self, job: Job, step: int, groups: Tensor) -> list[Tensor]:
        """Loop indices (draws x (B,)): images of a prompt share theirs, which depend on seed, step and group alone."""
        places, numbers = torch.tensor(self.places(job)), sorted(set(groups.tolist()))
        shift = torch.stack([
            torch.rand(
                self.config.draws,
                generator=torch.Generator().manual_seed(derived_seed(job.seed, "levels", step, number)),
            )
            for number in numbers
        ])  # fmt: skip
        row = torch.tensor([numbers.index(number) for number in groups.tolist()])
        return [places[level][row] for level in stratified(len(places), self.config.draws, shift)]

    def visited(self, job: Job, micro: Clean) -> Iterator[Place]:
        """The rows of a micro-batch by draw and level, each with its own noise; those that teach nothing are left out.

        Where weights are sharded all are visited, as all processes call the model equally often.
        """
        every = job.sharded or self.config.anchor.weight > 0
        teaches = torch.ones(len(micro), dtype=torch.bool) if every else micro.weight > 0
        for draw, levels in enumerate(micro.levels):
            noise = case_noise(self.noise_seeds(micro), micro.latents, "again", draw)
            for i in sorted(set(levels[teaches].tolist())):
                rows = ((levels == i) & teaches).nonzero().flatten()
                driver = micro.driver.select(rows.tolist())
                yield Place(draw, i, rows, driver, micro.latents[rows], noise[rows])

    def noise_seeds(self, micro: Clean) -> Sequence[int]:
        """The seed of each image's noise: its own."""
        return micro.driver.seeds

    # learning

    def learn(self, job: Job, micro: Clean, share: float) -> dict[str, Tensor]:
        """Predict every place with gradients; its backward runs at once."""
        self.remember(job, micro)
        told: dict[str, Tensor] = {}
        draws, none = len(micro.levels), [None] * len(micro.levels) * len(micro)
        places = list(self.visited(job, micro))
        olds, bases = micro.kept.get(self.COMPARES, none), micro.kept.get("base", none)
        for place, old, base in zip(places, olds, bases, strict=False):
            prediction = place.driver.predict(place.noisy, place.i, grad=True).float()
            seen = Seen(micro, place, prediction, old, base)
            policy, figures = self.loss(seen)
            part = share / (draws * len(micro))
            loss = (policy * seen.of(micro.weight)).sum()
            if base is not None:
                gap = mean_error(prediction, base)
                penalty = self.config.anchor.weights(seen.of(micro.share), seen.of(micro.reward)) * gap
                loss, figures = loss + penalty.sum(), {**figures, "anchor": gap}
            for name, value in {**figures, "loss": loss}.items():
                told[name] = told.get(name, torch.zeros(())) + value.detach().float().sum().cpu() * part
            job.backward(loss * part)
        return told

    def remember(self, job: Job, micro: Clean) -> None:
        """Predictions of earlier weights and of the base model at every place, once for all updates."""
        if self.COMPARES and self.COMPARES not in micro.kept:
            with self.old(job, self.COMPARES):
                micro.kept[self.COMPARES] = [self.seen_by(place, place.driver) for place in self.visited(job, micro)]
        if self.config.anchor.weight and "base" not in micro.kept:
            driver = self.guided(job, micro.cases)
            with job.trained.reference():
                micro.kept["base"] = [
                    self.seen_by(place, driver.select(place.rows.tolist())) for place in self.visited(job, micro)
                ]

    def seen_by(self, place: Place, driver: Driver) -> Tensor:
        """What the present weights predict at a place, computed as learning does: equal weights give equal bits."""
        return driver.predict(place.noisy, place.i, grad=True).float().detach()

    def guided(self, job: Job, cases: Sequence[Case]) -> Driver:
        """The pipeline at the guidance of the anchor."""
        scale = self.config.anchor.guidance
        return job.driver(cases) if scale is None else job.driver(cases, guidance_scale=scale)

    def loss(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss (b,) of one place and figures (b,)."""
        raise NotImplementedError

    # preflight

    def rehearse(self, job: Job) -> Rehearsal:
        """Try a micro-batch of the first step."""
        return rehearsal.of_images(job, self)

    def pretend(self, job: Job, micros: Sequence[Clean]) -> None:
        """Advantages of both signs, to try a gradient with."""
        rows = sum(len(micro) for micro in micros)
        values = torch.ones(rows)
        values[1::2] = -1.0
        found = Advantages(torch.cat([values] * job.processes), torch.ones(rows * job.processes, dtype=torch.bool), {})
        self.deal(job, 0, micros, torch.zeros(rows, len(job.members)), found)
