"""How the scores of each reward are spread, as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INK, FAINT, BAR, SOFT, MARK = "#1c1c1e", "#6b6b70", "#4c7fb8", "#e9eef4", "#c2382c"
ACROSS = 3  # panels in a row, at most


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What one panel shows."""

    name: str
    values: list[float]  # valid scores
    invalid: int
    typical: tuple[float, float] | None = None  # of the reward's card


def draw(panels: Sequence[Panel], file: Path) -> None:
    """One panel a reward: a histogram, its mean, and the range that its card calls typical."""
    import io

    import matplotlib

    from diffalign import atomic

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(ACROSS, len(panels)) if len(panels) != 4 else 2
    lines = math.ceil(len(panels) / columns)
    size = (max(5.2, 4.2 * columns), 0.4 + 2.9 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels, strict=False):
        _panel(axis, panel)
    if any(_shaded(panel) for panel in panels):
        figure.supxlabel("shaded: where scores usually lie", x=0.99, ha="right", fontsize=8, color=FAINT)
    held = io.BytesIO()
    figure.savefig(held, dpi=130, format="png")
    plt.close(figure)
    atomic.write_bytes(file, held.getvalue())


def _panel(axis: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    name = panel.name if len(panel.name) <= 34 else f"{panel.name[:33]}…"
    axis.set_title(name.replace("$", r"\$"), fontsize=11, loc="left", color=INK, fontweight="bold", pad=16)
    told = f"{len(panel.values)} image{'s' * (len(panel.values) != 1)}"
    told += f", {panel.invalid} invalid" if panel.invalid else ""
    axis.text(0, 1.03, told, transform=axis.transAxes, fontsize=8, color=FAINT)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#b9bcc2")
    axis.tick_params(colors=FAINT, labelsize=8, length=3)
    axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.grid(axis="y", color=SOFT, linewidth=0.8)
    axis.set_axisbelow(True)
    if not panel.values:
        axis.text(0.5, 0.5, "no valid score", transform=axis.transAxes, ha="center", va="center", color=FAINT)
        axis.set(xticks=[], yticks=[])
        return
    low, high = _ends(panel.values)
    axis.hist(panel.values, bins=_bins(panel.values), range=(low, high), color=BAR, edgecolor="white", linewidth=0.6)
    axis.set_xlim(low, high)
    if shaded := _shaded(panel):
        axis.axvspan(*shaded, color=SOFT, zorder=0)
    mean = sum(panel.values) / len(panel.values)
    axis.axvline(mean, color=MARK, linewidth=1.4)
    axis.text(1, 1.03, f"mean {mean:.4g}", transform=axis.transAxes, ha="right", fontsize=8, color=MARK)


def _shaded(panel: Panel) -> tuple[float, float] | None:
    """The typical range, where the axis shows some of it."""
    if panel.typical is None or not panel.values:
        return None
    low, high = _ends(panel.values)
    return panel.typical if panel.typical[0] < high and panel.typical[1] > low else None


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the axis; equal scores get a width of their own."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.04 or max(abs(low) * 0.05, 0.01)
    return low - margin, high + margin


def _bins(values: Sequence[float]) -> int:
    """About as many bins as the square root of the images, so that few images make no comb."""
    return max(8, min(40, round(2 * math.sqrt(len(values))))) | 1  # odd: equal scores stand in the middle of a bar
