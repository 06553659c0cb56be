"""Couplings of two clouds of tokens by entropic optimal transport: balanced, unbalanced, partial; batched and ragged.

Papers: Cuturi 2013 (Sinkhorn), Chizat et al. 2018 (unbalanced: marginals are held softly), Benamou et al. 2015
(partial: a given mass moves), Olkin and Pukelsheim 1982 (the map of Gaussians); "PISCES: Annotation-free
Text-to-Video Post-Training via Optimal Transport-Aligned Rewards", 2026 (arXiv 2602.01624) for the cost of tokens with
time and place, and for what a coupling does to an attention.

Where we differ: POT, which the tests hold this to, has no batched unbalanced or partial solver and no ragged batches,
so the iterations are here, in the log domain. The printed update of PISCES puts the exponent on one term alone and has
no fixed point where the clouds differ in size; `paper_literal` runs it for a fixed number of iterations, and the
default is the standard form, in which the exponent of the soft marginals is `mass` itself.

Letters: cost C (B, N, M) in [0, 1], log weights mu (B, N) and nu (B, M), the regularisation epsilon.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.errors import ConfigError

Kind = Literal["balanced", "unbalanced", "partial", "paper_literal"]
SMALLEST = 1e-8  # added to an attention and a plan before their logarithms: far below 1 / (N M)


@dataclass(frozen=True, kw_only=True)
class CouplingConfig:
    """How tokens are coupled."""

    kind: Kind = "unbalanced"
    epsilon: float = 0.05  # smaller is sharper and takes more iterations
    mass: float = 0.9  # unbalanced: exponent of the soft marginals, 1 is hard; partial: the mass that moves
    iterations: int = 200  # at most; paper_literal: exactly
    tolerance: float = 1e-6  # largest change of a log scaling that ends it
    fallback: Literal["keep", "uniform", "raise"] = "keep"  # what is done with a plan that did not settle

    def __post_init__(self) -> None:
        if not self.epsilon > 0 or not 0 < self.mass <= 1 or self.iterations < 1 or not self.tolerance > 0:
            raise ConfigError(
                f"a coupling has epsilon {self.epsilon}, mass {self.mass}, {self.iterations} iterations and tolerance "
                f"{self.tolerance}: above 0, a share in (0, 1], at least 1, above 0."
            )

    @property
    def exponent(self) -> float:
        """tau = rho / (rho + epsilon), which is the mass itself for rho = epsilon mass / (1 - mass)."""
        return 1.0 if self.kind == "balanced" or self.mass >= 0.999 else self.mass


@dataclass(frozen=True)
class Coupling:
    """Plans (B, N, M) without a gradient, and how far each had settled."""

    plan: Tensor  # 0 where a token is masked; NaN where the cost was
    residual: Tensor  # (B,) the last change of a log scaling
    iterations: int

    @property
    def mass(self) -> Tensor:
        """(B,) all that moves."""
        return self.plan.sum((1, 2))


@torch.no_grad()
def couple(
    cost: Tensor, rows: Tensor | None = None, columns: Tensor | None = None, config: CouplingConfig = CouplingConfig()
) -> Coupling:
    """Couple the tokens whose masks, rows (B, N) and columns (B, M), are set; each side's weights are even.

    A case with no token on a side has a plan of zeros, and one whose cost is not finite a plan of NaN.
    """
    work = cost.detach().to(torch.promote_types(cost.dtype, torch.float32))
    here = torch.ones(work.shape[:2], dtype=torch.bool, device=work.device) if rows is None else rows.bool()
    there = torch.ones_like(work[:, 0], dtype=torch.bool) if columns is None else columns.bool()
    valid = here[:, :, None] & there[:, None, :]
    broken = (~work.isfinite() & valid).flatten(1).any(1)
    work = torch.where(valid & ~broken[:, None, None], work, 0.0)
    kernel = torch.where(valid, -work / config.epsilon, -torch.inf)
    mu, nu = _even(here, work), _even(there, work)
    solve = _partial if config.kind == "partial" else _scaled
    plan, residual, count = solve(kernel, mu, nu, config)
    plan = _settled(plan, residual, valid, config)
    plan = torch.where(broken[:, None, None] & valid, torch.nan, plan.nan_to_num(0.0))
    return Coupling(plan.to(cost.dtype), residual, count)


def _even(mask: Tensor, like: Tensor) -> Tensor:
    """Log weights (B, N): even over the tokens that are there, -inf elsewhere."""
    count = mask.sum(1, keepdim=True).clamp(min=1).to(like)
    return torch.where(mask, -count.log(), -torch.inf)


def _scaled(kernel: Tensor, mu: Tensor, nu: Tensor, config: CouplingConfig) -> tuple[Tensor, Tensor, int]:
    """Sinkhorn's scalings: log u <- tau (log mu - log K v), and the same for v."""
    tau, literal = config.exponent, config.kind == "paper_literal"
    u, v = torch.zeros_like(mu), torch.where(nu.isfinite(), 0.0, -torch.inf)
    residual = torch.full(mu.shape[:1], torch.inf, dtype=mu.dtype, device=mu.device)
    count = 0
    while count < config.iterations:
        count += 1
        before = u, v
        u = _update(mu, (kernel + v[:, None, :]).logsumexp(2), tau, literal=literal)
        v = _update(nu, (kernel + u[:, :, None]).logsumexp(1), tau, literal=literal)
        residual = torch.maximum(_change(u, before[0]), _change(v, before[1]))
        if not literal and bool((residual < config.tolerance).all()):
            break
    return (u[:, :, None] + kernel + v[:, None, :]).exp(), residual, count


