"""Nodes: the trees of a search over denoising steps, one per case; what may be asked of them, and how they are saved.

Level -1 is a root above the noise, level 0 the noise, level `length` the finished latents. Latents and predictions stay
on the CPU: a further child of a node costs no model call.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from diffalign.noise import case_generator, forked

HALF = 1 << 62  # a seed is any whole number; two int64 of a state hold it


class Nodes:
    """One case's tree in flat lists, parents before children; node 0 is the root.

    Visits are counted when a descent is made, so those of leaves still in `queue` are in them: virtual visits.
    """

    def __init__(self, seed: int, length: int, noise: Tensor | None = None) -> None:
        self.seed, self.length, self.noise = seed, length, noise  # noise (N, ...) of the first N children of the root
        self.parent, self.level, self.seeds = [-1], [-1], [seed]
        self.children: list[list[int]] = [[]]
        self.visits, self.value = [0], [math.nan]  # the value of a finished leaf is its reward, NaN where invalid
        self.x: list[Tensor | None] = [None]
        self.prediction: list[Tensor | None] = [None]
        self.leaves: list[int] = []  # in the order they were found
        self.strength, self.scale, self.settled = 0.0, 1.0, False
        self.queue: list[int] = []  # nodes that are owed one more child each
        self.filled = False  # whether the queue's round is chosen and only has to be walked
        self.stall = 0  # descents in a row that ended on a finished leaf

    def valid(self, node: int) -> list[int]:
        """The children that have a valid leaf below them."""
        return [child for child in self.children[node] if not math.isnan(self.value[child])]

    def owed(self, node: int) -> int:
        """How many children there are or will be once the queue is walked."""
        return len(self.children[node]) + self.queue.count(node)

    def child_seed(self, node: int, order: int) -> int:
        """The seed a child walks on with: a first child keeps its parent's, a later one has its own."""
        if node == 0:
            return forked([self.seed], [0], [order])[0]
        if order == 0:
            return self.seeds[node]
        return case_generator(self.seeds[node], "branch", self.level[node], order).initial_seed()

    def tempted(self, node: int, uniform: float) -> int:
        """A valid child drawn in proportion to exp(strength v); the children are draws of the prior already."""
        known = self.valid(node)
        top = max(self.value[child] for child in known)
        ladder = list(accumulate(math.exp(self.strength * (self.value[child] - top)) for child in known))
        return known[min(bisect(ladder, uniform * ladder[-1]), len(known) - 1)]

    def add(self, node: int, track: Sequence[tuple[Tensor, Tensor]], x: Tensor, reward: float, start: int = 0) -> None:
        """Hang a walk below `node`: (latent, prediction) of each level, then the finished x; back its reward up."""
        below, seed = node, self.child_seed(node, len(self.children[node]))
        for latent, prediction in [*track, (x, None)]:
            below = self._append(below, seed, latent, prediction)
            self.value[below], self.visits[below] = reward, start + 1
        while node >= 0:
            self.value[node] = soft_value([self.value[child] for child in self.children[node]], self.strength)
            node = self.parent[node]

    def weigh(self, strength: float, calibration: int | None) -> None:
        """Set the strength, over the spread of the first leaves if `calibration` says how many; renew the values."""
        scale, self.settled = 1.0, True
        if calibration is not None:
            found = [self.value[leaf] for leaf in self.leaves if not math.isnan(self.value[leaf])]
            differs = next((k for k, reward in enumerate(found) if reward != found[0]), math.inf)
            enough = max(calibration, differs + 1)
            self.settled = enough <= len(found)
            scale = statistics.stdev(found[: int(min(enough, len(found)))]) if differs < math.inf else 0.0
        self.scale, before = scale, self.strength
        self.strength = strength / scale if scale else 0.0
        if self.strength != before:
            self.renew()

    def renew(self) -> None:
        """Values of all inner nodes from the rewards of the leaves up."""
        for node in reversed(range(len(self.parent))):
            if self.children[node]:
                self.value[node] = soft_value([self.value[child] for child in self.children[node]], self.strength)

    def best_path(self) -> list[int]:
        """From the root down the child of the largest value; the root alone while there is no valid leaf."""
        path = [0]
        while known := self.valid(path[-1]):
            path.append(max(known, key=self.value.__getitem__))
        return path

    def ranked(self) -> list[int]:
        """Valid leaves, the best first, the earlier of two equals ahead."""
        valid = [leaf for leaf in self.leaves if not math.isnan(self.value[leaf])]
        return sorted(valid, key=self.value.__getitem__, reverse=True)

    def start(self, node: int) -> int:
        """The node of level 0 that a node descends from."""
        while self.level[node]:
            node = self.parent[node]
        return node

    def births(self) -> list[int]:
        """The level at which each leaf's walk left the tree that stood before it."""
        firsts = {children[0] for children in self.children[1:] if children}
        return [self.level[node] for node in range(1, len(self.parent)) if node not in firsts]

    def _append(self, parent: int, seed: int, x: Tensor, prediction: Tensor | None) -> int:
        node = len(self.parent)
        self.children[parent].append(node)
        self.children.append([])
        self.parent.append(parent)
        self.level.append(self.level[parent] + 1)
        self.seeds.append(seed)
        self.visits.append(0)
        self.value.append(math.nan)
        self.x.append(x)
        self.prediction.append(prediction)
        if self.level[node] == self.length:
            self.leaves.append(node)
        return node


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
        inner = [(x, p) for nodes in cases for x, p in zip(nodes.x, nodes.prediction, strict=True) if p is not None]
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
            "prediction": _stacked([p for _, p in inner]),
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
        numbers = {name: iter(state[name].tolist()) for name in ("parent", "visits", "reward", "queue")}
        per_case = ("nodes", "strength", "queued", "filled", "stall", "noises")
        tree = cls([high * HALF + low for high, low in state["seed"].tolist()], int(state["length"]))
        tree.free = [bool(free) for free in state["free"].tolist()]
        for b, nodes in enumerate(tree.cases):
            own = {name: state[name][b].item() for name in per_case}
            next(numbers["parent"])
            for _ in range(int(own["nodes"]) - 1):
                parent = next(numbers["parent"])
                leaf = nodes.level[parent] + 1 == tree.length
                seed = nodes.child_seed(parent, len(nodes.children[parent]))
                nodes._append(parent, seed, next(held["x"]), None if leaf else next(held["prediction"]))
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


def soft_value(values: Sequence[float], strength: float) -> float:
    """(1/strength) log mean exp(strength v), the plain mean at 0; NaN entries are left out, and all NaN gives NaN."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan
    top = max(known)
    if strength == 0:
        return top + sum(value - top for value in known) / len(known)
    return top + math.log(sum(math.exp(strength * (value - top)) for value in known) / len(known)) / strength


def _joined(lists: list[list[int]]) -> Tensor:
    return torch.tensor([value for row in lists for value in row], dtype=torch.int64)


def _stacked(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if tensors else torch.empty(0)
