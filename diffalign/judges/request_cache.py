"""What servers answered, in one SQLite file that several processes and threads may share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign import weights
from diffalign.errors import OutputError

FORM = 1  # of what is hashed and kept; another number forgets everything
_TABLE = "CREATE TABLE IF NOT EXISTS answers_1 (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID"
_AT_ONCE = 500  # keys in one query; SQLite allows 999 of them everywhere
_PATIENCE = 60.0  # seconds that one process waits for another


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
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"cannot make the folder of the request cache '{self.path}': {e}. {_INSTEAD}") from e

    def lookup(self, keys: Sequence[str]) -> dict[str, Any]:
        """The answers of those keys that are there; a damaged one counts as absent."""
        wanted, found = list(dict.fromkeys(keys)), dict[str, Any]()
        for start in range(0, len(wanted) if self.path else 0, _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            marks = ", ".join("?" * len(some))
            with self._open() as db:
                for key, answer in db.execute(f"SELECT key, answer FROM answers_1 WHERE key IN ({marks})", some):
                    with contextlib.suppress(TypeError, ValueError, RecursionError):
                        found[key] = json.loads(answer)
        return found

    def store(self, key: str, answer: Any) -> None:
        """Keep one answer."""
        if self.path is not None:
            told = json.dumps(answer, allow_nan=False)
            with self._open() as db, db:
                db.execute("INSERT OR REPLACE INTO answers_1 VALUES (?, ?)", (key, told))

    def __len__(self) -> int:
        if self.path is not None:
            with self._open() as db:
                return int(db.execute("SELECT count(*) FROM answers_1").fetchone()[0])
        return 0

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One connection per use: nothing to share across threads or a fork."""
        inode = self._inode()
        try:
            with contextlib.closing(self._connect()) as db:
                yield db
        except sqlite3.OperationalError as e:
            raise OutputError(f"cannot use the request cache '{self.path}': {e}. {_INSTEAD}") from e
        except sqlite3.DatabaseError as e:
            self._set_aside(e, inode)

    def _connect(self) -> sqlite3.Connection:
        inode = self._inode()
        db = sqlite3.connect(self._place, timeout=_PATIENCE)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute(_TABLE)
            return db
        except sqlite3.OperationalError:
            db.close()
            raise
        except sqlite3.DatabaseError as e:
            db.close()
            self._set_aside(e, inode)
        return self._connect()

    @property
    def _place(self) -> Path:
        assert self.path is not None
        return self.path

    def _inode(self) -> int | None:
        return self._place.stat().st_ino if self._place.exists() else None

    def _set_aside(self, error: Exception, inode: int | None) -> None:
        """Move the unreadable file away, unless another process has replaced it in the meantime."""
        place = self._place
        if self._inode() != inode:
            return
        aside = place.with_name(place.name + ".unreadable")
        try:
            place.replace(aside)
            for suffix in ("-wal", "-shm"):
                place.with_name(place.name + suffix).unlink(missing_ok=True)
        except FileNotFoundError:
            return  # another process was faster
        except OSError as e:
            raise OutputError(f"the request cache '{place}' is unreadable ({error}) and cannot be moved: {e}.") from e
        warnings.warn(
            f"the request cache '{place}' is unreadable ({error}); it is now '{aside.name}', and a new one starts.",
            stacklevel=2,
        )


_INSTEAD = "Give `cache` another path, or false."
