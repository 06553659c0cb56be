"""Local search over the start noise: fresh draws, or neighbours of the best noise so far.

Paper: "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps", Ma et al., 2025 (arXiv
2501.09732): random search and zero-order search; the neighbour at a given cosine that keeps the norm is that of the
public port to which the first author contributed. "MCMC Methods for Functions", Cotter et al., 2013 (arXiv 1202.0709):
the pCN proposal, with `strength` its Metropolis walk over N(0, I) exp(strength r).

Where we differ: a pivot is scored once, so every round costs exactly `neighbours` images, a fresh pivot being one of
them; neighbours are drawn from the case's seed. The first pivot is the plain image, unless `noise` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffalign.budget import Limits
from diffalign.errors import ConfigError
from diffalign.noise import case_generator, case_noise, forked
from diffalign.search.anneal import Anneal, progress, scale, spent_share
from diffalign.search.chain import Chain
from diffalign.search.judge import Judge

Proposal = Literal["rotate", "pcn"]


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    neighbours: int = 4  # images per round, in one batch; wide rounds choose better, narrow ones move more often
    rounds: int = 4  # without a budget; with one, as many as it affords
    proposal: Proposal = "rotate"  # rotate keeps the pivot's norm exactly; pcn keeps N(0, I) in law
    cosine: float = 0.95  # of neighbour and pivot: 1 stays, 0 forgets the pivot
    restart: bool = True  # a fresh pivot where no neighbour beat the old one; False stays there
    strength: float | None = None  # nats per unit of reward of a Metropolis walk; None moves to better noise only
    anneal: Anneal | None = None  # shrinks 1 - cosine over the run

    def __post_init__(self) -> None:
        if self.neighbours < 1 or self.rounds < 1:
            raise ConfigError(
                f"local search got {self.neighbours} neighbours and {self.rounds} rounds, but needs at least 1 of each."
            )
        if self.proposal not in get_args(Proposal):
            raise ConfigError(f"local.proposal '{self.proposal}' is unknown. Use 'rotate' or 'pcn'.")
        widest = 1 - scale(self.anneal, 0.0) * (1 - self.cosine)
        if not (-1 <= self.cosine <= 1 and widest >= -1):
            raise ConfigError(f"local.cosine is {self.cosine} ({widest:g} annealed), but a cosine lies in [-1, 1].")
        if self.strength is not None and (self.neighbours > 1 or self.restart or not self.strength >= 0):
            raise ConfigError(
                f"local.strength is {self.strength}, and a Metropolis walk needs neighbours=1, restart=False and a "
                f"strength of at least 0, but got neighbours={self.neighbours}, restart={self.restart}."
            )


@dataclass(frozen=True, eq=False)
class LocalResult:
    """Where the search ended; the images themselves are the judge's best."""

    noise: Tensor | None  # (B, ...) on the CPU: the best start noise of each case; None if it starts elsewhere
    reward: Tensor  # (B,) its reward, -inf where none was valid
    pivot: Tensor | None  # (B, ...) on the CPU: where the walk stands; random search stands at its best
    path: Tensor  # (B, R) reward of the pivot after each round


def rotated(pivot: Tensor, direction: Tensor, cosine: float) -> Tensor:
    """Neighbours (K, ...) of `pivot` (K, ...) at exactly this cosine and norm, turned towards `direction` (K, ...)."""
    dtype = torch.promote_types(pivot.dtype, torch.float32)
    n, w = pivot.flatten(1).to(dtype), direction.flatten(1).to(dtype)
    if n.shape[1] < 2:
        raise ConfigError("a noise of one number cannot be rotated. Use proposal='pcn'.")
    norm = n.norm(dim=1, keepdim=True)
    unit = n / norm
    for _ in range(2):  # the second pass removes what rounding left of the pivot
        w = w - (w * unit).sum(1, keepdim=True) * unit
    turned = cosine * unit + math.sqrt(1 - cosine**2) * w / w.norm(dim=1, keepdim=True)
    found: Tensor = norm * turned
    return found.view_as(pivot).to(pivot.dtype)


