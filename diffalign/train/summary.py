"""What a run came to: before and after with intervals, what it cost, and what the watch said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.train.overoptimisation import of_run

FIGURES = {"proxy": "proxy", "truth": "truth", "heldout": "heldout", "diversity": "variety"}  # by name in metrics.jsonl


def summary(
    rows: Sequence[Mapping[str, Any]], cost: Mapping[str, float], alarms: Sequence[Any], **more: Any
) -> dict[str, Any]:
    """The content of summary.json from the rows of metrics.jsonl; `chosen` names the step whose weights were saved.

    `after` has the figures of `after_step`: the chosen step, or where that was not evaluated, the last one that was.
    """
    judged = [row for row in rows if row.get("proxy") is not None]
    chosen = more.get("chosen")
    last = next((row for row in judged if row["step"] == chosen), judged[-1] if judged else {})
    return {
        "before": _figures(judged[0]) if judged else {},
        "after": _figures(last),
        "after_step": last.get("step"),
        "watch": of_run(judged),
        "steps": rows[-1]["step"] if rows else 0,
        "seconds": cost["seconds"],
        "model_calls": cost["nfe"],
        "alarms": list(alarms),
        **more,
    }


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {"mean": row[key], "lo": row.get(f"{key}_lo"), "hi": row.get(f"{key}_hi")}
        for name, key in FIGURES.items()
        if row.get(key) is not None
    }


def said(found: Mapping[str, Any]) -> str:
    """One line for people."""
    parts = []
    for name, before in found["before"].items():
        after = found["after"].get(name)
        if after is not None:
            parts.append(f"{name} {_interval(before)} -> {_interval(after)}")
    cost = f"{found['steps']} steps, {found['seconds'] / 60:.1f} minutes, {found['model_calls']:,} model rows"
    at, saved = found["after_step"], found.get("chosen")
    if at is not None and saved is not None and at != saved:
        cost = f"these are the figures of step {at}, the weights saved are those of step {saved}; {cost}"
    return f"{'; '.join(parts)}; {cost}; {len(found['alarms'])} alarm(s)"


def _interval(figure: Mapping[str, Any]) -> str:
    ends = "" if figure["lo"] is None else f" [{figure['lo']:.3f}, {figure['hi']:.3f}]"
    return f"{figure['mean']:.3f}{ends}"
