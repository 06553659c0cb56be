"""Tree: search or sample over the branching walk of a stochastic sampler, with every walk's reward reused.

Paper: "Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models", Jain et al., 2025 (arXiv
2506.20701). Both its forms: DTS descends by exp(strength v) and draws from the reward-tilted law, DTS* descends by
v + c_uct sqrt(log N(parent) / N(child)) and hunts for the best. The soft backup divides by the number of children,
which are draws of the prior; a node may have ceil(width max(1, N)^growth) of them.

Where we differ: the paper's constants are not known to us for certain, so all of them are options, and what is left
out follows the mode: the wide tree of the reports samples well, but hunts worse than a deep one. The strength may
be measured in standard deviations of a case's first leaves; until it is settled, descents take the least visited
child. A step that draws no noise has one child. Invalid leaves leave the mean over their siblings. A descent onto a
finished leaf repeats at once, so that a round ends with walks to make. `levels`, `fixed`, starts found elsewhere
(`noise`) and values of unfinished nodes (`value`) are ours. Such a value decides where to grow, as `value_weight`
visits more of a node, so that it guides while the node is new and fades as leaves come in. It is never backed up, where
a long walk's many opinions would drown its one reward, and nothing is drawn by it, because the leaves it hopes for may
not be there. Sampling averages it as it averages leaves, and exact values take away the low bias of growing by what was
found; a search takes the plain mean, in which a poor opinion counts too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.noise import case_generator, case_noise
from diffalign.search.chain import Chain
from diffalign.search.forest import Tree as Tree
from diffalign.search.forest import TreeResult as TreeResult
from diffalign.search.forest import require_fits as require_fits
from diffalign.search.forest import require_latents
from diffalign.search.judge import Judge
from diffalign.search.nodes import Nodes, Stop
from diffalign.search.tree_config import TreeConfig as TreeConfig
from diffalign.search.values import Value

Prices = list[tuple[int, int]]  # NFE and scored images of a walk that joins at each level


@dataclass
class _Purse:
    """What one case may still spend in this call, so that its tree is the same alone and in a batch."""

    goal: float  # descents made in all by the end
    nfe: float
    scored: float


@dataclass(frozen=True)
class _Trip:
    """A walk to make: the child number `order` of `parent`, standing at `level`, on to the end."""

    row: int
    parent: int
    order: int
    level: int
    seed: int


def grow(
    chain: Chain,
    judge: Judge,
    config: TreeConfig = TreeConfig(),
    tree: Tree | None = None,
    iterations: int | None = None,
    noise: Tensor | Sequence[Tensor] | None = None,
    value: Value | None = None,
) -> Tree:
    """Grow the cases' trees by `iterations` descents each, or to the end of the budget; a given `tree` grows in place.

    Walks still queued when a limit is reached are the first of the next call, so cutting it up changes no tree.
    `noise` (B, N, ...), or one (N, ...) per case, starts the first N children of a new tree's roots. `value` judges the
    nodes of each new walk, at its own cost.
    """
    prices = _prices(chain, config, value)
    tree = _planted(chain, judge, config, tree, noise, prices[0])
    for nodes in tree.cases:
        nodes.trust, nodes.soft = config.value_weight if value is not None else 0.0, config.mode == "sample"
        nodes.stall = nodes.stall if nodes.stall < config.patience else 0
        _weigh(nodes, config)
    like = chain.first(chain.seeds[:1], [0])
    purses = _purses(tree, judge, config, iterations)
    while True:
        trips: list[_Trip] = []
        for row, (nodes, purse) in enumerate(zip(tree.cases, purses, strict=True)):
            _choose(nodes, tree.free, config, purse.goal)
            trips += _payable(row, nodes, purse, prices)
        nfe, scored = (sum(prices[trip.level][kind] for trip in trips) for kind in (0, 1))
        if not trips or not judge.affords(nfe=nfe, scored=scored):
            return tree
        tracks, x = _walk(chain, tree, trips, like, config, value)
        rewards = judge.leaf(x, [trip.row for trip in trips])
        _hang(tree, config, trips, (tracks, x), rewards)


def _prices(chain: Chain, config: TreeConfig, value: Value | None) -> Prices:
    prices = [(0, 1)]
    for i in reversed(range(chain.length)):
        nfe, scored = value.cost(i) if value is not None and _judged(config, i) else (0, 0)
        prices.insert(0, (prices[0][0] + chain.costs[i] + nfe, prices[0][1] + scored))
    return prices


def _judged(config: TreeConfig, i: int) -> bool:
    """Whether a value is asked about nodes of level i: only where that decides between siblings."""
    asked = config.value_weight > 0 and (not config.value_levels or i in config.value_levels)
    return asked and not config.fixed and config.branches(i)


def _planted(
    chain: Chain,
    judge: Judge,
    config: TreeConfig,
    tree: Tree | None,
    noise: Tensor | Sequence[Tensor] | None,
    price: tuple[int, int],
) -> Tree:
    cases = len(chain.seeds)
    if tree is not None:
        if noise is not None:
            raise ConfigError("noise starts a new tree, but this one has grown already. Pass either tree or noise.")
        require_fits(chain, tree)
        require_latents(tree, config)
        if any(nodes.leaves for nodes in tree.cases):
            return tree
    elif noise is not None and len(noise) != cases:
        raise ConfigError(f"noise is given for {len(noise)} cases, but there are {cases}.")
    judge.require(nfe=cases * price[0], scored=cases * price[1], what="a first walk")
    return tree or Tree(chain.seeds, chain.length, noise)


def _purses(tree: Tree, judge: Judge, config: TreeConfig, iterations: int | None) -> list[_Purse]:
    """An equal share of what is left for every case."""
    budget, cases = judge.chain.budget, len(tree.cases)
    limits = budget.limits

    def share(limit: int | None, spent: int, each: int = 1) -> float:
        return math.inf if limit is None else (limit * budget.prompts - spent) // cases // each

    nfe = share(limits.nfe, budget.nfe)
    scored = min(share(limits.decodes, budget.decodes), share(limits.reward_calls, budget.reward_calls, judge.rewards))
    more: float = config.iterations if iterations is None else iterations
    if iterations is None and not (nfe == scored == math.inf and limits.seconds is None):
        more = math.inf
    return [_Purse(nodes.visits[0] - len(nodes.queue) + more, nfe, scored) for nodes in tree.cases]


def _choose(nodes: Nodes, free: list[bool], config: TreeConfig, goal: float) -> None:
    """Descend until a round's `parallel` walks are queued; visits count at once, so later descents look elsewhere."""
    while not nodes.filled and nodes.stall < config.patience and nodes.visits[0] - len(nodes.queue) < goal:
        path = _descend(nodes, free, config)
        ended = bool(path) and nodes.level[path[-1]] == nodes.length
        if not path or (ended and config.fixed):  # nothing to do until walks in flight are home, or ever
            nodes.filled = bool(nodes.queue)
            nodes.stall = nodes.stall if nodes.queue else config.patience
            return
        for node in path:
            nodes.visits[node] += 1
        if ended:
            nodes.stall += 1
            nodes.filled = nodes.stall >= config.patience and bool(nodes.queue)
        else:
            nodes.stall = 0
            nodes.queue.append(path[-1])
            nodes.filled = len(nodes.queue) >= config.parallel


