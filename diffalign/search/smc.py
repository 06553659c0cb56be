"""SMC: a population of particles, weighted by what their unfinished latents promise and resampled on the way.

Papers: "A General Framework for Inference-time Scaling and Steering of Diffusion Models" (Feynman-Kac steering),
Singhal et al., 2025 (arXiv 2501.06848), Algorithm 1 with its potentials; "Sampling for Quality: Training-Free
Reward-Guided LLM Decoding via Sequential Monte Carlo", 2026 (arXiv 2604.16453), for lookahead values and resample-move.

The target is p(x_0) exp(strength r(x_0)) / Z. Whatever the potentials on the way, the last one is exp(strength r(x_0))
over their product, so the weighted particles and the estimate of Z are right for any value and any schedule.

Where we differ: weights of particles that were not resampled are carried on (the published code drops them, which
undoes the steering); max and add end with the true reward; weights stay logarithms; a particle is scored and
resampled at x_t, before its step; resampling is systematic by default; a lookahead value stays with its particle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from diffalign.budget import BACKWARD_COST
from diffalign.errors import ConfigError
from diffalign.search.chain import Chain
from diffalign.search.judge import Judge
from diffalign.search.moves import MovesConfig, MovesResult
from diffalign.search.population import Population
from diffalign.search.resampling import Scheme, uniforms
from diffalign.search.values import CleanPrediction, Value


@dataclass(frozen=True, kw_only=True)
class SMCConfig:
    """How a population is weighted, resampled and moved.

    `scale` "std" divides the strength by the standard deviation of the case's values at its first scoring. The target
    then depends on the population that drew it: exact only as the number of particles grows.
    """

    particles: int = 0  # per case; 1 is plain stochastic sampling, 0 as many as the budget affords or else 8
    strength: float = 1.0  # nats per unit of reward; larger is greedier
    scale: Literal["given", "std"] = "given"  # std: nats per standard deviation of the first values
    potential: Literal["diff", "max", "add", "rt"] = "diff"  # gain, best, sum or level of the values; see the paper
    start: float = 0.2  # first scoring, as a share of the chain
    stop: float = 0.8  # no scoring after this share, but for the finished images
    every: float = 0.2  # share of the chain between scorings; 0 scores at every level
    resample_below: float = 0.5  # share of `particles` that the effective size falls under; 1 always, 0 never
    resampling: Scheme = "systematic"  # ssp spreads as evenly; multinomial is noisier and loses ancestors faster
    tempering: float = 0.0  # growth of the strength per level, see das.py; 0 has all of it in force from the start
    proposal: Literal["prior", "gradient"] = "prior"  # gradient: DAS between start and stop; needs slopes of the reward
    moves: MovesConfig = field(default_factory=MovesConfig)  # at the end, and at each scoring with moves.midway

    def __post_init__(self) -> None:
        if self.particles < 0:
            raise ConfigError(f"smc.particles is {self.particles}. Use 1 or more, or 0 for what the budget affords.")
        if not 0 <= self.strength < math.inf:
            raise ConfigError(f"smc.strength is {self.strength}, but it must be finite and at least 0.")
        if not 0 <= self.start <= self.stop <= 1:
            raise ConfigError(f"smc scores from {self.start} to {self.stop}. Use shares with 0 <= start <= stop <= 1.")
        if not (self.every >= 0 and self.tempering >= 0):
            raise ConfigError(f"smc.every is {self.every} and smc.tempering {self.tempering}: neither can be negative.")
        if not 0 <= self.resample_below <= 1:
            raise ConfigError(f"smc.resample_below is {self.resample_below}, but it is a share between 0 and 1.")
        self._check_choices()
        if self.moves.ode:
            raise ConfigError("smc.moves.ode is for rejuvenate alone: particles walk by the stochastic sampler.")
        if self.moves.midway and self.proposal == "gradient":
            raise ConfigError("smc.moves.midway redraws from the prior. Use proposal 'prior', or leave midway off.")

    def _check_choices(self) -> None:
        choices = {
            "scale": ("given", "std"),
            "potential": ("diff", "max", "add", "rt"),
            "resampling": ("systematic", "ssp", "multinomial"),
            "proposal": ("prior", "gradient"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"smc.{name} is '{getattr(self, name)}'. Use one of {', '.join(known)}.")

    def times(self, length: int) -> list[int]:
        """The levels at which unfinished particles are scored."""
        if self.every == 0:
            return list(range(round(self.start * length), min(round(self.stop * length), length - 1) + 1))
        count = math.floor((self.stop - self.start) / self.every + 1e-9) + 1
        found = {round((self.start + n * self.every) * length) for n in range(count)}
        return sorted(i for i in found if i < length)


@dataclass(frozen=True, eq=False)
class SMCResult:
    """The weighted particles of every case."""

    latents: Tensor  # (B, K, ...) on the CPU
    rewards: Tensor  # (B, K) float32, NaN where invalid
    log_weights: Tensor  # (B, K) float64, normalised
    log_z: Tensor  # (B,) float64, estimate of log E exp(strength r); NaN where no weight could be told at the end
    strength: Tensor  # (B,) in nats per unit of reward
    starts: Tensor  # (B, K) number of the start behind each particle, negative where a move drew one anew
    ancestors: Tensor  # (B,) distinct starts behind the particles, before the closing moves
    levels: tuple[int, ...]  # where unfinished particles were scored
    ess: Tensor  # (S + 1, B) effective size at each scoring, and at the end
    resampled: Tensor  # (S, B) bool
    invalid: Tensor  # (B,) values and rewards that were NaN
    stalled: Tensor  # (B,) scorings passed over because no particle was left with weight
    seeds: Sequence[int]  # of the cases
    moves: MovesResult | None = None  # the closing moves

    def sample(self, case: int, count: int, stream: str = "sample") -> Tensor:
        """`count` draws (count, ...) from the weighted particles of one case, repeatable for each `stream`."""
        ladder = self.log_weights[case].exp().cumsum(0)
        drawn = torch.searchsorted(ladder / ladder[-1], uniforms([self.seeds[case]], count, stream)[0], right=True)
        return self.latents[case, drawn]


def run(
    chain: Chain,
    judge: Judge,
    config: SMCConfig = SMCConfig(),
    *,
    value: Value | None = None,
    noise: Tensor | None = None,
) -> SMCResult:
    """Walk K particles of every case in lock-step; `noise` (B, ...) replaces the start noise of each particle 0.

    `value` defaults to the reward of the clean prediction. Seconds are foretold from what was spent before, so a budget
    in seconds alone gives a first run one particle; repeat the run on the same chain to spend the rest.
    """
    plan = Plan(chain, judge, config, value)
    count = plan.particles()
    nfe, scored = plan.cost(count)
    cases = len(chain.seeds)
    judge.require(nfe=nfe * count * cases, scored=scored * count * cases, what=f"smc with {count} particles")
    population = Population(plan, count, noise)
    levels = plan.times(count)
    for i in range(chain.length):
        population.look(i)
        if i in levels:
            population.weigh(i)
            population.select(i)
        population.step(i)
    population.end()
    ancestors = [len(set(found.tolist())) for found in population.cloud.ancestor.view(cases, count)]
    moved = population.close()
    return SMCResult(
        latents=population.cloud.x.cpu().view(cases, count, *population.cloud.x.shape[1:]),
        rewards=population.cloud.value.float().view(cases, count),
        log_weights=population.log_w.log_softmax(1),
        log_z=population.log_z,
        strength=population.strength,
        starts=population.cloud.ancestor.view(cases, count).clone(),
        ancestors=torch.tensor(ancestors),
        levels=tuple(levels),
        ess=torch.stack(population.ess),
        resampled=torch.stack(population.resampled) if levels else torch.zeros(0, cases, dtype=torch.bool),
        invalid=population.invalid,
        stalled=population.stalled,
        seeds=tuple(chain.seeds),
        moves=moved,
    )


class Plan:
    """What a run does at each level, and what one particle costs."""

    def __init__(self, chain: Chain, judge: Judge, config: SMCConfig, value: Value | None) -> None:
        self.chain, self.judge, self.config = chain, judge, config
        self.shared = value is None  # the gradient's own reward serves as the value
        self.value: Value = value or CleanPrediction(judge)

    def times(self, count: int) -> list[int]:
        """Scoring levels; weights of a lone particle compare with nothing, so it has none."""
        return self.config.times(self.chain.length) if count > 1 else []

    def guided(self, i: int) -> bool:
        """Whether the step from level i follows the gradient."""
        share, slack = i / self.chain.length, 1e-9
        inside = self.config.start - slack <= share <= self.config.stop + slack
        return self.config.proposal == "gradient" and inside

    def cost(self, count: int, after: int = -1) -> tuple[int, int]:
        """NFE and scored images of one of `count` particles beyond level `after`, at most: steady steps may save."""
        nfe, scored = 0, 1
        for i in range(after + 1, self.chain.length):
            nfe += self.chain.costs[i] * (1 + BACKWARD_COST * self.guided(i))
            scored += self.guided(i)
            if i in self.times(count) and not (self.guided(i) and self.shared):
                more = self.value.cost(i)
                nfe, scored = nfe + more[0], scored + more[1]
        return nfe, scored

    def block(self, since: int, i: int) -> tuple[int, int]:
        """NFE and scored images of redrawing one particle from level `since` to level i midway."""
        nfe, scored = self.value.cost(i)
        return nfe + sum(self.chain.costs[since : i + 1]), scored

    def particles(self) -> int:
        """The number asked for, or the largest that the budget affords with all its moves."""
        if self.config.particles:
            return self.config.particles
        costs = [self.cost(2), *self._moves()]
        nfe, scored = (sum(cost[part] for cost in costs) for part in (0, 1))
        return self.judge.as_many_as(lambda count: (nfe * count, scored * count), without_limits=8)

    def _moves(self) -> list[tuple[int, int]]:
        """Costs of all moves of one particle, at most."""
        moves, times = self.config.moves, self.times(2)
        if moves.kind == "none":
            return []
        closing = [moves.cost(self.chain.costs, sweep) for sweep in range(moves.count)]
        pairs = zip([0, *times[:-1]], times, strict=True) if times else ()
        midway = [self.block(since, i) for since, i in pairs for _ in range(moves.count)]
        return closing + (midway if moves.midway else [])
