"""Settings of tree search, and what is left out of them in each of its two modes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from diffalign.errors import ConfigError

BY_MODE: Any = None  # a setting left out: see SETTINGS
SETTINGS = {  # to hunt, go deep below what is good; to sample, look around
    "search": {"strength": 5.0, "c_uct": 0.5, "width": 1.0, "growth": 0.25},
    "sample": {"strength": 2.0, "c_uct": 1.0, "width": 2.0, "growth": 0.5},
}


@dataclass(frozen=True, kw_only=True)
class TreeConfig:
    """Settings of tree search; what is left out of strength, c_uct, width and growth is the mode's in SETTINGS.

    That is settled when the config is made: a copy with another mode keeps what the first one had.
    """

    mode: Literal["search", "sample"] = "search"  # DTS* hunts for the best leaf, DTS draws from the tilted law
    strength: float = BY_MODE  # nats per unit of reward, or per deviation of it: greater trusts good leaves more
    scale: Literal["given", "std"] = "std"  # "std": strength and c_uct are per standard deviation of the first leaves
    calibration: int = 8  # valid leaves that settle that deviation; if they all tie, it waits for one that differs
    c_uct: float = BY_MODE  # DTS* only, in the strength's unit: greater goes back to rarely visited nodes more
    width: float = BY_MODE  # children a node may have after one visit; 1 goes deep sooner
    growth: float = BY_MODE  # power of the visits that allows more: 1 never leaves the root
    parallel: int = 1  # leaves a case has in flight: greater fills a device and knows less when it chooses
    iterations: int = 64  # descents per case where neither the call nor the budget says when to stop
    value_weight: float = 1.0  # visits that a node's own value counts as where one is given: see grow
    value_levels: tuple[int, ...] = ()  # levels that such a value is asked about; empty: all of them
    levels: tuple[int, ...] = ()  # levels that may hold siblings, 0 being the noise; empty: all
    fixed: tuple[int, ...] = ()  # siblings at levels 0, 1, ..., one below: a tree of that shape in place of widening
    visits_start: int = 0  # visits a new node begins with, before the one that made it
    patience: int = 1000  # descents in a row onto finished leaves after which a case counts as searched out

    def __post_init__(self) -> None:
        for name, known in (("mode", ("search", "sample")), ("scale", ("given", "std"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"tree.{name} is {getattr(self, name)!r}. Use one of: {', '.join(known)}.")
        for name, value in SETTINGS[self.mode].items():
            if getattr(self, name) is BY_MODE:
                object.__setattr__(self, name, value)
        for name in ("strength", "c_uct", "width", "growth", "value_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"tree.{name} is {getattr(self, name)}, but it must be finite and not negative.")
        for name, least in (("calibration", 2), ("parallel", 1), ("iterations", 1), ("patience", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"tree.{name} is {getattr(self, name)}, but it must be at least {least}.")
        if self.width == 0 or self.growth > 1:
            raise ConfigError(
                f"tree.width is {self.width} and tree.growth {self.growth}, but a node needs a width above 0, and "
                "growth above 1 would never descend. Leave them out for the mode's own."
            )
        if self.visits_start not in (0, 1):
            raise ConfigError(f"tree.visits_start is {self.visits_start}, but a new node counts as seen 0 or 1 times.")
        if self.levels and self.fixed:
            raise ConfigError(f"tree.levels {self.levels} and tree.fixed {self.fixed} both shape the tree. Keep one.")
        for name, levels in (("levels", self.levels), ("value_levels", self.value_levels)):
            if min((*levels, 0)) < 0:
                raise ConfigError(f"tree.{name} is {levels}, but levels begin at 0, the noise.")
        if min((*self.fixed, 1)) < 1:
            raise ConfigError(f"tree.fixed is {self.fixed}, but a level holds at least 1 child.")

    def branches(self, level: int) -> bool:
        """Whether a level may hold siblings."""
        if self.fixed:
            return level < len(self.fixed) and self.fixed[level] > 1
        return not self.levels or level in self.levels
