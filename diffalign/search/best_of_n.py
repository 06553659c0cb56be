"""Best-of-N: draw N candidates, keep the best, and say exactly what that did.

Papers: "Asymptotics of Language Model Alignment", Yang et al., 2024 (arXiv 2404.01730): the law of the best of N and
its KL. "InfAlign: Inference-aware language model alignment", Balashankar et al., 2024 (arXiv 2412.19792): the
calibrated reward, and win rates with ties counted one half.

Where we differ: every quantity is estimated from one pool of M rewards per prompt by U-statistics, so a whole curve
costs M samples; ties are averaged over their order, so the estimates hold for discrete rewards too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.errors import ConfigError


def weights(pool: int, n: int) -> Tensor:
    """Weights (M,) that turn a pool ascending into the unbiased E[max of n], in float64."""
    _check_n(n, pool)
    rank = torch.arange(n, pool, dtype=torch.float64)  # i = n .. M-1; w_i = w_{i+1} (i - n + 1) / i
    ladder = torch.cat([torch.tensor([n / pool], dtype=torch.float64), ((rank - n + 1) / rank).flip(0)]).cumprod(0)
    return torch.cat([torch.zeros(n - 1, dtype=torch.float64), ladder.flip(0)])


def expected(rewards: Tensor, n: int, metric: Tensor | None = None) -> float:
    """Unbiased mean of `metric` (default: the reward itself) at the best of n draws, from a pool `rewards` (M,)."""
    order, carried = _ordered(rewards, metric)
    return float(weights(len(order), n) @ carried)


def curve(rewards: Tensor, metric: Tensor | None = None, ns: Sequence[int] | None = None) -> Tensor:
    """The unbiased best-of-n value for n = 1 .. M, or for the given `ns`, from one pool `rewards` (M,)."""
    order, carried = _ordered(rewards, metric)
    steps = range(1, len(order) + 1) if ns is None else ns
    return torch.stack([weights(len(order), n) @ carried for n in steps])


def kl_bound(n: int) -> float:
    """Upper bound in nats on KL(best of n || base): log n - (n-1)/n; exact if no two rewards tie."""
    _check_n(n)
    return math.log(n) - (n - 1) / n


def binary_kl(success: float, n: int) -> float:
    """Exact KL(best of n || base) in nats when the reward is pass or fail with base rate `success`."""
    _check_n(n)
    if not 0.0 <= success <= 1.0:
        raise ConfigError(f"a success rate lies in [0, 1], but got {success}")
    if success in (0.0, 1.0):
        return 0.0
    fail = (1 - success) ** n
    passed = -math.expm1(n * math.log1p(-success))
    return passed * math.log(passed / success) + (fail * (n - 1) * math.log1p(-success) if fail else 0.0)


def win_rate_without_ties(n: int, m: int = 1) -> float:
    """P(best of n beats an independent best of m), both from the base, when no two rewards tie: n / (n + m)."""
    _check_n(n)
    _check_n(m)
    return n / (n + m)


def win_rate(rewards: Tensor, n: int, m: int = 1) -> float:
    """Unbiased P(best of n beats an independent best of m), ties one half, from a pool `rewards` (M,), M >= n + m."""
    _check_n(m)
    _check_n(n + m, len(rewards), what="n + m")
    drawn = n + m
    _, counts = torch.unique(rewards.double(), return_counts=True)
    total = _log_binomial(len(rewards), drawn)
    lead, below = 0.0, 0  # lead = P(every top-tied draw is in the n) - P(every one is in the m)
    for count in counts.tolist():
        for tied in range(1, min(count, drawn) + 1):
            rest = drawn - tied
            if rest > below:
                continue
            hit = math.exp(_log_binomial(count, tied) + _log_binomial(below, rest) - total)
            split = _log_binomial(drawn, tied)
            lead += hit * (_exp(_log_binomial(n, tied) - split) - _exp(_log_binomial(m, tied) - split))
        below += count
    return 0.5 + 0.5 * lead


def wins(rewards: Tensor, others: Tensor) -> float:
    """Share of pairs in which `rewards` (A,) beats `others` (B,), ties one half."""
    return float(calibrate(rewards, others).mean())


def calibrate(rewards: Tensor, pool: Tensor, *, smooth: bool = False) -> Tensor:
    """Mid-rank in [0, 1] of each reward in a reference pool (K,); `smooth`: (rank + .5) / (K + 1), strictly inside."""
    if len(pool) == 0:
        raise ConfigError("calibration needs at least one reference reward, but the pool is empty")
    ladder = pool.double().sort().values
    values = rewards.double().contiguous()
    rank = (torch.searchsorted(ladder, values) + torch.searchsorted(ladder, values, right=True)).double() / 2
    return (rank + 0.5) / (len(pool) + 1) if smooth else rank / len(pool)


def best_first(total: Tensor, valid: Tensor, k: int) -> Tensor:
    """Indices (B, k) of the k best candidates of each row of `total` (B, N): ties to the earlier, invalid ones last."""
    ranked = torch.where(valid, total, torch.full_like(total, -math.inf))
    return ranked.argsort(dim=1, descending=True, stable=True)[:, :k]


def running_best(total: Tensor, valid: Tensor) -> Tensor:
    """Best valid reward (B, N) after 1 .. N candidates; -inf until a first valid one has come."""
    return torch.where(valid, total, torch.full_like(total, -math.inf)).cummax(dim=1).values


def _ordered(rewards: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rewards ascending (M,) and the carried value, averaged within each group of tied rewards."""
    if rewards.ndim != 1 or not torch.isfinite(rewards).all():
        raise ConfigError(
            f"a pool is one row of finite rewards, but got shape {tuple(rewards.shape)}; drop the invalid ones first"
        )
    order = rewards.double().sort()
    if metric is None:
        return order.values, order.values
    carried = metric.double()[order.indices]
    _, group, counts = torch.unique_consecutive(order.values, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64, device=carried.device).index_add_(0, group, carried)
    return order.values, (sums / counts)[group]


def _log_binomial(top: int, bottom: int) -> float:
    if bottom < 0 or bottom > top:
        return -math.inf
    return math.lgamma(top + 1) - math.lgamma(bottom + 1) - math.lgamma(top - bottom + 1)


def _exp(value: float) -> float:
    return math.exp(value) if value > -math.inf else 0.0


def _check_n(n: int, pool: int | None = None, what: str = "n") -> None:
    if n < 1:
        raise ConfigError(f"best-of-n needs {what} of at least 1, but got {n}")
    if pool is not None and n > pool:
        raise ConfigError(
            f"{what} is {n}, but the pool holds {pool} rewards. Draw more candidates, or ask for at most {pool}."
        )