def _descend(nodes: Nodes, free: list[bool], config: TreeConfig) -> list[int]:
    """The path to a node that is owed a child, or to a finished leaf; empty if the root must wait for its children."""
    path = [0]
    uniforms: list[float] = []
    if config.mode == "sample":
        generator = case_generator(nodes.seed, "select", nodes.visits[0])
        uniforms = torch.rand(nodes.length + 1, generator=generator, dtype=torch.float64).tolist()
    while nodes.level[path[-1]] < nodes.length:
        node = path[-1]
        if nodes.owed(node) < _allowance(nodes, node, free, config):
            return path
        known = nodes.valid(node)
        if not known:  # only a root can get here: all its leaves are invalid, or still in flight
            return [] if nodes.queue or config.fixed else path
        path.append(_pick(nodes, node, known, config, uniforms))
    return path


def _allowance(nodes: Nodes, node: int, free: list[bool], config: TreeConfig) -> int:
    """How many children a node may have."""
    level = nodes.level[node] + 1
    if not free[level]:
        return 1
    if config.fixed:
        most = config.fixed[level] if level < len(config.fixed) else 1
    elif not config.branches(level):
        most = 1
    else:
        most = math.ceil(config.width * max(1, nodes.visits[node]) ** config.growth)
    return max(most, len(nodes.noise)) if level == 0 and nodes.noise is not None else most


def _pick(nodes: Nodes, node: int, known: list[int], config: TreeConfig, uniforms: list[float]) -> int:
    if config.fixed or not nodes.settled:
        return min(known, key=nodes.visits.__getitem__)
    if config.mode == "sample":
        return nodes.tempted(node, uniforms[nodes.level[node] + 1], growing=True)
    pull = config.c_uct * nodes.scale * math.sqrt(math.log(nodes.visits[node]))
    return max(known, key=lambda child: nodes.esteem(child) + pull / math.sqrt(nodes.visits[child]))


