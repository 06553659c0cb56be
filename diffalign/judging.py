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
        self.broken = 0  # images with NaN or infinite pixels
        self._scored: list[Score] = []  # since the last record, previews among them
        count = len(getattr(reward, "rewards", [reward]))
        super().__init__(chain, self._score, rewards=count, **options)

    def record(
        self, x: Tensor, media: Tensor, rows: Sequence[int], rewards: Tensor, seeds: Sequence[int] | None = None
    ) -> Tensor:
        own: list[Score] = []  # of these very images, which may have been scored in several goes
        while self._scored and sum(map(len, own)) < len(rows):
            own.insert(0, self._scored.pop())
        self._scored.clear()
        parts = {name: part.detach().tolist() for name, part in Score.concat(own).parts.items()} if own else {}
        for k, row in enumerate(rows):
            self.parts[row].append({name: values[k] for name, values in parts.items()})
        return super().record(x, media, rows, rewards, seeds)

    def mark(self) -> None:
        super().mark()
        self.show()

    def _score(self, media: Tensor, rows: Sequence[int]) -> Tensor:
        sound = media.detach().flatten(1).isfinite().all(1)  # a model in half precision may overflow for one candidate
        if not sound.all():
            self.broken += int((~sound).sum())
        found = Score(media.new_zeros(0))
        if sound.any():
            cases = [self.cases[row] for row, whole in zip(rows, sound.tolist(), strict=True) if whole]
            asked = media if sound.all() else media[sound]
            found = scoring.score(self.reward, asked, cases, all_invalid=True, **self.asked)
        found = found if sound.all() else found.spread(sound)
        self._scored.append(Score(found.total.detach(), {k: part.detach() for k, part in found.parts.items()}))
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
