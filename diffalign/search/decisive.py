"""Decisive levels and value-gated expansion: find where the reward is decided, and branch only there.

Paper: "Spend Search Where It Pays: Value-Guided Structured Sampling and Optimization for Generative Recommendation"
(V-STAR), 2026 (arXiv 2602.10699): a tree grown by G = V + spread plus a visit bonus, expanded only where G reaches the
mean of its depth, and advantages among siblings.

Where we differ: nodes are latents at a few branching levels, which a pilot tree chooses by the share of Var(r) that
each explains; entropy becomes the deviation of the children's values; each child has its own value, each visit counts,
and a gated node is passed over instead of being drawn again and again. A child is carried to its leaf at once, so that
the search may stop at any time; the pilot's leaves count too. Sibling groups never mix prompts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.noise import forked
from diffalign.search.chain import Chain
from diffalign.search.gated import Node, Tree
from diffalign.search.judge import Judge
from diffalign.search.local import Purse, limited
from diffalign.search.stepwise import stepped
from diffalign.search.values import CleanPrediction, Value


@dataclass(frozen=True, kw_only=True)
class DecisiveConfig:
    levels: int = 3  # segments the walk is cut into; the first one holds the start noise
    pilot: int = 2  # draws per level of the pilot tree, pilot ** levels leaves; 1 goes without and branches everywhere
    branching: int = 2  # how many of the segments branch, the most decisive ones
    children: int = 4  # draws per branching node; more once every node is full
    expansions: int = 16  # leaves without a budget, beside the pilot's; with one, as many as it affords
    spread: float = 0.1  # reward per deviation of the children's values: seeks nodes that still can go either way
    explore: float = 1.0  # reward per unit of the visit bonus; 0 follows the values alone

    def __post_init__(self) -> None:
        for name in ("levels", "pilot", "branching", "children", "expansions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"decisive.{name} is {getattr(self, name)}, but must be at least 1.")
        if self.branching > self.levels:
            raise ConfigError(f"decisive.branching is {self.branching}, but there are only {self.levels} levels.")
        if not (self.spread >= 0 and self.explore >= 0):
            raise ConfigError(f"decisive.spread = {self.spread} and explore = {self.explore} cannot be negative.")


@dataclass(frozen=True, eq=False)
class DecisiveResult:
    """The trees that were grown; the images themselves are the judge's best."""

    bounds: tuple[int, ...]  # levels at which the segments begin
    shares: Tensor  # (B, levels) share of Var(r) that each segment explains, NaN where it was not measured
    branching: tuple[tuple[int, ...], ...]  # per case, the segments that branched
    paths: tuple[tuple[tuple[int, ...], ...], ...]  # per case and leaf of the tree, its nodes from the top
    rewards: tuple[tuple[float, ...], ...]  # per case and leaf of the tree


def search_decisive(
    chain: Chain,
    judge: Judge,
    config: DecisiveConfig = DecisiveConfig(),
    *,
    value: Value | None = None,
    shares: Tensor | None = None,
) -> DecisiveResult:
    """Measure where the reward is decided (or take `shares` (levels,), measured before), then grow a tree there.

    A new child at a node of level i costs the model rows of the levels after i, a leaf, and what `value` (default: the
    reward of the clean prediction) costs at the branching levels on its way. The pilot may take half of a budget.
    """
    cases, parts = len(chain.seeds), min(config.levels, chain.length)
    judge.require(nfe=cases * sum(chain.costs), scored=cases, what="one walk")
    starts = [round(chain.length * k / parts) for k in range(parts)]
    bounds = tuple(i for i in starts if i == 0 or i + 1 < chain.length)  # a last step alone decides nothing, at no NFE
    parts = len(bounds)
    if shares is not None and shares.shape != (parts,):
        raise ConfigError(f"shares has shape {tuple(shares.shape)}, but the walk has {parts} segments.")
    grower = _Grower(chain, judge, config, value or CleanPrediction(judge), bounds)
    measured = grower.pilot() if shares is None else shares.expand(cases, parts)
    grower.plant(measured)
    while picks := grower.picks():
        grower.grow(picks)
    trees = grower.trees
    return DecisiveResult(
        bounds,
        measured,
        tuple(grower.branching),
        tuple(tuple(tree.paths) for tree in trees),
        tuple(tuple(tree.rewards) for tree in trees),
    )