def pcn(pivot: Tensor, fresh: Tensor, cosine: float) -> Tensor:
    """Neighbours (K, ...) that are N(0, I) whenever `pivot` and `fresh` (K, ...) are, independent of each other."""
    found: Tensor = cosine * pivot + math.sqrt(1 - cosine**2) * fresh
    return found


def random_search(chain: Chain, judge: Judge, config: LocalConfig = LocalConfig()) -> LocalResult:
    """Score independent candidates 0, 1, ..., as many as `zero_order` would; number 0 is the plain image."""
    cases = _opened(chain, judge)
    best = _Best(cases)
    drawn = done = 0
    while n := _block(chain, judge, config, done):
        rows = [row for row in range(cases) for _ in range(n)]
        seeds = forked(chain.seeds, rows, list(range(drawn, drawn + n)) * cases)
        start = chain.first(seeds, rows)
        x, media = chain.generate(start, rows, seeds=seeds)
        best.take(start.view(cases, n, *start.shape[1:]), judge.seen(x, media, rows, seeds).view(cases, n))
        best.path.append(best.reward)
        drawn, done = drawn + n, done + 1
    noise = chain.unscaled(best.start)
    return best.result(noise, noise)


def zero_order(
    chain: Chain, judge: Judge, config: LocalConfig = LocalConfig(), *, noise: Tensor | None = None
) -> LocalResult:
    """Climb by rounds of neighbours from `noise` (B, ...), the plain noise if left out; every round costs the same."""
    cases = _opened(chain, judge)
    climb, best, done = _Climb(chain, config, noise), _Best(cases), 0
    while n := _block(chain, judge, config, done):
        u = spent_share(chain.budget) if limited(chain) else progress(done, config.rounds)
        tried = climb.propose(n, 1 - scale(config.anneal, u) * (1 - config.cosine))  # (B, n, ...)
        rows = [row for row in range(cases) for _ in range(n)]
        x, media = chain.generate(chain.start(tried.flatten(0, 1), rows), rows)
        rewards = judge.seen(x, media, rows).view(cases, n)
        best.take(tried, rewards)
        climb.choose(tried, rewards)
        best.path.append(climb.reward)
        done += 1
    return best.result(best.start, climb.pivot)


class _Climb:
    """The pivot of each case; a case that is `fresh` draws a new one first."""

    def __init__(self, chain: Chain, config: LocalConfig, noise: Tensor | None) -> None:
        cases = len(chain.seeds)
        self.chain, self.config, self.cases = chain, config, cases
        self.reward = torch.full((cases,), -math.inf)
        self.fresh = torch.ones(cases, dtype=torch.bool)
        self.starts, self.drawn = [0] * cases, 0  # pivots per case and proposals per case so far
        plain = chain.noise(chain.seeds, range(cases))
        self.pivot = plain if noise is None else noise.detach().to(plain.device, copy=True)

    def propose(self, n: int, cosine: float) -> Tensor:
        """Noises (B, n, ...) to score: neighbours, the first one the pivot itself where it is fresh."""
        new = self.fresh.nonzero()[:, 0].tolist()
        if self.drawn and new:
            self.pivot[new] = self.chain.noise(forked(self.chain.seeds, new, [self.starts[k] for k in new]), new)
        rows = [row for row in range(self.cases) for _ in range(n)]
        seeds = forked(self.chain.seeds, rows, list(range(self.drawn, self.drawn + n)) * self.cases)
        around = self.pivot.repeat_interleave(n, 0)
        move = rotated if self.config.proposal == "rotate" else pcn
        found = move(around, case_noise(seeds, around, "neighbour"), cosine)
        found = found.view(self.cases, n, *found.shape[1:])
        found[new, 0] = self.pivot[new]
        self.drawn += n
        return found

    def choose(self, noise: Tensor, rewards: Tensor) -> None:
        """Move the pivots by the rewards (B, n) of `noise` (B, n, ...)."""
        held = rewards.where(~rewards.isnan(), -math.inf)
        old = torch.where(self.fresh, held[:, 0], self.reward)
        top, at = held.max(1)
        beaten = top > old
        moved = beaten | self._accepted(top - old) if self.config.strength is not None else beaten
        for row in moved.nonzero()[:, 0].tolist():
            self.pivot[row] = noise[row, at[row]]
        self.reward = torch.where(moved, top, old)
        alone = self.fresh & (held.shape[1] == 1)  # a pivot scored without neighbours has not failed yet
        self.fresh = ~beaten & ~alone if self.config.restart else torch.zeros_like(beaten)
        self.starts = [k + int(again) for k, again in zip(self.starts, self.fresh.tolist(), strict=True)]

    def _accepted(self, gain: Tensor) -> Tensor:
        generators = [case_generator(seed, "accept", self.drawn) for seed in self.chain.seeds]
        uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        return uniform.log() < (self.config.strength or 0.0) * gain  # NaN, of two invalid rewards, stays


