"""Beam search with programmatic rewards and vetoes: branch, look ahead to an image, keep the best.

Paper: "DeAL: Decoding-time Alignment for Large Language Models", Huang et al., 2024 (arXiv 2402.06147): decoding as
search whose heuristic is the reward of a greedy look-ahead, with programmatic constraints.

Where we differ: a state is an unfinished latent, its children are draws of the sampler's own noise every few steps, and
the look-ahead is a short deterministic completion. The paper adds log P of the prefix; the density of a noise vector is
mostly its dimension, so `prior` weighs it centred and in units of its deviation, and is 0 by default. Vetoes are apart
from rewards, which stay finite. Where a budget is short the beam narrows, down to the plain walk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.errors import ConfigError, InvalidReward
from diffalign.noise import case_noise, forked
from diffalign.search.anneal import Anneal, progress
from diffalign.search.chain import Chain
from diffalign.search.judge import Judge
from diffalign.search.local import Purse, limited
from diffalign.search.values import Completion, Value

Veto = Callable[[Tensor, Sequence[int]], Tensor]  # (media (K, ...), rows) -> (K,) bool, True where it must not be


@dataclass(frozen=True, kw_only=True)
class BeamConfig:
    beams: int = 2  # states kept per case; 1 is greedy
    children: int = 3  # draws per state and block
    every: int = 4  # steps per block; a last block of one step joins the one before
    lookahead: int = 2  # deterministic steps from a child to an image; 1 is the clean prediction
    prior: float = 0.0  # weight of the centred log-density of the noise, in reward units per deviation
    redraws: int = 3  # how often a block whose children were all vetoed is drawn again
    walks: int = 1  # without a budget; with one, as many as it affords
    anneal: Anneal | None = None  # scales the children over the steps

    def __post_init__(self) -> None:
        counts = {"beams": self.beams, "children": self.children, "every": self.every}
        counts |= {"lookahead": self.lookahead, "walks": self.walks}
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"beam.{name} is {count}, but must be at least 1.")
        if self.redraws < 0:
            raise ConfigError(f"beam.redraws is {self.redraws}, but cannot be negative.")
        if not math.isfinite(self.prior):
            raise ConfigError(f"beam.prior is {self.prior}, but a weight is finite.")


@dataclass(frozen=True, eq=False)
class BeamResult:
    """What the search did; the images themselves are the judge's best."""

    walks: tuple[int, ...]  # per case, walks begun
    redrawn: tuple[int, ...]  # per case, blocks drawn again because everything was vetoed
    lost: tuple[int, ...]  # per case, walks given up for the same reason


@dataclass(frozen=True, eq=False)
class _States:
    """States at one level, those of a case together and best first."""

    x: Tensor  # (K, ...)
    prediction: Tensor  # (K, ...)
    rows: list[int]
    seeds: list[int]
    odds: Tensor  # (K,) centred log-density of the noise so far

    def pick(self, at: Sequence[int]) -> _States:
        index = torch.tensor(at, dtype=torch.long)
        there = index.to(self.x.device)
        rows, seeds = [self.rows[k] for k in at], [self.seeds[k] for k in at]
        return _States(self.x[there], self.prediction[there], rows, seeds, self.odds[index])


@dataclass(frozen=True)
class _Plan:
    """What one case may do in a block."""

    states: int
    children: int
    look: bool  # whether children are valued and shown to the veto before the end


def search_beam(
    chain: Chain,
    judge: Judge,
    config: BeamConfig = BeamConfig(),
    *,
    value: Value | None = None,
    veto: Veto | None = None,
) -> BeamResult:
    """Beam search with `value` (default: the reward of a completion in `lookahead` steps) as the heuristic.

    A branch whose look-ahead `veto` rejects is dropped, and a rejected leaf counts as invalid; if a case loses every
    branch its block is drawn again. A block of s steps costs states x children x s model rows beside the look-ahead;
    nothing is valued where there is nothing to choose. Raises InvalidReward, after all cases have ended, for cases that
    the veto left without any image.
    """
    cases = len(chain.seeds)
    judge.require(nfe=cases * sum(chain.costs), scored=cases, what="one walk")
    beam = _Beam(chain, judge, config, value or Completion(judge, config.lookahead), veto)
    while ready := beam.ready():
        beam.walk(ready)
    bare = [row for row in range(cases) if beam.lost[row] and not judge.best[row]]
    if bare:
        raise InvalidReward(
            f"every branch of case {bare[0]} was vetoed, even after {beam.redrawn[bare[0]]} redraws, so there is no "
            "image to return. Loosen the veto, raise beam.redraws or beam.children, or change the prompt."
        )
    return BeamResult(tuple(beam.walks), tuple(beam.redrawn), tuple(beam.lost))


