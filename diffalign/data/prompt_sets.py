"""Prompts of benchmarks in the files they are published in; `read_prompts` is the door.

- `geneval`: GenEval's evaluation_metadata.jsonl and Flow-GRPO's train_metadata.jsonl, a row with tag, prompt, include
  and exclude; the metadata is the row.
- `t2i_compbench`: T2I-CompBench's texts such as color_val.txt or 3d_spatial.txt, a prompt a line. Metadata: category,
  split.
- `drawbench`: DrawBench's table with the columns Prompts and Category. Metadata: category.
- `ocr`: Flow-GRPO's ocr/train.txt, a prompt a line with the words to be written in double quotes. Metadata: text.
- `hpd`: HPD v2's anime.json, photo.json and so on, a list of prompts, or one object of lists by style. Metadata: style.
- `pickapic`: Pick-a-Pic's parquet shards, each caption once.
- `editreward`: EditReward-Bench's shards, each instruction with its input_image once; that is the case's source.
  Metadata: task_type.
- `table`: any table with a column prompt, caption or text, optional seed. Metadata: all other plain values.
- `plain`: .txt with a prompt a line, or .jsonl with a prompt and optional seed and metadata.

The metadata `kind` says what a prompt tests in one vocabulary: counting, spatial, colour, text, ... (see kinds.py).
Texts and lists of a folder are read file by file; its parquet shards are one table.
"""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from diffalign.cases import Case, read_cases
from diffalign.data import prompt_formats as formats
from diffalign.data.kinds import kind_of
from diffalign.data.tables import SUFFIXES, first_row
from diffalign.errors import ConfigError, UnknownName

FORMATS: dict[str, Callable[[Path], Iterator[Case]]] = {
    "geneval": formats.geneval,
    "t2i_compbench": formats.compbench,
    "drawbench": formats.drawbench,
    "ocr": formats.ocr,
    "hpd": formats.hpd,
    "pickapic": formats.pickapic,
    "editreward": formats.editreward,
    "table": formats.table,
    "plain": lambda path: iter(read_cases(path)),
}
ALONE = (".txt", ".json", ".jsonl", ".csv", ".tsv")  # in a folder, each such file is a prompt set of its own


def read_prompts(path: str | Path, format: str | None = None, seed: int = 0, *, limit: int | None = None) -> list[Case]:
    """The cases of a file or folder; `format` is told from name and content.

    Seeds count up from `seed` where a row has none of its own.
    """
    if format is not None and format not in FORMATS:
        raise UnknownName.among("prompt format", format, FORMATS, "python -m pydoc diffalign.data.prompt_sets")
    found: list[Case] = []
    for place in _places(Path(path)):
        name, first = format or sniff(place), seed + len(found)
        if name == "plain":
            found += read_cases(place, seed=first)  # a line may have a seed of its own
        else:
            room = None if limit is None else max(limit - len(found), 0)
            cases = itertools.islice(FORMATS[name](place), room)
            found += [_seeded(case, first + k) for k, case in enumerate(cases)]
    if not found:
        raise ConfigError(f"'{path}' holds no prompt. Is it the file you meant?")
    return [_with_kind(case) for case in found[:limit]]


def sniff(path: str | Path) -> str:
    """The format of a file by its name and first row; ConfigError lists the formats where nothing fits."""
    place = Path(path)
    suffix = place.suffix.lower()
    if suffix == ".txt":
        if formats.compbench_name(place):
            return "t2i_compbench"
        named = "ocr" in (place.parent.name.lower(), *place.stem.lower().split("_"))
        return "ocr" if named and formats.quotes_first(place) else "plain"
    if suffix == ".json" and formats.is_hpd(place):
        return "hpd"
    if suffix in SUFFIXES or os.path.isdir(place) or "*" in place.name:
        row = first_row(place)
        for name, columns in (
            ("geneval", ("tag", "include")),
            ("drawbench", ("Prompts", "Category")),
            ("editreward", ("instruction", "input_image")),
            ("pickapic", ("caption", "label_0")),
            ("pickapic", ("caption", "image_0_uid")),
        ):
            if row.has(*columns):
                return name
        if suffix in (".jsonl", ".ndjson") and row.has("prompt"):
            return "plain"
        if formats.prompt_column(row):
            return "table"
        raise _unsure(f"'{path}' has the columns {', '.join(map(str, row.values)) or 'none'}, which no prompt set has")
    raise _unsure(f"'{path}' does not look like a prompt set")


def _unsure(what: str) -> ConfigError:
    return ConfigError(f"{what}. Say which format it is: {', '.join(FORMATS)}.")


def _places(path: Path) -> list[Path]:
    """The texts and JSON files of a folder or a pattern one by one; whatever else there is, as one table."""
    if os.path.isdir(path) and next(path.rglob("*.parquet"), None):
        files = []
    elif os.path.isdir(path):
        files = [file for file in path.iterdir() if file.suffix.lower() in ALONE]
    else:
        files = [Path(file) for file in glob.glob(str(path)) if Path(file).suffix.lower() in ALONE]
    return sorted(files) or [path]


def _seeded(case: Case, seed: int) -> Case:
    """The case with the seed of its own row, else with this one."""
    told = dict(case.metadata)
    return replace(case, seed=told.pop("seed", seed), metadata=told)


def _with_kind(case: Case) -> Case:
    """What the prompt tests, from its tag or category, unless it says so itself."""
    if "kind" in case.metadata:
        return case
    names = (case.metadata.get(name) for name in ("tag", "category", "task_type", "style"))
    name = next((name for name in names if isinstance(name, str) and name.strip()), "")
    return replace(case, metadata={**case.metadata, "kind": kind_of(name)}) if name else case
