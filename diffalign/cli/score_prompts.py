"""Prompts from a file: line k for image k, or by the name of the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffalign.cases import Case
from diffalign.cli.score_entry import Entry
from diffalign.data.named_pictures import named_inputs
from diffalign.errors import ConfigError

NAMED = ("file", "image", "file_name")  # what may hold the name of the image a prompt belongs to


def read(path: Path) -> list[Case]:
    """The cases of a prompt file; the one place here that knows their formats."""
    from diffalign.data.prompt_sets import read_prompts

    return read_prompts(path)


def matched(entries: Sequence[Entry], path: Path) -> list[Entry]:
    """Each image with the prompt the file has for it; pictures that the file names belong to the prompt."""
    cases = read(path)
    column = next((name for name in NAMED if all(isinstance(case.metadata.get(name), str) for case in cases)), None)
    chosen = _in_order(entries, cases, path) if column is None else _by_name(entries, cases, column, path)
    found = []
    for entry, case in zip(entries, chosen, strict=True):
        inputs = {slot: path.parent / name for slot, name in named_inputs(case.metadata).items()}
        metadata = {key: value for key, value in case.metadata.items() if key != column}
        found.append(replace(entry, prompt=case.prompt, metadata=metadata, inputs={**entry.inputs, **inputs}))
    return found


def _in_order(entries: Sequence[Entry], cases: list[Case], path: Path) -> list[Case]:
    if len(cases) != len(entries):
        raise ConfigError(
            f"'{path}' has {len(cases)} prompts for {len(entries)} images. Give one for each, in the order of their "
            "names, or name the images: a .jsonl or .csv file with 'file' and 'prompt'."
        )
    return cases


def _by_name(entries: Sequence[Entry], cases: Sequence[Case], column: str, path: Path) -> list[Case]:
    named: dict[str, Case] = {}
    for case in cases:
        name = Path(case.metadata[column]).as_posix()
        if name in named:
            raise ConfigError(f"'{path}' has two prompts for '{name}'. Keep one.")
        named[name] = case
    taken: dict[str, str] = {}
    for entry in entries:
        fits = next((name for name in _names(entry.name) if name in named), None)
        if fits is None:
            raise ConfigError(f"'{path}' has no prompt for the image '{entry.name}'. Add a row with its name.")
        if fits in taken:
            raise ConfigError(
                f"'{fits}' in '{path}' may be '{taken[fits]}' or '{entry.name}'. Write more of its path there."
            )
        taken[fits] = entry.name
    return [named[name] for name in taken]


def _names(name: str) -> list[str]:
    """What a file may be called in a table: its path, ever less of it, and its name without the ending."""
    parts = Path(name).parts
    return [Path(*parts[k:]).as_posix() for k in range(len(parts))] + [Path(name).stem]
