"""YAML <-> frozen dataclasses: overrides, type checks, and errors that carry the path to the setting."""

from __future__ import annotations

import copy
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml

from diffalign.errors import ConfigError

T = TypeVar("T")
WORDS = {False: ("no", "off"), True: ("yes", "on")}  # what YAML reads as a truth value where a setting means the word


class _Loader(yaml.SafeLoader):
    """Safe YAML where `1e-4` is a number and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' appears twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The same the other way: text that would be read as a number, such as `12e3`, is quoted."""


for _end in (_Loader, _Dumper):
    _end.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def parse(text: str, where: str) -> Any:
    """The value of a piece of YAML; `where` names it in the error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as e:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(e).split())}") from e


def read(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Build `cls` from a YAML file, then apply overrides such as `smc.particles=16`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the config '{path}': {e}. Give the path of a YAML file.") from e
    content = parse(text, f"'{path}'")
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"'{path}' holds {_quote(content)}, but a config is a mapping of `key: value` lines.")
    return build(cls, content, overrides)


def build(cls: type[T], mapping: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "") -> T:
    """Build the dataclass `cls` from a mapping; `where` is the dotted path that errors start with."""
    content: Any = copy.deepcopy(dict(mapping))
    for override in overrides:
        _apply(content, override)
    built: T = _dataclass(cls, content, where)
    return built


def settings(cls: type[T], given: T | Mapping[str, Any] | None, where: str) -> T:
    """A config as a caller gives it: the dataclass itself, a mapping of its fields, or None for the defaults."""
    if isinstance(given, cls):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {type(given).__name__}, but it takes a {cls.__name__} or a mapping.")
    return build(cls, given or {}, where=where)


def dump(config: Any) -> str:
    """YAML text that `build` turns back into an equal object."""
    return say(plain(config))


def say(content: Any) -> str:
    """Plain values as YAML text that `parse` turns back into them."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`, or ConfigError with path, value and expected type; types beyond YAML pass through."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union(value, args, where)
    if origin is typing.Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        if isinstance(value, bool) and (word := next((w for w in WORDS[value] if w in args), None)):
            return word
        raise _wrong(value, "one of " + ", ".join(map(repr, args)), where, value, args)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else _dataclass(hint, value, where)
    kind = origin or hint
    if kind in (tuple, list, Sequence):
        return _sequence(value, kind, args, where)
    if kind in (dict, Mapping):
        return _mapping(value, args, where)
    return _scalar(value, kind, where)


def _dataclass(cls: Any, content: Any, where: str) -> Any:
    if not isinstance(content, Mapping):
        raise _wrong(content, f"a mapping with the keys of {cls.__name__}", where)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in content.items():
        if key not in fields:
            raise unknown_key(str(key), list(fields), where)
        values[key] = convert(value, hints[key], _join(where, key))
    missing = [_join(where, f.name) for f in fields.values() if f.name not in values and _required(f)]
    if missing:
        raise ConfigError(f"no value for {', '.join(missing)}, and there is no default. Add it to the config.")
    return cls(**values)


def unknown_key(key: str, known: Sequence[str], where: str) -> ConfigError:
    """The error for a key nobody reads, with the nearest one that exists."""
    near = get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f" Did you mean '{_join(where, near[0])}'?" if near else ""
    return ConfigError(f"unknown key '{_join(where, key)}'.{hint} Known here: {', '.join(known) or 'none'}.")


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _union(value: Any, args: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in args:
        return None
    choices = [a for a in args if a is not type(None)]
    for choice in sorted(choices, key=lambda a: a is not type(value)):  # an exact match first: True stays a bool
        try:
            return convert(value, choice, where)
        except ConfigError as e:
            if len(choices) == 1 or (dataclasses.is_dataclass(choice) and isinstance(value, Mapping)):
                raise e
    raise _wrong(value, " or ".join(_name(a) for a in args), where)


def _sequence(value: Any, kind: Any, args: tuple[Any, ...], where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong(value, "a list", where)
    fixed = kind is tuple and args and args[-1] is not Ellipsis
    if fixed and len(value) != len(args):
        raise _wrong(value, f"a list of {len(args)}", where)
    hints = args if fixed else [args[0] if args else Any] * len(value)
    items = [convert(v, h, f"{where}[{k}]") for k, (v, h) in enumerate(zip(value, hints, strict=True))]
    return items if kind is list else tuple(items)


def _mapping(value: Any, args: tuple[Any, ...], where: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(value, "a mapping", where)
    key_hint, value_hint = args or (Any, Any)
    return {convert(k, key_hint, f"{where} (key)"): convert(v, value_hint, _join(where, k)) for k, v in value.items()}


def _scalar(value: Any, kind: Any, where: str) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind in (bool, int, float, str, Path, type(None)) and (type(value) is not kind):
        raise _wrong(value, _name(kind), where)
    return value


def _apply(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"the override '{override}' is not of the form key=value, for instance smc.particles=16.")
    for depth, key in enumerate(keys[:-1], 1):
        inner = content.get(key)
        if inner is None:
            inner = content[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"the override '{override}' goes into '{'.'.join(keys[:depth])}', which is {_quote(inner)}."
            )
        content = inner
    content[keys[-1]] = parse(text, f"the override '{override}'")


def plain(value: Any) -> Any:
    """A config as mappings, lists and scalars, as YAML has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _wrong(value: Any, expected: str, where: str, key: Any = None, known: Sequence[Any] = ()) -> ConfigError:
    near = get_close_matches(str(key), [str(k) for k in known], n=1, cutoff=0.5) if known else []
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return ConfigError(f"{where or 'the config'} is {_quote(value)}, but it takes {expected}.{hint}")


def _quote(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _name(hint: Any) -> str:
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "a path",
        type(None): "nothing",
    }
    return words.get(
        hint, str(hint).replace("typing.", "") if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))
    )


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
