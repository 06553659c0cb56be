"""A chain on which the true credit of every step is known: x_{i+1} = x_i + nu_i eps_i, and the reward is x_T.

The advantage of step i is nu_i eps_i exactly, and the value of a latent is the latent. `exact` visits all products of
the three Gauss-Hermite nodes with their weights, so that moments up to degree 5 in each noise (those of A eps too,
where A is linear) carry no sampling error; `drawn` takes random walks, for estimators that look at a group; `tree`
branches with children whose noises have mean 0 and variance 1, so that averaging leaves averages later noise out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chain:
    nu: Tensor  # (T,)
    eps: Tensor  # (N, T)
    share: Tensor  # (N,) weight of each walk, 1 in all

    @property
    def x(self) -> Tensor:
        """Latents (N, T + 1), which are their own values."""
        return torch.nn.functional.pad((self.nu * self.eps).cumsum(1), (1, 0))

    @property
    def reward(self) -> Tensor:
        return self.x[:, -1]

    @property
    def truth(self) -> Tensor:
        """The true advantage (N, T) of every step."""
        return self.nu * self.eps

    def mean(self, values: Tensor) -> Tensor:
        return (self.share.unsqueeze(1) * values).sum(0)

    def variance(self, A: Tensor) -> Tensor:
        """Variance (T,) over walks of the gradient estimate A eps of each step."""
        g = A * self.eps
        return self.mean(g.square()) - self.mean(g).square()

    def correlation(self, A: Tensor) -> float:
        """Correlation of credit (N, T) with the truth, over all walks and steps."""
        return correlation(A, self.truth, self.share.unsqueeze(1).expand_as(A))

    def broadcast(self) -> Tensor:
        return self.reward.unsqueeze(1).expand_as(self.eps)


@dataclass(frozen=True)
class Tree:
    parent: Tensor  # (M,)
    depth: Tensor  # (M,)
    eps: Tensor  # (M,) noise of the edge to each node
    x: Tensor  # (M,)
    log_prob: Tensor  # (M,) of each edge, averaged over the one element


def correlation(A: Tensor, truth: Tensor, share: Tensor | None = None) -> float:
    w = torch.ones_like(A) / A.numel() if share is None else share / share.sum()
    a, t = A - (w * A).sum(), truth - (w * truth).sum()
    return float((w * a * t).sum() / ((w * a * a).sum() * (w * t * t).sum()).sqrt())


def exact(T: int, nu: Tensor | None = None) -> Chain:
    root = 3**0.5
    nodes = list(itertools.product(((-root, 1 / 6), (0.0, 2 / 3), (root, 1 / 6)), repeat=T))
    eps = torch.tensor([[value for value, _ in walk] for walk in nodes], dtype=torch.float64)
    share = torch.tensor([[weight for _, weight in walk] for walk in nodes], dtype=torch.float64).prod(1)
    return Chain(torch.ones(T, dtype=torch.float64) if nu is None else nu, eps, share)


def drawn(n: int, T: int, nu: Tensor | None = None, seed: int = 0) -> Chain:
    eps = torch.randn(n, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Chain(
        torch.ones(T, dtype=torch.float64) if nu is None else nu, eps, torch.full((n,), 1 / n, dtype=torch.float64)
    )


def tree(deep: int, noises: Tensor | None = None) -> Tree:
    """A full tree: every node above depth `deep` has a child for each of `noises` (mean 0, variance 1)."""
    noises = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) * 1.5**0.5 if noises is None else noises
    parent, depth, eps, x = [-1], [0], [0.0], [0.0]
    above = [0]
    for level in range(1, deep + 1):
        born = []
        for node, noise in itertools.product(above, noises.tolist()):
            born.append(len(parent))
            parent.append(node)
            depth.append(level)
            eps.append(noise)
            x.append(x[node] + noise)
        above = born
    noise = torch.tensor(eps, dtype=torch.float64)
    return Tree(torch.tensor(parent), torch.tensor(depth), noise, torch.tensor(x, dtype=torch.float64), -(noise**2) / 2)