class _Best:
    """The best start of each case so far."""

    def __init__(self, cases: int) -> None:
        self.reward = torch.full((cases,), -math.inf)
        self.start = torch.empty(0)
        self.path: list[Tensor] = []

    def take(self, starts: Tensor, rewards: Tensor) -> None:
        """Compare starts (B, n, ...) by rewards (B, n); ties stay with the earlier."""
        top, at = rewards.where(~rewards.isnan(), -math.inf).max(1)
        if not self.path:
            self.start = starts[:, 0].detach().to("cpu", copy=True)
        for row in (top > self.reward).nonzero()[:, 0].tolist():
            self.start[row] = starts[row, at[row]].detach().cpu()
        self.reward = self.reward.maximum(top)

    def result(self, noise: Tensor | None, pivot: Tensor | None) -> LocalResult:
        standing = None if pivot is None else pivot.detach().cpu()
        return LocalResult(noise, self.reward, standing, torch.stack(self.path, 1))


def limited(chain: Chain) -> bool:
    """Whether the budget has any limit; without one the config's counts apply."""
    return chain.budget.limits != Limits()


def affordable(judge: Judge, *, nfe: int, scored: int, at_most: int) -> int:
    """How many blocks of `nfe` and `scored`, summed over cases, still fit the budget."""
    return next((n for n in range(at_most, 0, -1) if judge.affords(nfe=n * nfe, scored=n * scored)), 0)


class Purse:
    """What each case may still spend of its even share, so that a case ends in a batch as it ends alone."""

    def __init__(self, judge: Judge) -> None:
        budget, cases = judge.chain.budget, len(judge.chain.seeds)
        self.judge, self.cases = judge, cases
        self.left: dict[str, list[float]] = {}
        for name in ("nfe", "decodes", "reward_calls"):
            limit = getattr(budget.limits, name)
            room = math.inf if limit is None else (limit * budget.prompts - getattr(budget, name)) // cases
            self.left[name] = [room] * cases

    def affords(self, row: int, *, nfe: int = 0, scored: int = 0) -> bool:
        """Whether case `row` can pay; seconds are foretold as if every case did the same."""
        budget = self.judge.chain.budget
        ahead = self.cases * nfe * budget.seconds / budget.nfe if budget.nfe else 0.0
        costs = {"nfe": nfe, "decodes": scored, "reward_calls": scored * self.judge.rewards}
        return all(cost <= self.left[name][row] for name, cost in costs.items()) and budget.allows(seconds=ahead)

    def spend(self, rows: Sequence[int], *, nfe: int = 0, scored: int = 0) -> None:
        """Note what each of `rows` has cost its case."""
        for row in rows:
            self.left["nfe"][row] -= nfe
            self.left["decodes"][row] -= scored
            self.left["reward_calls"][row] -= scored * self.judge.rewards


def _opened(chain: Chain, judge: Judge) -> int:
    cases = len(chain.seeds)
    judge.require(nfe=cases * sum(chain.costs), scored=cases, what="one image")
    return cases


def _block(chain: Chain, judge: Judge, config: LocalConfig, done: int) -> int:
    """Images per case of the next round; 0 ends the search."""
    cases = len(chain.seeds)
    if not limited(chain):
        return config.neighbours if done < config.rounds else 0
    return affordable(judge, nfe=cases * sum(chain.costs), scored=cases, at_most=config.neighbours)
