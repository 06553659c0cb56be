"""Per-step noise search: choose the noise of each stochastic step by what the next clean prediction is worth.

Paper: "Noise-trajectory search", 2025 (arXiv 2506.03164), the epsilon-greedy variant of its published code
rvignav/diffusion-tts; epsilon = 0 is zero-order search per step.

Where we differ: candidates are brought back to norm sqrt(d) (`project`), for the published additive steps let the norm
grow round by round; the look-ahead asks the model at the next level, not at the present one; the winner's prediction
serves the next step. `keep` lets the old pivot compete, which the published code does not. Two rounds, not twenty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.noise import case_generator, case_noise, forked
from diffalign.search.anneal import Anneal, progress, scale
from diffalign.search.chain import Chain
from diffalign.search.judge import Judge
from diffalign.search.local import limited
from diffalign.search.values import CleanPrediction, Value


@dataclass(frozen=True, kw_only=True)
class StepwiseConfig:
    candidates: int = 4  # noises tried per round
    rounds: int = 2  # per step; the published code runs 20, and each costs `candidates` model rows; 0 is the plain walk
    epsilon: float = 0.4  # chance of a fresh noise instead of one near the pivot
    distance: float = 0.15  # farthest step from the pivot, in units of its expected norm
    project: bool = True  # bring candidates to norm sqrt(d); off, their norm grows with the rounds
    keep: bool = False  # whether the old pivot competes: a value never falls, and a flat reward leaves the plain walk
    every: int = 1  # search each step or only each second, third, ...
    walks: int = 1  # without a budget; with one, as many as it affords
    anneal: Anneal | None = None  # scales epsilon and distance over the steps

    def __post_init__(self) -> None:
        counts = {"candidates": self.candidates, "every": self.every, "walks": self.walks}
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"stepwise.{name} is {count}, but must be at least 1.")
        if self.rounds < 0 or not self.distance >= 0:
            raise ConfigError(
                f"stepwise got rounds = {self.rounds} and distance = {self.distance}, but neither can be negative."
            )
        if not 0 <= self.epsilon <= 1:
            raise ConfigError(f"stepwise.epsilon is {self.epsilon}, but a chance lies in [0, 1].")


@dataclass(frozen=True, eq=False)
class StepwiseResult:
    """How far the search came; the images themselves are the judge's best."""

    walks: int  # finished walks per case
    rounds: Tensor  # (walks, T) rounds searched at each step


def stepped(chain: Chain, x: Tensor, prediction: Tensor, i: int, seeds: Sequence[int]) -> Tensor:
    """Latents (K, ...) at level i + 1, each row with the noise that its own seed has for this step."""
    step = chain.transition(x, prediction, i)
    return step.sample(case_noise(seeds, x, "step", i) if step.std else None, dtype=x.dtype)


def candidates(
    pivot: Tensor, seeds: Sequence[int], *stream: str | int, n: int, epsilon: float, distance: float, project: bool
) -> Tensor:
    """Noises (B, n, ...): fresh with chance epsilon, else up to `distance` sqrt(d) from `pivot` (B, ...)."""
    fresh, reach, drawn = [], [], []
    for seed in seeds:
        generator = case_generator(seed, "candidates", *stream)
        fresh.append(torch.rand(n, generator=generator) < epsilon)
        reach.append(torch.rand(n, generator=generator) * distance)
        drawn.append(torch.randn(n, *pivot.shape[1:], generator=generator))
    noise = torch.stack(drawn).to(pivot.device).flatten(2)  # (B, n, d): a fresh noise, or a direction
    root = math.sqrt(noise.shape[2])
    far = torch.stack(reach).to(noise)[:, :, None] * root
    near = pivot.to(noise).flatten(1)[:, None] + far * noise / noise.norm(dim=2, keepdim=True)
    found = torch.where(torch.stack(fresh).to(pivot.device)[:, :, None], noise, near)
    if project:
        found = found * (root / found.norm(dim=2, keepdim=True))
    return found.view(len(seeds), n, *pivot.shape[1:])


def search_steps(
    chain: Chain, judge: Judge, config: StepwiseConfig = StepwiseConfig(), *, value: Value | None = None
) -> StepwiseResult:
    """Walk from noise to media, at every stochastic step with the best noise found for it.

    A searched step costs rounds x candidates model rows, at the next level, plus what `value` (default: the reward of
    the clean prediction) costs for each; it includes the one row that the plain walk pays there. The last step has no
    next level: its candidates are leaves. A round is skipped where the rest of the walk would no longer fit the budget.
    """
    cases = len(chain.seeds)
    whole = cases * sum(chain.costs)
    judge.require(nfe=whole, scored=cases, what="one walk")
    search = _Search(chain, judge, config, value or CleanPrediction(judge))
    counts: list[list[int]] = []
    while judge.affords(nfe=whole, scored=cases) if limited(chain) else len(counts) < config.walks:
        counts.append(search.walk(len(counts)))
    return StepwiseResult(len(counts), torch.tensor(counts))


