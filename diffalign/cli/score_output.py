"""What `diffalign score` leaves behind: rows as JSONL and CSV, the best and the worst, a summary."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from diffalign.cli.score_entry import Entry
from diffalign.cli.score_pass import Column

Rows = list[dict[str, Any]]
_MANY = 5000  # scores from which a mean is as good as normal, and a bootstrap of gigabytes


def scored_rows(
    entries: Sequence[Entry], columns: Sequence[Column], totals: Sequence[float | None] | None, lost: Mapping[int, str]
) -> Rows:
    """One row per image with every score and part; null is an invalid score, and the reason stands beside it."""
    rows = []
    for k, entry in enumerate(entries):
        row: dict[str, Any] = {"file": _plain(entry.name), "prompt": _plain(entry.prompt)}
        for column in columns:
            row[column.name] = column.values[k]
            row |= {f"{column.name}/{part}": values[k] for part, values in column.parts.items()}
        if totals is not None:
            row["total"] = totals[k]
        if k in lost:
            row["error"] = _plain(lost[k])
        if reasons := {column.name: _plain(column.reasons[k]) for column in columns if k in column.reasons}:
            row["invalid"] = reasons
        rows.append(row)
    return rows


def _plain(text: str) -> str:
    """Text that UTF-8 can hold: names of files and prompts may carry halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode()


def without_parts(rows: Rows, columns: Sequence[Column]) -> Rows:
    parts = {f"{column.name}/{part}" for column in columns for part in column.parts}
    return [{key: value for key, value in row.items() if key not in parts} for row in rows]


def as_csv(rows: Rows) -> str:
    """A table for spreadsheets, where text that would be taken for a formula starts with an apostrophe."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("error", "invalid")))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([_harmless(name) for name in (*names, "error")])
    for row in rows:
        reasons = [f"{name}: {why}" for name, why in row.get("invalid", {}).items()]
        error = "; ".join(([row["error"]] if "error" in row else []) + reasons)
        writer.writerow([_harmless(row.get(name)) for name in names] + [_harmless(error)])
    return file.getvalue()


def _harmless(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@") and value.strip():
        return f"'{value}"
    return value


def summary(column: Column, cached: str) -> dict[str, Any]:
    """What to say of one reward, and what it took."""
    cost = {"asked": column.asked, "from_cache": column.answered, "seconds": round(column.seconds, 3)}
    return {**figures(column.name, column.values), **cost, "cached": cached}


def figures(name: str, values: Sequence[float | None]) -> dict[str, Any]:
    """Mean with its interval, and spread; null where no image has a score."""
    valid = [value for value in values if value is not None]
    told = {"reward": name, **dict.fromkeys(("mean", "lo", "hi", "median", "min", "max"))}
    if valid:
        told |= {**_interval(valid), "median": median(valid), "min": min(valid), "max": max(valid)}
    return {**told, "n": len(valid), "invalid": len(values) - len(valid)}


def _interval(values: Sequence[float]) -> dict[str, float]:
    """The mean and its 95 % interval over images."""
    from diffalign.intervals import bootstrap

    if len(values) <= _MANY:
        return bootstrap(values).json()
    mean, half = fmean(values), 1.96 * stdev(values) / len(values) ** 0.5
    return {"mean": mean, "lo": mean - half, "hi": mean + half}


def whether_cached(reward: Any, keeps: bool) -> str:
    """`yes`, or why a reward is asked every time."""
    from diffalign.score_cache import identity_of
    from diffalign.scoring import leaves

    if not keeps:
        return "off"
    parts = leaves(reward)
    lacking = [part for part in parts if identity_of(part) is None]
    if not lacking:
        return "yes"
    why = "no version" if any(part.version is None for part in lacking) else "options unknown"
    names = ", ".join(part.name for part in lacking)
    return f"no ({why})" if len(lacking) == len(parts) else f"in part ({names}: {why})"


def top(rows: Rows, name: str, most: int, per_prompt: bool) -> Rows:
    """The best and the worst images by one column, of all or of each prompt; where there are few, one may be both."""
    groups: dict[str, Rows] = {}
    for row in rows:
        if row.get(name) is not None:
            groups.setdefault(row["prompt"] if per_prompt else "", []).append(row)
    found: Rows = []
    for group in groups.values():
        ranked = sorted(group, key=lambda row: -row[name])
        for which, chosen in (("best", ranked[:most]), ("worst", ranked[::-1][:most])):
            for rank, row in enumerate(chosen, 1):
                told = {"reward": name, "which": which, "rank": rank, "score": row[name]}
                found.append({**told, "file": row["file"], "prompt": row["prompt"]})
    return found


def write(out: Path, rows: Rows, columns: Sequence[Column], parts: bool | None) -> None:
    """scores.jsonl with parts unless they are refused, scores.csv with parts where they are asked for."""
    from diffalign import atomic

    bare = without_parts(rows, columns)
    atomic.write_jsonl(out / "scores.jsonl", bare if parts is False else rows)
    atomic.write_text(out / "scores.csv", as_csv(rows if parts else bare))
