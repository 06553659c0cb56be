"""`diffalign zoo build NAME`: train a model from nothing, write it as it ships, and measure it for its card."""

from __future__ import annotations

import json
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from diffalign.errors import UnknownName

RECIPES = {"shapes-sd3": "sd3", "shapes-turbo": "turbo", "shapes-clip": "clip", "shapes-vlm": "vlm"}


def build(name: str, *, out: str | Path, seed: int = 0, resume: bool = True, config: Any = None, n: int = 240) -> Path:
    """Train into `out`, continuing where an earlier run stopped; returns the folder of the finished model.

    `config` replaces the recipe's own settings and `n` the number of images of the measurement.
    """
    if name not in RECIPES:
        raise UnknownName.among("model", name, RECIPES, "diffalign zoo list")
    recipe = import_module(f"diffalign.zoo.{RECIPES[name]}")
    work, started = Path(out), time.monotonic()
    settings = config or recipe.DEFAULT
    target: Path = recipe.make(settings, work=work, seed=seed, resume=resume)
    minutes = (time.monotonic() - started) / 60
    facts = {"name": name, **recipe.FACTS, "seed": seed, "command": f"diffalign zoo build {name} --seed {seed}"}
    facts["bytes"] = sum(f.stat().st_size for f in target.rglob("*") if f.is_file() and f.name != "card.json")
    facts["cost"] = {"minutes": round(minutes, 1), "hardware": "2 CPU cores"}
    write_card(target, facts | recipe.measured(target, seed=seed, n=n))
    return target


def write_card(target: Path, facts: dict[str, Any]) -> None:
    """Write card.json."""
    (target / "card.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