class _Grower:
    def __init__(
        self, chain: Chain, judge: Judge, config: DecisiveConfig, value: Value, bounds: tuple[int, ...]
    ) -> None:
        self.chain, self.judge, self.config, self.value, self.bounds = chain, judge, config, value, bounds
        self.purse, self.drawn = Purse(judge), [0] * len(chain.seeds)
        self.trees: list[Tree] = []
        self.branching: list[tuple[int, ...]] = []

    def pilot(self) -> Tensor:
        """Shares (B, levels) of Var(r) by a small tree that branches at every segment; NaN if it costs too much."""
        chain, n, cases = self.chain, self.config.pilot, len(self.chain.seeds)
        ends = [*self.bounds[1:], chain.length]
        spans = list(zip(self.bounds, ends, strict=True))
        nfe = sum(
            n**k * ((n if k == 0 else 1) * chain.costs[i] + n * sum(chain.costs[i + 1 : j]))
            for k, (i, j) in enumerate(spans)
        )
        leaves = n ** len(self.bounds)
        unpaid = limited(chain) and not all(self.purse.affords(r, nfe=2 * nfe, scored=2 * leaves) for r in range(cases))
        if n == 1 or unpaid:
            return torch.full((cases, len(self.bounds)), math.nan)
        rows = [row for row in range(cases) for _ in range(n)]
        seeds = self._fresh(rows)
        x = chain.first(seeds, rows)
        for i, j in spans:
            for level in range(i, j):
                prediction = chain.predict(x, level, rows)
                if level == i > 0:  # siblings share the prediction, and the first goes on with its parent's seed
                    rows, seeds = [row for row in rows for _ in range(n)], [seed for seed in seeds for _ in range(n)]
                    new = [k for k in range(len(rows)) if k % n]
                    for k, seed in zip(new, self._fresh([rows[k] for k in new]), strict=True):
                        seeds[k] = seed
                    x, prediction = x.repeat_interleave(n, 0), prediction.repeat_interleave(n, 0)
                x = stepped(chain, x, prediction, level, seeds)
        rewards = self.judge.leaf(x, rows)
        self.purse.spend(range(cases), nfe=nfe, scored=leaves)
        return torch.stack([explained(tree.view([n] * len(ends))) for tree in rewards.view(cases, -1)])

    def plant(self, shares: Tensor) -> None:
        """An empty tree per case, cut where its most decisive segments begin."""
        for each in shares:
            order = each.argsort(descending=True, stable=True).tolist()
            most = len(order) if bool(each.isnan().any()) else min(self.config.branching, len(order))
            chosen = tuple(sorted(order[:most]))
            cuts = [self.bounds[k] for k in chosen if k]
            self.branching.append(chosen)
            tree = Tree(
                cuts,
                width=self.config.children,
                spread=self.config.spread,
                explore=self.config.explore,
                root_branches=0 in chosen,
            )
            self.trees.append(tree)

    def picks(self) -> list[tuple[int, Node]]:
        """The next node of every case that goes on."""
        found = []
        for row, tree in enumerate(self.trees):
            if not limited(self.chain) and len(tree.rewards) >= self.config.expansions:
                continue
            node = tree.select([node for node in tree.nodes if self._pays(row, node)])
            if node is None and tree.cuts:  # what is left pays for no value any more, but perhaps for a walk
                tree.cuts = []
                node = tree.select([node for node in tree.nodes if self._pays(row, node)])
            if node is not None:
                found.append((row, node))
        return found

    def _pays(self, row: int, node: Node) -> bool:
        nfe, scored = sum(self.chain.costs[node.level + 1 :]), 1
        for cut in self.trees[row].cuts:
            if cut > node.level:
                extra, images = self.value.cost(cut)
                nfe, scored = nfe + extra, scored + images
        return self.purse.affords(row, nfe=nfe, scored=scored)

    def grow(self, picks: Sequence[tuple[int, Node]]) -> None:
        """One child for each pick, carried to its leaf; a walk joins the others at the level of its node."""
        walks = self._walks(picks)
        for i in range(self.chain.length):
            here = [walk for walk in walks if walk.head.level <= i]
            if not here:
                continue
            new = [walk for walk in here if walk.prediction is None]
            self._predict(new, i)
            self._cut([walk for walk in new if i in self.trees[walk.row].cuts], i)
            x, prediction = torch.stack([walk.x for walk in here]), _predictions(here)
            after = stepped(self.chain, x, prediction, i, [walk.seed for walk in here])
            for walk, x in zip(here, after, strict=True):
                walk.x, walk.prediction = x, None
        rows = [walk.row for walk in walks]
        self.purse.spend(rows, scored=1)
        rewards = self.judge.leaf(torch.stack([walk.x for walk in walks]), rows)
        for walk, reward in zip(walks, rewards.tolist(), strict=True):
            tree = self.trees[walk.row]
            tree.close(tree.add(walk.head, self.chain.length, None, None, reward))

    def _walks(self, picks: Sequence[tuple[int, Node]]) -> list[_Walk]:
        rows = [row for row, _ in picks]
        seeds = self._fresh(rows)
        found = []
        for row, seed, start, (_, node) in zip(rows, seeds, self.chain.first(seeds, rows), picks, strict=True):
            x = start if node.x is None else node.x.to(start.device)
            aim = None if node.prediction is None else node.prediction.to(start.device)
            found.append(_Walk(row, seed, node, x, aim))
        return found

    def _predict(self, walks: Sequence[_Walk], i: int) -> None:
        if walks:
            rows = [walk.row for walk in walks]
            self.purse.spend(rows, nfe=self.chain.costs[i])
            found = self.chain.predict(torch.stack([walk.x for walk in walks]), i, rows)
            for walk, prediction in zip(walks, found, strict=True):
                walk.prediction = prediction

    def _cut(self, walks: Sequence[_Walk], i: int) -> None:
        """Make a node, with its own value, of each walk that has come to a branching level."""
        if walks:
            x, prediction, rows = torch.stack([walk.x for walk in walks]), _predictions(walks), [w.row for w in walks]
            values = self.value(x, prediction, i, rows, [walk.seed for walk in walks]).tolist()
            extra, scored = self.value.cost(i)
            self.purse.spend(rows, nfe=extra, scored=scored)
            for k, walk in enumerate(walks):
                kept, aim = (each[k].detach().to("cpu", copy=True) for each in (x, prediction))
                walk.head = self.trees[walk.row].add(walk.head, i, kept, aim, values[k])

    def _fresh(self, rows: Sequence[int]) -> list[int]:
        """Each row's next unused seed of its case."""
        numbers = []
        for row in rows:
            numbers.append(self.drawn[row])
            self.drawn[row] += 1
        return forked(self.chain.seeds, rows, numbers)