@dataclass(frozen=True)
class _Search:
    chain: Chain
    judge: Judge
    config: StepwiseConfig
    value: Value

    def walk(self, number: int) -> list[int]:
        """One walk of every case from its candidate `number`; returns the rounds searched at each step."""
        chain, rows = self.chain, range(len(self.chain.seeds))
        seeds = forked(chain.seeds, rows, [number] * len(rows))
        x, counts = chain.first(seeds, rows), []
        prediction: Tensor | None = None
        for i in range(chain.length):
            prediction = chain.predict(x, i, rows) if prediction is None else prediction
            x, prediction, done = self.step(x, prediction, i, seeds)
            counts.append(done)
        if not counts[-1]:  # a searched last step has scored its leaves already
            self.judge.leaf(x, rows)
        return counts

    def step(self, x: Tensor, prediction: Tensor, i: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor | None, int]:
        """The latents (B, ...) of level i + 1, their prediction if it is known, and the rounds searched."""
        step = self.chain.transition(x, prediction, i)
        pivot = case_noise(seeds, x, "step", i) if step.std else None
        after, ahead, done = step.sample(pivot, dtype=x.dtype), None, 0
        if pivot is None or i % self.config.every:
            return after, None, 0
        reached = torch.full((len(x),), -math.inf)
        while done < self.config.rounds and self._fits(i):
            noises = self._candidates(pivot, seeds, i, done)  # (B, n, ...)
            found, known, values = self._look(x, prediction, noises, i, done, seeds)
            top, at = values.where(~values.isnan(), -math.inf).max(1)  # all invalid: the first is as good as any
            won = top > reached if self.config.keep and done else torch.ones_like(top, dtype=torch.bool)
            pick = torch.arange(len(x)) * noises.shape[1] + at
            pivot, after = _replaced(pivot, noises.flatten(0, 1), pick, won), _replaced(after, found, pick, won)
            ahead = None if known is None else _replaced(ahead, known, pick, won)
            reached = torch.where(won, top, reached)
            done += 1
        return after, ahead, done

    def _candidates(self, pivot: Tensor, seeds: Sequence[int], i: int, done: int) -> Tensor:
        config = self.config
        wide = scale(config.anneal, progress(i, self.chain.length))
        found = candidates(
            pivot,
            seeds,
            i,
            done,
            n=config.candidates,
            epsilon=min(wide * config.epsilon, 1.0),
            distance=wide * config.distance,
            project=config.project,
        )
        if config.keep and done == 0:
            found[:, 0] = pivot.to(found)
        return found

    def _look(
        self, x: Tensor, prediction: Tensor, noises: Tensor, i: int, done: int, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Latents and predictions (B n, ...) at level i + 1 and values (B, n) of noises (B, n, ...)."""
        cases, n = noises.shape[:2]
        rows = [row for row in range(cases) for _ in range(n)]
        step = self.chain.transition(x.repeat_interleave(n, 0), prediction.repeat_interleave(n, 0), i)
        x = step.sample(noises.flatten(0, 1), dtype=x.dtype)
        if i + 1 == self.chain.length:
            return x, None, self.judge.leaf(x, rows).view(cases, n)
        prediction = self.chain.predict(x, i + 1, rows)
        first = 1 + (i * self.config.rounds + done) * n
        own = forked(seeds, rows, list(range(first, first + n)) * cases)
        return x, prediction, self.value(x, prediction, i + 1, rows, own).view(cases, n)

    def _fits(self, i: int) -> bool:
        """Whether a round at step i and the rest of the walk after it fit the budget."""
        chain, n, cases = self.chain, self.config.candidates, len(self.chain.seeds)
        if i + 1 == chain.length:
            return self.judge.affords(scored=cases * n)
        extra, scored = self.value.cost(i + 1)
        nfe = n * (chain.costs[i + 1] + extra) + sum(chain.costs[i + 2 :])
        return self.judge.affords(nfe=cases * nfe, scored=cases * (n * scored + 1))


def _replaced(old: Tensor | None, new: Tensor, pick: Tensor, won: Tensor) -> Tensor:
    """Rows `pick` (B,) of `new` (B n, ...) where `won` (B,), else the rows of `old` (B, ...); won by all if None."""
    found = new[pick.to(new.device)]
    if old is None or bool(won.all()):
        return found
    return torch.where(won.to(new.device).view(-1, *[1] * (found.ndim - 1)), found, old.to(found))
