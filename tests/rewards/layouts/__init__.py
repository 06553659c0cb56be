"""Names and shapes of published checkpoints: `a.{0-2}.b` stands for a.0.b, a.1.b and a.2.b."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def layout(name: str, part: str = "entries") -> dict[str, tuple[int, ...]]:
    """One part of `name`.json, written out."""
    told = json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
    return expanded(told[part])


def expanded(entries: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for pattern, shape in entries.items() for name in _names(pattern)}


def _names(pattern: str) -> list[str]:
    pieces = re.split(r"\{(\d+)-(\d+)\}", pattern)
    spans = [range(int(a), int(b) + 1) for a, b in zip(pieces[1::3], pieces[2::3], strict=True)]
    fixed = pieces[0::3]
    return [
        "".join(itertools.chain.from_iterable(zip(fixed, (*map(str, picks), ""), strict=True)))
        for picks in itertools.product(*spans)
    ]
