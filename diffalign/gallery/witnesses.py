"""Witnesses: rewards asked about every picture of every side, whoever was steered by what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.gallery.pictures import VIDEOS, Unreadable, read_image
from diffalign.gallery.sides import Item, Role, Side

AT_ONCE = 16  # pictures of one size that a reward sees together


def scored(
    sides: Sequence[Side], reward: Any, role: Role = "heldout", advance: Callable[[int], None] = lambda n: None
) -> list[Side]:
    """The sides with the scores of one reward on every picture that it can read."""
    from diffalign import scoring

    judge = scoring.make_reward(reward)
    found = []
    for side in sides:
        values: list[float | None] = [None] * len(side.items)
        for some in _alike(side.items):
            pixels, cases = torch.stack([p for _, p in some]), [_case(side.items[k]) for k, _ in some]
            given = scoring.score(judge, pixels, cases, all_invalid=True)
            for (k, _), value, valid in zip(some, given.total.tolist(), given.valid.tolist(), strict=True):
                values[k] = value if valid else None
            advance(len(some))
        scores = zip(side.items, values, strict=True)
        items = [replace(item, scores={**item.scores, judge.name: value}) for item, value in scores]
        found.append(replace(side, items=items, roles={judge.name: role, **side.roles}))
    return found


def _alike(items: Sequence[Item]) -> Iterator[list[tuple[int, Tensor]]]:
    """Readable pictures of one size, a few at a time, with the numbers of their items."""
    piles: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    for k, item in enumerate(items):
        pixels = _pixels(item)
        if pixels is None:
            continue
        pile = piles.setdefault(tuple(pixels.shape), [])
        pile.append((k, pixels))
        if len(pile) == AT_ONCE:
            yield piles.pop(tuple(pixels.shape))
    yield from piles.values()


def _case(item: Item) -> Case:
    return Case(prompt=item.prompt, seed=item.seed or 0)


def _pixels(item: Item) -> Tensor | None:
    """The picture as (3, H, W) or (F, 3, H, W) in [0, 1]; None where there is none to read."""
    from PIL import Image

    from diffalign import vision

    picture = item.picture
    if isinstance(picture, Path):
        if picture.suffix.lower() in VIDEOS:
            return None
        try:
            picture = read_image(picture)
        except Unreadable:
            return None  # the page says why it cannot be shown
    if isinstance(picture, Image.Image):
        return vision.to_tensor([picture.convert("RGB")])[0]
    return None if picture is None else picture.detach().float().cpu()
