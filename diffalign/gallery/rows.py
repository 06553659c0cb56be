"""Rows that somebody else wrote: JSON lines and objects read with care, values taken for no more than they are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.errors import ConfigError


def read_lines(file: Path, again: str) -> list[tuple[str, dict[str, Any]]]:
    """Every object of a JSONL file with where it stands; `again` says what to do about a file that is none.

    Lines end at newlines only: a prompt may hold other separators. NaN is no number, but null.
    """
    rows = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read '{file}': {e}. {again}") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda _: None)
        except json.JSONDecodeError as e:
            raise ConfigError(f"{file}:{number} is not JSON ({e}). {again}") from e
        if not isinstance(row, dict):
            raise ConfigError(f"{file}:{number} is not an object. {again}")
        rows.append((f"{file}:{number}", row))
    return rows


def read_object(file: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none."""
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"), parse_constant=lambda _: None)
    except (OSError, ValueError) as e:
        raise ConfigError(f"'{file}' cannot be read ({e}). Make the run again.") from e
    return found if isinstance(found, dict) else None


def number(value: Any) -> float | None:
    """A finite number; whole ones of hundreds of digits are none."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:
        return None


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
