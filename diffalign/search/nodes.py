"""Nodes: one case's tree of denoising steps, its values and its choices.

Level -1 is a root above the noise, level 0 the noise, level `length` the finished latents. Latents and predictions stay
on the CPU: a further child of a node costs no model call. Nodes that can have no further child keep neither.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from diffalign.noise import case_generator, forked


@dataclass(frozen=True, eq=False)
class Stop:
    """One level that a walk passed: what a further child is drawn from, and what a value says of it."""

    x: Tensor | None
    prediction: Tensor | None
    opinion: float = math.nan


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
        self.opinion = [math.nan]  # what a value of unfinished latents says of a node, beside the leaves below it
        self.trust, self.soft = 0.0, True  # visits that an opinion counts as, and whether it is averaged as values are
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

    def tempted(self, node: int, uniform: float, *, growing: bool = False) -> int:
        """A valid child drawn in proportion to exp(strength v); the children are draws of the prior already.

        While a tree is growing, v is the esteem; what is found in it is drawn by its leaves alone.
        """
        known = self.valid(node)
        values = [self.esteem(child) if growing else self.value[child] for child in known]
        top = max(values)
        ladder = list(accumulate(math.exp(self.strength * (each - top)) for each in values))
        return known[min(bisect(ladder, uniform * ladder[-1]), len(known) - 1)]

    def esteem(self, node: int) -> float:
        """Where to grow on goes by this: the value of the leaves below, and the opinion as some visits more."""
        value, opinion, visits = self.value[node], self.opinion[node], self.visits[node]
        if not self.trust or math.isnan(opinion):
            return value
        return soft_value([value, opinion], self.strength if self.soft else 0.0, (visits, self.trust))

    def add(self, node: int, track: Sequence[Stop], x: Tensor, reward: float, start: int = 0) -> None:
        """Hang a walk below `node`: a stop at each level, then the finished x; back its reward up."""
        below, seed = node, self.child_seed(node, len(self.children[node]))
        for stop in [*track, Stop(x, None)]:
            below = self._append(below, seed, stop)
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

    def _append(self, parent: int, seed: int, stop: Stop) -> int:
        node = len(self.parent)
        self.children[parent].append(node)
        self.children.append([])
        self.parent.append(parent)
        self.level.append(self.level[parent] + 1)
        self.seeds.append(seed)
        self.visits.append(0)
        self.value.append(math.nan)
        self.x.append(stop.x)
        self.prediction.append(stop.prediction)
        self.opinion.append(stop.opinion)
        if self.level[node] == self.length:
            self.leaves.append(node)
        return node


def soft_value(values: Sequence[float], strength: float, weights: Sequence[float] | None = None) -> float:
    """(1/strength) log mean exp(strength v), the plain mean at 0; NaN entries are left out, and all NaN gives NaN."""
    pairs = zip(values, weights or [1.0] * len(values), strict=True)
    known = [(value, weight) for value, weight in pairs if not math.isnan(value)]
    total = sum(weight for _, weight in known)
    if not total:
        return math.nan
    top = max(value for value, _ in known)
    if strength == 0:
        return top + sum(weight * (value - top) for value, weight in known) / total
    mean = sum(weight * math.exp(strength * (value - top)) for value, weight in known) / total
    return top + math.log(mean) / strength
