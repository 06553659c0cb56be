"""Metropolis-Hastings moves that renew finished particles under the law tilted by exp(strength x reward).

Paper: "Sampling for Quality: Training-Free Reward-Guided LLM Decoding via Sequential Monte Carlo", 2026
(arXiv 2604.16453), which redraws the end of a text. For diffusion there are three moves here:
`suffix` keeps the latent of one level and redraws the rest; `renoise` noises the finished latent up to a level and
denoises it; `pcn` turns all noises a little (preconditioned Crank-Nicolson) and reruns the sampler. Each accepts with
probability min(1, exp(strength (new reward - old reward))).

Where we differ: the moves are ours. `suffix` and `pcn` leave the tilted law exactly invariant; `renoise` only where the
sampler is the true reverse of the noising. The paper's rule to move poor duplicates alone is `selective`: it breaks
detailed balance, so it hunts rewards and samples nothing. To move duplicates whatever their reward is not exact
either, as heavy particles have more of them; so without `selective` everyone moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.noise import case_noise, forked
from diffalign.search.chain import Chain
from diffalign.search.judge import Judge
from diffalign.search.resampling import gathered, uniforms

Draw = Callable[[Tensor, int], Tensor]  # (latents (K, ...), level) -> the step's standard normal noise (K, ...)
START = -1  # the key of the start noise among the noises of the steps
_FRESH = 1_000_000  # numbers of seeds that no candidate of a sensible count has


@dataclass(frozen=True, kw_only=True)
class MovesConfig:
    """Which move, how often, and how far it reaches."""

    kind: Literal["none", "suffix", "renoise", "pcn"] = "none"
    count: int = 2  # sweeps; each proposes once for every particle and costs up to a full run of it
    levels: tuple[float, ...] = (0.0, 0.4, 0.7)  # where walks restart, as shares of the chain, one sweep each in turn
    renewal: float = 0.5  # pcn: z' = sqrt(1 - renewal^2) z + renewal xi; smaller moves less and is accepted more
    ode: bool = False  # pcn alone: only the start noise, finished by the plain sampler `chain.generate`
    selective: bool = False  # optimiser: move only particles below `threshold`; the tilted law is then not kept
    threshold: float | None = None  # reward; None takes the mean of the case's particles
    midway: bool = False  # smc with suffix: also at each scoring, from the one before; selective: poor duplicates alone

    def __post_init__(self) -> None:
        if self.kind not in ("none", "suffix", "renoise", "pcn"):
            raise ConfigError(f"moves.kind is '{self.kind}'. Use 'suffix', 'renoise', 'pcn' or 'none'.")
        if self.count < 0:
            raise ConfigError(f"moves.count is {self.count}, but sweeps cannot be negative.")
        if not self.levels or not all(0 <= level < 1 for level in self.levels):
            raise ConfigError(f"moves.levels are {self.levels}, but each is a share of the chain from 0 to below 1.")
        if self.kind == "suffix" and 0 not in self.levels:
            raise ConfigError(f"moves.levels are {self.levels}. Add 0, or what stands before them is frozen for ever.")
        if not 0 < self.renewal <= 1:
            raise ConfigError(f"moves.renewal is {self.renewal}, but a share of fresh noise lies above 0, at most 1.")
        if self.ode and self.kind != "pcn":
            raise ConfigError(f"moves.ode is for kind 'pcn', but the kind is '{self.kind}'.")
        if self.midway and self.kind != "suffix":
            raise ConfigError(f"moves.midway is for kind 'suffix', but the kind is '{self.kind}'.")

    def level(self, sweep: int, length: int) -> int:
        """The level at which walks of this sweep restart."""
        if self.kind == "pcn":
            return 0
        return min(round(self.levels[sweep % len(self.levels)] * length), length - 1)

    def kept(self, length: int) -> set[int]:
        """Levels whose latents a suffix move needs; level 0 is drawn anew."""
        return {self.level(s, length) for s in range(len(self.levels))} - {0} if self.kind == "suffix" else set()

    def cost(self, costs: Sequence[int], sweep: int) -> tuple[int, int]:
        """NFE and scored images of one particle in this sweep."""
        return sum(costs[self.level(sweep, len(costs)) :]), 1


@dataclass(eq=False)
class Particles:
    """Finished particles with what a move needs of their past."""

    rows: list[int]  # case of each
    seeds: list[int]  # of each slot: later draws come from here
    x: Tensor  # (N, ...) final latents
    rewards: Tensor  # (N,) float64, NaN where invalid
    path: dict[int, Tensor]  # latents (N, ...) by level, for `suffix`, on the CPU
    noises: dict[int, Tensor]  # standard normals (N, ...) by step, and START, for `pcn`, on the CPU

    def take(self, index: Tensor) -> Particles:
        """The particles at `index`, as copies."""
        return Particles(**{f.name: gathered(getattr(self, f.name), index) for f in fields(self)})

    def put(self, index: Tensor, new: Particles) -> None:
        """Write `new` over the particles at `index`; rows and seeds stay."""
        self.x[index.to(self.x.device)] = new.x.to(self.x.device)
        self.rewards[index] = new.rewards
        for held, fresh in ((self.path, new.path), (self.noises, new.noises)):
            for key, value in fresh.items():
                held[key][index] = value


@dataclass(frozen=True, eq=False)
class MovesResult:
    """The particles after all sweeps, and what the sweeps did."""

    particles: Particles
    proposed: Tensor  # (sweeps, B)
    accepted: Tensor  # (sweeps, B)
    invalid: Tensor  # (B,) proposals whose reward was NaN; they are refused


def rejuvenate(
    chain: Chain,
    judge: Judge,
    config: MovesConfig = MovesConfig(kind="pcn"),
    *,
    particles: Particles | None = None,
    chains: int = 1,
    strength: float | Tensor = 1.0,
    movable: Tensor | None = None,
) -> MovesResult:
    """Move `particles`, or `chains` plain samples of each case, until the sweeps or the budget end.

    `strength` is one number or one per case (B,); `movable` (N,) bool leaves out the particles where it is False.
    """
    particles = begin(chain, judge, config, chains) if particles is None else particles
    cases, rows = len(chain.seeds), torch.tensor(particles.rows)
    tilt = torch.as_tensor(strength, dtype=torch.float64).expand(cases)[rows]  # (N,)
    movable = torch.ones(len(rows), dtype=torch.bool) if movable is None else movable
    proposed, accepted, invalid = [], [], torch.zeros(cases, dtype=torch.long)
    for sweep in range(config.count if config.kind != "none" else 0):
        allowed = movable & below(particles.rewards, rows, config) if config.selective else movable
        who = allowed.nonzero()[:, 0]
        nfe, scored = config.cost(chain.costs, sweep)
        if not len(who) or not judge.affords(nfe=nfe * len(who), scored=scored * len(who)):
            break
        old = particles.take(who)
        seeds = renewed(old.seeds, chain.length, sweep)
        new = _propose(chain, judge, config, old, config.level(sweep, chain.length), seeds)
        yes = accepts(tilt[who] * old.rewards, tilt[who] * new.rewards, seeds)
        particles.put(who[yes], new.take(yes.nonzero()[:, 0]))
        proposed.append(torch.bincount(rows[who], minlength=cases))
        accepted.append(torch.bincount(rows[who[yes]], minlength=cases))
        invalid += torch.bincount(rows[who[new.rewards.isnan()]], minlength=cases)
    empty = torch.zeros(0, cases, dtype=torch.long)
    return MovesResult(
        particles, torch.stack(proposed) if proposed else empty, torch.stack(accepted) if accepted else empty, invalid
    )


def begin(chain: Chain, judge: Judge, config: MovesConfig, count: int) -> Particles:
    """`count` plain samples of each case, with the past that the configured move needs."""
    rows = [row for row in range(len(chain.seeds)) for _ in range(count)]
    nfe = sum(chain.costs) * len(rows)
    judge.require(nfe=nfe, scored=len(rows), what=f"starting {count} particles")
    seeds = forked(chain.seeds, rows, list(range(count)) * len(chain.seeds))
    noises = {START: chain.noise(seeds, rows).cpu()} if config.kind == "pcn" else {}
    if config.ode:
        x, media = chain.generate(chain.first(seeds, rows), rows)
        return Particles(rows, seeds, x, judge.seen(x, media, rows).double(), {}, noises)

    def draw(x: Tensor, i: int) -> Tensor:
        noise = case_noise(seeds, x, "step", i)
        if config.kind == "pcn":
            noises[i] = noise.cpu()
        return noise

    x, path = walk(chain, chain.first(seeds, rows), 0, chain.length, rows, draw, config.kept(chain.length))
    return Particles(rows, seeds, x, judge.leaf(x, rows).double(), path, noises)


def walk(
    chain: Chain, x: Tensor, i: int, end: int, rows: Sequence[int], draw: Draw, keep: Collection[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """Latents x (K, ...) walked from level i to level `end`, and those of the levels in `keep` on the way."""
    path = {}
    for j in range(i, end):
        if j in keep:
            path[j] = x.cpu()
        step = chain.transition(x, chain.predict(x, j, rows), j)
        x = step.sample(draw(x, j) if step.std else None, dtype=x.dtype)
    return x, path


def renewed(seeds: Sequence[int], level: int, sweep: int) -> list[int]:
    """Seeds (K,) for one round of proposals at one level, which share no noise with any other."""
    number = _FRESH * (1 + level) + sweep
    return forked(seeds, range(len(seeds)), [number] * len(seeds))


def accepts(old: Tensor, new: Tensor, seeds: Sequence[int]) -> Tensor:
    """Whether each move (K,) from log target `old` to `new` is taken: an invalid target never, out of one always."""
    gain = torch.where(old.isnan(), math.inf, new - old)
    return ~new.isnan() & (uniforms(seeds, 1, "accept")[:, 0].log() < gain)


def below(rewards: Tensor, rows: Tensor, config: MovesConfig) -> Tensor:
    """Which particles (N,) the optimiser moves: those under the threshold, and the invalid ones."""
    if config.threshold is not None:
        return ~(rewards >= config.threshold)
    valid = ~rewards.isnan()
    total = torch.bincount(rows, torch.where(valid, rewards, 0.0))
    return ~(rewards >= (total / torch.bincount(rows, valid.double()))[rows])


def fresh_noise(seeds: Sequence[int]) -> Draw:
    """Step noise from the seeds (K,) alone."""
    return lambda x, i: case_noise(seeds, x, "step", i)


def _propose(
    chain: Chain, judge: Judge, config: MovesConfig, old: Particles, level: int, seeds: Sequence[int]
) -> Particles:
    """One proposal for each of `old`, scored as a leaf."""
    if config.kind == "pcn":
        return _turned(chain, judge, config, old, seeds)
    if config.kind == "renoise":
        noise = case_noise(seeds, old.x, "renoise")
        x = chain.raised(old.x, noise, chain.length, level)
    else:
        x = old.path[level].to(old.x.device) if level else chain.first(seeds, old.rows)
    keep = {j for j in config.kept(chain.length) if j > level}
    x, path = walk(chain, x, level, chain.length, old.rows, fresh_noise(seeds), keep)
    return Particles(old.rows, old.seeds, x, judge.leaf(x, old.rows).double(), path, {})


def _turned(chain: Chain, judge: Judge, config: MovesConfig, old: Particles, seeds: Sequence[int]) -> Particles:
    """The pcn proposal: every noise turned towards a fresh one, and the walk rerun."""
    b, rows = config.renewal, old.rows
    noises = {}

    def turn(fresh: Tensor, key: int) -> Tensor:
        held = math.sqrt(1 - b * b) * old.noises[key].to(fresh.device) + b * fresh
        noises[key] = held.cpu()
        return held

    start = turn(chain.noise(seeds, rows), START)
    if config.ode:
        x, media = chain.generate(chain.start(start, rows), rows)
        rewards = judge.seen(x, media, rows)
    else:
        x = chain.start(start, rows)
        x, _ = walk(chain, x, 0, chain.length, rows, lambda x, i: turn(case_noise(seeds, x, "step", i), i))
        rewards = judge.leaf(x, rows)
    return Particles(rows, old.seeds, x, rewards.double(), {}, noises)
