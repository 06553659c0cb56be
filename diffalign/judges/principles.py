"""Checks that are written once for an instruction and a picture: read from a judge, kept in files a person can edit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign import config
from diffalign.atomic import write_text
from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.judges.parse import read_list
from diffalign.judges.rewarding import instruction_of

if TYPE_CHECKING:
    from PIL import Image

CATEGORIES = ("follow", "keep", "quality")
HEAD = (
    "# Checks of one edit instruction for one picture; edit them as you like, they are what edits are judged by.\n"
    f"# Yes is the good answer. category is {', '.join(CATEGORIES[:-1])} or {CATEGORIES[-1]}.\n"
)


@dataclass(frozen=True)
class Check:
    """A yes-or-no question with yes as the good answer."""

    question: str
    category: str  # one of CATEGORIES


@dataclass(frozen=True)
class Principles:
    """The checks of one instruction on one picture."""

    checks: tuple[Check, ...]

    @property
    def id(self) -> str:
        """Of the content: the same checks have the same one."""
        told = json.dumps([[check.question, check.category] for check in self.checks])
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def rows(self) -> list[dict[str, str]]:
        """As plain values."""
        return [asdict(check) for check in self.checks]

    def listed(self) -> str:
        """One line a check, numbered."""
        return "\n".join(f"{k}. {check.question}" for k, check in enumerate(self.checks, 1))

    def means(self, verdicts: tuple[int, ...]) -> dict[str, float]:
        """The mean of the verdicts, of all and of each category that has any."""
        found = {"checks": sum(verdicts) / len(verdicts)}
        for category in CATEGORIES:
            both = zip(self.checks, verdicts, strict=True)
            if some := [verdict for check, verdict in both if check.category == category]:
                found[category] = sum(some) / len(some)
        return found


def read_principles(text: str, most: int) -> Principles | None:
    """The checks of a judge's reply, at most the first `most`; None where one is malformed or there is none."""
    listed = read_list(text)
    found = [_check(entry) for entry in listed or []]
    checks = dict.fromkeys(check for check in found if check is not None)
    return Principles(tuple(checks)[:most]) if checks and None not in found else None


def _check(entry: Any) -> Check | None:
    if not isinstance(entry, Mapping):
        return None
    question, category = entry.get("question"), entry.get("category")
    if not isinstance(question, str) or not isinstance(category, str):
        return None
    asked, kind = " ".join(question.split()), category.strip().lower()
    return Check(asked, kind) if asked and kind in CATEGORIES else None


class PrincipleBook:
    """Principles by instruction and source: in memory, and with a folder in one YAML file each.

    A file counts over the memory, so that what a person changes holds at once.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder else None
        self._kept: dict[str, Principles] = {}
        self._read: dict[Path, tuple[tuple[int, int], dict[str, Any], Principles]] = {}

    def find(self, case: Case, key: str) -> Principles | None:
        """What is known for a case and its key."""
        path = self.path(case, key)
        if path is None:
            return self._kept.get(key)
        return self._file(path)[1] if path.is_file() else None

    def keep(self, case: Case, key: str, principles: Principles, writer: str) -> None:
        """Remember them; `writer` says who wrote them."""
        path = self.path(case, key)
        if path is None:
            self._kept[key] = principles
            return
        told: dict[str, Any] = {"instruction": instruction_of(case), "source": _digest(case.source), "writer": writer}
        told |= {"id": principles.id, "checks": principles.rows()}
        write_text(path, HEAD + config.say(told))

    def path(self, case: Case, key: str) -> Path | None:
        """The file of a case: the first words of its instruction, and the key."""
        if self.folder is None:
            return None
        words = "-".join(re.findall(r"[a-z0-9]+", instruction_of(case).lower()))[:40].strip("-")
        return self.folder / f"{words or 'edit'}-{key}.yaml"

    def foreign(self, writer: str) -> str:
        """A hash of the files that hold other checks than `writer` put there; empty where there is none."""
        found = []
        for path in sorted(self.folder.glob("*.yaml")) if self.folder is not None and self.folder.is_dir() else []:
            told, principles = self._file(path)
            if (told.get("writer"), told.get("id")) != (writer, principles.id):
                found.append([path.name, principles.id])
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12] if found else ""

    def _file(self, path: Path) -> tuple[dict[str, Any], Principles]:
        try:
            stat = path.stat()
            state = stat.st_mtime_ns, stat.st_size
            if path not in self._read or self._read[path][0] != state:
                self._read[path] = state, *read_file(path)
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"cannot read the principles '{path}': {e}. Mend or remove the file.") from e
        return self._read[path][1:]


def read_file(path: Path) -> tuple[dict[str, Any], Principles]:
    """What a file says, and its checks."""
    told = config.parse(path.read_text(encoding="utf-8"), f"'{path}'")
    if not isinstance(told, Mapping):
        raise ConfigError(f"'{path}' has no list of checks. Write them under 'checks', or remove the file.")
    return dict(told), _principles(told, f"'{path}'")


def read_exemplars(path: Path) -> list[tuple[str, Principles]]:
    """Instructions with their checks from a YAML list of `instruction` and `checks`."""
    try:
        rows = config.parse(path.read_text(encoding="utf-8"), f"'{path}'")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the exemplars '{path}': {e}. Give a YAML file.") from e
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "instruction" in row for row in rows):
        raise ConfigError(f"'{path}' is no list of entries with 'instruction' and 'checks'.")
    return [(str(row["instruction"]), _principles(row, f"'{path}'")) for row in rows]


def _principles(told: Mapping[str, Any], where: str) -> Principles:
    rows = told.get("checks")
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{where} has no list of checks. Write them under 'checks', or remove the file.")
    checks = []
    for number, row in enumerate(rows, 1):
        check = _check(row)
        if check is None:
            raise ConfigError(
                f"check {number} of {where} is {row!r}, but a check has a text under 'question' and "
                f"{', '.join(CATEGORIES[:-1])} or {CATEGORIES[-1]} under 'category'."
            )
        checks.append(check)
    return Principles(tuple(checks))


def key_of(case: Case) -> str:
    """One name for an instruction and the picture it is about."""
    told = f"{_digest(case.source)}\n{instruction_of(case)}"
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _digest(picture: Image.Image | None) -> str:
    if picture is None:
        return ""
    shown = picture.convert("RGBA")
    return hashlib.sha256(f"{shown.size}\n".encode() + shown.tobytes()).hexdigest()[:16]
