"""ReNO: climb a differentiable reward on the starting noise, and keep the noise as long as noise is.

Paper: "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization", Eyring, Karthik, Roth,
Dosovitskiy, Akata, 2024 (arXiv 2406.04312). Each iteration makes the image, notes its reward, and steps on the noise
against -reward + regularise (r^2 / 2 - (d - 1) log r), the gradient cut to length `clip`. The image with the best
reward wins, whatever the regulariser says. K iterations make K images and K - 1 updates; the first image is the plain
one. `finish` runs a sampler of more steps once, without gradient, from the best noise.

Where we differ:
- Every case has its own clip, optimiser and best, so prompts optimised together end where they would alone.
- The master noise is float32 and is rounded to the model's dtype at its door; half precision loses late updates.
- The paper does not say how LBFGS meets the clip. Here it never clips, because its line search needs the true slope;
  each image that the line search asks for counts as an iteration, and cases take turns instead of going in lock-step.
- Ours: a warm start from the best of several draws; stopping a case once it no longer improves; a case whose reward or
  gradient is not finite stops with the best it has; a budget that covers fewer iterations shortens the run beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.budget import BACKWARD_COST
from diffalign.errors import ConfigError
from diffalign.noise import forked
from diffalign.search import noise_prior
from diffalign.search.chain import Chain
from diffalign.search.judge import Judge


@dataclass(frozen=True, kw_only=True)
class RenoConfig:
    iterations: int = 50  # images made per case, one more than updates
    learning_rate: float = 5.0  # with the clip, at most half a unit of noise per plain step; 10 for 128 x 128 latents
    optimizer: Literal["sgd", "adam", "lbfgs"] = "sgd"  # adam wants a learning rate near 0.1
    momentum: float = 0.9  # sgd only
    nesterov: bool = True  # sgd only: step from where the momentum leads
    clip: float = 0.1  # longest gradient of a case, the regulariser's part included; 0 never clips
    regularise: float = 0.01  # reward units per nat of the noise length's log density; 0 lets the length drift
    warm_start: int = 0  # plain draws to choose the start from, an image each; 0 and 1 take the case's own noise
    patience: int = 0  # iterations in a row without a new best that stop a case; 0 never stops

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ConfigError(f"reno.iterations is {self.iterations}, but the first image already takes 1.")
        if not self.learning_rate > 0:
            raise ConfigError(f"reno.learning_rate is {self.learning_rate}, but it must be above 0. Try 5.")
        if self.optimizer not in ("sgd", "adam", "lbfgs"):
            raise ConfigError(f"reno.optimizer is '{self.optimizer}'. Known: sgd, adam, lbfgs.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"reno.momentum is {self.momentum}, but from 1 on it never forgets. Use 0 up to 0.99.")
        for name in ("clip", "regularise", "warm_start", "patience"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"reno.{name} is {getattr(self, name)}, but it cannot be negative; 0 leaves it out.")


@dataclass(frozen=True, eq=False)
class RenoResult:
    """What the optimisation found; K is the number of iterations that the budget covered."""

    noise: Tensor  # (B, ...) float32 on the CPU, the best of each case; its start where no reward was valid
    first: Tensor  # (B,) reward of the plain image
    best: Tensor  # (B,) best reward of the optimised chain, NaN where none was valid
    rewards: Tensor  # (K, B) reward of every iteration, NaN once a case has stopped
    norms: Tensor  # (K, B) length of the noise at every iteration, NaN once a case has stopped
    ended: tuple[str, ...]  # per case: iterations, budget, patience, converged, invalid reward, invalid gradient
    final: Tensor | None = None  # (B,) reward of the `finish` sampler's image from the best noise


def optimise(
    chain: Chain,
    judge: Judge,
    config: RenoConfig = RenoConfig(),
    *,
    noise: Tensor | None = None,
    finish: Judge | None = None,
) -> RenoResult:
    """Climb the judge's reward from the cases' own noise, or from `noise` (B, ...).

    `finish` judges another chain of the same cases and latents, which runs once at the end from the best noise; its
    images become leaves of that judge alone.
    """
    cases, kept = len(chain.seeds), (0, 0)
    if finish is not None:
        assert len(finish.chain.seeds) == cases
        last = cases * sum(finish.chain.costs)
        finish.require(nfe=last, scored=cases, what="the final image")
        if finish.chain.budget is chain.budget:
            kept = last, max(cases, math.ceil(cases * finish.rewards / judge.rewards))
    judge.require(nfe=cases * sum(chain.costs) + kept[0], scored=cases + kept[1], what="one image")
    draws, count = _plan(judge, config, kept)
    climb = _Climb(judge, config, count, kept)
    climb.begin(noise, draws)
    if config.optimizer == "lbfgs":
        climb.by_line_search()
    else:
        climb.in_step()
    return climb.result(finish)


def _plan(judge: Judge, config: RenoConfig, kept: tuple[int, int]) -> tuple[int, int]:
    """Warm-start draws and iterations that fit the budget; draws give way until at least one update is left.

    Fixed beforehand: what a case that stops early leaves over must not lengthen its neighbours' runs.
    """
    cases, cost = len(judge.chain.seeds), sum(judge.chain.costs)
    for draws in (*range(config.warm_start, 1, -1), 0):
        for count in range(config.iterations, min(2, config.iterations) - 1 if draws else 0, -1):
            passes = draws + 1 + (1 + BACKWARD_COST) * (count - 1)
            if judge.affords(nfe=cases * cost * passes + kept[0], scored=cases * (draws + count) + kept[1]):
                return draws, count
    return 0, 1


class _Ended(Exception):
    """Leaves a line search whose case has ended."""


class _Climb:
    """Where each case stands, the best it has seen, and why it ended."""

    def __init__(self, judge: Judge, config: RenoConfig, count: int, kept: tuple[int, int]) -> None:
        self.chain, self.judge, self.config, self.count, self.kept = judge.chain, judge, config, count, kept
        self.rows = list(range(len(self.chain.seeds)))
        self.like = self.chain.noise(self.chain.seeds[:1], [0])  # the chain's dtype and device
        self.noise: list[Tensor] = []  # per case (...), float32
        self.seeds: list[int] | None = list(self.chain.seeds)  # of the start, None where it was given
        self.first: Tensor | None = None
        self.best = [-math.inf for _ in self.rows]
        self.best_noise: list[Tensor] = []
        self.rewards = torch.full((count, len(self.rows)), math.nan)
        self.norms = torch.full((count, len(self.rows)), math.nan)
        self.looks = [0 for _ in self.rows]  # images made so far
        self.stale = [-1 for _ in self.rows]  # iterations since the last new best; the first one never counts
        self.ended = ["" for _ in self.rows]

    def begin(self, noise: Tensor | None, draws: int) -> None:
        """Stand at the start noise, or at the best of `draws` draws of which it is number 0."""
        if noise is not None and noise.shape != (len(self.rows), *self.like.shape[1:]):
            wanted = (len(self.rows), *self.like.shape[1:])
            raise ConfigError(f"noise has shape {tuple(noise.shape)}, but this call optimises {wanted}.")
        own = self.chain.noise(self.chain.seeds, self.rows) if noise is None else noise.to(self.like.device)
        self.noise = [row.detach().float().clone() for row in own]
        for number in range(draws):
            if number and not self._affords(self.rows, updates=0):
                break
            seeds = forked(self.chain.seeds, self.rows, [number] * len(self.rows))
            drawn = self.chain.noise(seeds, self.rows) if number else own
            rewards = _plain(self.judge, drawn, None if noise is not None and number == 0 else seeds)
            self.first = rewards if number == 0 else self.first
            for row in self.rows:
                if self._improves(row, rewards[row]):
                    self.noise[row] = drawn[row].detach().float().clone()
                    if self.seeds is not None:
                        self.seeds[row] = seeds[row]
        self.seeds = self.seeds if noise is None else None
        self.best_noise = [row.cpu().clone() for row in self.noise]

    def in_step(self) -> None:
        """SGD or Adam on all cases at once; a case that has ended leaves the batch."""
        memories = [(torch.zeros_like(noise), torch.zeros_like(noise)) for noise in self.noise]
        while rows := [row for row in self.rows if not self.ended[row]]:
            slopes = self.look(rows)
            for k, row in enumerate(rows):
                if not self.ended[row]:
                    self._move(row, self._downhill(row, slopes[k]), *memories[row])

    def by_line_search(self) -> None:
        """LBFGS, one case after the other."""
        for row in self.rows:
            options: dict[str, Any] = {"lr": self.config.learning_rate, "max_iter": 10, "history_size": 3}
            search: Any = torch.optim.LBFGS([self.noise[row]], line_search_fn="strong_wolfe", **options)

            def fall(row: int = row) -> float:
                slopes = self.look([row])
                if self.ended[row]:
                    raise _Ended
                self.noise[row].grad = self._downhill(row, slopes[0])
                k, d = self.looks[row] - 1, self.noise[row].numel()
                above = self.config.regularise * noise_prior.excess(float(self.norms[k, row]), d)
                return above - float(self.rewards[k, row])

            try:
                while True:
                    before = self.looks[row]
                    search.step(fall)
                    if self.looks[row] - before == 1:  # it only looked at where it stood
                        self._end([row], "converged")
                        break
            except _Ended:
                pass

    def look(self, rows: list[int]) -> Tensor:
        """Make and judge an image of each row's noise; slopes (K, ...) of the rewards, zero after a last look."""
        k = self.looks[rows[0]]
        steep = k + 1 < self.count and self._affords(rows, updates=1)  # an update pays only if its image can be seen
        if k and not steep and not self._affords(rows, updates=0):
            self._end(rows, "budget")
            return torch.zeros(())
        noise = torch.stack([self.noise[row].detach() for row in rows])  # (K, ...)
        seeds = [self.seeds[row] for row in rows] if self.seeds is not None and k == 0 else None
        if steep:
            parts = self.judge.backward.over(len(rows), lambda part: self._climbable(noise[part], rows[part]))
            x, media, rewards, slopes = (torch.cat(each) for each in zip(*parts, strict=True))
            self._note(rows, noise, self.judge.record(x, media, rows, rewards, seeds))
            self._end(
                [r for r, slope in zip(rows, slopes, strict=True) if not slope.isfinite().all()], "invalid gradient"
            )
            return slopes
        with torch.no_grad():
            x, media = self.chain.generate(self.chain.start(noise.to(self.like), rows), rows)
            self._note(rows, noise, self.judge.seen(x, media, rows, seeds))
        whole = k + 1 == self.config.iterations
        self._end(rows, "iterations" if whole else "budget")
        return torch.zeros_like(noise)

    def result(self, finish: Judge | None) -> RenoResult:
        noise, best = torch.stack(self.best_noise), torch.tensor(self.best)
        first = self.rewards[0].clone() if self.first is None else self.first
        final = None if finish is None else _plain(finish, noise, None)
        best = torch.where(best.isfinite(), best, torch.nan)
        return RenoResult(noise, first, best, self.rewards, self.norms, tuple(self.ended), final)

    def _affords(self, rows: list[int], *, updates: int) -> bool:
        passes = 1 + (1 + BACKWARD_COST) * updates
        nfe = len(rows) * sum(self.chain.costs) * passes
        return self.judge.affords(nfe=nfe + self.kept[0], scored=len(rows) * (1 + updates) + self.kept[1])

    def _note(self, rows: list[int], noise: Tensor, rewards: Tensor) -> None:
        """Enter the rewards (K,) of noise (K, ...) in the tables and end the cases they end."""
        norms = noise_prior.lengths(noise).cpu()
        for k, row in enumerate(rows):
            self.rewards[self.looks[row], row], self.norms[self.looks[row], row] = rewards[k], norms[k]
            self.looks[row] += 1
            better = self._improves(row, rewards[k])
            self.stale[row] = 0 if better else self.stale[row] + 1
            if better:
                self.best_noise[row] = noise[k].to("cpu", copy=True)
            if not rewards[k].isfinite():
                self._end([row], "invalid reward")
            elif 0 < self.config.patience <= self.stale[row]:
                self._end([row], "patience")

    def _improves(self, row: int, reward: Tensor) -> bool:
        better = bool(reward.isfinite()) and float(reward) > self.best[row]
        self.best[row] = float(reward) if better else self.best[row]
        return better

    def _climbable(self, noise: Tensor, rows: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, media, rewards (K,) and their slopes (K, ...) in noise (K, ...), zero where a reward is invalid."""
        noise = noise.clone().requires_grad_()
        with torch.enable_grad():
            x, media = self.chain.generate(self.chain.start(noise.to(self.like), rows), rows, grad=True)
            rewards = self.judge.slopes(media, rows)
            slopes = self.judge.climb(rewards, noise, "noise optimisation")
        return x.detach(), media.detach(), rewards.detach(), slopes

    def _downhill(self, row: int, slope: Tensor) -> Tensor:
        """Gradient (...) of what is minimised, cut to the clip's length except for LBFGS."""
        found = self.config.regularise * noise_prior.slope(self.noise[row][None])[0] - slope
        length, clip = float(torch.linalg.vector_norm(found)), self.config.clip
        cut = self.config.optimizer != "lbfgs" and 0 < clip < length
        return found * (clip / length) if cut else found

    def _move(self, row: int, gradient: Tensor, mean: Tensor, square: Tensor) -> None:
        """One update of a case's noise and of its running moments, all in place."""
        config, k = self.config, self.looks[row]  # as many images as updates, this one included
        if config.optimizer == "sgd":
            mean.mul_(config.momentum).add_(gradient)
            step = gradient + config.momentum * mean if config.nesterov else mean
        else:
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient**2, 0.001)
            step = mean / (1 - 0.9**k) / ((square / (1 - 0.999**k)).sqrt() + 1e-2)
        self.noise[row].sub_(config.learning_rate * step)

    def _end(self, rows: list[int], why: str) -> None:
        for row in rows:
            self.ended[row] = self.ended[row] or why


@torch.no_grad()
def _plain(judge: Judge, noise: Tensor, seeds: Sequence[int] | None) -> Tensor:
    """Rewards (B,) of the judge's chain run plainly from noise (B, ...) of all its cases; they become leaves."""
    chain, rows = judge.chain, list(range(len(judge.chain.seeds)))
    x, media = chain.generate(chain.start(noise.to(chain.noise(chain.seeds[:1], [0])), rows), rows)
    return judge.seen(x, media, rows, seeds)
