"""The comparison of trainings as markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.bench.training import DRAWS

UNITS = {"step": ("steps", 1.0, ".0f"), "seconds": ("minutes", 60.0, ".1f"), "nfe": ("million NFE", 1e6, ".2f")}


def table(rows: Sequence[Mapping[str, Any]], *, reference: str | None = None) -> str:
    """What every line of the plan came to, then how soon each reached the reference's truth."""
    parts = [_results(rows, reference)]
    if any("reach" in row for row in rows):
        parts.append(_reached(rows, str(reference)))
    return "\n".join(parts)


def _results(rows: Sequence[Mapping[str, Any]], reference: str | None) -> str:
    over = f" over {reference} |" if any("reach" in row for row in rows) else ""
    heads = f"| run | seeds | truth before | truth after | gain |{over} proxy | steps | minutes | million NFE |"
    heads += " points per million NFE | diversity | KL | alarms |"
    lines = [heads, "|---" * (heads.count("|") - 1) + "|"]
    for row in rows:
        cells = [row["name"], _seeds(row), _shown(row["before"]), _shown(row["after"]), _shown(row["gain"], "+.3f")]
        if over:
            cells.append(_shown(row.get("over_reference"), "+.3f"))
        cells += [_number(row["proxy"], ".3f"), *(_cost(row, axis) for axis in UNITS)]
        variety = row["diversity"] if row["diversity"] is not None else row["diversity_across"]
        cells += [_shown(row["points_per_million"], "+.1f"), _number(variety, ".2f"), _number(row["kl_base"], ".3g")]
        lines.append(f"| {' | '.join([*cells, _alarms(row['alarms'])])} |")
    prompts = sorted({row["prompts"] for row in rows})
    over_what = "seeds alone" if prompts == [1] else f"seeds and {prompts[-1]} prompts" if prompts else "nothing"
    lines += [
        "",
        f"Means with 95 % intervals from {DRAWS} draws over {over_what}, the same draws for every run; of one seed, "
        "over prompts alone. Evaluations of one seed draw the same prompts from the same noise in every run, so gains "
        "and differences are paired. Steps, minutes and NFE are means over seeds, without evaluations; in brackets "
        "minutes with them. Diversity is relative to the base model.",
        "",
    ]
    return "\n".join(lines)


def _reached(rows: Sequence[Mapping[str, Any]], reference: str) -> str:
    lines = [
        f"| to the last truth of {reference} | steps | of its steps | minutes | of its minutes "
        "| million NFE | of its NFE | reached in draws |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"]]
        for axis, (_, unit, form) in UNITS.items():
            found = row["reach"][axis]
            cells += [_place(found, unit, form), _number(found["of_reference"], ".0%")]
        lines.append(f"| {' | '.join([*cells, _number(row['reach']['step']['reached'], '.0%')])} |")
    lines += [
        "",
        "Each evaluation is averaged with its two neighbours (the first and the last with their one) before seeds and "
        "prompts are averaged, step by step as far as all seeds got; between evaluations the curve is a straight line, "
        f"and the first place counts where it is as high as the end of the curve of {reference}. `never` stands where "
        f"it is not reached. A run of fewer seeds is held against the same seeds of {reference}.",
        "",
    ]
    return "\n".join(lines)


def _place(found: Mapping[str, float | None], unit: float, form: str) -> str:
    mean, lo, hi = ("never" if found[k] is None else format((found[k] or 0) / unit, form) for k in ("mean", "lo", "hi"))
    return f"{mean} [{lo}, {hi}]"


def _cost(row: Mapping[str, Any], axis: str) -> str:
    _, unit, form = UNITS[axis]
    wall = f" ({row['wall_seconds'] / 60:.1f})" if axis == "seconds" else ""
    return f"{format(row[axis] / unit, form)}{wall}"


def _seeds(row: Mapping[str, Any]) -> str:
    open_runs = len(row["seeds"]) - row["finished"]
    return f"{len(row['seeds'])}" + (f", {open_runs} not finished" if open_runs else "")


def _shown(found: Mapping[str, float] | None, form: str = ".3f") -> str:
    if found is None:
        return ""
    return f"{format(found['mean'], form)} [{format(found['lo'], form)}, {format(found['hi'], form)}]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _alarms(alarms: Sequence[Mapping[str, Any]]) -> str:
    if not alarms:
        return "none"
    return ", ".join(f"{a['signature']} at {a['step']} (seed {a['seed']})" for a in alarms)