@dataclass(eq=False)
class _Walk:
    row: int
    seed: int
    head: Node  # the last node it went through
    x: Tensor
    prediction: Tensor | None


def _predictions(walks: Sequence[_Walk]) -> Tensor:
    return torch.stack([walk.prediction for walk in walks if walk.prediction is not None])


def variance_parts(rewards: Tensor) -> Tensor:
    """Unbiased estimates (D,) of what each level of a tree of rewards (n_1, ..., n_D) adds to Var(r); NaN left out."""
    means, noise = rewards.double(), torch.zeros_like(rewards, dtype=torch.float64)
    parts: list[Tensor] = []
    while means.ndim:
        valid = (~means.isnan()).sum(-1)
        centre = means.nanmean(-1)
        squares = (means - centre.unsqueeze(-1)).square().nansum(-1)
        spread = torch.where(valid > 1, squares / (valid - 1), math.nan)  # of lone children nothing is known
        parts.insert(0, spread.nanmean() - noise.nanmean())
        means, noise = centre, spread / valid  # each mean is off by what lies below it
    return torch.stack(parts)


def explained(rewards: Tensor) -> Tensor:
    """Shares (D,) of Var(r) by level, from a tree of rewards (n_1, ..., n_D); equal shares if nothing varies."""
    parts = variance_parts(rewards).nan_to_num(0.0).clamp(min=0)
    total = parts.sum()
    return (parts / total if total > 0 else torch.full_like(parts, 1 / len(parts))).float()


def sibling_advantages(
    rewards: Tensor,
    paths: Sequence[Sequence[int]],
    prompts: Sequence[Hashable],
    *,
    least_std: float = 0.0,
    epsilon: float = 1e-4,
) -> Tensor:
    """Advantages (L, D) float32 of the transition into node d of each leaf's path, among the siblings of one parent.

    A child's reward is the mean of the leaves (L,) under it, NaN ones left out; parents with one child teach nothing,
    nor do equal children. Two children always come out at +-1: `least_std` bounds what their deviation counts as.
    """
    found = torch.zeros(len(paths), max(map(len, paths), default=0))
    families: dict[tuple[Hashable, tuple[int, ...]], dict[int, list[int]]] = {}
    for leaf, (path, prompt) in enumerate(zip(paths, prompts, strict=True)):
        for d, node in enumerate(path if not math.isnan(float(rewards[leaf])) else ()):
            families.setdefault((prompt, tuple(path[:d])), {}).setdefault(node, []).append(leaf)
    for (_, above), children in families.items():
        means = torch.stack([rewards[leaves].double().mean() for leaves in children.values()])
        if float(means.max() - means.min()) <= 1e-9 * max(1.0, float(means.abs().max())):
            continue
        scale = max(float(means.std(correction=0)), least_std) + epsilon
        for leaves, advantage in zip(children.values(), (means - means.mean()) / scale, strict=True):
            found[leaves, len(above)] = advantage.float()
    return found
