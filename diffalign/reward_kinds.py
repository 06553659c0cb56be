"""What a reward is: the protocol, its score with validity, and the kinds that wrap others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.score_cache import identity_of, pixels_of


@runtime_checkable
class Reward(Protocol):
    """Media (B, 3, H, W) or (B, F, 3, H, W) in [0, 1] -> (B,) float32, higher is better; NaN marks a row as invalid."""

    name: str
    differentiable: bool
    modality: str  # "image", "video" or "edit"
    version: str | None  # None: never cached
    range: tuple[float, float] | None

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor | Score: ...


@dataclass(frozen=True, eq=False)
class Score:
    """What a reward says about B rows; an invalid row has a NaN total and stays out of every mean."""

    total: Tensor  # (B,) float32
    parts: dict[str, Tensor] = field(default_factory=dict)  # each (B,) float32
    valid: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))  # (B,) bool

    def __post_init__(self) -> None:
        total = self.total.float()
        given = self.valid if len(self.valid) == len(total) else torch.ones_like(total, dtype=torch.bool)
        valid = given.to(total.device) & ~total.isnan()
        object.__setattr__(self, "total", torch.where(valid, total, torch.nan))
        object.__setattr__(self, "valid", valid)
        object.__setattr__(self, "parts", {k: v.float() for k, v in self.parts.items()})

    @classmethod
    def of(cls, found: Tensor | Score, name: str) -> Score:
        """A reward's answer as a Score; a bare tensor is its own only part."""
        return found if isinstance(found, Score) else cls(total=found, parts={name: found})

    @classmethod
    def concat(cls, scores: Sequence[Score]) -> Score:
        """Rows of several scores in order; a part that one of them lacks is NaN there."""
        names = dict.fromkeys(name for s in scores for name in s.parts)
        place = scores[0].total.device  # a reward may answer from another device than the one it was asked on

        def joined(columns: Iterable[Tensor]) -> Tensor:
            return torch.cat([column.to(place) for column in columns])

        parts = {n: joined(s.parts.get(n, torch.full_like(s.total, torch.nan)) for s in scores) for n in names}
        return cls(joined(s.total for s in scores), parts, joined(s.valid for s in scores))

    def select(self, index: Any) -> Score:
        """The rows at `index`, which is whatever indexes a tensor: numbers, a slice, a mask."""
        return Score(self.total[index], {k: v[index] for k, v in self.parts.items()}, self.valid[index])

    def parts_at(self, index: Any) -> dict[str, float | None]:
        """The parts of one row as plain numbers, None where the row is invalid or a part does not apply to it."""
        known = {name: float(part[index]) for name, part in self.parts.items()}
        valid = bool(self.valid[index])
        return {name: value if valid and math.isfinite(value) else None for name, value in known.items()}

    def spread(self, mask: Tensor) -> Score:
        """These rows where `mask` (B,) is true, in order, and invalid rows elsewhere."""

        def wide(values: Tensor) -> Tensor:
            return values.new_full(mask.shape, torch.nan).index_put((mask.to(values.device),), values)

        total = wide(self.total)
        return Score(total, {k: wide(v) for k, v in self.parts.items()}, ~total.isnan())

    def __len__(self) -> int:
        return len(self.total)


Ask = Callable[[Reward, Tensor, Sequence[Case]], Score]


class Composite:
    """A reward made of others: `through` asks them, so that each is cached by itself and may see some rows only.

    `options` is everything that changes the score beside the parts.
    """

    version: str | None = None  # the parts are cached, not the whole
    rewards: list[Reward]

    def through(self, media: Tensor, cases: Sequence[Case], ask: Ask) -> Score:
        """The score of these rows; `ask(reward, media, cases)` is how a part is asked."""
        raise NotImplementedError

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        from diffalign.scoring import rate

        return self.through(media, cases, rate)

    @property
    def leaves(self) -> list[Reward]:
        """The rewards that are asked in the end, each once for every row that reaches it."""
        return [leaf for part in self.rewards for leaf in leaves(part)]

    @staticmethod
    def shared_modality(rewards: Sequence[Reward]) -> str:
        """The modality of a whole, or ConfigError where the parts judge different things."""
        found = sorted({reward.modality for reward in rewards})
        if "video" in found and len(found) > 1:
            names = ", ".join(reward.name for reward in rewards)
            raise ConfigError(f"rewards for {' and '.join(found)} cannot be added up: {names}.")
        return "edit" if "edit" in found else found[0]

    @staticmethod
    def require_names(rewards: Sequence[Reward]) -> None:
        """Refuse two parts of one name: their columns would mix."""
        names = [reward.name for reward in rewards]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ConfigError(
                f"two rewards are called '{twice[0]}', so their parts would mix. "
                f"Give one another name: {{alias: {{reward: {twice[0]}}}}}."
            )


