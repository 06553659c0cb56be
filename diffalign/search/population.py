"""Population: the particles of a run of `smc` and what happens to them at a level; the papers are named there.

After each scoring the log weights of a case are those of its particles since their last resampling, and `paid` is
what a particle's potentials have summed to, so the last potential is the final reward's less that sum. A particle
whose value is NaN loses all weight; where that would leave a case without any, the scoring is passed over instead.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffalign.noise import case_noise, forked
from diffalign.search.das import log_ratio, slope, tempered
from diffalign.search.moves import (
    START,
    MovesResult,
    Particles,
    accepts,
    below,
    fresh_noise,
    rejuvenate,
    renewed,
    walk,
)
from diffalign.search.resampling import ess, gathered, log_mean_exp, resample

if TYPE_CHECKING:
    from diffalign.search.smc import Plan


@dataclass(eq=False)
class Cloud:
    """All that belongs to single particles, (N, ...) each; resampling gathers every field of it, here and at once."""

    x: Tensor
    prediction: Tensor
    gradient: Tensor | None  # of the value in x, where the next step follows it
    paid: Tensor  # float64, the sum of the log potentials so far
    memory: Tensor  # float64, what the potential remembers: the latest, best or summed value
    value: Tensor  # float64, the latest value: copied with its particle, never drawn again
    ancestor: Tensor  # number of its start
    anchor: dict[str, Tensor]  # x, paid and memory at the last scoring, for moves midway
    path: dict[int, Tensor]  # latents by level, for suffix moves
    noises: dict[int, Tensor]  # standard normals by step, for pcn moves

    def take(self, index: Tensor) -> None:
        """Slot k becomes a copy of slot index[k]."""
        for f in fields(self):
            setattr(self, f.name, gathered(getattr(self, f.name), index))


class Population:
    """K particles of each of B cases, N = B K rows at one level; slot k draws from its own seed, whoever sits there."""

    def __init__(self, plan: Plan, count: int, noise: Tensor | None) -> None:
        chain, self.plan, self.count, self.cases = plan.chain, plan, count, len(plan.chain.seeds)
        self.rows = [row for row in range(self.cases) for _ in range(count)]
        self.case = torch.tensor(self.rows)
        self.seeds = forked(chain.seeds, self.rows, list(range(count)) * self.cases)
        self.recording = plan.config.moves.kind == "pcn"
        self.keep = plan.config.moves.kept(chain.length)
        drawn = chain.noise(self.seeds, self.rows) if self.recording or noise is not None else None
        if noise is not None and drawn is not None:
            drawn[::count] = noise.to(drawn)
        x = chain.first(self.seeds, self.rows) if noise is None or drawn is None else chain.start(drawn, self.rows)
        none = torch.zeros(len(self.rows), dtype=torch.float64)
        self.forgotten = -torch.inf if plan.config.potential == "max" else 0.0
        self.cloud = Cloud(
            x, x, None, none, none + self.forgotten, none, torch.arange(len(self.rows)) % count, {}, {},
            {START: drawn.cpu()} if self.recording and drawn is not None else {},
        )  # fmt: skip
        self.log_w = none.view(self.cases, count)
        self.log_z = torch.zeros(self.cases, dtype=torch.float64)
        self.strength = torch.full((self.cases,), plan.config.strength, dtype=torch.float64)
        self.scaled = plan.config.scale == "given" or count == 1
        self.since = 0  # the level of the last scoring
        self.told = torch.ones(self.cases, dtype=torch.bool)  # whether the last scoring told a case's particles apart
        self.ess: list[Tensor] = []
        self.resampled: list[Tensor] = []
        self.invalid = torch.zeros(self.cases, dtype=torch.long)
        self.stalled = torch.zeros(self.cases, dtype=torch.long)

    def look(self, i: int) -> None:
        """Predict at level i, with the reward's gradient where the next step follows it."""
        chain, cloud = self.plan.chain, self.cloud
        if self.plan.guided(i) and chain.transition(cloud.x, cloud.x, i).std:  # the std asks for no prediction
            cloud.prediction, value, cloud.gradient = slope(chain, self.plan.judge, cloud.x, i, self.rows)
            cloud.value = value.double()
        else:
            cloud.prediction, cloud.gradient = chain.predict(cloud.x, i, self.rows), None

    def weigh(self, i: int) -> None:
        """Score the unfinished particles of level i and multiply their potentials in."""
        cloud = self.cloud
        if cloud.gradient is None or not self.plan.shared:
            cloud.value = self.plan.value(cloud.x, cloud.prediction, i, self.rows, self.seeds).double()
        self._scale()
        log_g, memory = self._potential(cloud.value, i, cloud.paid, cloud.memory, self.strength[self.case])
        used = self._multiply(log_g)
        cloud.paid = torch.where(used, cloud.paid + log_g, cloud.paid)
        cloud.memory = torch.where(used, memory, cloud.memory)

    def select(self, i: int) -> None:
        """Resample the cases whose effective size is low, and renew the walks since the last scoring if asked to."""
        config = self.plan.config
        size = ess(self.log_w)
        due = size < config.resample_below * self.count * (1 - 1e-9)  # equal weights need no resampling
        self.ess.append(size)
        self.resampled.append(due)
        index = torch.arange(self.count).expand(self.cases, -1)
        if due.any():
            drawn = resample(self.log_w, config.resampling, self.plan.chain.seeds, "resample", i)
            index = torch.where(due[:, None], drawn, index)
            self.log_z += torch.where(due, log_mean_exp(self.log_w), 0.0)
            self.log_w = torch.where(due[:, None], 0.0, self.log_w)
            self.cloud.take((index + self.count * torch.arange(self.cases)[:, None]).view(-1))
        if config.moves.midway:
            weighed = self.log_w.isfinite() & self.told[:, None]
            self._renew(i, (weighed & _repeats(index) if config.moves.selective else weighed).view(-1))
            self.anchor(i)

    def anchor(self, i: int) -> None:
        """Remember where the walk after this scoring begins."""
        self.since = i
        self.cloud.anchor = {"x": self.cloud.x, "paid": self.cloud.paid, "memory": self.cloud.memory}

    def step(self, i: int) -> None:
        """Walk from level i to level i + 1, each slot with its own noise."""
        chain, cloud = self.plan.chain, self.cloud
        if i in self.keep:
            cloud.path[i] = cloud.x.cpu()
        step = chain.transition(cloud.x, cloud.prediction, i)
        noise = case_noise(self.seeds, cloud.x, "step", i) if step.std else None
        if noise is not None and cloud.gradient is not None and self.scaled:
            pull = self.strength * tempered(self.plan.config.tempering, i + 1, chain.length)
            pull = pull[self.case].view(-1, *[1] * (noise.ndim - 1)).to(noise)
            shift = step.std * pull * cloud.gradient
            noise = noise + shift
            self.log_w = self.log_w + log_ratio(noise, shift).cpu().double().view(self.cases, self.count)
        if self.recording and noise is not None:
            cloud.noises[i] = noise.cpu()
        cloud.x = step.sample(noise, dtype=cloud.x.dtype)

    def end(self) -> None:
        """Score the finished particles and give each the potential that is still owed."""
        cloud = self.cloud
        cloud.value = self.plan.judge.leaf(cloud.x, self.rows).double()
        self._scale()
        self._multiply(self.strength[self.case] * cloud.value - cloud.paid)
        self.ess.append(ess(self.log_w))
        self.log_z += torch.where(self.told, log_mean_exp(self.log_w), torch.nan)

    def close(self) -> MovesResult | None:
        """The closing moves; weights stay, since every move keeps the target."""
        plan, cloud = self.plan, self.cloud
        if plan.config.moves.kind == "none":
            return None
        finished = Particles(self.rows, self.seeds, cloud.x, cloud.value, cloud.path, cloud.noises)
        movable = self.log_w.isfinite().view(-1)
        return rejuvenate(
            plan.chain, plan.judge, plan.config.moves, particles=finished, strength=self.strength, movable=movable
        )

    def _scale(self) -> None:
        """Fix the strengths at the first scoring; values that all tie leave them as given."""
        if self.scaled:
            return
        self.scaled = True
        value = self.cloud.value.view(self.cases, self.count)
        spread = (value - value.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
        flat = ~(spread > 1e-6 * value.nan_to_num(0.0).abs().amax(1))
        self.strength = self.strength / torch.where(flat, 1.0, spread)

    def _potential(
        self, value: Tensor, i: int, paid: Tensor, memory: Tensor, strength: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The log potential (K,) of values (K,) at level i, and what is remembered after it; NaN where invalid."""
        config = self.plan.config
        if config.potential == "max":
            memory = torch.maximum(memory, value)
        else:
            memory = memory + value if config.potential == "add" else value
        log_g = tempered(config.tempering, i, self.plan.chain.length) * strength * memory
        return log_g - paid if config.potential == "diff" else log_g, memory

    def _multiply(self, log_g: Tensor) -> Tensor:
        """Multiply potentials (N,) into the weights, and say where they were used."""
        dead = log_g.isnan()
        self.invalid += dead.view(self.cases, self.count).sum(1)
        weighed = self.log_w + torch.where(dead, -torch.inf, log_g).view(self.cases, self.count)
        alive = (~weighed.isneginf()).any(1)
        self.stalled += (~alive).long()
        self.log_w = torch.where(alive[:, None], weighed, self.log_w)
        self.told = alive
        return alive[self.case] & ~dead

    def _renew(self, i: int, allowed: Tensor) -> None:
        """Redraw the walk since the last scoring by Metropolis-Hastings, under the potentials up to level i.

        All weighed particles move: a heavy particle has more copies, so to move copies alone would shift the law.
        """
        plan, cloud, moves = self.plan, self.cloud, self.plan.config.moves
        for sweep in range(moves.count):
            chosen = allowed & below(cloud.value, self.case, moves) if moves.selective else allowed
            who = chosen.nonzero()[:, 0]
            if not len(who) or not self._affords(i, len(who)):
                return
            rows = self.case[who].tolist()
            seeds = renewed([self.seeds[k] for k in who.tolist()], i, sweep)
            old = gathered(cloud.anchor, who)
            x = old["x"] if old else plan.chain.first(seeds, rows)
            x, path = walk(plan.chain, x, self.since, i, rows, fresh_noise(seeds), self.keep)
            prediction = plan.chain.predict(x, i, rows)
            value = plan.value(x, prediction, i, rows, seeds).double()
            paid = old["paid"] if old else torch.zeros(len(who), dtype=torch.float64)
            memory = old["memory"] if old else torch.full_like(paid, self.forgotten)
            log_g, memory = self._potential(value, i, paid, memory, self.strength[self.case[who]])
            self.invalid += torch.bincount(self.case[who[value.isnan()]], minlength=self.cases)
            yes = accepts(cloud.paid[who], paid + log_g, seeds).nonzero()[:, 0]
            new = {"x": x, "prediction": prediction, "paid": paid + log_g, "memory": memory, "value": value}
            if not old:
                new["ancestor"] = -1 - who  # a start of its own
            for name, tensor in new.items():
                held = getattr(cloud, name)
                setattr(cloud, name, held.index_put((who[yes].to(held.device),), gathered(tensor, yes)))
            for level, latents in path.items():
                cloud.path[level][who[yes]] = latents[yes]

    def _affords(self, i: int, count: int) -> bool:
        """Whether `count` redrawn particles fit beside what the population still has to walk."""
        nfe, scored = self.plan.block(self.since, i)
        ahead, owed = self.plan.cost(self.count, after=i)
        everyone = len(self.rows)
        return self.plan.judge.affords(nfe=nfe * count + ahead * everyone, scored=scored * count + owed * everyone)


def _repeats(index: Tensor) -> Tensor:
    """Which slots (B, K) hold a particle that an earlier slot of their case holds too."""
    same = index[:, :, None] == index[:, None, :]
    return same.tril(-1).any(2)
