"""Rewards as one protocol: scores with validity, weighted sums, chunks, the cache, and specs such as `clip:2.0`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffalign import registry
from diffalign.cases import Case
from diffalign.errors import ConfigError, InvalidReward, NotDifferentiable
from diffalign.reward_kinds import Ask, Composite, FunctionReward, Memo, Reward, Score, WeightedReward, leaves
from diffalign.score_cache import ScoreCache, engine_version

__all__ = [
    "Ask",
    "Composite",
    "FunctionReward",
    "Reward",
    "Score",
    "ScoreCache",
    "WeightedReward",
    "engine_version",
    "is_listwise",
    "leaves",
    "make_reward",
    "problems_of",
    "rate",
    "require_gradient",
    "require_rowwise",
    "score",
]

FAR = 4.0  # decoders overshoot [0, 1] a little; beyond this the pixels are on another scale


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
    memo = Memo(reward) if isinstance(reward, Composite) else None
    parts = _chunks(reward, cases, chunk or max(len(cases), 1))
    found = Score.concat([rate(reward, media[part], cases[part], cache, memo) for part in parts])
    if not all_invalid and not found.valid.any():
        raise InvalidReward(
            f"reward '{reward.name}' is NaN for all {len(cases)} rows, so there is nothing to choose from; "
            f"the first prompt is '{cases[0].prompt[:80]}'. {_why_invalid(reward, cases)}"
        )
    return found


def _chunks(reward: Reward, cases: Sequence[Case], size: int) -> list[slice]:
    """At most `size` rows at once; neighbours of one prompt stay together for a reward that compares them."""
    beside = is_listwise(reward)
    cuts = [0]
    for k in range(1, len(cases) + 1):
        whole = beside and k < len(cases) and cases[k].prompt == cases[k - 1].prompt
        if k == len(cases) or (k - cuts[-1] >= size and not whole):
            cuts.append(k)
    return [slice(start, end) for start, end in pairwise(cuts)]


def none_valid(reward: Reward, case: Case, count: int) -> InvalidReward:
    """The error for a prompt none of whose candidates could be scored."""
    return InvalidReward(
        f"reward '{reward.name}' is NaN for all {count} candidates of '{case.prompt[:80]}', so there is nothing to "
        f"choose from. {_why_invalid(reward, [case])}"
    )


def _why_invalid(reward: Reward, cases: Sequence[Case]) -> str:
    """What each judge last had against a picture of these prompts; without one, what to look at."""
    if found := problems_of(reward, cases):
        return "; ".join(f"{name} says: {problem}" for name, problem in found.items()) + "."
    return "Check that the images are finite and that the reward can read them."


def problems_of(reward: Reward, cases: Sequence[Case]) -> dict[str, str]:
    """The latest problem that each leaf which keeps its judgements had with one of these prompts, by its name."""
    prompts, found = {case.prompt for case in cases}, dict[str, str]()
    for leaf in leaves(reward):
        for case, judgement in reversed(tuple(getattr(leaf, "judgements", ()))):
            if judgement.problem and case.prompt in prompts:
                found[leaf.name] = judgement.problem
                break
    return found


def is_listwise(reward: Reward) -> bool:
    """Whether a row's score depends on the other rows of its prompt."""
    return any(getattr(leaf, "listwise", False) for leaf in leaves(reward))


def require_rowwise(reward: Reward, who: str) -> None:
    """Refuse a reward that compares the pictures of a prompt, in the name of `who` sees a few at a time."""
    beside = [leaf.name for leaf in leaves(reward) if getattr(leaf, "listwise", False)]
    if beside:
        raise ConfigError(
            f"{who} scores a few pictures at a time, and reward '{beside[0]}' compares all of a prompt, so its scores "
            "of two steps would not be on one scale. Let it score each picture by itself, with `against: reference` "
            "(pairwise) or `group: 1` (principle), or use BestOfNPipeline (--method best_of_n), which scores all "
            "candidates together."
        )


def require_gradient(reward: Reward, who: str) -> None:
    """Refuse a reward without a gradient, in the name of `who` needs one."""
    if reward.differentiable:
        return
    lacking = [r for r in leaves(reward) if not r.differentiable] or [reward]
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


def rate(
    reward: Reward, media: Tensor, cases: Sequence[Case], cache: ScoreCache | None = None, memo: Memo | None = None
) -> Score:
    """Score rows without judging whether all of them failed: another chunk may hold a valid one."""
    if isinstance(reward, Composite):
        return _checked(reward, reward.through(media, cases, partial(rate, cache=cache, memo=memo)), cases)
    _check_modality(reward, media, cases)
    if media.ndim == 5 and reward.modality == "image":
        return _per_frame(reward, media, cases, partial(rate, cache=cache, memo=memo))
    if media.requires_grad and torch.is_grad_enabled():  # equal rows have each their own gradient
        return _ask(reward, media, cases)
    ask = _ask if cache is None else partial(_through_cache, cache)
    return memo.through(ask, reward, media, cases) if memo else ask(reward, media, cases)


