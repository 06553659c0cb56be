"""Walks that branch: the transitions of each depth, the leaves, and both as one numbered forest."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffalign.cases import Case, derived_seed
from diffalign.drive import Driver
from diffalign.noise import Convention, Kernel, Transition


@dataclass
class Layer:
    """The transitions of one depth: P nodes and the C children that grew from them."""

    i: int  # the step of the chain
    driver: Driver  # for the P nodes
    x: Tensor  # (P, ...) where the children start
    parent: Tensor  # (C,) row of x
    moves: Tensor  # (C, ...) where they arrive
    log_probs: Tensor  # (C,) under the weights that sampled
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))  # (C,)


@dataclass
class Grove:
    """The trees of a micro-batch."""

    layers: list[Layer]
    leaves: list[Case]
    media: Tensor  # (L, ...) of the leaves
    kernel: Kernel

    def __len__(self) -> int:
        return len(self.leaves)

    @property
    def cases(self) -> list[Case]:
        """Whose images these are."""
        return self.leaves

    @property
    def elements(self) -> int:
        """Numbers in one latent."""
        return self.layers[0].x[0].numel()


def child_seed(seed: int, i: int, branch: int) -> int:
    """The first child goes on with its parent's noise, as a walk without branches would; the others draw their own."""
    return derived_seed(seed, "branch", i, branch) if branch else seed


def spread(step: Transition, parent: Tensor) -> Transition:
    """A transition of every child: its parent's."""
    return Transition(step.mean[parent.to(step.mean.device)], step.std)


def forest(grove: Grove, rewards: Tensor, density: Convention = "mean") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parent, depth, edge log-density per element and leaf reward of every node (M,): roots first, layer by layer."""
    roots, elements = len(grove.layers[0].x), grove.elements if density == "sum" else 1
    parents, depths = [torch.full((roots,), -1)], [torch.zeros(roots, dtype=torch.int64)]
    log_probs, first = [torch.zeros(roots)], 0
    for depth, layer in enumerate(grove.layers, 1):
        parents.append(layer.parent + first)
        depths.append(torch.full((len(layer.moves),), depth))
        log_probs.append(layer.log_probs.cpu() / elements)
        first += len(layer.x)
    parent = torch.cat(parents)
    leaf = torch.full((len(parent),), torch.nan)
    leaf[-len(rewards) :] = rewards
    return parent, torch.cat(depths), torch.cat(log_probs), leaf


def deviation(rewards: Tensor, size: int) -> Tensor:
    """Population deviation (groups,) of the valid rewards of each group."""
    rows = rewards.view(-1, size)
    return (rows - rows.nanmean(1, keepdim=True)).square().nanmean(1).sqrt().nan_to_num()
