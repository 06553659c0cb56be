"""Tiny models that ship with the package, their cards, and the recipes that rebuild them on a CPU.

pipe = zoo.load("shapes-sd3")
image = pipe("two red circles", **zoo.card("shapes-sd3")["call"]).images[0]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.zoo.accuracy import measure
    from diffalign.zoo.recipes import build
    from diffalign.zoo.shelf import card, folder, load, names

_HOMES = {"accuracy": ("measure",), "recipes": ("build",), "shelf": ("card", "folder", "load", "names")}

__all__ = ["build", "card", "folder", "load", "measure", "names"]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"diffalign.zoo.{home}"), name)
    raise AttributeError(f"module 'diffalign.zoo' has no attribute '{name}'")
