"""Systems: the same cases and seeds through several, each kept as a run folder from which a later run goes on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign import atomic
from diffalign.errors import ConfigError
from diffalign.gallery import rows
from diffalign.gallery.folders import read_side
from diffalign.gallery.sides import Side

DONE = "settings.json"  # what a finished run was made with


def run_all(made: Mapping[str, Any], out: Path, run: Callable[[str, Path], None]) -> list[Side]:
    """The sides of all systems; `run(name, folder)` makes those that `out`/runs does not hold as `made` says."""
    found = []
    for name, how in made.items():
        folder = out / "runs" / folder_name(name, list(made))
        if rows.read_object(folder / DONE) != how:
            (folder / DONE).unlink(missing_ok=True)
            run(name, folder)
            atomic.write_json(folder / DONE, how)
        found.append(replace(read_side(folder), name=name))
    return found


def folder_name(name: str, names: Sequence[str]) -> str:
    """A folder for a system, whatever characters its name has."""
    plain = [re.sub(r"[^\w.-]", "_", other).strip(".") or "system" for other in names]
    own = plain[list(names).index(name)]
    return own if plain.count(own) == 1 else f"{own}-{list(names).index(name)}"


def require_systems(systems: Mapping[str, Any]) -> None:
    """Refuse a config whose systems are not settings by name."""
    for name, settings in systems.items():
        if not isinstance(settings, Mapping):
            raise ConfigError(f"system '{name}' is {settings!r}, not a mapping such as {{method: tree, n: 8}}.")
