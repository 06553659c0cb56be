"""Sides: what each system made of the prompts, before any file is written; items are matched by key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Picture: TypeAlias = "Image.Image | Tensor | Path"  # a tensor is (3, H, W) or (F, 3, H, W) in [0, 1]

Role = Literal["proxy", "heldout", "truth", "part"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt by one system."""

    key: str  # what other systems' items of the same prompt and seed have too
    prompt: str
    picture: Picture | None
    missing: str = ""  # why there is no picture
    seed: int | None = None
    scores: Mapping[str, float | None] = field(default_factory=dict)  # None where invalid
    tags: tuple[str, ...] = ()
    inputs: Mapping[str, Picture] = field(default_factory=dict)  # source, control, reference
    instruction: str | None = None  # of an edit
    command: str | None = None  # reproduces this very image
    steps: Mapping[str, Sequence[float | None]] | None = None  # levels and rewards: the dense step rewards
    checks: Sequence[Mapping[str, Any]] = ()  # name, passed, note: what a judge looked at
    candidates: int | None = None
    samples: Sequence[tuple[int, Picture]] = ()  # the same prompt after other training steps


@dataclass(frozen=True, kw_only=True)
class Side:
    """One system and all its items."""

    name: str
    items: Sequence[Item]
    card: Mapping[str, Any] | None = None
    cost: Mapping[str, float] = field(default_factory=dict)  # per prompt
    diversity: float | None = None  # of a prompt's own images
    command: str | None = None
    roles: Mapping[str, Role] = field(default_factory=dict)  # of the rewards in its items' scores
    curves: Sequence[Mapping[str, Any]] = ()


def numbered(prompts: Sequence[str]) -> list[str]:
    """Keys for prompts in their order: a prompt asked several times is matched by which time it is."""
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        keys.append(f"{prompt}\n{seen[prompt]}")
        seen[prompt] += 1
    return keys


def matched(sides: Sequence[Side]) -> list[tuple[str, list[Item | None]]]:
    """Every key with each side's item, in the order of the first side that has it."""
    if not sides:
        raise ConfigError("a gallery needs at least one system to show.")
    tables = [_table(side) for side in sides]
    keys = dict.fromkeys(key for table in tables for key in table)
    return [(key, [table.get(key) for table in tables]) for key in keys]


def named_apart(sides: Sequence[Side]) -> list[Side]:
    """The sides with different names: a second 'tree' becomes 'tree (2)'."""
    seen: Counter[str] = Counter()
    taken = {side.name for side in sides}
    found = []
    for side in sides:
        seen[side.name] += 1
        name, number = side.name, seen[side.name]
        while number > 1 and (name := f"{side.name} ({number})") in taken:
            number += 1
        taken.add(name)
        found.append(replace(side, name=name))
    return found


def roles_of(sides: Sequence[Side]) -> dict[str, Role]:
    """The role of every reward: what steers one system is no independent witness about any."""
    rank: list[Role] = ["proxy", "truth", "heldout", "part"]
    found: dict[str, Role] = {}
    for side in sides:
        for name, role in side.roles.items():
            found[name] = min(role, found.get(name, role), key=rank.index)
    return {name: found[name] for name in sorted(found, key=lambda name: (_SHOWN.index(found[name]), name))}


_SHOWN: list[Role] = ["truth", "heldout", "proxy", "part"]


def _table(side: Side) -> dict[str, Item]:
    table: dict[str, Item] = {}
    for item in side.items:
        if item.key in table:
            raise ConfigError(f"'{side.name}' has two items for '{item.key.splitlines()[0]}'. Give each its own name.")
        table[item.key] = item
    return table
