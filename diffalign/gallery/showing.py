"""A page from outputs at hand: `show({"stock": out, "tree": better}, prompts, "out/page")`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign import media
from diffalign.bench.sample import dense_steps
from diffalign.errors import ConfigError
from diffalign.gallery import page
from diffalign.gallery.manifest import Heading
from diffalign.gallery.sides import Item, Role, Side, numbered


def show(
    outputs: Mapping[str, Any], prompts: str | Sequence[str], folder: str | Path, *, title: str = "Before and after"
) -> Path:
    """Write a gallery of what pipelines gave back for the same prompts, the first output the baseline.

    Outputs are those of stock or drop-in pipelines; the best image of each prompt is shown, with what a `.report` says
    of it. Gives back the page to open.
    """
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    page.write([side_of(name, output, asked) for name, output in outputs.items()], Path(folder), Heading(title=title))
    return Path(folder) / "index.html"


def side_of(name: str, output: Any, prompts: Sequence[str]) -> Side:
    """The side of one pipeline output."""
    fields, key = media.open_output(output)
    pixels = media.to_tensor(fields[key])
    if not prompts or len(pixels) % len(prompts):
        raise ConfigError(f"'{name}' has {len(pixels)} images for {len(prompts)} prompts, so they cannot be matched.")
    each = len(pixels) // len(prompts)
    report = getattr(output, "report", None)
    items = [
        Item(key=key, prompt=prompt, picture=pixels[i * each], **(_told(report, i) if report else {}))
        for i, (key, prompt) in enumerate(zip(numbered(prompts), prompts, strict=True))
    ]
    role: Role = "proxy"
    roles = {reward: role for item in items for reward in item.scores}
    return Side(name=name, items=items, cost=dict(report.budget) if report else {}, roles=roles)


def _told(report: Any, i: int) -> dict[str, Any]:
    """Seed, scores and step rewards of the best image of prompt i."""
    best = int(report.best[i][0])
    told: dict[str, Any] = {
        "seed": report.seeds[i][best],
        "scores": report.scores.parts_at((i, best)),
        "candidates": int(report.scores.total[i].isfinite().sum()),
    }
    return told | {"steps": dense_steps(report, i)}
