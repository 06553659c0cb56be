"""What watches a run must not be what trains it: the tower of the variety and the panel beside the rewards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from diffalign import scoring
from diffalign.clip_tower import EMBEDDED, ClipTower
from diffalign.errors import ConfigError
from diffalign.scoring import Reward


def tower(asked: str | None, model: str, raised: Sequence[Reward], say: Callable[[str], None]) -> ClipTower | None:
    """The CLIP that variety is measured in, none that is trained on where there is a choice; None measures pixels."""
    from diffalign import zoo

    name = asked
    if asked == "auto":
        name = EMBEDDED if model in zoo.names() else None
    fooled = [leaf.name for leaf in raised if name is not None and _model_of(leaf) == name]
    if not fooled:
        return None if name is None else ClipTower(name)
    if asked == "auto":
        say(f"variety is measured in pixels: reward '{fooled[0]}' trains on {name}, which would be fooled with it")
        return None
    say(f"variety is measured in {name}, which reward '{fooled[0]}' trains on: take another evaluate.tower")
    return ClipTower(str(name))


def _model_of(reward: Reward) -> Any:
    """The model of a reward's tower, as it was named."""
    return getattr(getattr(reward, "tower", None), "model", None)


def panel(members: Sequence[tuple[Reward, float]], raised: Sequence[Reward]) -> list[tuple[str, Reward]]:
    """The rewards that only watch, by name; names differ, weights mean nothing, and those that train are told."""
    found: dict[str, Reward] = {}
    for reward, weight in members:
        if weight != 1.0:
            raise ConfigError(
                f"the panel gives '{reward.name}' the weight {weight:g}, but it only watches, each member by itself. "
                "Give a list of names."
            )
        if reward.name in found:
            raise ConfigError(f"the panel has two rewards called '{reward.name}'. Leave one out, or rename it.")
        found[reward.name] = reward
        if any(_alike(leaf, other) for leaf in scoring.leaves(reward) for other in raised):
            warnings.warn(
                f"'{reward.name}' is in the panel and in the reward, so it is not held out: it gains what the proxy "
                "gains. Take another reward into the panel.",
                stacklevel=5,
            )
    return list(found.items())


def _alike(one: Reward, other: Reward) -> bool:
    """Whether two rewards are one, as far as their settings say."""
    return one is other or _marks(one) == _marks(other)


def _marks(reward: Reward) -> tuple[Any, ...]:
    function = getattr(reward, "function", None)  # a file that is read twice gives two functions with equal code
    code = getattr(function, "__code__", function)
    return type(reward), reward.name, getattr(reward, "options", None), code
