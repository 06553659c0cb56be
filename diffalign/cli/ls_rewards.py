"""`diffalign ls rewards`: every reward as a row, or the whole card of some."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import textwrap
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffalign.errors import UnknownName

if TYPE_CHECKING:
    from diffalign.registry import RewardInfo

Rows = list[dict[str, Any]]
PROGRAMS = {"pytesseract": ("tesseract", "apt install tesseract-ocr")}  # what a module calls, and how it comes here
WIDE = 120  # columns of a terminal from which costs have room in the table
_LISTED = ("name", "modality", "gradient", "range", "typical", "memory", "cost", "proof", "here")
_NARROW = ("name", "modality", "gradient", "range", "typical", "here")


def rows() -> Rows:
    """Everything that is known of every reward without importing it."""
    from diffalign import registry

    return [_row(info) for info in registry.rewards()]


def cards(names: Sequence[str]) -> Rows:
    """The same of some rewards, with their options and what they say of themselves."""
    from diffalign import registry

    known = {info.name: info for info in registry.rewards()}
    for name in names:
        if name not in known:
            raise UnknownName.among("reward", name, known, "diffalign ls rewards")
    return [_row(known[name]) | _own_words(name) for name in names]


def show(listed: Rows) -> None:
    """A table that leaves out costs where there is no room for them, then meanings, then what is to be installed."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    columns = _LISTED if console.width >= WIDE else _NARROW
    table = Table(box=SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, no_wrap=name in ("name", "range", "typical"), overflow="fold")
    for row in listed:
        told = {**row, "gradient": row["differentiable"], "here": "yes" if not row["install"] else "no"}
        table.add_row(*(_said(told[name]) for name in columns))
    console.print(table)
    for row in listed:
        print(textwrap.fill(f"{row['name']}: {row['meaning']}", console.width, subsequent_indent="  "))
    _show_missing(listed)
    print("\nA whole card: diffalign ls rewards NAME")


def show_cards(found: Rows) -> None:
    """Every field of each card, wrapped to the terminal."""
    for row in found:
        print(textwrap.fill(f"{row['name']}: {row['meaning']}", _width(), subsequent_indent="  "))
        fields = {"gradient": row["differentiable"], **{name: row[name] for name in _FIELDS}}
        fields |= {"weights": _weights(row), "here": "yes" if not row["install"] else "; ".join(row["install"])}
        for name, value in fields.items():
            _field(name.replace("_", " "), _said(value))
        for k, option in enumerate(row["options"]):
            _field("" if k else "options", _said_option(option))
        for paragraph in row["about"].split("\n\n") if row["about"] else ():
            print()
            print(textwrap.fill(paragraph, _width(), initial_indent="  ", subsequent_indent="  "))
        print()


_FIELDS = (
    *("modality", "reads_prompt", "needs", "range", "typical", "memory", "cost", "misses", "proof", "licence"),
    "source",
)


def _row(info: RewardInfo) -> dict[str, Any]:
    row = dataclasses.asdict(info)
    for name in ("range", "typical"):
        row[name] = list(row[name]) if row[name] else None
    return {**row, "missing": list(info.missing), "install": _install(info)}


def _install(info: RewardInfo) -> list[str]:
    """What to run before this reward works here; nothing where it does."""
    from diffalign import registry

    card = registry.cards().get(info.name)
    needs = card.requires if card and info.source == "diffalign" else ()
    steps = [f'pip install "diffalign[{info.extra}]"' if info.extra else f"pip install {' '.join(info.missing)}"]
    programs = [PROGRAMS[module] for module in needs if module in PROGRAMS]
    return (steps if info.missing else []) + [how for program, how in programs if shutil.which(program) is None]


def _show_missing(listed: Rows) -> None:
    """The rewards that each command brings."""
    wanted: dict[str, list[str]] = {}
    for row in listed:
        if row["install"]:
            wanted.setdefault("; ".join(row["install"]), []).append(row["name"])
    for command, names in wanted.items():
        print(f"\nfor {', '.join(names)}:\n  {command}")


def _own_words(name: str) -> dict[str, Any]:
    """Options with their defaults, and the docstring; empty where a reward needs what is not installed."""
    from diffalign import own_rewards, registry

    try:
        target = registry.find_reward(name)
    except ImportError:
        return {"options": [], "about": ""}
    own = {"model"} if name in own_rewards.names() else set()  # the name stands for it
    options = [option for option in _options(target) if option["name"] not in own]
    told = {"options": options, "about": inspect.getdoc(target) or ""}
    return told | ({"reads_prompt": True} if getattr(target, "reads_prompt", False) else {})


def _options(target: Any) -> Rows:
    """The keyword arguments of a class, or those of a function after media and cases."""
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return []
    found, hints = [], _hints(target)
    for parameter in parameters[0 if isinstance(target, type) else 2 :]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        needed = parameter.default is parameter.empty
        hint = hints.get(parameter.name, parameter.annotation)
        kind = "" if hint is parameter.empty else hint if isinstance(hint, str) else inspect.formatannotation(hint)
        default = None if needed else _plain(parameter.default)
        found.append({"name": parameter.name, "type": kind, "default": default, "needed": needed})
    return found


def _hints(target: Any) -> dict[str, Any]:
    """Types with their names resolved; none where some exist for type checkers only."""
    try:
        return typing.get_type_hints(inspect.getattr_static(target, "__init__") if isinstance(target, type) else target)
    except (NameError, TypeError):
        return {}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _weights(row: dict[str, Any]) -> str | None:
    if row["hub"] is None:
        return None
    return f"{row['hub']} at {row['revision']}" if row["revision"] else str(row["hub"])


def _field(name: str, value: str) -> None:
    start = f"  {name:<14} "
    print(textwrap.fill(value, _width(), initial_indent=start, subsequent_indent=" " * 17, break_on_hyphens=False))


def _width() -> int:
    return max(shutil.get_terminal_size().columns, 40)


def _said_option(option: dict[str, Any]) -> str:
    default = "needed" if option["needed"] else repr(option["default"])
    return f"{option['name']}: {default}" + (f"  ({option['type']})" if option["type"] else "")


def _said(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " to ".join(f"{v:g}" for v in value) if isinstance(value, list) else str(value)
