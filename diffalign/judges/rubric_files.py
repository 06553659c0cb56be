"""Rubrics and principles as files that a person can read, edit and version.

name: two-red-circles
version: 1
prompt: two red circles      # or `instruction: ...` for an edit, or `any: true`
items:
  - id: number
    question: Are there two circles?
    type: follow             # follow, keep or quality
    must: true               # whether a no spoils the whole
    weight: 1.0
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from diffalign import atomic, config
from diffalign.errors import ConfigError
from diffalign.rules.rubrics import Item

MOST_ITEMS = 100
LARGEST = 1_000_000  # bytes of a file
SUFFIXES = (".yaml", ".yml")
TEXTS = (".txt", ".md")


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """Checks for the pictures of one prompt, the edits of one instruction, or anything."""

    name: str
    items: tuple[Item, ...]
    version: int = 1  # counts up with every change
    prompt: str | None = None
    instruction: str | None = None
    any: bool = False
    source: str = ""  # with an instruction: a hash of the only picture it is for
    written: str = ""  # by a judge: a mark that no longer fits once a person has edited the file

    def __post_init__(self) -> None:
        told = (self.prompt is not None) + (self.instruction is not None) + self.any
        if told != 1:
            raise ConfigError(
                f"the rubric '{self.name}' says {told} times what it is for. Give one of `prompt`, `instruction` and "
                "`any: true`."
            )
        _require_name("rubric", self.name, self.version)
        if not 1 <= len(self.items) <= MOST_ITEMS:
            raise ConfigError(f"the rubric '{self.name}' has {len(self.items)} items; it takes 1 to {MOST_ITEMS}.")
        ids = [item.id for item in self.items]
        if twice := sorted({one for one in ids if ids.count(one) > 1}):
            raise ConfigError(f"the rubric '{self.name}' has two items with the id '{twice[0]}'. Rename one.")

    @property
    def id(self) -> str:
        """A hash of the content: of everything but how the file is laid out and who wrote it."""
        return _hash({key: value for key, value in asdict(self).items() if key != "written"})

    @property
    def label(self) -> str:
        """How a log names it."""
        return f"rubric {self.name} version {self.version} ({self.id})"

    @property
    def about(self) -> str:
        """The prompt or instruction, empty for any."""
        return self.prompt or self.instruction or ""

    def is_as_written(self, by: str) -> bool:
        """Whether the writer that goes by this mark wrote it and nobody changed it."""
        return self.written == _hash([self.id, by])

    def marked(self, by: str) -> Rubric:
        """The same, with the mark of its writer."""
        return replace(self, written=_hash([self.id, by]))


@dataclass(frozen=True, kw_only=True)
class Principle:
    """A criterion in free text."""

    principle: str
    name: str = "principle"
    version: int = 1

    def __post_init__(self) -> None:
        _require_name("principle", self.name, self.version)
        if not self.principle.strip():
            raise ConfigError(f"the principle '{self.name}' is empty. Say what a good picture is.")

    @property
    def id(self) -> str:
        return _hash(asdict(self))

    @property
    def label(self) -> str:
        return f"principle {self.name} version {self.version} ({self.id})"


def read_rubric(path: str | Path) -> Rubric:
    """The rubric in a YAML file; an error names the file, the line and the field."""
    text = _text(Path(path), "rubric")
    try:
        content = config.parse(text, f"'{path}'")
    except RecursionError as e:
        raise ConfigError(f"'{path}' is nested too deeply to be a rubric.") from e
    if not isinstance(content, Mapping):
        raise ConfigError(f"'{path}' holds {type(content).__name__}, but a rubric is a mapping with `items`.")
    return rubric_of(content, str(path), _lines(text))


def rubric_of(
    content: Any, where: str, lines: Mapping[str, int] | None = None, defaults: Mapping[str, Any] = MappingProxyType({})
) -> Rubric:
    """A rubric from a mapping, or from a list of items or questions; `where` is what errors start with.

    `defaults` are what the content may leave out: name, prompt, instruction, any. An item without an id is `q` and its
    number, and a question may stand for an item.
    """
    given = dict(content) if isinstance(content, Mapping) else {"items": content}
    if not {"prompt", "instruction", "any"}.isdisjoint(given):
        defaults = {key: value for key, value in defaults.items() if key not in ("prompt", "instruction", "any")}
    rows = given.get("items")
    if not isinstance(rows, list | tuple):
        raise ConfigError(f"{_at(where, lines, 'items')}: items is {rows!r}, but it is a list of questions.")
    items = tuple(_item(row, k, where, lines) for k, row in enumerate(rows))
    fields = {key: value for key, value in {**defaults, **given}.items() if key != "items"}
    try:
        return config.build(Rubric, {**fields, "items": items})
    except ConfigError as e:
        named = next((key for key in fields if str(e).startswith((f"{key} ", f"unknown key '{key}'"))), "items")
        raise ConfigError(f"{_at(where, lines, named)}: {e}") from e


def write_rubric(rubric: Rubric, path: str | Path) -> Path:
    """The file that `read_rubric` takes back."""
    content = {key: value for key, value in asdict(rubric).items() if value not in (None, "", False) or key == "name"}
    content["items"] = [asdict(item) for item in rubric.items]
    return atomic.write_text(path, config.say(content))


def read_principle(spec: str | Path) -> Principle:
    """A principle from a file (.yaml with `principle`, .txt, .md), or the text itself."""
    path = Path(spec).expanduser() if isinstance(spec, Path) or spec.endswith((*SUFFIXES, *TEXTS)) else None
    if path is None:
        return Principle(principle=str(spec))
    text = _text(path, "principle")
    if path.suffix in TEXTS:
        content: Any = {"name": path.stem, "principle": text.strip()}
    else:
        content = config.parse(text, f"'{path}'")
    if not isinstance(content, Mapping):
        raise ConfigError(f"'{path}' holds {type(content).__name__}, but a principle is a mapping with `principle`.")
    try:
        return config.build(Principle, {"name": path.stem, **content})
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e


class RubricFolder:
    """The rubrics of a folder by what they are for; of several with one name the latest version counts."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._known: dict[tuple[str, str, str], Rubric] = {}
        files = sorted(p for p in self.path.glob("*") if p.suffix in SUFFIXES) if self.path.is_dir() else []
        sources: dict[tuple[str, str, str], Path] = {}
        for file in files:
            rubric = read_rubric(file)
            key = _key(rubric)
            held = self._known.get(key)
            if held and held.version == rubric.version and held.id != rubric.id:
                raise ConfigError(
                    f"'{sources[key]}' and '{file}' are both version {rubric.version} of the rubric for "
                    f"'{rubric.about or 'anything'}'. Raise the `version` of the one that holds, or delete one."
                )
            if held is None or rubric.version >= held.version:
                self._known[key], sources[key] = rubric, file

    def find(self, prompt: str, instruction: str | None = None, source: str = "") -> Rubric | None:
        """The rubric of an instruction for this source, of an instruction, of the prompt, or the one for anything."""
        asked = [("instruction", instruction), ("prompt", prompt), ("any", "")]
        keys = [(kind, _plain(text), "") for kind, text in asked if text is not None]
        if instruction is not None:
            keys.insert(0, ("instruction", _plain(instruction), source))
        return next((self._known[key] for key in keys if key in self._known), None)

    def add(self, rubric: Rubric) -> Path:
        """Keep a rubric in a file named after what it is for."""
        self._known[_key(rubric)] = rubric
        return write_rubric(rubric, self.path / file_name(rubric))

    def add_next(self, rubric: Rubric) -> Rubric:
        """The same beside what is there for the same: as its next version."""
        held = self._known.get(_key(rubric))
        versioned = rubric if held is None else replace(rubric, version=held.version + 1)
        self.add(versioned)
        return versioned

    def __iter__(self) -> Iterator[Rubric]:
        return iter(list(self._known.values()))  # another thread may add one meanwhile

    def __len__(self) -> int:
        return len(self._known)


