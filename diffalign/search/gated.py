"""Gated trees: which node of a tree of latents deserves the next branch.

Paper: "Spend Search Where It Pays: Value-Guided Structured Sampling and Optimization for Generative Recommendation"
(V-STAR), 2026 (arXiv 2602.10699): G = V + spread, U = G + a bonus for few visits, expansion only where G reaches the
mean of its depth.

Where we differ: the published code gives a child its parent's value, so that siblings tie, and leaves the counts of a
gated node alone, so that it can be drawn for ever. Here a child has its own value, each walk visits every node above
its leaf, and the choice is among nodes that pass the gate and have room; all pass where none would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(eq=False)
class Node:
    """A latent at a branching level; the root stands before the start noise and has no latent."""

    level: int
    number: int
    x: Tensor | None = None  # (...), on the CPU
    prediction: Tensor | None = None  # (...), on the CPU
    value: float = math.nan
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    visits: int = 0  # walks that went through this node

    def promise(self, spread: float) -> float:
        """G: value plus `spread` times the deviation of the children's values; -inf where nothing valid is known."""
        found = [child.value for child in self.children if not math.isnan(child.value)]
        mean = sum(found) / len(found) if found else math.nan
        value = mean if self.x is None else self.value
        gap = math.sqrt(sum((v - mean) ** 2 for v in found) / len(found)) if found else 0.0
        return -math.inf if math.isnan(value) else value + spread * gap


class Tree:
    """One case's tree: the nodes that may branch, from the root on."""

    def __init__(
        self, cuts: Sequence[int], *, width: int, spread: float, explore: float, root_branches: bool = True
    ) -> None:
        self.cuts, self.width, self.spread, self.explore = list(cuts), width, spread, explore
        self.root_branches = root_branches or not cuts
        self.root, self.count = Node(-1, 0), 1
        self.nodes = [self.root]
        self.paths: list[tuple[int, ...]] = []
        self.rewards: list[float] = []

    def add(self, parent: Node, level: int, x: Tensor | None, prediction: Tensor | None, value: float) -> Node:
        """A child of `parent`; one with a latent may branch itself."""
        child = Node(level, self.count, x, prediction, value, parent)
        self.count += 1
        parent.children.append(child)
        if x is not None:
            self.nodes.append(child)
        return child

    def close(self, leaf: Node) -> None:
        """Note a finished leaf: its path, its reward, and a visit to every node above it."""
        path, node = [leaf.number], leaf.parent
        while node is not None:
            node.visits += 1
            path.append(node.number)
            node = node.parent
        self.paths.append(tuple(path[-2::-1]))
        self.rewards.append(leaf.value)

    def gated(self, nodes: Sequence[Node]) -> list[Node]:
        """Those whose G reaches the mean G of their level."""
        floors = {}
        for level in {node.level for node in nodes}:
            peers = [node.promise(self.spread) for node in self.nodes if node.level == level]
            valid = [promise for promise in peers if promise > -math.inf]
            mean = sum(valid) / len(valid) if valid else -math.inf
            floors[level] = mean - 1e-9 * max(1.0, abs(mean)) if valid else mean  # rounding shuts no equal peer out
        return [node for node in nodes if node.promise(self.spread) >= floors[node.level]]

    def priority(self, node: Node) -> float:
        """U: G plus a bonus that falls with the node's visits."""
        bonus = math.sqrt(math.log(self.root.visits + 1) / (node.visits + 1))
        return node.promise(self.spread) + self.explore * bonus

    def select(self, affordable: Sequence[Node]) -> Node | None:
        """The next node to expand among those that can be paid; None if there is none."""
        able = [node for node in affordable if node.level >= 0 or self.root_branches or not node.children]
        if not able:
            return None
        while not (free := [node for node in able if len(node.children) < self.width]):
            self.width += 1
        return max(self.gated(free) or free, key=self.priority)  # of two ties the earlier
