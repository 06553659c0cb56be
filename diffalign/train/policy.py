"""What policy gradients over denoising steps share: stochastic walks, rewards in groups, and a replay that learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign import media, noise, shaping
from diffalign.cases import Case
from diffalign.errors import SeamError
from diffalign.noise import Kernel, Transition
from diffalign.train import credit, rehearsal
from diffalign.train.advantage import Advantages
from diffalign.train.groups import Grouped, in_turn
from diffalign.train.job import Job
from diffalign.train.objective import Collected
from diffalign.train.rehearsal import Rehearsal
from diffalign.train.rollout import Rollout, sample, similarities
from diffalign.train.schedules import noise_levels

FIGURES = ("loss", "ratio_mean", "clip_low", "clip_high")  # what every micro-batch tells, as sums of shares; with a
# penalty also kl. One that teaches nothing is not replayed: it counts as unclipped, with the ratio 1.


@dataclass
class Seen:
    """One trained step of a replayed micro-batch."""

    micro: Rollout
    k: int  # which of the trained steps
    h: float  # how far it goes down in noise level
    log_prob: Tensor  # (B,) with its gradient
    transition: Transition
    prediction: Tensor
    base: tuple[Transition, Tensor] | None  # transition and prediction of the base model, where a penalty needs them

    @property
    def i(self) -> int:
        """The step's index in the chain."""
        return self.micro.trained[self.k]

    @property
    def old(self) -> Tensor:
        """The log-density (B,) under the weights that sampled."""
        return self.micro.log_probs[self.k]

    @property
    def advantage(self) -> Tensor:
        """(B,) on the device of the latents."""
        return self.micro.advantages[:, self.k].to(self.log_prob)


