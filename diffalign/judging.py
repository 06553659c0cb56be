"""The judge of a search over a pipeline: rewards with all their parts, and images that the model itself broke."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign import scoring
from diffalign.cases import Case
from diffalign.scoring import Score
from diffalign.search.chain import Chain
from diffalign.search.judge import Judge


class ScoringJudge(Judge):
    """A judge that keeps every part of a leaf's score."""

    def __init__(
        self,
        chain: Chain,
        cases: Sequence[Case],
        reward: scoring.Reward,
        *,
        show: Callable[[], None],
        asked: Mapping[str, Any],
        **options: Any,
    ) -> None:
        self.cases, self.reward, self.show, self.asked = cases, reward, show, asked
        self.parts: list[list[dict[str, float]]] = [[] for _ in chain.seeds]
        self.broken = [0 for _ in chain.seeds]  # images with NaN or infinite pixels
        self._scored: list[Score] = []  # since the last record, previews among them
        count = len(scoring.leaves(reward))
        super().__init__(chain, self._score, rewards=count, **options)

    def record(
        self, x: Tensor, media: Tensor, rows: Sequence[int], rewards: Tensor, seeds: Sequence[int] | None = None
    ) -> Tensor:
        own = self._scores_of(rewards.detach().float().cpu())
        parts = {name: part.tolist() for name, part in Score.concat(own).parts.items()} if own else {}
        sound = _sound(media).tolist()
        for k, row in enumerate(rows):
            self.broken[row] += not sound[k]
            self.parts[row].append({name: values[k] for name, values in parts.items()})
        return super().record(x, media, rows, rewards, seeds)

    def mark(self) -> None:
        super().mark()
        self.show()

    def _scores_of(self, rewards: Tensor) -> list[Score]:
        """The scores behind rewards (K,), which may have come in several goes, some of them in vain."""
        own: list[Score] = []
        end = len(rewards)
        while self._scored and end:
            last = self._scored.pop()
            start = end - len(last)
            if start >= 0 and torch.equal(last.total.nan_to_num(), rewards[start:end].nan_to_num()):
                own.insert(0, last)
                end = start
        self._scored.clear()
        return own if not end else []

    def _score(self, media: Tensor, rows: Sequence[int]) -> Tensor:
        sound = _sound(media)  # a model in half precision may overflow for one candidate
        found = Score(media.new_zeros(0))
        if sound.any():
            cases = [self.cases[row] for row, whole in zip(rows, sound.tolist(), strict=True) if whole]
            asked = media if sound.all() else media[sound]
            found = scoring.score(self.reward, asked, cases, all_invalid=True, **self.asked)
        found = found if sound.all() else found.spread(sound)
        parts = {name: part.detach().cpu() for name, part in found.parts.items()}
        self._scored.append(Score(found.total.detach().cpu(), parts))
        return found.total

    def table(self) -> tuple[Score, list[int]]:
        """Leaves as (P, N), rows filled up with NaN, and how many each prompt has."""
        counts = [len(row) for row in self.leaves]

        def table(rows: list[list[float]]) -> Tensor:
            return torch.tensor([row + [math.nan] * (max(counts) - len(row)) for row in rows])

        names = dict.fromkeys(name for row in self.parts for parts in row for name in parts)
        parts = {n: table([[p.get(n, math.nan) for p in row] for row in self.parts]) for n in names}
        total = table([[leaf.reward for leaf in row] for row in self.leaves])
        return Score(total, parts, ~total.isnan()), counts


def _sound(media: Tensor) -> Tensor:
    """Which images (K,) have only finite pixels."""
    return media.detach().flatten(1).isfinite().all(1)
