"""What servers answered, in one SQLite file that several processes and threads may share."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign import weights
from diffalign.sqlite_file import SqliteFile

FORM = 1  # of what is hashed and kept; another number forgets everything
_TABLE = "CREATE TABLE IF NOT EXISTS answers_1 (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID"
_AT_ONCE = 500  # keys in one query; SQLite allows 999 of them everywhere
_INSTEAD = "Give `cache` another path, or false."


def default_path() -> Path:
    """Where answers lie unless another file is given."""
    return weights.cache_folder() / "judges" / "requests.sqlite"


def key_of(asked: Mapping[str, Any]) -> str:
    """The hash of everything an answer depends on, JSON values only."""
    told = json.dumps([FORM, asked], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()


class RequestCache:
    """JSON answers by key; a file that cannot be read is set aside and replaced. Without a path it keeps nothing."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self._file = None if self.path is None else SqliteFile(self.path, "request cache", _TABLE, _INSTEAD)
        if self._file is not None:
            self._file.make_folder()

    def lookup(self, keys: Sequence[str]) -> dict[str, Any]:
        """The answers of those keys that are there; a damaged one counts as absent."""
        wanted, found = list(dict.fromkeys(keys)), dict[str, Any]()
        if self._file is None or not wanted:
            return found
        with self._file.open(reads=True) as db:
            for start in range(0, len(wanted), _AT_ONCE):
                some = wanted[start : start + _AT_ONCE]
                marks = ", ".join("?" * len(some))
                for key, answer in db.execute(f"SELECT key, answer FROM answers_1 WHERE key IN ({marks})", some):
                    with contextlib.suppress(TypeError, ValueError, RecursionError):
                        found[key] = json.loads(answer)
        return found

    def store(self, key: str, answer: Any) -> None:
        """Keep one answer."""
        if self._file is not None:
            told = json.dumps(answer, allow_nan=False)
            with self._file.open() as db, db:
                db.execute("INSERT OR REPLACE INTO answers_1 VALUES (?, ?)", (key, told))

    def __len__(self) -> int:
        if self._file is not None:
            with self._file.open(reads=True) as db:
                return int(db.execute("SELECT count(*) FROM answers_1").fetchone()[0])
        return 0
