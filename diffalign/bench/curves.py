"""Pictures of a search report: how the best reward grew, and which steps made or broke an image."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffalign.errors import ConfigError

GOOD, BAD, INK = "#1b7f4c", "#c2382c", "#1c1c1e"
MOST = 8  # prompts in one figure


def draw_steps(report: Any, file: str | os.PathLike[str], *, prompts: list[str] | None = None) -> Path:
    """Bars for the gain of every step, a line for the reward of its completion; a row per prompt, at most 8."""
    told = report.extras.get("dense")
    if told is None:
        raise ConfigError("this report holds no step rewards. Make it with DensePipeline.")
    levels, rows = list(told["levels"]), told["rewards"].tolist()[:MOST]
    plt = _pyplot()
    figure, axes = plt.subplots(len(rows), 1, figsize=(7.5, 0.8 + 2.1 * len(rows)), layout="constrained", squeeze=False)
    for k, (axis, rewards) in enumerate(zip(axes[:, 0], rows, strict=True)):
        gains = told["gains"][k].tolist()
        middles = [(a + b) / 2 for a, b in pairwise(levels)]
        widths = [0.8 * (b - a) for a, b in pairwise(levels)]
        axis.bar(middles, gains, width=widths, color=[GOOD if gain >= 0 else BAD for gain in gains])
        axis.axhline(0, color=INK, linewidth=0.6)
        axis.set_ylabel("gain of the step")
        line = axis.twinx()
        line.plot(levels, rewards, color=INK, marker="o", markersize=3, linewidth=1.2)
        line.set_ylabel("reward")
        axis.set_title(prompts[k] if prompts else f"prompt {k}", fontsize=10, loc="left")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[-1, 0].set_xlabel("step, from noise to image")
    return _saved(figure, plt, file)


def draw_growth(report: Any, file: str | os.PathLike[str]) -> Path:
    """The mean best reward so far against what was spent."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    points = [(nfe, best) for nfe, _, best in report.curve if best == best]
    axis.step([nfe for nfe, _ in points], [best for _, best in points], where="post", color=INK)
    axis.set_xlabel("NFE per prompt")
    axis.set_ylabel(f"best {report.reward} so far")
    axis.set_title(report.method, fontsize=10, loc="left")
    axis.grid(alpha=0.25)
    return _saved(figure, plt, file)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _saved(figure: Any, plt: Any, file: str | os.PathLike[str]) -> Path:
    place = Path(file)
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place, dpi=130)
    plt.close(figure)
    return place
