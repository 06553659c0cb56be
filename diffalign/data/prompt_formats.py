"""How each prompt set is read; prompt_sets.py says which is which."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.cases import Case, read_cases
from diffalign.data.pictures import Picture
from diffalign.data.row import Row
from diffalign.data.tables import first_row, read_rows, read_texts
from diffalign.errors import ConfigError

_COMPBENCH = re.compile(
    r"^(3d_spatial|non_spatial|spatial|color|shape|texture|numeracy|complex)"
    r"(?:_(train|val|test))?(?:_(?:seen|unseen|action|spatial|spatialaction))?$"
)


def geneval(path: Path) -> Iterator[Case]:
    """What must be there (`include`, all of it) and what must not (`exclude`, none of it), as the benchmark has it."""
    from diffalign.rules.geneval import read_request  # imports torch

    for row in read_rows(path):
        include, excluded = row.several("include"), row.several("exclude") if "exclude" in row else []
        if not include:
            raise row.error("includes nothing, so every picture would pass.")
        clauses = {"tag": row.text("tag"), "include": include, "exclude": excluded}
        try:
            read_request(clauses)
        except ConfigError as e:
            raise row.error(f"asks for what GenEval cannot judge: {e}") from e
        plain = {str(name): value for name, value in row.values.items() if _is_plain(value)}
        told = {**plain, **clauses, "prompt": row.text("prompt")}
        yield Case(prompt=row.text("prompt"), metadata=_with_whole_seed(row, told))


def compbench_name(path: Path) -> re.Match[str] | None:
    """Category and split in the name of a T2I-CompBench file."""
    return _COMPBENCH.match(path.stem.lower())


def compbench(path: Path) -> Iterator[Case]:
    name = compbench_name(path)
    if name is None:
        raise ConfigError(f"the name of '{path}' says no category of T2I-CompBench, such as color_val.txt does.")
    told = {"category": name[1]} | ({"split": name[2]} if name[2] else {})
    yield from (replace(case, metadata=told) for case in read_cases(path))


def drawbench(path: Path) -> Iterator[Case]:
    for row in read_rows(path, ("Prompts", "Category")):
        yield Case(prompt=row.text("Prompts"), metadata={"category": row.text("Category")})


def quotes_first(path: Path) -> bool:
    """Whether the first prompt of a file has words in quotes."""
    from diffalign.rules.text import quoted  # imports torch

    return bool(quoted(read_cases(path)[0].prompt))


def ocr(path: Path) -> Iterator[Case]:
    from diffalign.rules.text import normal, quoted  # imports torch

    for case in read_cases(path):
        words = next(iter(quoted(case.prompt)), "")  # the first pair counts
        if not normal(words):
            raise ConfigError(
                f"'{path}' has a prompt without words in double quotes, so there is nothing to read: "
                f"'{case.prompt[:80]}'. For prompts of another sort say format='plain'."
            )
        yield replace(case, metadata={"text": words, "kind": "text"})


def is_hpd(path: Path) -> bool:
    """Whether a JSON file holds texts: in one list, or in lists by name."""
    with contextlib.suppress(ConfigError):
        return next(read_texts(path), None) is not None
    with contextlib.suppress(ConfigError):
        return _lists_of_texts(first_row(path).values)  # an object on one line
    return _by_style(path) is not None


def hpd(path: Path) -> Iterator[Case]:
    styles = _by_style(path)
    if styles is None:
        styles = {path.stem: [text for _, text in read_texts(path)]}
    for style, prompts in styles.items():
        yield from (Case(prompt=prompt, metadata={"style": style}) for prompt in prompts)


def _by_style(path: Path) -> dict[str, list[str]] | None:
    """Lists of prompts by style, where the file is one object of them."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not _lists_of_texts(found):
        return None
    for style, texts in found.items():
        for k, text in enumerate(texts):
            Row(f"{path}, {k + 1} of '{style[:40]}',", path, {"prompt": text}).text("prompt")
    return found


def _lists_of_texts(found: Mapping[str, Any]) -> bool:
    lists = list(found.values())
    return bool(lists) and all(isinstance(texts, list) and texts and isinstance(texts[0], str) for texts in lists)


def pickapic(path: Path) -> Iterator[Case]:
    captions = dict.fromkeys(row.text("caption") for row in read_rows(path, ("caption",)))
    yield from (Case(prompt=caption) for caption in captions)


def editreward(path: Path) -> Iterator[Case]:
    seen = set()
    for row in read_rows(path, ("instruction", "input_image", "task_type")):
        source, instruction = Picture.of(row, "input_image"), row.text("instruction")
        if (instruction, source.key) not in seen:
            seen.add((instruction, source.key))
            told = {"task_type": row.text_or("task_type")} if row.text_or("task_type") else {}
            yield Case(prompt=instruction, source=source.open(), metadata=told)


def prompt_column(row: Row) -> str | None:
    """The column of a table that holds prompts."""
    by_name = {str(name).lower(): str(name) for name in row.values}
    return next((by_name[name] for name in ("prompt", "caption", "text") if name in by_name), None)


def table(path: Path) -> Iterator[Case]:
    for row in read_rows(path):
        column = prompt_column(row)
        if column is None:
            raise row.error("has no column 'prompt', 'caption' or 'text'.")
        rest = {str(name).lower(): v for name, v in row.values.items() if name != column and _is_plain(v)}
        yield Case(prompt=row.text(column), metadata=_with_whole_seed(row, rest))


def _with_whole_seed(row: Row, told: dict[str, Any]) -> dict[str, Any]:
    """Metadata whose `seed`, if there is one, is a whole number; `read_prompts` gives it to the case."""
    return told | {"seed": row.as_whole(told["seed"], "seed")} if "seed" in told else told


def _is_plain(value: Any) -> bool:
    """Whether a value may be metadata: pictures and empty cells may not."""
    if isinstance(value, Mapping):
        return all(_is_plain(each) for each in value.values())
    if isinstance(value, list):
        return all(_is_plain(each) for each in value)
    return isinstance(value, str | int | float | bool) and value != ""
