"""What `diffalign score` shows: tables that fit 80 columns, the best and the worst images, and the histogram."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]
_PROMPTS = 5  # of --per-prompt, on the screen; the file has all


def show(table: Rows) -> None:
    """What was found, and below it what it took."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    found, took = Table("reward", box=SIMPLE_HEAD), Table("reward", box=SIMPLE_HEAD)
    for name in ("mean", "95 % interval", "median", "min", "max"):
        found.add_column(name, justify="right")
    for name in ("images", "invalid", "asked", "from cache", "seconds"):
        took.add_column(name, justify="right")
    took.add_column("cached")
    for row in table:
        interval = f"{short(row['lo'])} to {short(row['hi'])}" if row["n"] else "-"
        found.add_row(row["reward"], short(row["mean"]), interval, *(short(row[k]) for k in ("median", "min", "max")))
        counts = [str(row.get(k, "-")) for k in ("n", "invalid", "asked", "from_cache")]
        seconds = f"{row['seconds']:.2f}" if "seconds" in row else "-"
        took.add_row(row["reward"], *counts, seconds, row.get("cached", "-"))
    for shown in (found, took):
        Console(highlight=False, markup=False).print(shown)


def show_references(table: Rows) -> None:
    """What a table of references holds of each reward."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = Table("reward", box=SIMPLE_HEAD)
    for name in ("prompts", "references each", "median", "std"):
        shown.add_column(name, justify="right")
    shown.add_column("hash")
    for row in table:
        least, most = row["references_per_prompt"]
        each = str(least) if least == most else f"{least} to {most}"
        numbers = [str(row["prompts"]), each, short(row["median"]), short(row["std"])]
        shown.add_row(row["reward"], *numbers, row["hash"][:12])
    Console(highlight=False, markup=False).print(shown)


def show_top(picked: Rows, per_prompt: bool) -> None:
    """The chosen images by reward, a line each; of --per-prompt the first few prompts."""
    width = shutil.get_terminal_size().columns
    prompts = list(dict.fromkeys(row["prompt"] for row in picked))
    heading = None
    for row in picked:
        if per_prompt and row["prompt"] not in prompts[:_PROMPTS]:
            continue
        prompt = " ".join(row["prompt"].split())
        above = f"{row['reward']}, {prompt}" if per_prompt else row["reward"]
        if above != heading:
            heading = above
            print(f"\n  {above}"[: width + 1])
        line = f"  {row['which']:5} {short(row['score']):>8}  {row['file']}"
        room = max(width - len(line) - 2, 0)
        print(line if per_prompt or room < 12 else f"{line}  {prompt[:room]}")
    if per_prompt and len(prompts) > _PROMPTS:
        print(f"\n  the other {len(prompts) - _PROMPTS}: top.jsonl")
    print()


def draw(file: Path, table: Rows, rows: Rows) -> None:
    """The spread of every column as a picture."""
    from diffalign import registry
    from diffalign.cli import score_figure

    cards, panels = registry.cards(), []
    for told in table:
        name = told["reward"]
        values = [row[name] for row in rows if row[name] is not None]
        typical = cards[name].typical if name in cards else None
        panels.append(score_figure.Panel(name=name, values=values, invalid=told["invalid"], typical=typical))
    score_figure.draw(panels, file)


def short(value: float | None) -> str:
    """Four decimals, or three digits where those say nothing."""
    if value is None:
        return "-"
    return f"{value:.4f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"