class _Beam:
    def __init__(self, chain: Chain, judge: Judge, config: BeamConfig, value: Value, veto: Veto | None) -> None:
        cases = len(chain.seeds)
        self.chain, self.judge, self.config, self.value, self.veto = chain, judge, config, value, veto
        self.purse = Purse(judge)
        self.drawn, self.walks, self.redrawn, self.lost = [0] * cases, [0] * cases, [0] * cases, [0] * cases

    def ready(self) -> list[int]:
        """Cases that begin another walk."""
        if not limited(self.chain):
            return [row for row, count in enumerate(self.walks) if count < self.config.walks]
        return [row for row in range(len(self.walks)) if self.purse.affords(row, nfe=sum(self.chain.costs), scored=1)]

    def walk(self, cases: list[int]) -> None:
        """One beam per case, from noise to leaves."""
        level, stops = 0, self._stops()
        rows = []
        for row in cases:
            self.walks[row] += 1
            rows += [row] * self._plan(row, self.config.beams, 0, stops[0], unpredicted=True).states
        seeds = self._fresh(rows)
        x = self.chain.first(seeds, rows)
        states = _States(x, self._predict(x, 0, rows), rows, seeds, torch.zeros(len(rows)))
        for stop in stops:
            states, level = self._block(states, level, stop), stop
            if not states.rows:
                return

    def _block(self, states: _States, i: int, j: int) -> _States:
        """The survivors at level j; cases whose children are all vetoed start again from their states at level i."""
        kept, attempt = dict[int, _States](), 0
        while states.rows:
            cases = list(dict.fromkeys(states.rows))
            plans = {row: self._plan(row, states.rows.count(row), i, j) for row in cases}
            children, split = self._children(states, plans, i, j, fresh=attempt > 0)
            scores, vetoed = self._scores(children, plans, j)
            again = []
            for row in cases:
                alive = [k for k, other in enumerate(children.rows) if other == row and not vetoed[k]]
                alive.sort(key=lambda k: -scores[k])  # stable: of two ties the earlier
                if alive:
                    kept[row] = children.pick(alive[: self.config.beams])
                elif split and attempt < self.config.redraws and self._pays(row, plans[row], i, j):
                    again.append(row)
                    self.redrawn[row] += 1
                else:
                    self.lost[row] += 1
            states = states.pick([k for k, row in enumerate(states.rows) if row in again])
            attempt += 1
        return _joined([kept[row] for row in sorted(kept)], states)

    def _children(
        self, states: _States, plans: dict[int, _Plan], i: int, j: int, *, fresh: bool
    ) -> tuple[_States, bool]:
        """All children at level j, predicted there unless it is the end, and whether any step drew noise.

        States split at the first step that draws noise. The first child goes on with its parent's seed, unless `fresh`.
        """
        at = [k for k, row in enumerate(states.rows) if states.rows[:k].count(row) < plans[row].states]
        now, split = states.pick(at), False
        for level in range(i, j):
            if level > i:
                now = replace(now, prediction=self._predict(now.x, level, now.rows))
            step = self.chain.transition(now.x, now.prediction, level)
            noise = None
            if step.std:
                if not split:
                    now, split = self._split(now, plans, fresh=fresh), True
                    step = self.chain.transition(now.x, now.prediction, level)
                noise = case_noise(now.seeds, now.x, "step", level)
            odds = now.odds if noise is None else now.odds + _centred(noise)
            now = replace(now, x=step.sample(noise, dtype=now.x.dtype), odds=odds)
        if j < self.chain.length:
            now = replace(now, prediction=self._predict(now.x, j, now.rows))
        return now, split

    def _split(self, states: _States, plans: dict[int, _Plan], *, fresh: bool) -> _States:
        at = [k for k, row in enumerate(states.rows) for _ in range(plans[row].children)]
        wide = states.pick(at)
        new = [k for k in range(len(at)) if fresh or (k and at[k] == at[k - 1])]
        for k, seed in zip(new, self._fresh([wide.rows[k] for k in new]), strict=True):
            wide.seeds[k] = seed
        return wide

    def _scores(self, children: _States, plans: dict[int, _Plan], j: int) -> tuple[list[float], list[bool]]:
        """Score and verdict of each child; -inf where the reward is invalid, 0 where nothing was asked."""
        final = j == self.chain.length
        choosing = {row for row in plans if self.veto is not None or children.rows.count(row) > self.config.beams}
        at = [k for k, row in enumerate(children.rows) if final or (plans[row].look and row in choosing)]
        asked, scores, verdicts = children.pick(at), [0.0] * len(children.rows), [False] * len(children.rows)
        if not at:
            return scores, verdicts
        rewards, vetoed = self._leaves(asked) if final else self._ahead(asked, j)
        extra, scored = (0, 1) if final else self._look_cost(j)
        self.purse.spend(asked.rows, nfe=extra, scored=scored)
        total = rewards + (self.config.prior * asked.odds if self.config.prior else 0.0)
        for k, score, verdict in zip(at, total.tolist(), vetoed.tolist(), strict=True):
            scores[k], verdicts[k] = -math.inf if math.isnan(score) else score, verdict
        return scores, verdicts

    def _ahead(self, states: _States, j: int) -> tuple[Tensor, Tensor]:
        """Values (K,) of unfinished states and whether the veto rejects what they lead to."""
        x, prediction, rows = states.x, states.prediction, states.rows
        if self.veto is None:
            return self.value(x, prediction, j, rows, states.seeds), torch.zeros(len(rows), dtype=torch.bool)
        if isinstance(self.value, Completion):  # one decode serves the reward and the veto
            media = self.chain.finish(self.value.finished(x, prediction, j, rows), rows)
            return self._rated(media, rows), self.veto(media, rows).cpu()
        media = self.chain.finish(self.chain.denoised(x, prediction, j), rows)
        return self.value(x, prediction, j, rows, states.seeds), self.veto(media, rows).cpu()

    def _leaves(self, states: _States) -> tuple[Tensor, Tensor]:
        """Rewards (K,) of finished states, which become leaves; a vetoed one as invalid, so that it is never best."""
        if self.veto is None:
            rewards = self.judge.leaf(states.x, states.rows)
            return rewards, torch.zeros(len(rewards), dtype=torch.bool)
        media = self.chain.finish(states.x, states.rows)
        vetoed = self.veto(media, states.rows).cpu()
        rewards = self._rated(media, states.rows).where(~vetoed, math.nan)
        return self.judge.record(states.x, media, states.rows, rewards), vetoed

    def _rated(self, media: Tensor, rows: Sequence[int]) -> Tensor:
        return self.judge.slopes(media, rows).detach().float().cpu()

    def _plan(self, row: int, states: int, i: int, j: int, *, unpredicted: bool = False) -> _Plan:
        """The widest block that leaves the case enough for a plain walk to the end."""
        n = self.config.children
        if self.config.anneal is not None:
            n = self.config.anneal.count(n, progress(i, self.chain.length))
        pairs = [(k, c) for k in range(1, states + 1) for c in range(1, n + 1)]
        for k, c in sorted(pairs, key=lambda pair: (-pair[0] * pair[1], -pair[0])):
            plan = _Plan(k, c, self.veto is not None or k * c > self.config.beams)
            if self._pays(row, plan, i, j, unpredicted=unpredicted):
                return plan
        return _Plan(1, 1, False)

    def _pays(self, row: int, plan: _Plan, i: int, j: int, *, unpredicted: bool = False) -> bool:
        costs, final = self.chain.costs, j == self.chain.length
        one, scored = sum(costs[i + 1 : j + 1]), 1 if final else 0
        if plan.look and not final:
            extra, scored = self._look_cost(j)
            one += extra
        pool = plan.states * plan.children
        nfe = pool * one + sum(costs[j + 1 :]) + (plan.states * costs[i] if unpredicted else 0)
        return self.purse.affords(row, nfe=nfe, scored=pool * scored + (0 if final else 1))

    def _look_cost(self, j: int) -> tuple[int, int]:
        """NFE and decoded images of one look-ahead; a veto beside another value decodes the clean prediction too."""
        extra, scored = self.value.cost(j)
        return extra, scored + (self.veto is not None and not isinstance(self.value, Completion))

    def _predict(self, x: Tensor, i: int, rows: Sequence[int]) -> Tensor:
        self.purse.spend(rows, nfe=self.chain.costs[i])
        return self.chain.predict(x, i, rows)

    def _stops(self) -> list[int]:
        """Levels at which blocks end; a step that draws nothing cannot be a block of its own at the end."""
        length = self.chain.length
        return [*range(self.config.every, length - 1, self.config.every), length]

    def _fresh(self, rows: Sequence[int]) -> list[int]:
        """Each row's next unused seed of its case."""
        numbers = []
        for row in rows:
            numbers.append(self.drawn[row])
            self.drawn[row] += 1
        return forked(self.chain.seeds, rows, numbers)


def _centred(noise: Tensor) -> Tensor:
    """Log-density (K,) of noises (K, d), minus its mean and in units of its deviation sqrt(d / 2)."""
    flat = noise.flatten(1).float()
    d = flat.shape[1]
    return ((d - (flat**2).sum(1)) / math.sqrt(2 * d)).cpu()


def _joined(parts: Sequence[_States], empty: _States) -> _States:
    if not parts:
        return empty.pick([])
    x, prediction = torch.cat([part.x for part in parts]), torch.cat([part.prediction for part in parts])
    rows, seeds = [row for part in parts for row in part.rows], [seed for part in parts for seed in part.seeds]
    return _States(x, prediction, rows, seeds, torch.cat([part.odds for part in parts]))
