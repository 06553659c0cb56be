"""The figure of a reward model's training."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign import atomic


def plot(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Loss while learning and on held-out prompts, and the accuracy there, from the lines of metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    figure.subplots_adjust(left=0.07, right=0.985, top=0.92, bottom=0.13, wspace=0.2)
    learnt = [row for row in rows if row.get("loss") is not None]
    looked = [row for row in rows if row.get("accuracy") is not None]
    left.plot([r["step"] for r in learnt], [r["loss"] for r in learnt], color="#b9c0c8", label="learning")
    left.plot([r["step"] for r in looked], [r["heldout_loss"] for r in looked], "o-", color="#20639b", label="held out")
    left.set(title="Loss", xlabel="step")
    left.legend(frameon=False)
    steps = [r["step"] for r in looked]
    right.plot(steps, [r["accuracy"] for r in looked], "o-", color="#20639b")
    right.fill_between(
        steps, [r["accuracy_lo"] for r in looked], [r["accuracy_hi"] for r in looked], color="#20639b", alpha=0.15
    )
    right.axhline(0.5, color="#888888", linewidth=0.8)
    right.set(title="Pairs told apart, held-out prompts", xlabel="step")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130)
    plt.close(figure)
    return atomic.write_bytes(path, drawn.getvalue())
