"""Advantages on trees of rollouts: every edge is a transition, and is credited with the node it leads to.

Papers: V-STAR, "Spend Search Where It Pays: Value-Guided Structured Sampling and Optimization for Generative
Recommendation", Jiang et al., 2026 (arXiv 2602.10699): `sibling_advantages`; BranchGRPO, 2025 (arXiv 2509.06040):
`depth_advantages` and the pruning of children; "TreeGRPO: Tree-Advantage GRPO for Online RL Post-Training of Diffusion
Models", Ding and Ye, 2025 (arXiv 2512.08153): `fused_advantages`; "TempFlow-GRPO: When Timing Matters for GRPO in Flow
Models", He et al., 2025 (arXiv 2508.04324): siblings of one branch with `scale=False`.

Where we differ: V-STAR's global advantage of a node is the mean over its leaves of their group-relative advantage, and
no two of its children are merged: every child draws noise of its own, so none is another's duplicate. Softmax fusion
takes log-densities averaged over elements; summed ones would make it one-hot. BranchGRPO keeps shares after the last
split only; ours rank the children of every parent, and what hangs below a dropped node is dropped too. Its pruning of
whole depths and its softmax over rewards are left out.

A forest is given as parent (M,) int64, -1 for roots, and depth (M,), 0 for roots; a tree is all that one root reaches.
Values of edges sit at their child. Rewards (M,) are read at leaves; NaN marks a leaf without one, which counts nowhere:
a node that no valid leaf reaches is NaN, and its advantage is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.shaping import adv_dr, adv_grpo, statistics


def leaves(parent: Tensor) -> Tensor:
    """Which nodes (M,) are nobody's parent."""
    ends = torch.ones_like(parent, dtype=torch.bool)
    ends[parent[parent >= 0]] = False
    return ends


def tree_of(parent: Tensor) -> Tensor:
    """The root (M,) above each node: nodes of one tree share it."""
    nodes = torch.arange(len(parent), device=parent.device)
    above = torch.where(parent < 0, nodes, parent)
    while not torch.equal(above, above[above]):
        above = above[above]
    return above


def node_rewards(parent: Tensor, depth: Tensor, rewards: Tensor) -> Tensor:
    """The mean reward (M,) of the valid leaves below each node."""
    ends = leaves(parent) & ~rewards.isnan()
    total, count = torch.where(ends, rewards, 0).double(), ends.double()
    for level in range(_deepest(depth), 0, -1):
        nodes = depth == level
        total = total.index_add(0, parent[nodes], total[nodes])
        count = count.index_add(0, parent[nodes], count[nodes])
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan).to(rewards)


def fusion_weights(parent: Tensor, log_prob: Tensor, valid: Tensor | None = None) -> Tensor:
    """Softmax (M,) over siblings of the edges' log-densities (M,), averaged over elements; roots and invalid have 0."""
    used = (parent >= 0) if valid is None else (parent >= 0) & valid
    above = parent.clamp(min=0)
    logits = torch.where(used, log_prob, -torch.inf)
    top = torch.full_like(logits, -torch.inf).scatter_reduce(0, above, logits, "amax")
    mass = torch.where(used, (logits - top[above]).exp(), 0)
    return torch.where(used, mass / torch.zeros_like(mass).index_add(0, above, mass)[above], 0)


def effective_children(parent: Tensor, weights: Tensor) -> Tensor:
    """The effective number (M,) of children behind each node's fusion weights: 1 is one-hot, 0 a leaf; log it."""
    edges = parent >= 0
    squares = torch.zeros_like(weights).index_add(0, parent[edges], weights[edges].square())
    return torch.where(squares > 0, 1 / squares, 0)


def fused_advantages(parent: Tensor, depth: Tensor, leaf: Tensor, log_prob: Tensor) -> Tensor:
    """TreeGRPO's advantages (M,): at leaves those given (M,), above them fused by the old policy's log-densities."""
    return _credited(parent, _fused(parent, depth, torch.where(leaves(parent), leaf, torch.nan), log_prob))


def leaf_advantages(parent: Tensor, rewards: Tensor, gid: Tensor | None = None, *, eps: float = 1e-4) -> Tensor:
    """Group-relative advantages (M,) of leaves, (r - mean) / (std0 + eps), 0 elsewhere; a tree is a group of its own
    unless `gid` (M,) numbers the groups."""
    family = tree_of(parent) if gid is None else gid
    return adv_grpo(torch.where(leaves(parent), rewards, torch.nan), family, eps=eps)


def global_advantages(
    parent: Tensor, depth: Tensor, rewards: Tensor, gid: Tensor | None = None, *, eps: float = 1e-4
) -> Tensor:
    """The mean (M,) of the leaves' group-relative advantages below each node: plain GRPO, carried up the tree."""
    scored = torch.where(rewards.isnan(), torch.nan, leaf_advantages(parent, rewards, gid, eps=eps))
    return _credited(parent, node_rewards(parent, depth, scored))