def _through_cache(cache: ScoreCache, reward: Reward, media: Tensor, cases: Sequence[Case]) -> Score:
    """The rows that the cache has, and what the reward says of the others."""
    keys = cache.keys(reward, media, cases)
    rows = cache.lookup(keys)
    new = [k for k, row in enumerate(rows) if row is None]
    known = [_from_row(row, media) for row in rows if row is not None]
    if new:
        asked = _ask(reward, media[new], [cases[k] for k in new])
        cache.store([keys[k] for k in new], _to_rows(asked))
        known.append(asked)
    cache.count(reward.name, asked=len(new), answered=len(rows) - len(new))
    order = [k for k, row in enumerate(rows) if row is not None] + new
    return Score.concat(known).select(torch.tensor(order).argsort())


def _per_frame(reward: Reward, media: Tensor, cases: Sequence[Case], ask: Ask) -> Score:
    """An image reward judges a video by the mean over its frames; one unreadable frame makes the row invalid."""
    frames = media.shape[1]
    if getattr(reward, "listwise", False):  # frames of one time are compared, never those of one video
        moments = Score.concat([ask(reward, media[:, k], cases) for k in range(frames)])
        each = moments.select(torch.arange(len(moments)).view(frames, -1).T.flatten())
    else:
        each = ask(reward, media.flatten(0, 1), [case for case in cases for _ in range(frames)])
    parts = {name: part.view(-1, frames).mean(1) for name, part in each.parts.items()}
    return Score(each.total.view(-1, frames).mean(1), parts, each.valid.view(-1, frames).all(1))


def _ask(reward: Reward, media: Tensor, cases: Sequence[Case]) -> Score:
    """What the reward says of the rows it can read; the others are invalid whatever it would say.

    Unreadable are pixels that are not finite and, where the prompt counts, half characters that no tokenizer takes.
    """
    sound = media.detach().isfinite().flatten(1).all(1)  # (B,)
    if getattr(reward, "reads_prompt", False):
        sound = sound & torch.tensor([_is_text(case.prompt) for case in cases], device=sound.device)
    if bool(sound.all()):
        return _checked(reward, reward(media, cases), cases)
    if not bool(sound.any()):
        return Score(torch.full((len(cases),), torch.nan, device=media.device))
    rows = [case for case, fine in zip(cases, sound.tolist(), strict=True) if fine]
    return _checked(reward, reward(media[sound], rows), rows).spread(sound)


def _furthest(media: Tensor) -> float:
    """The largest finite value without its sign; one pass over the pixels where all are finite."""
    if not media.numel():
        return 0.0
    low, high = (float(end) for end in media.aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return max(-low, high)
    return float(media.nan_to_num(0.0, 0.0, 0.0).abs().max())


def _is_text(prompt: str) -> bool:
    try:
        prompt.encode()
    except UnicodeEncodeError:  # a lone surrogate, as JSON may hold
        return False
    return True


def _checked(reward: Reward, found: Tensor | Score, cases: Sequence[Case]) -> Score:
    """The answer as a Score, or InvalidReward where it breaks the contract."""
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
    if 0 in media.shape[1:]:
        raise ConfigError(f"media has shape {tuple(media.shape)}, so its pictures have no pixels.")
    if not media.is_floating_point():
        raise ConfigError(
            f"media has dtype {media.dtype}; rewards take floats in [0, 1]. Divide 8-bit levels by 255: media / 255."
        )
    if (most := _furthest(media.detach())) > FAR:
        raise ConfigError(f"media has values up to {most:g}; rewards take [0, 1]. Divide 8-bit levels by 255.")
    if len(media) != len(cases) or not cases:
        raise ConfigError(
            f"there are {len(media)} images and {len(cases)} cases; scoring needs one case per image, and at least one."
        )
    if chunk is not None and chunk < 1:
        raise ConfigError(
            f"chunk is {chunk}, but scoring goes through at least 1 row at a time. Leave it out to score all at once."
        )
    if not isinstance(reward, Composite):  # its parts may see some rows only
        _check_modality(reward, media, cases)


def _check_modality(reward: Reward, media: Tensor, cases: Sequence[Case]) -> None:
    if reward.modality == "video" and media.ndim == 4:
        raise ConfigError(
            f"reward '{reward.name}' judges videos (B, F, 3, H, W), but got images of shape {tuple(media.shape)}."
        )
    if reward.modality == "edit" and any(case.source is None for case in cases):
        raise ConfigError(
            f"reward '{reward.name}' judges edits, but a case has no source image. Give each case the edited image."
        )
