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
from diffalign.train.groups import Grouped, Made, in_turn
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
    figures: ClassVar[tuple[str, ...]] = ()  # what its loss tells beside the loss
    takes_data: ClassVar[bool] = True
    draws: bool = True  # whether images are drawn and scored; set by `check`
    least_group: ClassVar[int] = 2  # pictures of a prompt, where they are given

    def __init__(self, config: Any) -> None:
        self.config = config
        self._old: dict[str, Averages] | None = None
        self._restored: Mapping[str, Any] = {}

    def check(self, job: Job) -> None:
        if job.stock is None:
            self.require_groups(job)
        else:
            self.draws = False
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
                f"needs {self.least_group} or more. "
                + (f"Use group_size={stock.least}." if stock.least >= self.least_group else "Give data with more.")
            )
        if job.config.advantage.hardness != "off":
            raise ConfigError("advantage.hardness looks at images that are drawn, and the job learns from data.")
        self.judge(job, 0, [], torch.zeros(len(job.group_ids) // job.processes, 1))

    def state(self) -> dict[str, Any]:
        return {name: old.state_dict() for name, old in self._old.items()} if self._old else dict(self._restored)

    def restore(self, state: Mapping[str, Any]) -> None:
        self._old, self._restored = None, state

    # earlier weights

    def old(self, job: Job, name: str) -> AbstractContextManager[None]:
        """A block with earlier weights in the model; without a name, with the trained ones."""
        return self._olds(job)[name].swapped() if name else nullcontext()

    def _olds(self, job: Job) -> dict[str, Averages]:
        if self._old is None:
            self._old = {name: Averages(job.trained.named_parameters()) for name in self.OLD}
            for name, old in self._old.items():
                if name in self._restored:  # a forced resume may come from another objective
                    old.load_state_dict(self._restored[name])
            self._restored = {}
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
            walk = job.driver(chunk).rollout(quiet=True)
            made = media.to_tensor(walk.media).float()
            return Clean(self.learner(job, chunk), list(chunk), walk.latents[-1].float(), made)

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
            micros.append(Clean(self.learner(job, cases), cases, clean, torch.empty(0)))
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
        total, clip = self.worth(job, rewards), job.config.advantage.clip
        values, weight = job.own(found.values), job.own(found.kept).float() * self.weight(job, found)
        for micro, rows in in_turn(micros):
            micro.groups, micro.reward, micro.media = job.own_groups[rows], total[rows], torch.empty(0)
            micro.advantage, micro.weight, micro.clip = values[rows], weight[rows], clip
            micro.share = (micro.advantage / (2 * clip) + 0.5).clamp(0, 1)
            micro.levels = self.drawn(job, step, micro.groups)

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
            together = micro.groups if job.sharded else levels  # by group all processes have equally many
            for each in sorted(set(together[teaches].tolist())):
                rows = ((together == each) & teaches).nonzero().flatten()
                driver = micro.driver.select(rows.tolist())
                yield Place(draw, int(levels[rows[0]]), rows, driver, micro.latents[rows], noise[rows])

    def noise_seeds(self, micro: Clean) -> Sequence[int]:
        """The seed of each image's noise: its own."""
        return micro.driver.seeds

    # learning

    def learn(self, job: Job, micro: Clean, share: float) -> dict[str, Tensor]:
        """Predict every place with gradients; its backward runs at once."""
        self.remember(job, micro)
        named = ("loss", *self.figures, *(("anchor",) if self.config.anchor.weight else ()))
        told = dict.fromkeys(named, torch.zeros(()))  # the same in every process, whatever it has to learn from
        draws, none = len(micro.levels), [None] * len(micro.levels) * len(micro)
        olds, bases = micro.kept.get(self.COMPARES, none), micro.kept.get("base", none)
        for place, old, base in zip(self.visited(job, micro), olds, bases, strict=False):
            prediction = place.driver.predict(place.noisy, place.i, grad=True).float()
            seen = Seen(micro, place, prediction, old, base)
            policy, figures = self.loss(seen)
            part, weight = share / (draws * len(micro)), seen.of(micro.weight)
            loss, sums = (policy * weight).sum(), {name: (value * weight).sum() for name, value in figures.items()}
            if base is not None:
                gap = mean_error(prediction, base)
                penalty = self.config.anchor.weights(seen.of(micro.share), seen.of(micro.reward)) * gap
                loss, sums = loss + penalty.sum(), {**sums, "anchor": gap.sum()}
            for name, value in {**sums, "loss": loss}.items():
                told[name] = told[name] + value.detach().float().cpu() * part
            job.backward(loss * part)
        micro.passes += 1
        if micro.passes >= job.config.passes:
            micro.kept = {}
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
        """What the present weights predict at a place; outside of `no_grad` with the kernels that learning uses."""
        return driver.predict(place.noisy, place.i, grad=True).float().detach()

    def guided(self, job: Job, cases: Sequence[Case]) -> Driver:
        """The pipeline at the guidance of the anchor."""
        scale = self.config.anchor.guidance
        return self.learner(job, cases) if scale is None else job.driver(cases, guidance_scale=scale)

    def learner(self, job: Job, cases: Sequence[Case]) -> Driver:
        """The pipeline as it is learnt: without guidance by a second branch, unless that is asked for."""
        return job.driver(cases, **({} if self.config.guided else job.unguided))

    def loss(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss (b,) of one place and figures (b,)."""
        raise NotImplementedError

    # preflight

    def rehearse(self, job: Job) -> Rehearsal:
        """Try a micro-batch of the first step."""
        return rehearsal.of_images(job, self)

    def pretend(self, job: Job, micros: Sequence[Clean]) -> None:
        """Advantages of both signs, to try a gradient with."""
        values = torch.ones(len(job.group_ids))
        values[1::2] = -1.0
        found = Advantages(values, torch.ones(len(values), dtype=torch.bool), {})
        self.deal(job, 0, micros, torch.zeros(sum(map(len, micros)), len(job.members)), found)
