"""What an alarm looks like on disk, and the figure of a run: the base model's pictures beside the present ones.

OUT/alarms/step-40-saturation_high/ holds alarm.json and sheet.png.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign import atomic, media
from diffalign.train.watch import Alarm

SHOWN = 12  # pairs on a sheet
PROXY, TRUTH, HELDOUT, INK, SOFT = "#c2382c", "#1b7f4c", "#2f5fa8", "#1c1c1e", "#75757a"
LINES = (
    ("truth", "truth", TRUTH, "-", "o"),
    ("proxy", "proxy", PROXY, "--", "s"),
    ("heldout", "held out", HELDOUT, ":", "^"),
)


def write_alarm(
    alarm: Alarm,
    out: str | Path,
    base: Tensor,
    now: Tensor,
    *,
    prompts: Sequence[str] | None = None,
    rewards: tuple[Tensor, Tensor] | None = None,
) -> Path:
    """Write the folder of an alarm and return it; media are those of the first and of this evaluation.

    `prompts` has the text of every image, `rewards` the proxy's of both evaluations.
    """
    from diffalign.bench.sheet import Entry, Picture, contact_sheet  # which measures trainings too, and imports them

    folder = Path(out) / "alarms" / f"step-{alarm.step}-{alarm.signature}"
    entries = []
    for k in list(alarm.images or range(len(now)))[:SHOWN]:
        scores = [_finite(column[k]) for column in rewards] if rewards else [None, None]
        sides = zip((base, now), scores, strict=True)
        pair = [Picture(image=_still(pixels[k]), score=score) for pixels, score in sides]
        entries.append(Entry(prompt=prompts[k] if prompts else f"image {k}", pictures=pair))
    title = f"{alarm.signature.replace('_', ' ')} at step {alarm.step}"
    sheet = contact_sheet(entries, title=title, subtitle=alarm.says, labels=("base model", f"step {alarm.step}"))
    atomic.write_image(folder / "sheet.png", sheet)
    atomic.write_json(folder / "alarm.json", alarm.json())
    return folder


def plot(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """The figure of a run from the lines of its metrics.jsonl; those without an evaluation are passed over."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7))
    figure.subplots_adjust(left=0.075, right=0.985, top=0.955, bottom=0.075, hspace=0.3, wspace=0.2)
    judged = [row for row in rows if _number(row, "proxy_gain") is not None]
    seen = judged or [row for row in rows if _number(row, "proxy") is not None]
    _rewards(axes[0, 0], seen)
    _against(axes[0, 1], seen)
    _line(axes[1, 0], seen, "diversity", "within prompts", TRUTH, "-", "o")
    _line(axes[1, 0], seen, "diversity_across", "across prompts", HELDOUT, ":", "^")
    axes[1, 0].axhline(1, color=SOFT, linewidth=0.8)
    _dress(axes[1, 0], "Variety", "share of the base model's")
    axes[1, 0].set_ylim(0, max(1.05, axes[1, 0].get_ylim()[1]))
    far = "kl_base" if any("kl_base" in row for row in seen) else "kl"
    _line(axes[1, 1], seen, far, "KL", INK, "-", "o")
    _dress(axes[1, 1], "Distance to the base model", "KL, nats", legend=False)
    held = [row["step"] for row in seen if (_number(row, "alarms") or 0) > 0]
    for axis in (axes[0, 0], axes[1, 0], axes[1, 1]):
        axis.set_xlabel("step")
        for k, step in enumerate(held):
            label = "a rule of the watch holds" if k == 0 else None
            axis.axvline(step, color=PROXY, linewidth=0.8, alpha=0.35, zorder=0, label=label)
    if held:
        axes[0, 0].legend(frameon=False, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130)
    plt.close(figure)
    return atomic.write_bytes(path, drawn.getvalue())


def _rewards(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Gains where they are known, as rewards of different scales share no axis."""
    gains = any(_number(row, "proxy_gain") is not None for row in rows)
    for name, label, colour, style, marker in LINES:
        _line(axis, rows, f"{name}_gain" if gains else name, label, colour, style, marker)
    _dress(axis, "Rewards", "gain since the base model, deviations" if gains else "reward")


def _against(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Truth against proxy, or what is held out where the truth is not known, from the first evaluation on."""
    name, label, colour = next(
        ((n, text, c) for n, text, c, *_ in LINES if n != "proxy" and any(_number(r, n) is not None for r in rows)),
        ("heldout_gain", "held out", HELDOUT),
    )
    across = "proxy" if any(_number(row, "proxy") is not None for row in rows) else "proxy_gain"
    points = [
        (row, x, y) for row in rows if (x := _number(row, across)) is not None and (y := _number(row, name)) is not None
    ]
    axis.plot(
        [x for _, x, _ in points], [y for _, _, y in points], color=colour, marker="o", markersize=4, linewidth=1.2
    )
    for row, x, _ in points:
        ends = (_number(row, f"{name}_lo"), _number(row, f"{name}_hi"))
        if None not in ends:
            axis.plot([x, x], ends, color=colour, linewidth=0.8, alpha=0.5)
    for (row, x, y), side in zip(points[:1] + points[1:][-1:], ("left", "right"), strict=False):
        place = {"xytext": (6 if side == "left" else -6, -14), "textcoords": "offset points", "ha": side}
        axis.annotate(f"step {row['step']}", (x, y), fontsize=9, color=INK, **place)
    axis.set_xlabel("proxy" if across == "proxy" else "gain of the proxy, deviations")
    unit = "held out, deviations" if name.startswith("heldout") else label  # members of a panel share no other unit
    _dress(axis, f"What the proxy stands for: {label} against proxy", unit, legend=False)


def _line(
    axis: Any, rows: Sequence[Mapping[str, Any]], name: str, label: str, colour: str, style: str, marker: str
) -> None:
    points = [(row["step"], y) for row in rows if (y := _number(row, name)) is not None]
    if points:
        xs, ys = zip(*points, strict=True)
        axis.plot(xs, ys, color=colour, linestyle=style, marker=marker, markersize=4, linewidth=1.5, label=label)


def _dress(axis: Any, title: str, unit: str, *, legend: bool = True) -> None:
    axis.set_title(title, fontsize=11, loc="left", color=INK)
    axis.set_ylabel(unit)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9)


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _finite(value: Tensor) -> float | None:
    found = float(value)
    return found if math.isfinite(found) else None


def _still(pixels: Tensor) -> Any:
    """A picture, or the middle frame of a video, as PIL."""
    return media.to_pil(pixels[len(pixels) // 2] if pixels.ndim == 4 else pixels)
