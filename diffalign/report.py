"""What a search did: every candidate's score, its seed, what it cost, and how the best reward grew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign import atomic
from diffalign.scoring import Score
from diffalign.search import best_of_n
from diffalign.search.forest import Tree
from diffalign.search.judge import Leaf


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """Scores of P prompts with N candidates each; candidate 0 is the stock image for the same generator."""

    method: str
    reward: str
    scores: Score  # total and parts (P, N)
    best: Tensor  # (P, top_k) candidate numbers, best first
    seeds: list[list[int]]  # (P, N)
    budget: Mapping[str, float]  # spent per prompt: nfe, decodes, reward_calls, seconds
    curve: list[tuple[float, float, float]]  # per prompt: nfe, seconds; and the mean best reward so far
    card: Mapping[str, Any] = field(default_factory=dict)  # what was asked: pipeline, scheduler, steps, guidance

    @property
    def candidates(self) -> int:
        return self.scores.total.shape[1]

    @property
    def invalid(self) -> list[int]:
        """How many candidates of each prompt could not be scored."""
        return [int(n) for n in (~self.scores.valid).sum(1)]

    @property
    def best_reward(self) -> Tensor:
        """The reward of each prompt's best candidate, (P,)."""
        return self.scores.total.gather(1, self.best[:, :1])[:, 0]

    def json(self) -> dict[str, Any]:
        """Everything as plain numbers; an invalid score is null."""
        return {
            "method": self.method,
            "reward": self.reward,
            "scores": atomic.finite(self.scores.total),
            "parts": {name: atomic.finite(part) for name, part in self.scores.parts.items()},
            "invalid": self.invalid,
            "best": self.best.tolist(),
            "seeds": self.seeds,
            "budget": dict(self.budget),
            "curve": atomic.finite(torch.tensor(self.curve, dtype=torch.float64)),
            "card": dict(self.card),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class BestOfNReport(Report):
    """A report on independent draws, so the whole best-of-n curve can be estimated from its pool."""

    @property
    def pools(self) -> list[Tensor]:
        """The valid rewards of each prompt that has any."""
        rows = zip(self.scores.total, self.scores.valid, strict=True)
        return [total[valid] for total, valid in rows if valid.any()]

    @property
    def expected(self) -> list[float]:
        """Unbiased mean reward of the best of n for n = 1 .. the smallest pool, averaged over prompts."""
        largest = min(len(pool) for pool in self.pools)
        return torch.stack([best_of_n.curve(p, ns=range(1, largest + 1)) for p in self.pools]).mean(0).tolist()

    @property
    def kl_bound(self) -> float:
        """Upper bound in nats on the KL to the base model, exact if no rewards tie."""
        return best_of_n.kl_bound(min(len(pool) for pool in self.pools))

    @property
    def win_rate(self) -> float:
        """Estimated P(the winner beats one fresh draw of the base for the same prompt), ties one half."""
        rates = [best_of_n.calibrate(pool.max()[None], pool, smooth=True) for pool in self.pools]
        return float(torch.cat(rates).mean())

    def win_rate_of(self, n: int, m: int = 1) -> float:
        """Unbiased P(best of n beats an independent best of m), ties one half, averaged over prompts."""
        return sum(best_of_n.win_rate(pool, n, m) for pool in self.pools) / len(self.pools)

    def json(self) -> dict[str, Any]:
        theory = {"expected": self.expected, "kl_bound": self.kl_bound, "win_rate": self.win_rate}
        return super().json() | theory | {"win_rate_convention": "against one base draw, ties one half"}


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchReport(Report):
    """A report on leaves of a search, which depend on one another; rows with fewer leaves are filled up with NaN."""

    counts: list[int]  # (P,) leaves of each prompt
    extras: Mapping[str, Any] = field(default_factory=dict)  # what the method itself has to say
    notes: list[str] = field(default_factory=list)  # in words: interrupted, constant reward
    kept: list[list[Leaf]] = field(default_factory=list)  # the best leaves of each prompt with latents and media
    tree: Tree | None = None  # of a tree search: pass it back as `grown`, or keep it with `save_tree`

    @property
    def invalid(self) -> list[int]:
        rows = zip(self.scores.valid, self.counts, strict=True)
        return [count - int(valid.sum()) for valid, count in rows]

    def json(self) -> dict[str, Any]:
        return super().json() | {"counts": self.counts, "extras": atomic.finite(self.extras), "notes": self.notes}
