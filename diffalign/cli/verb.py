"""A verb is a frozen dataclass: its fields are its options, its config file's keys and its trailing overrides."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin

import typer

from diffalign.errors import ConfigError

_OVERRIDE = re.compile(r"^[A-Za-z_][\w.]*=")


def option(default: Any = MISSING, help: str = "", *, flags: Sequence[str] = (), positional: bool = False) -> Any:
    """A field that is also an option; `positional` takes the first plain words of the command line."""
    return field(default=default, metadata={"help": help, "flags": tuple(flags), "positional": positional})


@dataclass(frozen=True, kw_only=True)
class Verb:
    """What every verb has."""

    NAME: ClassVar[str]  # what people type
    seed: int = option(0, "Seed of everything drawn here.")
    out: str | None = option(None, "Folder for what is written.")

    def run(self) -> Any:
        """Do the work, print it for people, and give back what --json writes."""
        raise NotImplementedError

    def cost(self) -> dict[str, Any]:
        """What a run would cost, for --dry-run; cheap to compute."""
        return {}


def add(app: typer.Typer, verb: type[Verb]) -> None:
    """Make `verb` a command of `app`."""
    app.command(verb.NAME, help=inspect.getdoc(verb))(_command(verb))


def _command(verb: type[Verb]) -> Any:
    hints = typing.get_type_hints(verb)
    given = [f for f in dataclasses.fields(verb) if not f.metadata.get("positional") and _kind(hints[f.name])]

    def command(**values: Any) -> int:
        words: list[str] = values.pop("words") or []
        shared = {name: values.pop(name) for name in ("config", "dry_run", "json_file", "debug")}
        asked = {name: value for name, value in values.items() if value not in (None, [], ())}
        return _execute(verb, asked, words, shared)

    parameters = [_parameter(f, hints[f.name]) for f in given]
    parameters += [_shared(*row) for row in _SHARED]
    names = " ".join(f"[{f.name.upper()}]" for f in dataclasses.fields(verb) if f.metadata.get("positional"))
    metavar = f"{names} [KEY=VALUE]...".strip()
    words = Annotated[list[str] | None, typer.Argument(metavar=metavar, help="Overrides, such as call.guidance_scale=4.")]
    parameters.append(inspect.Parameter("words", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=words))
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


_SHARED: list[tuple[str, Any, Any, list[str], str]] = [
    ("config", str | None, None, ["--config", "-c"], "YAML file of settings, or the name of a shipped one."),
    ("dry_run", bool, False, ["--dry-run"], "Show the resolved settings and the cost; run nothing."),
    ("json_file", str | None, None, ["--json"], "Also write the result as JSON to this file."),
    ("debug", bool, False, ["--debug"], "Show the traceback of an error."),
]


def _shared(name: str, kind: Any, default: Any, flags: list[str], text: str) -> inspect.Parameter:
    annotation = Annotated[kind, typer.Option(*flags, help=text)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(f: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """The option of one field; unset is None, so that a config file may speak."""
    kind, metavar = _kind(hint)
    name = f"--{f.name.replace('_', '-')}"
    flags = [f"{name}/--no-{name[2:]}"] if kind is bool else [name, *f.metadata.get("flags", ())]
    shown = f" [default: {_shown(f.default)}]" if f.default not in (None, (), MISSING, "") else ""
    about = typer.Option(*flags, help=f.metadata.get("help", "") + shown, metavar=metavar, show_default=False)
    annotation = Annotated[kind | None, about]
    return inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(hint: Any) -> tuple[Any, str | None] | None:
    """The option type of a field's type, and what to call its value; None for what only YAML can say."""
    parts = [part for part in (get_args(hint) if _is_union(hint) else (hint,)) if part is not type(None)]
    for part in parts:
        if get_origin(part) is typing.Literal:
            return str, "|".join(map(str, get_args(part)))
        if part in (str, int, float, bool):
            return part, None
        if get_origin(part) is tuple:
            return list[str], None
    return None


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (typing.Union, type(int | str))


def _shown(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def _execute(verb: type[Verb], asked: dict[str, Any], words: list[str], shared: dict[str, Any]) -> int:
    from diffalign import atomic, config

    settings = _settings(verb, asked, words, shared["config"])
    if shared["dry_run"]:
        result: Any = {"dry_run": True, "config": json.loads(_json_of(settings)), "cost": settings.cost()}
        print(config.dump(settings) + "".join(f"# {key}: {value}\n" for key, value in settings.cost().items()), end="")
    else:
        if shared["json_file"]:
            atomic.require_file(shared["json_file"])
        result = settings.run()
    if shared["json_file"]:
        atomic.write_json(shared["json_file"], result)
    return 0


def _settings(verb: type[Verb], asked: dict[str, Any], words: list[str], file: str | None) -> Verb:
    """Defaults, then the config file, then options, then trailing overrides."""
    from diffalign import config

    positional = [f.name for f in dataclasses.fields(verb) if f.metadata.get("positional")]
    overrides = [word for word in words if _OVERRIDE.match(word)]
    plain = [word for word in words if not _OVERRIDE.match(word)]
    if len(plain) > len(positional):
        extra = plain[len(positional)]
        raise ConfigError(f"'{extra}' is not understood. Settings are --options or key=value; see --help.")
    content = dict(read_config(file)) if file else {}
    content |= {name: tuple(v) if isinstance(v, list) else v for name, v in asked.items()}
    content |= dict(zip(positional, plain, strict=False))
    for f in dataclasses.fields(verb):
        if f.metadata.get("positional") and f.default is MISSING and f.name not in content:
            raise ConfigError(f"{f.name.upper()} is missing: {f.metadata['help']} See --help.")
    return config.build(verb, content, overrides)


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


def _json_of(settings: Verb) -> str:
    return json.dumps(dataclasses.asdict(settings), default=str)