def _update(log_weight: Tensor, log_sum: Tensor, tau: float, *, literal: bool) -> Tensor:
    found = tau * log_weight - log_sum if literal else tau * (log_weight - log_sum)
    return torch.where(log_weight.isfinite() & log_sum.isfinite(), found, -torch.inf)


def _change(now: Tensor, before: Tensor) -> Tensor:
    """(B,) the largest move of a scaling that is finite in both."""
    moved = torch.where(now.isfinite() & before.isfinite(), (now - before).abs(), 0.0)
    return moved.amax(1)


def _partial(kernel: Tensor, mu: Tensor, nu: Tensor, config: CouplingConfig) -> tuple[Tensor, Tensor, int]:
    """Dykstra's projections on plans whose rows and columns stay below their weights and whose whole is the mass."""
    mass = math.log(config.mass)
    empty = ~(mu.isfinite().any(1) & nu.isfinite().any(1))
    plan = _whole(kernel, mass)
    first, second, third = (torch.zeros_like(kernel) for _ in range(3))
    residual = torch.full(mu.shape[:1], torch.inf, dtype=mu.dtype, device=mu.device)
    count = 0
    while count < config.iterations:
        count += 1
        start = plan
        given = plan + first
        plan = given + _capped(mu - given.logsumexp(2))[:, :, None]
        first = _kept(given, plan)
        given = plan + second
        plan = given + _capped(nu - given.logsumexp(1))[:, None, :]
        second = _kept(given, plan)
        given = plan + third
        plan = _whole(given, mass)
        third = _kept(given, plan)
        residual = torch.where(empty, 0.0, (plan.exp() - start.exp()).abs().flatten(1).amax(1) * kernel[0].numel())
        if bool((residual < config.tolerance).all()):
            break
    return plan.exp(), residual, count


def _whole(plan: Tensor, mass: float) -> Tensor:
    """The log plan scaled to the log mass."""
    total = plan.flatten(1).logsumexp(1)[:, None, None]
    return torch.where(plan.isfinite(), plan - total + mass, -torch.inf)


def _capped(room: Tensor) -> Tensor:
    return torch.where(room.isnan(), 0.0, room.clamp(max=0.0))


def _kept(before: Tensor, after: Tensor) -> Tensor:
    """What a projection took away, given back before it is made again."""
    return torch.where(after.isfinite() & before.isfinite(), before - after, 0.0)


def _settled(plan: Tensor, residual: Tensor, valid: Tensor, config: CouplingConfig) -> Tensor:
    """What the config does with plans that go on moving."""
    late = residual >= config.tolerance
    if config.kind == "paper_literal" or not bool(late.any()):
        return plan
    told = f"{int(late.sum())} of {len(late)} couplings had not settled after {config.iterations} iterations (residual "
    told += f"{float(residual.max()):.1e}, tolerance {config.tolerance:.0e})"
    advice = "Raise iterations, epsilon or the tolerance."
    if config.fallback == "raise":
        raise ConfigError(f"{told}. {advice}")
    if config.fallback == "uniform":
        even = valid / valid.sum((1, 2), keepdim=True).clamp(min=1)
        warnings.warn(f"{told}; even plans stand in for them. {advice}", stacklevel=4)
        return torch.where(late[:, None, None], even.to(plan), plan)
    warnings.warn(f"{told}; they are used as they are. {advice}", stacklevel=4)
    return plan


