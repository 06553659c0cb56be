"""Chains whose answers are known exactly: a Gaussian, a mixture of Gaussians, and a finite-state chain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.budget import Budget, Limits
from diffalign.noise import Kernel, Levels, Transition, case_noise, ddim
from diffalign.search.judge import Judge


def cosine_levels(steps: int) -> Levels:
    """abar_0 = 1 and abar_t = cos^2(0.999 pi/2 u_t) with u from 0.02 to 1; level 0 is t = `steps`."""
    u = torch.linspace(0.02, 1.0, steps, dtype=torch.float64)
    abar = torch.cat([(0.999 * math.pi / 2 * u).cos() ** 2, torch.ones(1, dtype=torch.float64)])
    abar[:steps] = abar[:steps].flip(0)
    return Levels(abar.sqrt(), (1 - abar).sqrt(), "sample")


class ToyChain:
    """A chain over vectors (K, width); `denoise(x, alpha, sigma)` is the exact posterior mean of the clean vector."""

    def __init__(
        self,
        denoise: Callable[[Tensor, float, float], Tensor],
        *,
        steps: int = 10,
        width: int = 1,
        cases: int = 1,
        kernel: Kernel | None = None,
        budget: Budget | Limits | int | None = None,
        seed: int = 0,
        cost: int = 1,
    ) -> None:
        self.denoise, self.levels, self.length, self.width = denoise, cosine_levels(steps), steps, width
        self.kernel = kernel or ddim(1.0)
        self.budget = budget if isinstance(budget, Budget) else Budget(budget, prompts=cases)
        self.seeds = [seed + 1000 * k for k in range(cases)]
        self.costs = [cost] * steps
        self.calls: list[tuple[int, int]] = []  # (level, rows) of every model call

    def noise(self, seeds: Sequence[int], rows: Sequence[int]) -> Tensor:
        return case_noise(seeds, torch.zeros(len(seeds), self.width), "start")

    def first(self, seeds: Sequence[int], rows: Sequence[int]) -> Tensor:
        return self.start(self.noise(seeds, rows), rows)

    def start(self, noise: Tensor, rows: Sequence[int]) -> Tensor:
        return noise

    def unscaled(self, x: Tensor) -> Tensor | None:
        return x

    def predict(self, x: Tensor, i: int, rows: Sequence[int], *, grad: bool = False) -> Tensor:
        assert len(x) == len(rows)
        self.calls.append((i, len(x)))
        self.budget.charge(nfe=self.costs[i] * len(x))
        with torch.set_grad_enabled(grad):
            found = self.denoise(x, *self.levels.at(i))
        if found.requires_grad:
            spent = 2 * self.costs[i] * len(x)
            found.register_hook(lambda _: self.budget.charge(nfe=spent))
        return found

    def transition(self, x: Tensor, prediction: Tensor, i: int) -> Transition:
        return self.kernel(self.levels, x, prediction, i)

    def denoised(self, x: Tensor, prediction: Tensor, i: int) -> Tensor:
        return self.levels.denoised(x, prediction, i)

    def jump(self, x: Tensor, prediction: Tensor, i: int, j: int) -> Tensor:
        return self.levels.jump(x, prediction, i, j)

    def raised(self, x: Tensor, noise: Tensor, i: int, j: int) -> Tensor:
        return self.levels.raised(x, noise, i, j)

    def finish(self, x: Tensor, rows: Sequence[int], *, grad: bool = False) -> Tensor:
        self.budget.charge(decodes=len(x))
        return x if grad else x.detach()

    def generate(
        self, x: Tensor, rows: Sequence[int], *, seeds: Sequence[int] | None = None, grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        for i in range(self.length):
            x = self.jump(x, self.predict(x, i, rows, grad=grad), i, i + 1)
        return x, self.finish(x, rows, grad=grad)


def gaussian_chain(mean: float = 0.5, deviation: float = 0.7, **options: object) -> ToyChain:
    """Data N(mean, deviation^2), independent over the width."""

    def posterior_mean(x: Tensor, alpha: float, sigma: float) -> Tensor:
        gain = deviation**2 * alpha / (alpha**2 * deviation**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    return ToyChain(posterior_mean, **options)  # type: ignore[arg-type]


def mixture_chain(weights: Sequence[float], means: Sequence[float], deviation: float, **options: object) -> ToyChain:
    """Data from a mixture of Gaussians with one deviation, on a line."""
    w, m = torch.tensor(weights), torch.tensor(means)

    def posterior_mean(x: Tensor, alpha: float, sigma: float) -> Tensor:
        spread = alpha**2 * deviation**2 + sigma**2
        log_odds = w.log() - (x - alpha * m) ** 2 / (2 * spread)  # (K, modes)
        gain = deviation**2 * alpha / spread
        return (log_odds.softmax(-1) * (m + gain * (x - alpha * m))).sum(-1, keepdim=True)

    return ToyChain(posterior_mean, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Affine:
    """x_0 given x at level i is N(slope x + offset, variance) under DDIM eta = 1 on the Gaussian chain."""

    slope: list[float]
    offset: list[float]
    variance: list[float]

    def value(self, x: Tensor, i: int, c: float, lam: float = 1.0) -> Tensor:
        """Soft value (K,) of r(x) = c x at x (K, 1) of level i."""
        return c * (self.slope[i] * x[:, 0] + self.offset[i]) + lam * c * c * self.variance[i] / 2

    @property
    def prior(self) -> tuple[float, float]:
        """Mean and variance of the chain's own law of x_0."""
        return self.offset[0], self.slope[0] ** 2 + self.variance[0]

    def log_z(self, c: float, lam: float = 1.0) -> float:
        mean, variance = self.prior
        return lam * c * mean + (lam * c) ** 2 * variance / 2

    def tilted(self, c: float, lam: float = 1.0) -> tuple[float, float]:
        """Mean and standard deviation of the law tilted by exp(lam c x)."""
        mean, variance = self.prior
        return mean + lam * c * variance, math.sqrt(variance)