class PolicyGradient(Grouped):
    """Base of the objectives whose steps are Gaussian policies; `config` has density, noise, credit and same_start."""

    dense: ClassVar[bool] = False  # whether rewards come per step
    figures: ClassVar[tuple[str, ...]] = FIGURES

    @property
    def penalised(self) -> bool:
        """Whether a penalty asks for the base model's predictions."""
        return bool(self.config.beta > 0)

    def check(self, job: Job) -> None:
        """Refuse what cannot give an advantage or a ratio."""
        self.config.credit.require_source(self.dense)
        self.require_groups(job, stepwise=self.dense or bool(self.config.credit.phases))
        self.noise(job, 0)
        prediction = job.levels.prediction
        if self.kernel_name(prediction) == "flow_sde" and prediction != "flow":
            raise SeamError(f"noise.kernel is flow_sde, but {type(job.pipe).__name__} predicts {prediction}. Use ddim.")

    def rehearse(self, job: Job) -> Rehearsal:
        """Try a micro-batch of the first step."""
        return rehearsal.rehearse(job, self)

    # collecting

    def kernel_name(self, prediction: str) -> str:
        named: str = self.config.noise.kernel
        return ("flow_sde" if prediction == "flow" else "ddim") if named == "auto" else named

    def noise(self, job: Job, step: int) -> tuple[Kernel, range]:
        """The kernel of a step's walks and the steps that train: those with noise, one after the other."""
        shares = noise_levels(step, job.length, self.config.noise, seed=job.seed)
        make = noise.KERNELS[self.kernel_name(job.levels.prediction)]
        made = {share: make(share) for share in set(shares)}
        noisy = [i for i, share in enumerate(shares) if share > 0]
        return noise.stepwise([made[share] for share in shares]), range(noisy[0], noisy[-1] + 1)

    def collect(self, job: Job, step: int) -> Collected:
        """Sample the groups of this process, score them, and compare with all processes."""
        cases = job.cases_of(step)
        rollouts, rewards = self.sampled(job, step, cases)
        found, told = self.judge(job, step, rollouts, rewards, self.step_rewards(job, rollouts, rewards))
        self.deal(job, rollouts, found)
        return Collected(rollouts, told)

    def sampled(self, job: Job, step: int, cases: Sequence[Case]) -> tuple[list[Rollout], Tensor]:
        """Walks in micro-batches and the rewards (n, K) of their images."""
        kernel, trained = self.noise(job, step)
        starts = self.starts(job, cases)

        def make(first: int, chunk: Sequence[Case]) -> Rollout:
            return self.walk(job, chunk, kernel, trained, starts[first : first + len(chunk)])

        return self.scored(job, cases, make)

    def starts(self, job: Job, cases: Sequence[Case]) -> list[Case]:
        """The cases whose start noise these walk from: their own, or the first one's of their group."""
        size = job.config.group_size
        if not self.config.same_start:
            return list(cases)
        return [case.with_seed(cases[k - k % size].seed) for k, case in enumerate(cases)]

    def walk(
        self, job: Job, cases: Sequence[Case], kernel: Kernel, trained: range, starts: Sequence[Case] = ()
    ) -> Rollout:
        """One micro-batch of walks, from the start noise of `starts` where that is not their own."""
        driver, start = job.driver(cases), None
        if [case.seed for case in starts or cases] != [case.seed for case in cases]:
            start = job.driver(starts).start()
        keep = self.config.credit.weighting == "ratio_norm"
        return sample(driver, kernel, trained, convention=self.config.density, keep_means=keep, x=start)

    def step_rewards(self, job: Job, rollouts: Sequence[Rollout], rewards: Tensor) -> Tensor | None:
        """Rewards (n, S) per trained step; without phases the image's one reward serves all."""
        cuts = self.config.credit.phases
        if not cuts:
            return None
        steps = rollouts[0].driver.length
        levels = rollouts[0].driver.levels
        ends = credit.phase_ends((levels.sigma / (levels.alpha + levels.sigma)).tolist(), cuts)
        guesses = self.worth(job, rollouts, [0, *ends[:-1]], _guess)
        final = job.total(rewards)[:, None]
        gains = credit.phase_gains(torch.cat([guesses, final], 1), ends, steps)
        return self.through_steps(gains, final)[:, rollouts[0].trained.start : rollouts[0].trained.stop]

    def through_steps(self, gains: Tensor, final: Tensor) -> Tensor:
        """Step gains (n, T) as the config credits them: joined with the outcome first, then summed to returns."""
        if self.config.credit.process == "renorm":
            gains = shaping.renorm(gains, final[:, 0], self.config.credit.mu)
        return credit.returns(gains, self.config.credit.gamma)

    def worth(
        self, job: Job, rollouts: Sequence[Rollout], places: Sequence[int], show: Callable[[Rollout, int], Tensor]
    ) -> Tensor:
        """Rewards (n, len(places)) of what `show` makes of the walks at some steps."""
        cases, columns = [case for rollout in rollouts for case in rollout.cases], []
        with job.scoring() as ask, torch.no_grad():
            for i in places:
                if job.listwise:  # groups stay whole, as in the rewards of the images
                    columns.append([ask(torch.cat([show(rollout, i) for rollout in rollouts]), cases)])
                else:
                    columns.append([ask(show(rollout, i), rollout.cases) for rollout in rollouts])
            scores = [torch.cat([answer.result() for answer in answers]) for answers in columns]
        return torch.stack([job.total(score) for score in scores], 1)

    def deal(self, job: Job, rollouts: Sequence[Rollout], found: Advantages) -> None:
        """Give every rollout its rows of the advantages, one for each trained step."""
        own, weight = job.own(found.values), self.weight(job, found)
        for rollout, rows in in_turn(rollouts):
            values, steps = own[rows], len(rollout.trained)
            values = values[:, None].expand(-1, steps) if values.ndim == 1 else values
            if self.config.credit.similarity == "coca":
                told = self.config.credit
                weights = credit.coca(similarities(rollout), told.window, told.alpha)
                values = values * weights[:, rollout.trained.start : rollout.trained.stop].cpu()
            rollout.advantages = values.contiguous()
            rollout.weight = weight
            rollout.walk.predictions = []

    # learning

    def learn(self, job: Job, micro: Rollout, share: float) -> dict[str, Tensor]:
        """Replay a micro-batch with gradients; each step's backward runs at once."""
        named = (*self.figures, "kl") if self.penalised else self.figures
        sums, steps = dict.fromkeys(named, torch.zeros(())), len(micro.trained)
        if not self.teaches(micro) and not job.sharded:
            return sums | {"ratio_mean": torch.tensor(share)}
        base, h = self.reference(job, micro), self.sizes(micro)
        weights = self.step_weights(self.deviations(micro), h)

        def on_step(i: int, prediction: Tensor, transition: Transition, log_prob: Tensor) -> None:
            k = i - micro.trained.start
            seen = Seen(micro, k, float(h[k]), log_prob, transition, prediction, base.get(i))
            policy, penalty, told = self.loss(seen)
            # a filter's weight is not the advantages', which the clip range is made for, and not the penalty's, which
            # holds every image near the base model
            loss = (policy * (float(weights[k]) * micro.weight) + penalty).mean()
            for name, value in {**told, "loss": loss}.items():
                sums[name] = sums[name] + value.detach().float().mean().cpu() * (share / steps)
            job.backward(loss * (share / steps))

        micro.replay(self.config.density, on_step)
        return sums

    def sizes(self, micro: Rollout) -> Tensor:
        """How far each trained step goes down in noise level (S,)."""
        sigma = micro.driver.levels.sigma
        return torch.stack([sigma[i] - sigma[i + 1] for i in micro.trained]).float()

    def deviations(self, micro: Rollout) -> Tensor:
        """The standard deviation of each trained step (S,)."""
        levels, x = micro.driver.levels, micro.walk.latents[0][:1]
        return torch.tensor([micro.kernel(levels, x, x, i).std for i in micro.trained])

    def step_weights(self, nu: Tensor, h: Tensor) -> Tensor:
        """Loss weights (S,) of trained steps with deviations nu (S,) and sizes h (S,)."""
        return credit.STEP_WEIGHTS[self.config.credit.weighting](nu, h)

    def replayed(self, job: Job, micro: Rollout) -> tuple[Tensor, Tensor]:
        """Log-densities of the trained steps under the weights that sampled, and under the present ones."""
        with torch.enable_grad():  # as learning runs it
            return micro.log_probs, micro.replay(self.config.density).detach()

    def pretend(self, micro: Rollout) -> None:
        """Advantages of both signs, to try a gradient with."""
        micro.advantages = torch.ones(len(micro), len(micro.trained))
        micro.advantages[1::2] = -1.0

    def teaches(self, micro: Rollout) -> bool:
        """Whether a replay of this micro-batch could move anything."""
        return bool(micro.advantages.any()) or self.penalised

    def reference(self, job: Job, micro: Rollout) -> dict[int, tuple[Transition, Tensor]]:
        """Transition and prediction of the base model at every trained step, where a penalty asks for them."""
        found: dict[int, tuple[Transition, Tensor]] = {}
        if not self.penalised:
            return found

        def keep(i: int, prediction: Tensor, transition: Transition, log_prob: Tensor) -> None:
            found[i] = transition, prediction

        with torch.no_grad(), job.trained.reference():
            micro.replay(self.config.density, keep, grad=False)
        return found

    def loss(self, seen: Seen) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The policy loss (B,) of one step, its penalty (B,), and the figures of FIGURES that it knows."""
        raise NotImplementedError


def _guess(rollout: Rollout, i: int) -> Tensor:
    """Media (B, ...) of the clean latents that step i points to."""
    walk, driver = rollout.walk, rollout.driver
    clean = driver.levels.denoised(walk.latents[i], walk.predictions[i], i)
    return media.to_tensor(driver.decode(clean)).float()
