"""`diffalign ls`: what there is to name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from diffalign.cli import ls_rewards
from diffalign.cli.verb import Opt, Verb, shipped_configs
from diffalign.errors import ConfigError

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class List(Verb):
    """List rewards, pipelines, models, training objectives or configs.

    Rewards include those of installed plug-ins (entry points of the group diffalign.rewards). With names after
    `rewards`, their whole cards: what they see and miss, their options, weights and licence.

    \b
    diffalign ls rewards
    diffalign ls rewards clip shapes
    diffalign ls rewards --json rewards.json
    diffalign ls pipelines --json pipelines.json
    diffalign ls models
    diffalign ls objectives
    diffalign ls configs
    """

    NAME: ClassVar[str] = "ls"
    what: Annotated[
        Literal["rewards", "pipelines", "models", "objectives", "configs"],
        Opt("rewards, pipelines, models, objectives or configs.", positional=True),
    ]
    names: Annotated[tuple[str, ...], Opt("Rewards whose whole cards to show.", positional=True)] = ()

    def __post_init__(self) -> None:
        if self.names and self.what != "rewards":
            raise ConfigError(f"'{self.names[0]}' has no card: names are for `diffalign ls rewards NAME...`.")

    def run(self) -> Rows:
        if self.what == "rewards":
            listed = ls_rewards.cards(self.names) if self.names else ls_rewards.rows()
            (ls_rewards.show_cards if self.names else ls_rewards.show)(listed)
            return listed
        kinds = {"pipelines": _pipelines, "models": _models, "objectives": _objectives, "configs": _configs}
        listed, notes = kinds[self.what]()
        print_table(listed)
        for row, note in zip(listed, notes, strict=False):
            print(f"{row['name']}: {note}")
        return listed


def print_table(rows: Rows) -> None:
    """Rows with the same keys as a table whose names are never cut."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for name in rows[0] if rows else ["nothing here"]:
        table.add_column(name, no_wrap=name == "name")
    for row in rows:
        table.add_row(*("-" if value is None else _shown(value) for value in row.values()))
    Console().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " to ".join(f"{v:g}" for v in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _pipelines() -> tuple[Rows, list[str]]:
    from diffalign import registry

    listed = [{"name": info.name, "class": info.target, "source": info.source} for info in registry.pipelines()]
    return listed, []


def _models() -> tuple[Rows, list[str]]:
    from diffalign.cli.zoo import model_rows

    return model_rows(), []


def _objectives() -> tuple[Rows, list[str]]:
    from diffalign.train import objective

    about = [objective.about(name) for name in objective.names()]
    return [{"name": name, "settings": len(fields)} for name, _, fields in about], [told for _, told, _ in about]


def _configs() -> tuple[Rows, list[str]]:
    shipped = shipped_configs()
    first = [path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip() for path in shipped]
    return [{"name": path.stem, "kind": path.parent.name} for path in shipped], first
