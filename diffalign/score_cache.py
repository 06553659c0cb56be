"""A content-addressed store of scores in one SQLite file, safe under several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.cases import Case
from diffalign.sqlite_file import SqliteFile

Row = tuple[float, dict[str, float]]  # total, parts
PICTURES = ("source", "control", "reference")  # what a case may hold
_TABLE = (
    "CREATE TABLE IF NOT EXISTS scores_1 (key TEXT PRIMARY KEY, total REAL NOT NULL, parts TEXT NOT NULL) WITHOUT ROWID"
)


_AT_ONCE = 500  # keys in one query; SQLite allows 999 of them everywhere


class ScoreCache:
    """Scores by the hash of everything they depend on; a file it cannot read is set aside and replaced.

    It counts, by reward, the rows that were asked and those it answered. Without a path it counts and keeps nothing.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.keeps = path is not None
        self.path = Path(path or os.devnull)
        self._file = SqliteFile(self.path, "score cache", _TABLE, "Give another path, or run without a cache.")
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self._held: tuple[Tensor, int, list[str]] | None = None
        if self.keeps:
            self._file.make_folder()

    def hold(self, media: Tensor) -> None:
        """Hash these pixels (B, ...) once for all rewards that are asked about them next."""
        if self.keeps and not media.is_inference():  # such a tensor does not tell when it is written to
            self._held = media, media._version, pixels_of(media)

    def keys(self, reward: Any, media: Tensor, cases: Sequence[Case]) -> list[str | None]:
        """One key per row; pixels that are held, and were not written to since, are not hashed again."""
        if not self.keeps:
            return [None] * len(cases)
        pixels = None
        if self._held is not None:
            held, version, known = self._held
            same = (held.data_ptr(), held.shape, held.stride(), held.dtype, held.device)
            asked = (media.data_ptr(), media.shape, media.stride(), media.dtype, media.device)
            pixels = known if same == asked and held._version == version else None
        return keys_of(reward, media, cases, pixels)

    def lookup(self, keys: Sequence[str | None]) -> list[Row | None]:
        """The stored row of each key; None where there is none, or where the key is None."""
        wanted, found = list(dict.fromkeys(key for key in keys if key)), dict[str, Row]()
        if wanted and self.keeps:
            with self._file.open(reads=True) as db:
                for start in range(0, len(wanted), _AT_ONCE):
                    found |= _read(db, wanted[start : start + _AT_ONCE])
        return [found.get(key) if key else None for key in keys]

    def count(self, name: str, asked: int, answered: int) -> None:
        """Note how many rows the reward `name` was asked for, and how many were known."""
        self.asked[name] += asked
        self.answered[name] += answered

    def store(self, keys: Sequence[str | None], rows: Sequence[Row]) -> None:
        """Keep rows in one transaction; rows without a key and invalid rows are left out."""
        found = [(k, t, json.dumps(p)) for k, (t, p) in zip(keys, rows, strict=True) if k and np.isfinite(t)]
        if found and self.keeps:
            with self._file.open() as db, db:
                db.executemany("INSERT OR REPLACE INTO scores_1 VALUES (?, ?, ?)", found)

    def __len__(self) -> int:
        if not self.keeps:
            return 0
        with self._file.open(reads=True) as db:
            return int(db.execute("SELECT count(*) FROM scores_1").fetchone()[0])
        return 0


def _read(db: sqlite3.Connection, keys: Sequence[str]) -> dict[str, Row]:
    """The rows of those keys that are there; one with damaged content counts as absent."""
    marks = ", ".join("?" * len(keys))
    found: dict[str, Row] = {}
    for key, total, parts in db.execute(f"SELECT key, total, parts FROM scores_1 WHERE key IN ({marks})", keys):
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            found[key] = float(total), {str(name): float(part) for name, part in json.loads(parts).items()}
    return found


def keys_of(reward: Any, media: Tensor, cases: Sequence[Case], pixels: Sequence[str] | None = None) -> list[str | None]:
    """One key per row (B,), None where the row must not be cached; `pixels` are their hashes where those are known."""
    identity = identity_of(reward)
    if identity is None:
        return [None] * len(cases)
    hashes = pixels_of(media) if pixels is None else pixels
    return [_key(identity, row, case) for row, case in zip(hashes, cases, strict=True)]


def pixels_of(media: Tensor) -> list[str]:
    """The hash of each row (B,)."""
    rows = list(media.detach().cpu().contiguous())
    with ThreadPoolExecutor(min(len(rows), os.cpu_count() or 1) or 1) as pool:  # hashing large rows leaves the lock
        return list(pool.map(_digest, rows))


