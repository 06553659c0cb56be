"""Files whose rows name images and prompts: results.jsonl, any JSONL, and parquet."""

from __future__ import annotations

import bisect
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.cli.score_entry import Entry
from diffalign.data.named_pictures import INPUTS, named_inputs
from diffalign.errors import ConfigError, MediaError, MissingExtra
from diffalign.gallery import rows

IMAGE_NAMES = ("image", "file", "file_name", "img", "jpg", "png", "image_path", "path")
PROMPT_NAMES = ("prompt", "caption", "text", "instruction")
_OWN = {"seed", "metadata", "inputs", "instruction", *(name for names in INPUTS.values() for name in names)}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the columns of a table are called; None leaves it to a guess."""

    image: str | None = None
    prompt: str | None = None

    def find(self, names: Sequence[str], where: str) -> tuple[str, str | None]:
        """The columns of images and of prompts; there may be no prompts, unless they were named."""
        image = _pick(names, (self.image,) if self.image else IMAGE_NAMES)
        prompt = _pick(names, (self.prompt,) if self.prompt else PROMPT_NAMES)
        for what, found, missing in (("image", image, image is None), ("prompt", prompt, self.prompt and not prompt)):
            if missing and not found:
                guesses = {"image": IMAGE_NAMES, "prompt": PROMPT_NAMES}[what]
                raise ConfigError(
                    f"{where} has {', '.join(names)[:120] or 'nothing'}, and no {what}. It is looked for under "
                    f"{', '.join(guesses)}; name another with --{what}-column."
                )
        return str(image), prompt


def read(file: Path, columns: Columns) -> list[Entry]:
    """The images that the rows of a file name."""
    return _from_parquet(file, columns) if file.suffix.lower() == ".parquet" else _from_lines(file, columns)


def _from_lines(file: Path, columns: Columns) -> list[Entry]:
    entries = []
    ours = file.name == "results.jsonl"  # what else `generate` writes there is no metadata
    for where, row in rows.read_lines(file, "Each line is one object that names an image and a prompt."):
        image, prompt = columns.find(list(row), where)
        if not isinstance(row[image], str):
            raise ConfigError(f"{where} has {json.dumps(row[image])[:80]} under '{image}', not the path of an image.")
        rest = {} if ours else {key: value for key, value in row.items() if key not in {image, prompt, *_OWN}}
        place = file.parent / row[image]
        entry = Entry(
            name=str(place),
            picture=place,
            prompt=_text(row.get(prompt or "")),
            seed=_seed(row),
            metadata={**rest, **_metadata(row, where), **_instruction(row, prompt)},
            inputs={slot: file.parent / name for slot, name in named_inputs(row).items()},
        )
        entries.append(entry)
    return entries


def _pick(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _seed(row: Mapping[str, Any]) -> int:
    return seed if isinstance(seed := row.get("seed"), int) else 0


def _instruction(row: Mapping[str, Any], prompt: str | None) -> dict[str, str]:
    """What an edit was told, where the prompt is something else."""
    return {"instruction": text} if prompt != "instruction" and (text := _text(row.get("instruction"))) else {}


def _metadata(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = row.get("metadata") or {}
    if isinstance(found, str):  # as parquet files often keep it
        try:
            found = json.loads(found)
        except ValueError as e:
            raise ConfigError(f"{where} has metadata that is not JSON ({e}): {found[:80]}") from e
    if not isinstance(found, dict):
        raise ConfigError(f"{where} has metadata {found!r}, but metadata is an object of names and values.")
    return found


class Parquet:
    """A parquet file of which one group of rows of a column is in memory at a time."""

    def __init__(self, path: Path) -> None:
        try:
            importlib.import_module("pyarrow")
            parquet: Any = importlib.import_module("pyarrow.parquet")  # it has no types
        except ImportError as e:
            raise MissingExtra.of(f"reading '{path}'", "pyarrow", "parquet") from e
        self.path = path
        try:
            self.file = parquet.ParquetFile(path)
        except Exception as e:  # of any kind for a file that is no parquet
            raise ConfigError(f"cannot read '{path}' as parquet: {' '.join(str(e).split())[:200]}") from e
        sizes = [self.file.metadata.row_group(k).num_rows for k in range(self.file.metadata.num_row_groups)]
        self.starts = [sum(sizes[:k]) for k in range(len(sizes))]
        self.names = [str(name) for name in self.file.schema_arrow.names]
        self._held: dict[str, tuple[int, Any]] = {}

    def values(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """All rows of some small columns."""
        if not names:
            return [{} for _ in range(self.file.metadata.num_rows)]
        found: list[dict[str, Any]] = self.file.read(columns=list(names)).to_pylist()
        return found

    def value(self, column: str, row: int) -> Any:
        """What one cell holds."""
        group = bisect.bisect_right(self.starts, row) - 1
        if self._held.get(column, (-1, None))[0] != group:
            self._held[column] = group, self.file.read_row_group(group, columns=[column])[column]
        return self._held[column][1][row - self.starts[group]].as_py()

    def plain(self) -> list[str]:
        """The columns of numbers, words, and lists or records of those."""
        return [item.name for item in self.file.schema_arrow if _is_plain(item.type)]


@dataclass(frozen=True)
class ParquetCell:
    """A picture in a parquet file: its bytes, alone or beside a path, or a path from the file's folder."""

    table: Parquet
    column: str
    row: int

    def read(self) -> Path | bytes | None:
        value = self.table.value(self.column, self.row)
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return self.table.path.parent / value
        if value is None or isinstance(value, bytes):
            return value
        raise MediaError(f"column '{self.column}' holds {type(value).__name__}, not a picture")


def _is_plain(kind: Any) -> bool:
    types: Any = importlib.import_module("pyarrow.types")
    if types.is_struct(kind):
        return all(_is_plain(kind.field(k).type) for k in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    tests = (types.is_integer, types.is_floating, types.is_string, types.is_large_string, types.is_boolean)
    return any(test(kind) for test in tests)


def _from_parquet(file: Path, columns: Columns) -> list[Entry]:
    table = Parquet(file)
    image, prompt = columns.find(table.names, f"'{file}'")
    slots = {slot: name for slot, names in INPUTS.items() if (name := _pick(table.names, names))}
    small = [name for name in table.plain() if name not in {image, *slots.values()}]
    entries = []
    for k, row in enumerate(table.values(small)):
        rest = {name: value for name, value in row.items() if name not in {prompt, *_OWN}}
        entry = Entry(
            name=f"{file}#{k}",
            picture=ParquetCell(table, image, k),
            prompt=_text(row.get(prompt or "")),
            seed=_seed(row),
            metadata={**rest, **_metadata(row, f"{file}#{k}"), **_instruction(row, prompt)},
            inputs={slot: ParquetCell(table, name, k) for slot, name in slots.items()},
        )
        entries.append(entry)
    return entries
