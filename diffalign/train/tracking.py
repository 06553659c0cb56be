"""Curves for people: TensorBoard, trackio or Weights & Biases through Accelerate, beside metrics.jsonl."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffalign.errors import MissingExtra, UnknownName

KNOWN = ("tensorboard", "trackio", "wandb")


def chosen(asked: tuple[str, ...]) -> list[str]:
    """The trackers that are asked for; `auto` is TensorBoard where it is installed."""
    found = []
    for name in asked:
        if name == "auto":
            found += ["tensorboard"] * installed("tensorboard")
        elif name not in KNOWN:
            raise UnknownName.among("tracker", name, ("auto", *KNOWN), "diffalign train --help")
        elif not installed(name):
            raise MissingExtra.of(f"the tracker '{name}'", f"the package {name}", "track")
        else:
            found.append(name)
    return list(dict.fromkeys(found))


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def tracker(accelerator: Any, names: list[str], folder: Path, config: Mapping[str, Any]) -> Callable[..., None]:
    """A function (figures, step) that all trackers hear."""
    if not names:
        return lambda figures, step: None
    plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
    accelerator.init_trackers("diffalign", config=plain, init_kwargs={"wandb": {"dir": str(folder)}})

    def track(figures: Mapping[str, float], step: int) -> None:
        accelerator.log(dict(figures), step=step)

    return track
