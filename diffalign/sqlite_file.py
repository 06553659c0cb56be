"""One SQLite file that several processes and threads share: opened for each use, set aside where it is damaged."""

from __future__ import annotations

import contextlib
import sqlite3
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from urllib.parse import quote

from diffalign.errors import OutputError

MAGIC = b"SQLite format 3\0"
OURS = (".sqlite", ".sqlite3", ".db")  # endings of files that we may move away
PATIENCE = 60.0  # seconds that one process waits for another


@dataclass(frozen=True)
class SqliteFile:
    """`what` names it in messages, `table` is the statement that makes its table, `instead` is what to do about it."""

    path: Path
    what: str
    table: str
    instead: str

    def make_folder(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"cannot make the folder of the {self.what} '{self.path}': {e}. {self.instead}") from e

    @contextlib.contextmanager
    def open(self, *, reads: bool = False) -> Iterator[sqlite3.Connection]:
        """One connection per use: nothing to share across threads or a fork. What only reads may not be able to write.

        The block ends early, and quietly, where the file turns out to be damaged.
        """
        inode = self._inode()
        try:
            with contextlib.closing(self._connect(reads)) as db:
                yield db
        except sqlite3.OperationalError as e:
            raise OutputError(f"cannot use the {self.what} '{self.path}': {e}. {self.instead}") from e
        except sqlite3.DatabaseError as e:
            self._set_aside(e, inode)

    def _connect(self, reads: bool) -> sqlite3.Connection:
        inode = self._inode()
        db = sqlite3.connect(self.path, timeout=PATIENCE)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute(self.table)
            return db
        except sqlite3.OperationalError as e:
            db.close()
            if reads and ("readonly" in str(e) or "unable to open" in str(e)) and self.path.is_file():
                return self._read_only()
            raise
        except sqlite3.DatabaseError as e:
            db.close()
            self._set_aside(e, inode)
        return self._connect(reads)

    def _read_only(self) -> sqlite3.Connection:
        """Where nobody writes beside us, SQLite is told so: else it wants to write a file for its locks."""
        still = not self.path.with_name(self.path.name + "-wal").exists()
        mode = "mode=ro&immutable=1" if still else "mode=ro"
        return sqlite3.connect(f"file:{quote(str(self.path))}?{mode}", timeout=PATIENCE, uri=True)

    def _inode(self) -> int | None:
        return self.path.stat().st_ino if self.path.exists() else None

    def _set_aside(self, error: Exception, inode: int | None) -> None:
        """Move the unreadable file away, unless another process has replaced it in the meantime."""
        place = self.path
        try:
            if self._inode() != inode:
                return
            if place.suffix not in OURS and not _begins(place):
                raise OutputError(
                    f"'{place}' is no {self.what} but another kind of file ({error}), and is left alone. {self.instead}"
                )
            aside = next(name for name in _names(place) if not name.exists())
            place.replace(aside)
            for suffix in ("-wal", "-shm"):
                place.with_name(place.name + suffix).unlink(missing_ok=True)
        except FileNotFoundError:
            return  # another process was faster
        except OSError as e:
            raise OutputError(f"the {self.what} '{place}' is unreadable ({error}) and cannot be moved: {e}.") from e
        warnings.warn(
            f"the {self.what} '{place}' is unreadable ({error}); it is now '{aside.name}', and a new one starts.",
            stacklevel=2,
        )


def _begins(place: Path) -> bool:
    with place.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _names(place: Path) -> Iterator[Path]:
    yield place.with_name(f"{place.name}.unreadable")
    for k in count(2):
        yield place.with_name(f"{place.name}.unreadable-{k}")