def identity_of(reward: Any) -> str | None:
    """Name, version and options of a reward, or None if scores of it cannot be told apart from those of another."""
    version = getattr(reward, "version", None)
    options = _options(reward)
    if version is None or options is None:
        return None
    with contextlib.suppress(TypeError):
        target = getattr(reward, "function", reward)
        kind = target if inspect.isfunction(target) else type(target)
        return _canonical(
            [
                reward.name,
                f"{kind.__module__}.{kind.__qualname__}",
                version,
                options,
                str(getattr(reward, "dtype", None)),
            ]
        )
    return None


def engine_version(revision: str, engine: Any, spec: Any) -> str | None:
    """The version of a reward that asks an engine or detector, None where that cannot be told from another.

    Made from a name as `spec` it is ours, and the reward's options say the rest; else its class, `version` and
    `options` count.
    """
    version = getattr(engine, "version", None)
    if version is None:
        return None
    if isinstance(spec, str) and (":" not in spec or Path(spec).expanduser().is_dir()):
        return f"{revision} {version}"
    kind = engine if isinstance(engine, type) else type(engine)
    ours = kind.__module__.startswith("diffalign.")
    options = _options(engine) if ours or dataclasses.is_dataclass(engine) else getattr(engine, "options", None)
    if not isinstance(options, Mapping):
        return None
    with contextlib.suppress(TypeError):
        return f"{revision} {_canonical([f'{kind.__module__}.{kind.__qualname__}', version, options])}"
    return None


def asked_of(case: Case, reads: Iterable[str]) -> str:
    """A short hash of what a case holds under these names, pictures or metadata; empty where it holds nothing there."""
    asked = {}
    for name in set(reads):
        picture = getattr(case, name) if name in PICTURES else None
        told = case.metadata.get(name)
        if picture is not None or told is not None:
            asked[name] = [picture, _listed(told)]
    return hashlib.sha256(_canonical(asked).encode("utf-8", "surrogatepass")).hexdigest()[:12] if asked else ""


def _listed(value: Any) -> Any:
    """The same with lists for tuples, as JSON would give it back."""
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _options(reward: Any) -> Mapping[str, Any] | None:
    """Everything that makes one reward of a kind another, None where that is not known."""
    wrapped = getattr(reward, "function", None)
    if wrapped is not None:
        own = {"enclosed": enclosed} if (enclosed := _enclosed(wrapped)) else {}
        inner = own if inspect.isfunction(wrapped) else _options(wrapped)
        return None if inner is None else {**inner, **reward.options}
    if dataclasses.is_dataclass(reward) and not isinstance(reward, type):
        return {f.name: getattr(reward, f.name) for f in dataclasses.fields(reward)}
    options = getattr(reward, "options", None)
    if options is None and (inspect.isfunction(reward) or type(reward).__init__ is object.__init__):
        return {}
    return options if isinstance(options, Mapping) else None


def _enclosed(function: Any) -> list[Any]:
    """What a function made by another holds of it."""
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return [f"{value.__module__}.{value.__qualname__}" if inspect.isfunction(value) else value for value in held]


def _key(identity: str, pixels: str, case: Case) -> str | None:
    try:
        asked = _canonical([case.prompt, case.source, case.control, case.reference, case.metadata])
    except TypeError:
        return None
    return hashlib.sha256(f"{identity}\n{pixels}\n{asked}".encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(_encode(value), sort_keys=True)


def _encode(value: Any) -> Any:
    """JSON in which different values stay different; TypeError for what has no content to hash."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {"map": sorted(([_encode(k), _encode(v)] for k, v in value.items()), key=json.dumps)}
    if isinstance(value, list | tuple):
        return [type(value).__name__, [_encode(v) for v in value]]
    if isinstance(value, Tensor):
        return {"tensor": _digest(value.detach().cpu().contiguous())}
    if isinstance(value, np.ndarray) and value.dtype != object:
        return {"array": _hash(value.tobytes(), value.shape, str(value.dtype))}
    if isinstance(value, Image.Image):
        return {"image": _hash(value.tobytes(), value.size, value.mode + repr(value.getpalette()))}
    if isinstance(value, bytes | Path | torch.dtype):
        return {type(value).__name__: repr(value)}
    raise TypeError(type(value).__name__)


def _digest(row: Tensor) -> str:
    """Of a contiguous tensor on the CPU, without copying it."""
    content = row.flatten().view(torch.uint8).numpy() if row.numel() else b""
    return _hash(content, tuple(row.shape), str(row.dtype))


def _hash(content: Any, shape: Sequence[int], kind: str) -> str:
    digest = hashlib.sha256(f"{tuple(shape)} {kind}\n".encode())
    digest.update(content)
    return digest.hexdigest()
