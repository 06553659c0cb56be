"""A verb is a frozen dataclass: its fields are its options, its config file's keys and its trailing overrides."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin

import typer

from diffalign.errors import ConfigError

_OVERRIDE = re.compile(r"^[A-Za-z_][\w.]*=")


@dataclass(frozen=True)
class Opt:
    """Marks a field as an option; `positional` takes the first plain words of the command line."""

    help: str
    flag: str = ""  # a short form, such as -n
    positional: bool = False


@dataclass(frozen=True, kw_only=True)
class Verb:
    """What every verb has."""

    NAME: ClassVar[str]  # what people type
    CONFIG_FIRST: ClassVar[bool] = False  # whether the first plain word is a config file, or a shipped one by name
    seed: Annotated[int, Opt("Seed of everything drawn here.")] = 0
    out: Annotated[str | None, Opt("Folder for what is written.")] = None

    @classmethod
    def whole(cls, told: Mapping[str, Any]) -> type[Verb]:
        """The dataclass that settings fill: this one, one with fields that are too heavy for --help, or what they
        ask for."""
        return cls

    def run(self) -> Any:
        """Do the work, print it for people, and give back what --json writes."""
        raise NotImplementedError

    def cost(self) -> dict[str, Any]:
        """What a run would cost, for --dry-run; cheap to compute."""
        return {}

    def status(self, result: Any) -> int:
        """The exit code of a run that ended without an error."""
        return 0


def words(verb: type[Verb], settings: Mapping[str, Any], placed: Sequence[str] = ()) -> str:
    """The command line of a verb with plain words and settings; what is at its default is left out, and keys too."""
    import shlex

    from diffalign.judges.secrets import without_secrets

    defaults = {f.name: f.default for f in dataclasses.fields(verb)}
    told, dotted = ["diffalign", verb.NAME, *placed], []
    for key, value in without_secrets(settings).items():
        if value in (None, (), {}) or value == defaults.get(key):
            continue
        if isinstance(value, Mapping):
            dotted += [f"{key}.{part}={json.dumps(each)}" for part, each in value.items()]
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            told += [f"--{key.replace('_', '-')}", str(each)]
    return shlex.join(told + dotted)


def add(app: typer.Typer, verb: type[Verb]) -> None:
    """Make `verb` a command of `app`."""
    app.command(verb.NAME, help=inspect.getdoc(verb))(_command(verb))


def _command(verb: type[Verb]) -> Any:
    options = _options(verb)
    named = [_parameter(f, hint, opt) for f, hint, opt in options if not opt.positional]
    placed = [(f, opt) for f, _, opt in options if opt.positional]

    def command(**values: Any) -> int:
        words: list[str] = values.pop("words") or []
        shared = {name: values.pop(name) for name in ("config", "dry_run", "json_file", "debug")}
        asked = {name: value for name, value in values.items() if value not in (None, [], ())}
        return _execute(verb, asked, words, shared)

    about = " ".join(f"{f.name.upper()}: {opt.help}" for f, opt in placed)
    about = f"{about} Then settings by name, such as seed=1.".strip()
    many = {f.name for f, hint, opt in options if opt.positional and get_origin(hint) is tuple}
    first = ["[CONFIG]"] if verb.CONFIG_FIRST else []
    shown = [f"[{f.name.upper()}]{'...' if f.name in many else ''}" for f, _ in placed]
    metavar = " ".join([*first, *shown, "[KEY=VALUE]..."])
    words = Annotated[list[str] | None, typer.Argument(metavar=metavar, help=about)]
    parameters = [*named, *(_shared(*row) for row in _SHARED)]
    parameters.append(inspect.Parameter("words", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=words))
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _options(verb: type[Verb]) -> list[tuple[dataclasses.Field[Any], Any, Opt]]:
    """Every field that is an option, with its type; the verb's own first."""
    hints = typing.get_type_hints(verb, include_extras=True)
    found = []
    for f in dataclasses.fields(verb):
        extras = getattr(hints[f.name], "__metadata__", ())
        if extras and isinstance(extras[0], Opt):
            found.append((f, hints[f.name].__origin__, extras[0]))
    return sorted(found, key=lambda row: row[0].name in ("seed", "out"))


_SHARED: list[tuple[str, Any, Any, list[str], str]] = [
    ("config", str | None, None, ["--config", "-c"], "Settings from a YAML file, or a shipped one by name."),
    ("dry_run", bool, False, ["--dry-run"], "Show the resolved settings and the cost; run nothing."),
    ("json_file", str | None, None, ["--json"], "Also write the result as JSON to this file."),
    ("debug", bool, False, ["--debug"], "Show the traceback of an error."),
]


