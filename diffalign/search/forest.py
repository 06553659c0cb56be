"""Forest: the trees of all cases of a search; what may be asked of them, and how they are saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.noise import case_generator
from diffalign.search.chain import Chain
from diffalign.search.nodes import Nodes, Stop
from diffalign.search.tree_config import TreeConfig

HALF = 1 << 62  # a seed is any whole number; two int64 of a state hold it


@dataclass(frozen=True, eq=False)
class Found:
    """A finished leaf of a tree."""

    node: int
    x: Tensor  # final latents (...), on the CPU
    reward: float


@dataclass(frozen=True, eq=False)
class TreeResult:
    """What the trees hold; everything but `population` is (B,), values NaN where a case has no valid leaf."""

    leaves: Tensor
    invalid: Tensor  # leaves whose reward is NaN
    nodes: Tensor  # without the root
    population: Tensor  # (B, length + 1) nodes of each level
    depth: Tensor  # mean level at which a leaf's walk left the tree: 0 if nothing was ever reused
    value: Tensor  # soft value of the root
    best: Tensor  # reward of the best leaf
    descent: Tensor  # reward of the leaf that the descent along the largest values ends on


class Tree:
    """The trees of several cases; grown in place, so one kept from before is there even if growing is interrupted."""

    def __init__(self, seeds: Sequence[int], length: int, noise: Tensor | Sequence[Tensor] | None = None) -> None:
        starts = [None] * len(seeds) if noise is None else [each.detach().cpu() for each in noise]
        self.cases = [Nodes(seed, length, start) for seed, start in zip(seeds, starts, strict=True)]
        self.length = length
        self.free = [True] + [False] * length  # levels that noise leads to: known once a first walk has passed them
        self.origin: dict[str, str] = {}  # what it was grown for, in the words of whoever grew it

    def value(self, b: int) -> float:
        """Soft value of the root of case b: (1/strength) log E exp(strength r), estimated low until trees are vast."""
        return self.cases[b].value[0]

    def descend(self, b: int) -> Found | None:
        """The leaf of case b below the child of the largest value at each level; None without a valid leaf."""
        leaf = self.cases[b].best_path()[-1]
        return self._found(b, leaf) if leaf else None

    def sample(self, b: int, n: int, stream: str | int = 0) -> tuple[Tensor, Tensor]:
        """Final latents (n, ...) and rewards (n,) of n soft descents in case b, at no model call; `stream` names them.

        With no valid leaf there is nothing to draw and both are empty.
        """
        nodes = self.cases[b]
        if not nodes.valid(0):
            return torch.empty(0), torch.empty(0)
        generator = case_generator(nodes.seed, "sample", stream)
        drawn = []
        for uniforms in torch.rand(n, self.length + 1, generator=generator, dtype=torch.float64).tolist():
            node = 0
            for uniform in uniforms:
                node = nodes.tempted(node, uniform)
            drawn.append(self._found(b, node))
        return torch.stack([leaf.x for leaf in drawn]), torch.tensor([leaf.reward for leaf in drawn])

    def result(self) -> TreeResult:
        """Counts, values and rewards of all cases."""
        rewards = [torch.tensor([nodes.value[leaf] for leaf in nodes.leaves]) for nodes in self.cases]
        levels = [torch.tensor(nodes.level[1:], dtype=torch.int64) for nodes in self.cases]
        births = [torch.tensor(nodes.births(), dtype=torch.float32) for nodes in self.cases]
        descents = [self.descend(b) for b in range(len(self.cases))]
        return TreeResult(
            leaves=torch.tensor([len(row) for row in rewards]),
            invalid=torch.tensor([int(row.isnan().sum()) for row in rewards]),
            nodes=torch.tensor([len(row) for row in levels]),
            population=torch.stack([row.bincount(minlength=self.length + 1) for row in levels]),
            depth=torch.stack([row.mean() for row in births]),
            value=torch.tensor([nodes.value[0] for nodes in self.cases]),
            best=torch.tensor([max(row[~row.isnan()].tolist(), default=math.nan) for row in rewards]),
            descent=torch.tensor([found.reward if found else math.nan for found in descents]),
        )

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors: `restore` gives a tree that grows on exactly as this one would."""
        cases = self.cases
        noises = [noise for nodes in cases if nodes.noise is not None for noise in nodes.noise]
        return {
            "length": torch.tensor([self.length]),
            "free": torch.tensor(self.free).long(),
            "seed": torch.tensor([divmod(nodes.seed, HALF) for nodes in cases]),
            "nodes": torch.tensor([len(nodes.parent) for nodes in cases]),
            "parent": _joined([nodes.parent for nodes in cases]),
            "visits": _joined([nodes.visits for nodes in cases]),
            "reward": torch.tensor([nodes.value[leaf] for nodes in cases for leaf in nodes.leaves]),
            "x": _stacked([x for nodes in cases for x in nodes.x if x is not None]),
            "has_x": _joined([[int(x is not None) for x in nodes.x] for nodes in cases]),
            "prediction": _stacked([p for nodes in cases for p in nodes.prediction if p is not None]),
            "has_prediction": _joined([[int(p is not None) for p in nodes.prediction] for nodes in cases]),
            "opinion": torch.tensor([each for nodes in cases for each in nodes.opinion]),
            "strength": torch.tensor([nodes.strength for nodes in cases], dtype=torch.float64),
            "queued": torch.tensor([len(nodes.queue) for nodes in cases]),
            "queue": _joined([nodes.queue for nodes in cases]),
            "filled": torch.tensor([int(nodes.filled) for nodes in cases]),
            "stall": torch.tensor([nodes.stall for nodes in cases]),
            "noises": torch.tensor([-1 if nodes.noise is None else len(nodes.noise) for nodes in cases]),
            "noise": _stacked(noises),
        }

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Tree:
        """The tree a state was taken of."""
        held = {name: iter(state[name]) for name in ("x", "prediction", "noise")}
        per_node = ("parent", "visits", "reward", "queue", "has_x", "has_prediction", "opinion")
        numbers = {name: iter(state[name].tolist()) for name in per_node}
        per_case = ("nodes", "strength", "queued", "filled", "stall", "noises")
        tree = cls([high * HALF + low for high, low in state["seed"].tolist()], int(state["length"]))
        tree.free = [bool(free) for free in state["free"].tolist()]
        for b, nodes in enumerate(tree.cases):
            own = {name: state[name][b].item() for name in per_case}
            for node in range(int(own["nodes"])):
                parent, opinion = next(numbers["parent"]), next(numbers["opinion"])
                x, prediction = (
                    next(held[name]) if next(numbers[f"has_{name}"]) else None for name in ("x", "prediction")
                )
                if node:
                    seed = nodes.child_seed(parent, len(nodes.children[parent]))
                    nodes._append(parent, seed, Stop(x, prediction, opinion))
            for leaf_node in nodes.leaves:
                nodes.value[leaf_node] = next(numbers["reward"])
            nodes.visits = [next(numbers["visits"]) for _ in nodes.parent]
            nodes.queue = [next(numbers["queue"]) for _ in range(int(own["queued"]))]
            nodes.strength, nodes.filled, nodes.stall = own["strength"], bool(own["filled"]), int(own["stall"])
            if own["noises"] >= 0:
                nodes.noise = _stacked([next(held["noise"]) for _ in range(int(own["noises"]))])
            nodes.renew()
        return tree

    def _found(self, b: int, node: int) -> Found:
        x = self.cases[b].x[node]
        assert x is not None
        return Found(node, x, self.cases[b].value[node])


def require_fits(chain: Chain, tree: Tree) -> None:
    """Refuse to grow a tree on whose cases or steps are not the chain's."""
    seeds = [nodes.seed for nodes in tree.cases]
    if seeds != list(chain.seeds) or tree.length != chain.length:
        raise ConfigError(
            f"the tree was grown for seeds {seeds} in {tree.length} steps, but this call has seeds "
            f"{list(chain.seeds)} in {chain.length}. Repeat the call that began it, with a generator set "
            "to its seed anew."
        )


def require_latents(tree: Tree, config: TreeConfig) -> None:
    """Refuse to branch where nodes kept nothing to branch from."""
    for nodes in tree.cases:
        for node in range(1, len(nodes.parent)):
            level = nodes.level[node] + 1
            if level <= nodes.length and tree.free[level] and config.branches(level) and nodes.prediction[node] is None:
                raise ConfigError(
                    f"the tree was grown without siblings at level {level}, where this call wants some, and keeps no "
                    "latents there. Repeat its levels= or fixed=, or begin a new tree."
                )


def _joined(lists: list[list[int]]) -> Tensor:
    return torch.tensor([value for row in lists for value in row], dtype=torch.int64)


def _stacked(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if tensors else torch.empty(0)
