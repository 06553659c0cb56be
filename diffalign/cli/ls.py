"""`diffalign ls`: what there is to name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from diffalign.cli.verb import Opt, Verb, shipped_configs

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class List(Verb):
    """List rewards, pipelines, models or configs.

    Rewards include those of installed plug-ins (entry points of the group diffalign.rewards).

    \b
    diffalign ls rewards
    diffalign ls pipelines --json pipelines.json
    diffalign ls models
    diffalign ls configs
    """

    NAME: ClassVar[str] = "ls"
    what: Annotated[
        Literal["rewards", "pipelines", "models", "configs"],
        Opt("rewards, pipelines, models or configs.", positional=True),
    ]

    def run(self) -> Rows:
        listed, notes = {"rewards": _rewards, "pipelines": _pipelines, "models": _models, "configs": _configs}[
            self.what
        ]()
        print_table([row | note for row, note in zip(listed, notes, strict=True)])
        return listed


def print_table(rows: Rows) -> None:
    """Rows with the same keys as a table; nothing is cut off."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*(rows[0] if rows else ["nothing here"]))
    for row in rows:
        table.add_row(*("-" if value is None else _shown(value) for value in row.values()))
    Console().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " to ".join(f"{v:g}" for v in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _rewards() -> tuple[Rows, Rows]:
    from diffalign import registry

    infos = registry.rewards()
    names = ("name", "modality", "differentiable", "range", "installable")
    listed = [{name: getattr(info, name) for name in names} for info in infos]
    for row in listed:
        row["range"] = list(row["range"]) if row["range"] else None
    return listed, [{"meaning": info.meaning} for info in infos]


def _pipelines() -> tuple[Rows, Rows]:
    from diffalign import registry

    listed = [{"name": info.name, "class": info.target, "source": info.source} for info in registry.pipelines()]
    return listed, [{} for _ in listed]


def _models() -> tuple[Rows, Rows]:
    from diffalign.cli.zoo import model_rows

    listed = model_rows()
    return listed, [{} for _ in listed]


def _configs() -> tuple[Rows, Rows]:
    listed, notes = [], []
    for path in shipped_configs():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        listed.append({"name": path.stem, "kind": path.parent.name})
        notes.append({"command": first.removeprefix("#").strip()})
    return listed, notes