def _shared(name: str, kind: Any, default: Any, flags: list[str], text: str) -> inspect.Parameter:
    metavar = None if kind is bool else "FILE"
    annotation = Annotated[kind, typer.Option(*flags, help=text, metavar=metavar)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(f: dataclasses.Field[Any], hint: Any, opt: Opt) -> inspect.Parameter:
    """The option of one field; unset is None, so that a config file may speak."""
    kind, metavar = _kind(hint)
    name = f"--{f.name.replace('_', '-')}"
    both = kind is bool and not f.name.startswith("no_")  # --no-cache has no opposite of its own
    flags = [f"{name}/--no-{name[2:]}"] if both else [name, *([opt.flag] if opt.flag else [])]
    shown = f" [default: {_shown(f.default)}]" if f.default not in (None, (), MISSING) else ""
    about = typer.Option(*flags, help=opt.help + shown, metavar=metavar, show_default=False)
    annotation = Annotated[kind | None, about]  # type: ignore[valid-type]
    return inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(hint: Any) -> tuple[Any, str | None]:
    """The option type of a field's type, and what its value is called."""
    parts = [part for part in (get_args(hint) if _is_union(hint) else (hint,)) if part is not type(None)]
    first = parts[0]
    if get_origin(first) is typing.Literal:
        return str, "|".join(map(str, get_args(first)))
    if get_origin(first) is tuple:
        return list[str], "TEXT"
    return first, {int: "N", float: "X", str: "TEXT"}.get(first)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (typing.Union, type(int | str))


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def _execute(verb: type[Verb], asked: dict[str, Any], words: list[str], shared: dict[str, Any]) -> int:
    from diffalign import atomic

    settings = _settings(verb, asked, words, shared["config"])
    main = os.environ.get("RANK", "0") == "0"  # of several processes of a launcher one speaks
    if shared["dry_run"]:
        result: Any = {"dry_run": True, "config": as_json(settings), "cost": settings.cost()}
        told = dump(settings) + "".join(f"# {key}: {value}\n" for key, value in result["cost"].items())
        print(told if main else "", end="")
    else:
        if shared["json_file"]:
            atomic.require_file(shared["json_file"])
        result = settings.run()
    if shared["json_file"] and main:
        atomic.write_json(shared["json_file"], result)
    return 0 if shared["dry_run"] else settings.status(result)


def _settings(verb: type[Verb], asked: dict[str, Any], words: list[str], file: str | None) -> Verb:
    """Defaults, then the config file, then options, then trailing overrides."""
    from diffalign import config

    positional = {f.name: opt.help for f, _, opt in _options(verb) if opt.positional}
    overrides = [word for word in words if _OVERRIDE.match(word)]
    plain: list[Any] = [word for word in words if not _OVERRIDE.match(word)]
    if verb.CONFIG_FIRST and plain and file is None:
        file = plain.pop(0)
    if many := [f.name for f, hint, opt in _options(verb) if opt.positional and get_origin(hint) is tuple]:
        first = list(positional).index(many[-1])
        plain[first:] = [tuple(plain[first:])] if plain[first:] else []
    if len(plain) > len(positional):
        raise ConfigError(
            f"'{plain[len(positional)]}' is not understood. Settings are --options or key=value; see --help."
        )
    content = dict(read_config(file)) if file else {}
    content |= {name: tuple(v) if isinstance(v, list) else v for name, v in asked.items()}
    content |= dict(zip(positional, plain, strict=False))
    required = {f.name for f in dataclasses.fields(verb) if f.default is MISSING and f.default_factory is MISSING}
    for name, about in positional.items():
        if name in required and name not in content:
            raise ConfigError(f"{name.upper()} is missing: {about} See --help.")
    return config.build(verb.whole(content | dict(word.split("=", 1) for word in overrides)), content, overrides)


def read_config(name: str) -> Mapping[str, Any]:
    """A YAML file by path, or a shipped one by name from anywhere."""
    from diffalign import config
    from diffalign.errors import UnknownName

    place = Path(name)
    if not place.is_file():
        shipped = {path.stem: path for path in shipped_configs()}
        if name not in shipped:
            raise UnknownName.among("config file or shipped config", name, shipped, "diffalign ls configs")
        place = shipped[name]
    try:
        content = config.parse(place.read_text(encoding="utf-8"), f"'{place}'")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the config '{place}': {e}. Give the path of a YAML file.") from e
    if not isinstance(content or {}, Mapping):
        raise ConfigError(f"'{place}' holds {type(content).__name__}, but a config is a mapping of `key: value` lines.")
    return content or {}


def shipped_configs() -> list[Path]:
    """Every YAML file of the installed `diffalign.configs`."""
    import importlib.resources

    with importlib.resources.as_file(importlib.resources.files("diffalign.configs")) as folder:
        return sorted(folder.rglob("*.yaml"))


def as_json(settings: Verb) -> dict[str, Any]:
    """All settings as JSON has them, without the keys of judges."""
    from diffalign.judges.secrets import without_secrets

    found: dict[str, Any] = json.loads(json.dumps(without_secrets(dataclasses.asdict(settings)), default=str))
    return found


def dump(settings: Verb) -> str:
    """All settings as YAML that runs as a config, without the keys of judges."""
    from diffalign import config
    from diffalign.judges.secrets import without_secrets

    return config.dump(without_secrets(dataclasses.asdict(settings)))