# what is coupled


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """How far apart a word and a patch are."""

    time: float = 0.2  # weight of the distance between a word's expected time and a patch's
    place: float = 0.2  # the same of places
    squared: bool = True  # places by squared distance; the printed norm can be read either way


def token_cost(
    text: Tensor,
    video: Tensor,
    attention: Tensor,
    times: Tensor,
    places: Tensor,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    config: CostConfig = CostConfig(),
) -> Tensor:
    """Cost (B, N, M) in [0, 1] of text tokens (B, N, D) and video tokens (B, M, D).

    attention (B, N, M) says where each word looks, times (B, M) and places (B, M, 2) where the patches are.
    """
    shape = attention.shape
    here = torch.ones(shape[:2], dtype=torch.bool, device=attention.device) if rows is None else rows.bool()
    there = torch.ones_like(attention[:, 0], dtype=torch.bool) if columns is None else columns.bool()
    valid = here[:, :, None] & there[:, None, :]
    one, two = (torch.nn.functional.normalize(each.float(), dim=-1) for each in (text, video))
    found = ranged(1 - one @ two.mT, valid)
    looks = torch.where(valid, attention.float(), 0.0)
    looks = looks / looks.sum(2, keepdim=True).clamp(min=1e-12)
    when = looks @ times.float()[:, :, None]  # (B, N, 1)
    where = looks @ places.float()  # (B, N, 2)
    if config.time:
        found = found + config.time * ranged((when - times.float()[:, None, :]).abs(), valid)
    if config.place:
        apart = (where[:, :, None, :] - places.float()[:, None, :, :]).square().sum(-1)
        found = found + config.place * ranged(apart if config.squared else apart.sqrt(), valid)
    return ranged(found, valid)


def ranged(values: Tensor, valid: Tensor) -> Tensor:
    """Values (B, N, M) as shares of their range in each case; 0 where all are equal, and where not `valid`."""
    low = torch.where(valid, values, torch.inf).flatten(1).amin(1)[:, None, None]
    high = torch.where(valid, values, -torch.inf).flatten(1).amax(1)[:, None, None]
    wide = (high - low).clamp(min=0.0)
    share = (values - low) / torch.where(wide > 0, wide, 1.0)
    return torch.where(valid & (wide > 0), share, 0.0)


def fused(attention: Tensor, plan: Tensor) -> Tensor:
    """The attention (..., N, M) drawn to where the plan, which has no gradient, couples; rows still sum to 1."""
    both = (attention.clamp(min=0.0) + SMALLEST).log() + (plan.detach().to(attention) + SMALLEST).log()
    return both.softmax(-1)


# the exact map of Gaussians


@dataclass(frozen=True)
class GaussianMap:
    """y -> mean of the target + matrix (y - mean of the source): the optimal map for squared distances of Gaussians."""

    source: Tensor  # (D,)
    target: Tensor  # (D,)
    matrix: Tensor  # (D, D) symmetric

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (..., D) carried over."""
        return self.target.to(rows) + (rows - self.source.to(rows)) @ self.matrix.to(rows).mT

    @classmethod
    def between(cls, source: Tensor, source_cov: Tensor, target: Tensor, target_cov: Tensor) -> GaussianMap:
        """From means (D,) and covariances (D, D), float64 inside."""
        root, back = _roots(source_cov.double())
        inner, _ = _roots(root @ target_cov.double() @ root)
        return cls(source.double(), target.double(), back @ inner @ back)

    @classmethod
    def fit(cls, source: Tensor, target: Tensor, shrink: float = 1e-3) -> GaussianMap:
        """From samples (S, D) and (T, D), not paired; `shrink` pulls covariances towards round ones."""
        if len(source) < 2 or len(target) < 2:
            raise ConfigError(f"a map is fitted to {len(source)} and {len(target)} samples; it takes 2 on each side.")
        moments = []
        for rows in (source.double(), target.double()):
            cov = torch.cov(rows.T).view(rows.shape[1], rows.shape[1])
            mean_variance = cov.diagonal().mean()
            moments.append((rows.mean(0), (1 - shrink) * cov + shrink * mean_variance * torch.eye(len(cov)).to(cov)))
        return cls.between(*moments[0], *moments[1])


def _roots(cov: Tensor) -> tuple[Tensor, Tensor]:
    """A covariance's square root and the inverse of that."""
    values, vectors = torch.linalg.eigh((cov + cov.mT) / 2)
    values = values.clamp(min=1e-12 * float(values.abs().max().clamp(min=1e-300)))
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT
