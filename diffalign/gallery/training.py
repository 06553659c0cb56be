"""Training runs: samples of the same prompts over steps, and how the reward that trains and the others went.

A training run keeps `metrics.jsonl`, a line per step with `step` and any of the curves below, and `samples/step-N`,
each a run folder of the same prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.errors import ConfigError
from diffalign.gallery import rows
from diffalign.gallery.sides import Item, Picture, Side

CHARTS = {  # figures that share a unit share a chart: its y axis, and its curves
    "score": ("proxy", "truth"),
    "gain over the start, in deviations": ("proxy_gain", "truth_gain", "heldout"),
    "variety, 1 at the start": ("diversity", "diversity_across"),
}


def is_training(path: Path) -> bool:
    return (path / "samples").is_dir() or (path / "metrics.jsonl").exists()


def read_training(path: Path, read_run: Callable[[Path], Side]) -> Side:
    """The side a training run shows: its last samples, with the earlier ones to scrub through."""
    steps = sorted((int(found[1]), folder) for folder in (path / "samples").glob("step-*") if (found := _step(folder)))
    if not steps:
        raise ConfigError(f"'{path}' is a training run without samples. Train on until it keeps its first ones.")
    runs = [(step, read_run(folder)) for step, folder in steps]
    last = runs[-1][1]
    over: dict[str, list[tuple[int, Picture]]] = {}
    for step, run in runs:
        for item in run.items:
            if item.picture is not None:
                over.setdefault(item.key, []).append((step, item.picture))
    items: list[Item] = [replace(item, samples=over.get(item.key, [])) for item in last.items]
    name, metrics = path.resolve().name, path / "metrics.jsonl"
    lines = [row for _, row in rows.read_lines(metrics, "Train on from a checkpoint.")] if metrics.exists() else []
    return replace(
        last,
        name=name,
        items=items,
        curves=[chart for y, names in CHARTS.items() if (chart := _chart(name, lines, y, names))],
    )


def _step(folder: Path) -> re.Match[str] | None:
    return re.fullmatch(r"step-(\d+)", folder.name)


def _chart(name: str, lines: Sequence[Mapping[str, Any]], y: str, names: Sequence[str]) -> dict[str, Any] | None:
    """Some figures of the metrics over steps; None where none of them is known."""
    series = []
    for what in names:
        points = [(rows.number(row.get("step")), rows.number(row.get(what))) for row in lines]
        known = [(x, y) for x, y in points if x is not None and y is not None]
        if known:
            series.append({"name": what, "x": [x for x, _ in known], "y": [y for _, y in known]})
    return {"name": name, "x": "step", "y": y, "series": series} if series else None
