"""Rows of JSONL, JSON, CSV, TSV and parquet files, one at a time; each knows the file and the line it stands on.

JSONL and NDJSON hold an object a line; a line ends at a newline only, since a prompt may hold other separators. JSON
holds a list, which is read piece by piece. CSV and TSV have a header. Parquet is read a few rows at a time; a folder of
its shards is one table in the order of their names, and so are the files that a pattern such as `data/test-*` matches.
"""

from __future__ import annotations

import csv
import glob
import importlib
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from diffalign.data.json_lists import elements, parse
from diffalign.data.row import Row
from diffalign.errors import ConfigError, MissingExtra

LINES, LISTS, CELLS, PARQUET = {".jsonl", ".ndjson"}, {".json"}, {".csv": ",", ".tsv": "\t"}, {".parquet"}
SUFFIXES = (*sorted(LINES), *sorted(LISTS), *sorted(CELLS), *sorted(PARQUET))
ESCAPED = "surrogateescape"  # bytes that are not UTF-8 come through, and the row that holds them refuses them
BATCH = 32  # parquet rows at once: rows with pictures are heavy
_SHARD = re.compile(r"^(.+)-\d+-of-\d+$")


def read_rows(path: str | Path, columns: Collection[str] | None = None) -> Iterator[Row]:
    """Every row of a file, of a pattern's files, or of a folder of parquet shards, which reads `columns` only."""
    for file in files_of(path):
        try:
            if file.suffix.lower() in CELLS:
                yield from _cells(file)
            elif file.suffix.lower() in PARQUET:
                yield from _parquet(file, columns)
            else:
                for where, value in _values(file):
                    if not isinstance(value, dict):
                        raise ConfigError(f"{where} is not an object of names and values: {str(value)[:80]}")
                    yield Row(where, file, value)
        except (OSError, UnicodeError) as e:
            raise ConfigError(f"cannot read '{file}': {e}. Tables are UTF-8 text or parquet.") from e


def first_row(path: str | Path) -> Row:
    """The first row, from which the format is told."""
    for row in read_rows(path):
        return row
    raise ConfigError(f"'{path}' holds no row.")


def read_texts(file: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of each text in a JSON list of them."""
    for where, value in _values(file):
        yield where, Row(where, file, {"prompt": value}).text("prompt")


def files_of(path: str | Path) -> list[Path]:
    """The file itself, the parquet shards of a folder, or what a pattern matches, sorted by name."""
    place = Path(path)
    if os.path.isdir(place):
        found = sorted(place.rglob("*.parquet"))
        if not found:
            raise ConfigError(
                f"the folder '{place}' holds no parquet file. Name a file, or a pattern such as 'test/*.json'."
            )
        _require_one_split(found, place)
        return found
    if not os.path.exists(place) and (found := sorted(Path(p) for p in glob.glob(str(path)))):
        return found
    if not os.path.isfile(place):
        raise ConfigError(
            f"there is no file '{path}'. Check the path; a pattern such as 'data/test-*.parquet' may be given."
        )
    return [place]


def _require_one_split(files: Iterable[Path], place: Path) -> None:
    """Refuse a folder where training and test shards lie together: mixed up they measure nothing."""
    splits = sorted({match[1] for file in files if (match := _SHARD.match(file.stem))})
    if len(splits) > 1:
        raise ConfigError(
            f"'{place}' holds the splits {', '.join(splits)}, which must not be mixed. "
            f"Name one of them: '{place}/{splits[0]}-*.parquet'."
        )


def _values(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line, or of each element of a JSON list."""
    if file.suffix.lower() not in LINES | LISTS:
        raise ConfigError(f"'{file}' is no table that can be read; known are {', '.join(SUFFIXES)}.")
    if file.suffix.lower() in LISTS and _opens_with(file, "["):
        with file.open(encoding="utf-8-sig", errors=ESCAPED, newline="") as text:
            for line, value in elements(text, file):
                yield f"{file}:{line}", value
        return
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{file}:{number}"
            try:
                content = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip(" \t\r\n")
                if content:
                    yield where, parse(content)
            except (ValueError, RecursionError) as e:
                raise ConfigError(
                    f"{where} is not JSON ({e}). Each line is one object, or the file is one list."
                ) from e


def _opens_with(file: Path, mark: str) -> bool:
    with file.open(encoding="utf-8-sig", errors=ESCAPED) as text:
        while (head := text.read(4096)) and not head.strip():
            pass
    return head.lstrip().startswith(mark)


def _cells(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", errors=ESCAPED, newline="") as text:
        rows = csv.DictReader(text, delimiter=CELLS[file.suffix.lower()])
        try:
            for values in rows:
                where = f"{file}:{rows.line_num}"
                if None in values:
                    raise ConfigError(f"{where} has more cells than the header has names.")
                yield Row(where, file, values)
        except csv.Error as e:
            raise ConfigError(f"{file}:{rows.line_num} cannot be read as a table: {e}.") from e


def _parquet(file: Path, columns: Collection[str] | None) -> Iterator[Row]:
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as e:
        raise MissingExtra.of(f"reading '{file}'", "pyarrow", "parquet") from e
    try:
        with parquet.ParquetFile(file) as table:
            # dates say nothing about a picture, and nanoseconds have no type in plain Python
            fields = [f.name for f in table.schema_arrow if not pyarrow.types.is_temporal(f.type)]
            names = [name for name in fields if columns is None or name in columns]
            number = 0
            for batch in table.iter_batches(batch_size=BATCH, columns=names):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{file} row {number}", file, values)
    except (OSError, ValueError, pyarrow.ArrowException) as e:
        raise ConfigError(f"cannot read '{file}' as parquet: {e}. Is the file whole?") from e