def _payable(row: int, nodes: Nodes, purse: _Purse, prices: Prices) -> list[_Trip]:
    """The queue's walks, from its front, that the case can still pay; they are paid for."""
    trips: list[_Trip] = []
    twins: Counter[int] = Counter()
    for parent in nodes.queue if nodes.filled else []:
        level = nodes.level[parent] + 1
        (nfe, scored), made = prices[level], nodes.visits[0] - len(nodes.queue) + len(trips)
        if made >= purse.goal or nfe > purse.nfe or scored > purse.scored:
            break
        order = len(nodes.children[parent]) + twins[parent]
        trips.append(_Trip(row, parent, order, level, nodes.child_seed(parent, order)))
        twins[parent] += 1
        purse.nfe, purse.scored = purse.nfe - nfe, purse.scored - scored
    return trips


def _walk(
    chain: Chain, tree: Tree, trips: list[_Trip], like: Tensor, config: TreeConfig, value: Value | None
) -> tuple[list[list[Stop]], Tensor]:
    """Walk all trips to the end, one model call per level, rows joining at theirs; final latents are (K, ...)."""
    tracks: list[list[Stop]] = [[] for _ in trips]
    live: list[int] = []
    x = like[:0]
    for i in range(min(trip.level for trip in trips), chain.length + 1):
        fresh = [k for k, trip in enumerate(trips) if trip.level == i]
        if fresh:
            x, live = torch.cat([x, _children(chain, tree, [trips[k] for k in fresh], i, like)]), live + fresh
        if i == chain.length:
            break
        rows, seeds = [trips[k].row for k in live], [trips[k].seed for k in live]
        prediction = chain.predict(x, i, rows)
        step = chain.transition(x, prediction, i)
        tree.free[i + 1] = step.std != 0
        blank: Sequence[Tensor | None] = [None] * len(live)
        aims = _kept(prediction) if tree.free[i + 1] and config.branches(i + 1) else blank
        latents = _kept(x) if i == 0 or aims is not blank else blank  # a start is kept for who goes on from it
        opinions = [math.nan] * len(live)
        if value is not None and _judged(config, i):
            opinions = value(x, prediction, i, rows, seeds).tolist()
        for k, latent, aim, opinion in zip(live, latents, aims, opinions, strict=True):
            tracks[k].append(Stop(latent, aim, opinion))
        noise = case_noise(seeds, x, "step", i) if step.std else None
        x = step.sample(noise, dtype=x.dtype)
    return tracks, x[torch.tensor(live, device=x.device).argsort()]


def _children(chain: Chain, tree: Tree, trips: list[_Trip], i: int, like: Tensor) -> Tensor:
    """Latents (K, ...) of new nodes at level i: fresh starts, or new draws from predictions made before."""
    if i == 0:
        return torch.cat([_start(chain, tree.cases[trip.row], trip, like) for trip in trips])
    x, prediction = (
        torch.stack([getattr(tree.cases[trip.row], name)[trip.parent] for trip in trips]).to(like.device)
        for name in ("x", "prediction")
    )
    step = chain.transition(x, prediction, i - 1)
    noise = case_noise([trip.seed for trip in trips], x, "step", i - 1) if step.std else None
    return step.sample(noise, dtype=x.dtype)


def _start(chain: Chain, nodes: Nodes, trip: _Trip, like: Tensor) -> Tensor:
    if nodes.noise is not None and trip.order < len(nodes.noise):
        return chain.start(nodes.noise[trip.order : trip.order + 1].to(like.device), [trip.row])
    return chain.first([trip.seed], [trip.row])


def _hang(
    tree: Tree, config: TreeConfig, trips: list[_Trip], walks: tuple[list[list[Stop]], Tensor], r: Tensor
) -> None:
    """Put finished walks and their rewards (K,) into the trees and take them off the queues."""
    for trip, track, final, reward in zip(trips, walks[0], _kept(walks[1]), r.tolist(), strict=True):
        nodes = tree.cases[trip.row]
        nodes.queue.pop(0)
        nodes.filled, nodes.stall = bool(nodes.queue), 0
        nodes.add(trip.parent, track, final, reward, config.visits_start)
        if not nodes.settled:
            _weigh(nodes, config)


def _weigh(nodes: Nodes, config: TreeConfig) -> None:
    nodes.weigh(config.strength, config.calibration if config.scale == "std" else None)


def _kept(x: Tensor) -> Sequence[Tensor]:
    return x.detach().to("cpu", copy=True).unbind(0)
