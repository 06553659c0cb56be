"""Rewards as one protocol: scores with validity, weighted sums, chunks, the cache, and specs such as `clip:2.0`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffalign import registry
from diffalign.cases import Case
from diffalign.errors import ConfigError, InvalidReward, NotDifferentiable
from diffalign.score_cache import ScoreCache, keys_of

__all__ = ["Reward", "Score", "ScoreCache", "WeightedReward", "make_reward", "require_gradient", "score"]


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
        """The parts of one row as plain numbers, None where it is invalid."""
        valid = bool(self.valid[index])
        return {name: float(part[index]) if valid else None for name, part in self.parts.items()}

    def spread(self, mask: Tensor) -> Score:
        """These rows where `mask` (B,) is true, in order, and invalid rows elsewhere."""

        def wide(values: Tensor) -> Tensor:
            return values.new_full(mask.shape, torch.nan).index_put((mask.to(values.device),), values)

        total = wide(self.total)
        return Score(total, {k: wide(v) for k, v in self.parts.items()}, ~total.isnan())

    def __len__(self) -> int:
        return len(self.total)


class WeightedReward:
    """The sum of weight times reward; a weight of 0 shows a part without letting it count."""

    version: str | None = None  # each part is cached by itself

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        self.rewards, self.weights = list(rewards), [float(w) for w in weights]
        names = [reward.name for reward in self.rewards]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ConfigError(
                f"two rewards are called '{twice[0]}', so their parts would mix. "
                f"Give one another name: {{alias: {{reward: {twice[0]}}}}}."
            )
        modalities = sorted({reward.modality for reward in self.rewards})
        if "video" in modalities and len(modalities) > 1:
            raise ConfigError(f"rewards for {' and '.join(modalities)} cannot be added up: {', '.join(names)}.")
        self.modality = "edit" if "edit" in modalities else modalities[0]
        self.name = " + ".join(n if w == 1 else f"{w:g} {n}" for n, w in zip(names, self.weights, strict=True))
        self.differentiable = all(reward.differentiable for reward in self.rewards)
        self.range = self._range()

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        return self.combine([_rate(reward, media, cases, None) for reward in self.rewards])

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


def score(
    reward: Reward,
    media: Tensor,
    cases: Sequence[Case],
    *,
    chunk: int | None = None,
    cache: ScoreCache | None = None,
    all_invalid: bool = False,
) -> Score:
    """Score media (B, 3, H, W) or (B, F, 3, H, W), `chunk` rows a time; no valid row raises unless `all_invalid`."""
    _check_input(reward, media, cases, chunk)
    size = chunk or max(len(cases), 1)
    starts = range(0, len(cases), size)
    found = Score.concat([_rate(reward, media[k : k + size], cases[k : k + size], cache) for k in starts])
    if not all_invalid and not found.valid.any():
        raise InvalidReward(
            f"reward '{reward.name}' is NaN for all {len(cases)} rows, so there is nothing to choose from; "
            f"the first prompt is '{cases[0].prompt[:80]}'. "
            "Check that the images are finite and that the reward can read them."
        )
    return found


def none_valid(reward: Reward, case: Case, count: int) -> InvalidReward:
    """The error for a prompt none of whose candidates could be scored."""
    return InvalidReward(
        f"reward '{reward.name}' is NaN for all {count} candidates of '{case.prompt[:80]}', so there is nothing to "
        "choose from. Check that the images are sound and the reward can read them."
    )


def require_gradient(reward: Reward, who: str) -> None:
    """Refuse a reward without a gradient, in the name of `who` needs one."""
    if reward.differentiable:
        return
    lacking = [r for r in getattr(reward, "rewards", [reward]) if not r.differentiable]
    card = registry.cards().get(lacking[0].name)
    why = getattr(lacking[0], "no_gradient", None) or (card.no_gradient if card else "")
    raise NotDifferentiable(
        f"{who} needs a gradient, and reward '{lacking[0].name}' has none{f' ({why})' if why else ''}. "
        "Use smc= or tree= with it, or pair it with a differentiable reward such as 'clip'."
    )


def make_reward(spec: Any) -> Reward:
    """A reward from an object, a callable, `clip:2.0`, `file.py:name`, (reward, weight), a mapping, or a list."""
    from diffalign.reward_specs import parse_spec

    weighted = parse_spec(spec)
    if len(weighted) == 1 and weighted[0][1] == 1.0:
        return weighted[0][0]
    return WeightedReward([reward for reward, _ in weighted], [weight for _, weight in weighted])


def _rate(reward: Reward, media: Tensor, cases: Sequence[Case], cache: ScoreCache | None) -> Score:
    """Score rows without judging whether all of them failed: another chunk may hold a valid one."""
    if isinstance(reward, WeightedReward):
        return reward.combine([_rate(part, media, cases, cache) for part in reward.rewards])
    if media.ndim == 5 and reward.modality == "image":
        return _per_frame(reward, media, cases, cache)
    if cache is None or (media.requires_grad and torch.is_grad_enabled()):
        return _ask(reward, media, cases)
    keys = keys_of(reward, media, cases)
    rows = cache.lookup(keys)
    new = [k for k, row in enumerate(rows) if row is None]
    known = [_from_row(row, media) for row in rows if row is not None]
    if new:
        asked = _ask(reward, media[new], [cases[k] for k in new])
        cache.store([keys[k] for k in new], _to_rows(asked))
        known.append(asked)
    order = [k for k, row in enumerate(rows) if row is not None] + new
    return Score.concat(known).select(torch.tensor(order).argsort())


def _per_frame(reward: Reward, media: Tensor, cases: Sequence[Case], cache: ScoreCache | None) -> Score:
    """An image reward judges a video by the mean over its frames; one unreadable frame makes the row invalid."""
    frames = media.shape[1]
    each = _rate(reward, media.flatten(0, 1), [case for case in cases for _ in range(frames)], cache)
    parts = {name: part.view(-1, frames).mean(1) for name, part in each.parts.items()}
    return Score(each.total.view(-1, frames).mean(1), parts, each.valid.view(-1, frames).all(1))


def _ask(reward: Reward, media: Tensor, cases: Sequence[Case]) -> Score:
    found = reward(media, cases)
    total = found.total if isinstance(found, Score) else found
    if not isinstance(total, Tensor) or total.shape != (len(cases),):
        got = (
            f"a tensor of shape {tuple(total.shape)}"
            if isinstance(total, Tensor)
            else f"{type(found).__name__} {str(found)[:60]}"
        )
        raise InvalidReward(
            f"reward '{reward.name}' returned {got} for {len(cases)} rows. Return a tensor of shape ({len(cases)},)."
        )
    infinite = total.isinf().nonzero().flatten().tolist()
    if infinite:
        raise InvalidReward(
            f"reward '{reward.name}' is infinite for {len(infinite)} of {len(cases)} rows, first for the prompt "
            f"'{cases[infinite[0]].prompt[:80]}'. Return NaN for a row that cannot be scored; it is then invalid."
        )
    return Score.of(found, reward.name)


def _to_rows(found: Score) -> list[tuple[float, dict[str, float]]]:
    totals, parts = found.total.tolist(), {name: part.tolist() for name, part in found.parts.items()}
    return [(total, {name: values[k] for name, values in parts.items()}) for k, total in enumerate(totals)]


def _from_row(row: tuple[float, dict[str, float]], media: Tensor) -> Score:
    total, parts = row
    return Score(
        torch.tensor([total], device=media.device),
        {k: torch.tensor([v], device=media.device) for k, v in parts.items()},
    )


def _check_input(reward: Reward, media: Tensor, cases: Iterable[Case], chunk: int | None) -> None:
    cases = list(cases)
    if media.ndim not in (4, 5) or media.shape[-3] != 3:
        raise ConfigError(
            f"media has shape {tuple(media.shape)}; rewards take (B, 3, H, W) or (B, F, 3, H, W) with values in [0, 1]."
        )
    if len(media) != len(cases) or not cases:
        raise ConfigError(
            f"there are {len(media)} images and {len(cases)} cases; scoring needs one case per image, and at least one."
        )
    if chunk is not None and chunk < 1:
        raise ConfigError(
            f"chunk is {chunk}, but scoring goes through at least 1 row at a time. Leave it out to score all at once."
        )
    if reward.modality == "video" and media.ndim == 4:
        raise ConfigError(
            f"reward '{reward.name}' judges videos (B, F, 3, H, W), but got images of shape {tuple(media.shape)}."
        )
    if reward.modality == "edit" and any(case.source is None for case in cases):
        raise ConfigError(
            f"reward '{reward.name}' judges edits, but a case has no source image. Give each case the edited image."
        )