def exact(chain: ToyChain) -> Affine:
    """The recursion of x_0 given x_t, read off the chain's own transitions, which are affine."""
    slope, offset, variance = [1.0], [0.0], [0.0]
    for i in reversed(range(chain.length)):
        points = torch.tensor([[0.0], [1.0]])
        step = chain.transition(points, chain.denoise(points, *chain.levels.at(i)), i)
        b = float(step.mean[0, 0])
        a = float(step.mean[1, 0]) - b
        variance.insert(0, variance[0] + slope[0] ** 2 * step.std**2)
        offset.insert(0, offset[0] + slope[0] * b)
        slope.insert(0, slope[0] * a)
    return Affine(slope, offset, variance)


class Draw:
    """A categorical step: `sample` reads the normal noise through the inverse CDF."""

    std = 1.0

    def __init__(self, odds: Tensor) -> None:
        self.odds = odds  # (K, S)

    def sample(self, noise: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        assert noise is not None
        uniform = torch.special.ndtr(noise[:, :1].double())
        state = torch.searchsorted(self.odds.double().cumsum(1), uniform)
        return state.clamp(max=self.odds.shape[1] - 1).float()


class FiniteChain(ToyChain):
    """`states` states, `steps` random transition matrices; x (K, 1) holds the state's number."""

    def __init__(self, states: int = 4, steps: int = 3, seed: int = 0, **options: object) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(lambda x, alpha, sigma: x, steps=steps, **options)  # type: ignore[arg-type]
        self.states = states
        self.odds = torch.rand(steps, states, states, generator=generator).softmax(-1)
        self.origin = torch.full((states,), 1 / states)

    def start(self, noise: Tensor, rows: Sequence[int]) -> Tensor:
        return Draw(self.origin.expand(len(noise), -1)).sample(noise)

    def predict(self, x: Tensor, i: int, rows: Sequence[int], *, grad: bool = False) -> Tensor:
        self.calls.append((i, len(x)))
        self.budget.charge(nfe=self.costs[i] * len(x))
        return self.odds[i][x[:, 0].long()]

    def transition(self, x: Tensor, prediction: Tensor, i: int) -> Transition:
        return Draw(prediction)  # type: ignore[return-value]

    def values(self, rewards: Tensor, lam: float) -> list[Tensor]:
        """Soft values by dynamic programming: one tensor (S,) per level, and the value of the root last."""
        v = [rewards]
        for i in reversed(range(self.length)):
            v.insert(0, (self.odds[i].log() + lam * v[0]).logsumexp(1) / lam)
        root = (self.origin.log() + lam * v[0]).logsumexp(0) / lam
        return [*v, root]


def linear(c: float) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """Reward c times the first number of the media."""
    return lambda media, rows: c * media[:, 0]


def judge_of(chain: ToyChain, rate: Callable[[Tensor, Sequence[int]], Tensor], **options: object) -> Judge:
    return Judge(chain, rate, **options)  # type: ignore[arg-type]
