"""Curves of trainings: a thin line for each seed, a thick one with its interval for their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.bench.training import Curve, Group, between, ends, resampled

INK, QUIET = "#1c1c1e", "#75757a"
SCALES = {"step": ("steps", 1.0), "seconds": ("minutes of training", 60.0), "nfe": ("million model rows (NFE)", 1e6)}
BANDS = 4  # lines whose intervals can be shown as bands
GAIN = "Gain of truth, step by step"


def draw(groups: Mapping[str, Group], file: Path, *, title: str, reference: str | None = None) -> Path:
    """Truth against seconds and NFE, its gain by step; proxy, KL and diversity against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in groups if name != reference]
    palette = plt.get_cmap("tab20").colors
    order = [*palette[::2], *palette[1::2]]  # the strong ones first
    colours = {name: order[k % len(order)] for k, name in enumerate(names)} | {reference: INK}
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.6))
    for axis, (along, what, unit) in zip(
        axes[0],
        (("seconds", "Truth over time", "truth"), ("nfe", "Truth over model calls", "truth"), ("step", GAIN, "gain")),
        strict=True,
    ):
        for name, group in groups.items():
            _truth(axis, group, along, name, colours[name], gain=what == GAIN, banded=len(groups) <= BANDS)
        _dress(axis, what, along, unit)
    variety = "diversity" if _known(groups, "diversity") else "diversity_across"
    words = "within prompts" if variety == "diversity" else "across prompts"
    for axis, (figure_name, title_, unit) in zip(
        axes[1],
        (
            ("proxy", "Proxy, the reward that trains", "proxy"),
            ("kl_base", "Distance to the base model", "KL, nats"),
            (variety, f"Diversity {words}", "share of the base model's"),
        ),
        strict=True,
    ):
        for name, group in groups.items():
            _figure(axis, group, figure_name, colours[name])
        _dress(axis, title_, "seconds", unit)
    handles, labels = axes[0][0].get_legend_handles_labels()
    columns = min(len(labels), 5) or 1
    rows = math.ceil(len(labels) / columns)
    figure.suptitle(title, fontsize=13, color=INK, x=0.01, ha="left")
    figure.legend(handles, labels, loc="lower left", ncols=columns, frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.02 + 0.026 * rows, 1, 0.98))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file


def _truth(axis: Any, group: Group, along: str, name: str, colour: Any, *, gain: bool, banded: bool) -> None:
    """A mean with a band, or where bands would hide each other, with its interval at the end."""
    unit, several = SCALES[along][1], len(group.curves) > 1
    for curve in group.curves if several else ():
        truth = curve.truth.mean(1) - (curve.truth[0].mean() if gain else 0)
        axis.plot(curve.cost[along] / unit, truth, color=colour, linewidth=0.7, alpha=0.4)
    places, values = group.along(along)
    values = values - values[0] if gain else values
    around = [ends(draws) for draws in resampled(values).T]
    xs, mean = places / unit, values.mean((1, 2))
    if banded:
        low, high = ([each[side] for each in around] for side in ("lo", "hi"))
        axis.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
    else:
        axis.plot([xs[-1]] * 2, [around[-1]["lo"], around[-1]["hi"]], color=colour, linewidth=1.2, alpha=0.7)
    label = f"{name} ({len(group.curves)} seeds)" if several else name
    axis.plot(xs, mean, color=colour, linewidth=2.2, label=label, **_marks(places))


def _figure(axis: Any, group: Group, figure: str, colour: Any) -> None:
    """A figure against seconds; its mean as far as every seed got."""
    found = [line for curve in group.curves if (line := _line(curve, figure)) is not None]
    several = len(found) > 1
    for xs, ys, curve in found if several else ():
        seconds = curve.cost["seconds"][torch.isin(curve.cost["step"], xs)]
        axis.plot(seconds / 60, ys[:, 0], color=colour, linewidth=0.7, alpha=0.4)
    if found:
        steps, values = between([(xs, ys) for xs, ys, _ in found])
        minutes = group.cost_at(steps, "seconds") / 60
        axis.plot(minutes, values.mean((1, 2)), color=colour, linewidth=2.2, **_marks(steps))


def _marks(places: Tensor) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.5} if len(places) <= 12 else {}


def _line(curve: Curve, figure: str) -> tuple[Tensor, Tensor, Curve] | None:
    rows = [k for k, row in enumerate(curve.rows) if row.get(figure) is not None]
    if not rows:
        return None
    values = torch.tensor([[float(curve.rows[k][figure])] for k in rows], dtype=torch.float64)
    return curve.cost["step"][rows], values, curve


def _known(groups: Mapping[str, Group], figure: str) -> bool:
    return any(_line(curve, figure) is not None for group in groups.values() for curve in group.curves)


def _dress(axis: Any, title: str, along: str, unit: str) -> None:
    axis.set_title(title, fontsize=11, loc="left", color=INK)
    axis.set_xlabel(SCALES[along][0], color=QUIET)
    axis.set_ylabel(unit, color=QUIET)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