def leaves(reward: Reward) -> list[Reward]:
    """The rewards that are asked in the end, each once for every row that reaches it."""
    return reward.leaves if isinstance(reward, Composite) else [reward]


class Memo:
    """What rewards that stand in several places of a composite said within one call, so that each is asked once."""

    def __init__(self, reward: Reward) -> None:
        asked = leaves(reward)
        alike = Counter((type(part), part.name) for part in asked)  # an identity may be dear: it can read weights
        twice = [part for part in asked if alike[type(part), part.name] > 1]
        self._marks = {id(part): identity_of(part) or str(id(part)) for part in twice}
        places = Counter(self._marks[id(part)] for part in twice)
        self._several = {mark for mark, count in places.items() if count > 1}
        self._rows: dict[str, Score] = {}

    def through(self, ask: Ask, reward: Reward, media: Tensor, cases: Sequence[Case]) -> Score:
        """What `ask` says of these rows, asked only about those that are new."""
        mark = self._marks.get(id(reward))
        if mark not in self._several:
            return ask(reward, media, cases)
        keys = [f"{mark} {pixels} {id(case)}" for pixels, case in zip(pixels_of(media), cases, strict=True)]
        new = [k for k, key in enumerate(keys) if key not in self._rows]
        if new:
            some = media if len(new) == len(keys) else media[new]
            found = ask(reward, some, [cases[k] for k in new])
            self._rows |= {keys[k]: found.select([row]) for row, k in enumerate(new)}
        return Score.concat([self._rows[key] for key in keys])


class WeightedReward(Composite):
    """The sum of weight times reward; a weight of 0 shows a part without letting it count."""

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        self.rewards, self.weights = list(rewards), [float(w) for w in weights]
        self.options = {"weights": self.weights}
        self.require_names(self.rewards)
        self.modality = self.shared_modality(self.rewards)
        weighted = zip(self.rewards, self.weights, strict=True)
        self.name = " + ".join(r.name if w == 1 else f"{w:g} {r.name}" for r, w in weighted)
        self.differentiable = all(reward.differentiable for reward in self.rewards)
        self.range = self._range()

    def through(self, media: Tensor, cases: Sequence[Case], ask: Ask) -> Score:
        return self.combine([ask(reward, media, cases) for reward in self.rewards])

    def combine(self, scores: Sequence[Score]) -> Score:
        """One score from one per reward, each part visible under its reward's name."""
        total, valid = torch.zeros_like(scores[0].total), torch.ones_like(scores[0].valid)
        parts: dict[str, Tensor] = {}
        for reward, weight, found in zip(self.rewards, self.weights, scores, strict=True):
            if weight != 0:
                total, valid = total + weight * found.total.to(total.device), valid & found.valid.to(valid.device)
            parts[reward.name] = found.total
            parts |= {f"{reward.name}/{k}": v for k, v in found.parts.items() if k != reward.name}
        return Score(total, parts, valid)

    def _range(self) -> tuple[float, float] | None:
        counted = [(r.range, w) for r, w in zip(self.rewards, self.weights, strict=True) if w != 0]
        ends = [sorted((r[0] * w, r[1] * w)) for r, w in counted if r is not None]
        return (sum(e[0] for e in ends), sum(e[1] for e in ends)) if len(ends) == len(counted) else None


class FunctionReward:
    """A plain callable `(media, cases) -> (B,)` seen as a reward."""

    def __init__(self, function: Any, options: Mapping[str, Any]) -> None:
        self.function, self.options = function, dict(options)
        self.name: str = str(getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__))
        self.differentiable = bool(getattr(function, "differentiable", False))
        self.modality: str = getattr(function, "modality", "image")
        self.version: str | None = getattr(function, "version", None)
        self.range: tuple[float, float] | None = getattr(function, "range", None)

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor | Score:
        found: Tensor | Score = self.function(media, cases, **self.options)
        return found