def file_name(rubric: Rubric) -> str:
    """Words of what a rubric is for, and a hash that tells it from others."""
    words = re.sub(r"[^a-z0-9]+", "-", rubric.about.lower()).strip("-")[:40].strip("-")
    return f"{words or 'rubric'}-{_hash(_key(rubric))[:8]}-{rubric.version}.yaml"


def _key(rubric: Rubric) -> tuple[str, str, str]:
    kind = "any" if rubric.any else "prompt" if rubric.prompt is not None else "instruction"
    return kind, _plain(rubric.about), rubric.source


def _item(row: Any, k: int, where: str, lines: Mapping[str, int] | None) -> Item:
    content = {"question": row} if isinstance(row, str) else row
    place = _at(where, lines, f"items[{k}]")
    if not isinstance(content, Mapping):
        raise ConfigError(f"{place}: items[{k}] is {row!r}, but an item is a question or a mapping with `question`.")
    named = {"id": f"q{k + 1}", **content}
    if isinstance(named.get("question"), str):
        named["question"] = _plain(named["question"])
    try:
        return config.build(Item, named, where=f"items[{k}]")
    except ConfigError as e:
        field = next((key for key in named if f"items[{k}].{key}" in str(e)), "")
        raise ConfigError(f"{_at(where, lines, f'items[{k}].{field}' if field else f'items[{k}]')}: {e}") from e


def _at(where: str, lines: Mapping[str, int] | None, field: str) -> str:
    """`file:line`, or what came before where the line of the field is not known."""
    known = lines or {}
    line = known.get(field, known.get(field.partition(".")[0]))
    return where if line is None else f"{where}:{line}"


def _lines(text: str) -> dict[str, int]:
    """The line of each field: `name`, `items[0]`, `items[0].question`."""
    found: dict[str, int] = {}
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        found[key.value] = key.start_mark.line + 1
        for k, row in enumerate(value.value if isinstance(value, yaml.SequenceNode) else ()):
            found[f"{key.value}[{k}]"] = row.start_mark.line + 1
            for inner, _ in row.value if isinstance(row, yaml.MappingNode) else ():
                found[f"{key.value}[{k}].{inner.value}"] = inner.start_mark.line + 1
    return found


def _text(path: Path, kind: str) -> str:
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"'{path}' has more than {LARGEST} bytes, so it is no {kind}.")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the {kind} '{path}': {e}. Give the path of a text file.") from e


def _require_name(kind: str, name: str, version: int) -> None:
    if not name.strip() or "\n" in name:
        raise ConfigError(f"a {kind} has the name {name!r}, but a name is one line of text.")
    if version < 1:
        raise ConfigError(f"the {kind} '{name}' has version {version}, but versions count from 1.")


def _plain(text: str) -> str:
    return " ".join(text.split())


def _hash(value: Sequence[Any] | Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