def sibling_advantages(
    parent: Tensor,
    value: Tensor,
    *,
    overall: Tensor | None = None,
    alpha: float = 1.0,
    scale: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    """V-STAR's advantages (M,): node values (M,) against their siblings', an only child has 0.

    `alpha` below 1 blends with the `overall` advantages (M,); without `scale` the gap to the siblings' mean is left in
    reward units.
    """
    if not 0 <= alpha <= 1 or (alpha < 1 and overall is None):
        raise ConfigError(f"alpha is {alpha}, but a share lies in [0, 1], and below 1 it needs overall advantages.")
    family = torch.where(parent < 0, torch.arange(len(parent), device=parent.device), parent + len(parent))
    counted = torch.where(parent >= 0, value, torch.nan)  # a root is its own family, and has no advantage
    own = adv_grpo(counted, family, eps=eps) if scale else adv_dr(counted, family)
    own = _credited(parent, torch.where(value.isnan(), torch.nan, own))
    return own if overall is None else alpha * own + (1 - alpha) * overall


def depth_advantages(
    parent: Tensor, depth: Tensor, value: Tensor, gid: Tensor | None = None, *, eps: float = 1e-8, floor: float = 1e-6
) -> Tensor:
    """BranchGRPO's advantages (M,): z-scores (std1) among nodes of equal depth in a tree, or in a group of `gid` (M,),
    0 where all but tie."""
    family = (tree_of(parent) if gid is None else gid) * (_deepest(depth) + 1) + depth
    found = statistics(value, family, ddof=1)
    spread = found.std.squeeze(-1)[found.index].to(value)
    return _credited(parent, torch.where(spread < floor, 0, adv_grpo(value, family, ddof=1, eps=eps)))


def keep_best(parent: Tensor, depth: Tensor, value: Tensor, share: float = 0.5) -> Tensor:
    """Edges (M,) to train: of every parent the best `share` of the children, at least one; the first of equals."""
    if not 0 < share <= 1:
        raise ConfigError(f"the share of children to keep is {share}, but it lies above 0 and at most at 1.")
    rank, count = _ranks(parent, value)
    kept = rank < (count * share).floor().clamp(min=1)
    return _closed(parent, depth, kept & ~value.isnan())


def keep_extremes(parent: Tensor, depth: Tensor, value: Tensor) -> Tensor:
    """Edges (M,) to train: of every parent the best and the worst child."""
    rank, count = _ranks(parent, value)
    kept = (rank == 0) | (rank == count - 1)
    return _closed(parent, depth, kept & ~value.isnan())


def _deepest(depth: Tensor) -> int:
    return int(depth.max()) if len(depth) else 0


def _credited(parent: Tensor, value: Tensor) -> Tensor:
    """0 where there is nothing to credit: at roots, and where the value is NaN."""
    return torch.where((parent < 0) | value.isnan(), 0, value)


def _fused(parent: Tensor, depth: Tensor, value: Tensor, log_prob: Tensor) -> Tensor:
    """Leaf values (M,) carried up by softmax weights; NaN siblings count nowhere."""
    for level in range(_deepest(depth), 0, -1):
        edges = (depth == level) & ~value.isnan()
        share = fusion_weights(parent, log_prob, edges)[edges] * value[edges]
        fused = torch.zeros_like(value).index_add(0, parent[edges], share)
        reached = torch.zeros_like(edges).index_fill(0, parent[edges], True)
        value = torch.where(reached, fused, value)
    return value


def _ranks(parent: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Each node's place (M,) among its siblings, best first and NaN last, and how many of them are valid (M,)."""
    order = torch.where(value.isnan(), -torch.inf, value).argsort(descending=True, stable=True)
    order = order[parent[order].argsort(stable=True)]  # by parent, best first
    family = parent + 1
    sizes = family.bincount()
    rank = torch.empty_like(parent)
    rank[order] = torch.arange(len(parent), device=parent.device) - (sizes.cumsum(0) - sizes)[family[order]]
    count = torch.zeros_like(sizes).index_add(0, family, (~value.isnan()).to(sizes))[family]
    return rank, count


def _closed(parent: Tensor, depth: Tensor, kept: Tensor) -> Tensor:
    """Edges that are kept and hang below no dropped one; roots are no edges."""
    alive = torch.where(parent < 0, True, kept)
    for level in range(1, _deepest(depth) + 1):
        nodes = (depth == level).nonzero().flatten()
        alive[nodes] &= alive[parent[nodes]]
    return alive & (parent >= 0)
