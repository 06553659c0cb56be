"""Case: what was asked. Reading prompts from text, JSONL; batching and repeating into groups."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request; it owns its seed, so its image does not depend on its neighbours in a batch."""

    prompt: str
    seed: int = 0
    source: Image.Image | None = None  # the image to edit
    control: Image.Image | None = None  # the condition a ControlNet reads
    reference: Image.Image | None = None  # what a reward may compare with
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def with_seed(self, seed: int) -> Case:
        return replace(self, seed=seed)


def as_prompts(given: Any) -> Any:
    """What a stock call takes where cases stand in place of prompts."""
    if isinstance(given, Case):
        return given.prompt
    if isinstance(given, list | tuple) and any(isinstance(each, Case) for each in given):
        return [each.prompt if isinstance(each, Case) else each for each in given]
    return given


def read_cases(path: str | Path, *, seed: int = 0) -> list[Case]:
    """Cases from a text file (a prompt a line) or JSONL (`prompt`, optional `seed`, `metadata`)."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a prompt may hold other separators, such as U+2028
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"cannot read prompts from '{path}': {e}. Give a .txt (one prompt a line) or .jsonl file."
        ) from e
    cases: list[Case] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            cases.append(_parse(line, path, number, seed + len(cases)))
    if not cases:
        raise ConfigError(f"'{path}' holds no prompt. Put one prompt on each line.")
    return cases


def _parse(line: str, path: Path, number: int, seed: int) -> Case:
    if path.suffix not in (".jsonl", ".ndjson"):
        return Case(prompt=line.strip(), seed=seed)
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:  # bad syntax, a number of thousands of digits, bottomless nesting
        raise ConfigError(
            f"{path}:{number} is not JSON ({e}). Each line of a .jsonl file is one object with a 'prompt'."
        ) from e
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ConfigError(f"{path}:{number} has no text under 'prompt': {line[:80]}")
    own, given = row.get("seed", seed), row.get("metadata", {})
    if not isinstance(own, int) or isinstance(own, bool):
        raise ConfigError(f"{path}:{number} has seed {own!r}, but a seed is a whole number.")
    if not isinstance(given, dict):
        raise ConfigError(f"{path}:{number} has metadata {given!r}, but metadata is an object of names and values.")
    rest = {k: v for k, v in row.items() if k not in ("prompt", "seed", "metadata")}
    return Case(prompt=row["prompt"], seed=own, metadata={**rest, **given})


def derived_seed(seed: int, *stream: str | int) -> int:
    """A seed below 2^48 that depends on `seed` and the named stream only; different streams share no noise."""
    digest = hashlib.sha256(repr((int(seed), *stream)).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def candidate_seed(seed: int, candidate: int) -> int:
    """The seed of a case's candidate: the first is the case itself, the others draw noise that no other case draws."""
    return derived_seed(seed, "candidate", candidate) if candidate else seed


def row_seed(seed: int, row: int) -> int:
    """The seed of a batch's row where one generator serves them all: the first row has the generator's own."""
    return derived_seed(seed, "row", row) if row else seed


def batched(rows: Sequence[T], size: int) -> Iterator[list[T]]:
    """Consecutive chunks of at most `size`."""
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])


def repeat(cases: Sequence[Case], times: int) -> list[Case]:
    """Each case `times` in a row, as its candidates: the first keeps the case's own seed."""
    return [case.with_seed(candidate_seed(case.seed, k)) for case in cases for k in range(times)]
