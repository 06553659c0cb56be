"""Judge: turns latents into rewards, remembers the best of each case, and knows what is still affordable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffalign.budget import Limits
from diffalign.errors import BudgetError, InvalidReward, NotDifferentiable
from diffalign.search.chain import Chain
from diffalign.search.chunks import Chunks

MOST = 1024  # particles or candidates, however large the budget
Rate = Callable[[Tensor, Sequence[int]], Tensor]  # (media (K, ...), rows) -> rewards (K,) float32, NaN where invalid


@dataclass(frozen=True, eq=False)
class Leaf:
    """One finished candidate of one case."""

    row: int  # the case
    number: int  # which leaf of that case, from 0
    reward: float  # NaN if it could not be scored
    seed: int | None  # of a candidate that a seed alone determines
    x: Tensor | None = None  # final latents (...), on the CPU; kept for the best only
    media: Tensor | None = None  # (3, H, W) or (F, 3, H, W), on the CPU; kept for the best only


@dataclass
class Judge:
    """Scores finished candidates as leaves and unfinished ones as previews, within the chain's budget.

    `rewards` is how many rewards one image costs. `on_improve(leaf)` is told whenever a case's best leaf grows.
    """

    chain: Chain
    rate: Rate
    top_k: int = 1
    rewards: int = 1
    on_improve: Callable[[Leaf], None] | None = None
    at_once: int | None = None  # rows of one backward pass
    leaves: list[list[Leaf]] = field(init=False)  # per case, in order, without latents and media
    best: list[list[Leaf]] = field(init=False)  # per case, at most top_k, best first
    curve: list[tuple[float, float, float]] = field(init=False, default_factory=list)  # nfe, seconds, mean best reward

    def __post_init__(self) -> None:
        self.leaves = [[] for _ in self.chain.seeds]
        self.best = [[] for _ in self.chain.seeds]
        self.backward = Chunks(self.chain.budget, self.at_once)

    def leaf(self, x: Tensor, rows: Sequence[int], seeds: Sequence[int] | None = None) -> Tensor:
        """Rewards (K,) float32 on the CPU of final latents x (K, ...), which become leaves; NaN where invalid."""
        return self.seen(x, self.chain.finish(x, rows), rows, seeds)

    def seen(self, x: Tensor, media: Tensor, rows: Sequence[int], seeds: Sequence[int] | None = None) -> Tensor:
        """As `leaf`, for latents that are decoded already."""
        rewards = self._ask(media, rows)
        return self.record(x, media, rows, rewards, seeds)

    def record(
        self, x: Tensor, media: Tensor, rows: Sequence[int], rewards: Tensor, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Note leaves whose rewards (K,) are known, and mark the curve."""
        rewards = rewards.detach().float().cpu()
        for k, row in enumerate(rows):
            found = Leaf(row, len(self.leaves[row]), float(rewards[k]), None if seeds is None else seeds[k])
            self.leaves[row].append(found)
            if self._ranks(found):
                kept = Leaf(row, found.number, found.reward, found.seed, _to_cpu(x[k]), _to_cpu(media[k]))
                self._keep(kept)
        self.mark()
        return rewards

    def preview(self, x0: Tensor, rows: Sequence[int]) -> Tensor:
        """Rewards (K,) float32 on the CPU of clean latents (K, ...) that are no leaves: values to steer by."""
        return self._ask(self.chain.finish(x0, rows), rows).detach().float().cpu()

    def slopes(self, media: Tensor, rows: Sequence[int]) -> Tensor:
        """Rewards (K,) with their graph, for methods that follow the gradient; charged like every scoring."""
        return self._ask(media, rows)

    def climb(self, rewards: Tensor, x: Tensor, who: str) -> Tensor:
        """Slopes (K, ...) of rewards (K,) in x (K, ...), zero where a reward is not finite; rows share no gradient."""
        valid = rewards.isfinite()
        if not valid.any():
            return torch.zeros_like(x)
        found: Tensor | None = None
        if rewards.requires_grad:
            (found,) = torch.autograd.grad(rewards[valid].sum(), x, allow_unused=True)
        if found is None:
            raise NotDifferentiable(
                f"{who} needs a gradient, but the rewards of {len(rewards)} images came back without one to the noise. "
                "Use tree=, smc= or best_of_n= with this reward, or pair it with a differentiable one such as 'clip'."
            )
        return found

    def as_many_as(self, cost: Callable[[int], tuple[int, int]], *, without_limits: int) -> int:
        """The largest count whose `cost(count)`, NFE and scored images of one case, the budget affords; at least 1."""
        cases = len(self.chain.seeds)
        if self.unpaced:
            return 1  # a first walk shows how long one takes
        if self.chain.budget.limits == Limits():
            return without_limits
        count = 1
        while count < MOST:
            nfe, scored = cost(count + 1)
            if not self.affords(nfe=nfe * cases, scored=scored * cases):
                break
            count += 1
        return count

    def affords(self, *, nfe: int = 0, scored: int = 0) -> bool:
        """Whether `nfe` more model rows and `scored` more decoded and scored images fit the budget, summed over cases.

        Seconds are foretold from what an NFE has cost so far.
        """
        budget = self.chain.budget
        ahead = nfe * budget.seconds / budget.nfe if budget.nfe else 0.0
        return budget.allows(nfe=nfe, decodes=scored, reward_calls=scored * self.rewards, seconds=ahead)

    @property
    def unpaced(self) -> bool:
        """Whether seconds are limited, but nothing was spent yet that could foretell them."""
        return self.chain.budget.limits.seconds is not None and not self.chain.budget.nfe

    def require(self, *, nfe: int, scored: int, what: str) -> None:
        """Raise before anything is spent if the smallest run (`nfe` and `scored` summed over cases) does not fit."""
        budget, cases = self.chain.budget, len(self.chain.seeds)
        costs = {"nfe": nfe, "decodes": scored, "reward_calls": scored * self.rewards}
        for name, cost in costs.items():
            limit = getattr(budget.limits, name)
            if limit is not None and getattr(budget, name) + cost > limit * budget.prompts:
                raise BudgetError(
                    f"the budget allows {name} = {limit} per prompt, but {what} costs {cost / cases:g}. Raise the "
                    f"budget to at least {math.ceil(cost / cases)}, or lower num_inference_steps."
                )

    def mark(self) -> None:
        """A point of the curve: cost per prompt and the mean best reward so far."""
        reached = [kept[0].reward for kept in self.best if kept]
        spent = self.chain.budget.spent()
        self.curve.append((spent["nfe"], spent["seconds"], sum(reached) / len(reached) if reached else math.nan))

    def best_reward(self) -> Tensor:
        """The best reward of each case (B,), -inf where none is valid yet."""
        return torch.tensor([kept[0].reward if kept else -math.inf for kept in self.best])

    @property
    def constant(self) -> bool:
        """Whether every case had several valid leaves and all of one case tie: search cannot help there."""
        found = [{leaf.reward for leaf in row if math.isfinite(leaf.reward)} for row in self.leaves]
        several = all(sum(math.isfinite(leaf.reward) for leaf in row) > 1 for row in self.leaves)
        return several and all(len(values) == 1 for values in found)

    def _ask(self, media: Tensor, rows: Sequence[int]) -> Tensor:
        rewards = self.rate(media, rows)
        self.chain.budget.charge(reward_calls=len(rows) * self.rewards)
        if rewards.shape != (len(rows),):
            raise InvalidReward(f"{len(rows)} images were rated, but {tuple(rewards.shape)} rewards came back.")
        return rewards

    def _ranks(self, leaf: Leaf) -> bool:
        kept = self.best[leaf.row]
        return math.isfinite(leaf.reward) and (len(kept) < self.top_k or leaf.reward > kept[-1].reward)

    def _keep(self, leaf: Leaf) -> None:
        """Insert behind equals, so that the earlier of two ties stays ahead."""
        kept = self.best[leaf.row]
        at = next((k for k, other in enumerate(kept) if leaf.reward > other.reward), len(kept))
        kept.insert(at, leaf)
        del kept[self.top_k :]
        if at == 0 and self.on_improve is not None:
            self.on_improve(leaf)


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
