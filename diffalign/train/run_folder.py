"""Where a run lives: one run a folder, one process at a time, and a resumed run goes on as if it had never stopped.

OUT holds config.yaml (resolved), metrics.jsonl, timing.jsonl, checkpoints/step-N and whatever else the loop writes.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign import atomic
from diffalign.config import dump, parse
from diffalign.errors import ConfigError, OutputError
from diffalign.train import checkpoint

CONFIG, METRICS, TIMING, CHECKPOINTS, LOCK = "config.yaml", "metrics.jsonl", "timing.jsonl", "checkpoints", ".lock"
BASE = "samples/base.safetensors"  # the base model's pictures
FREE = (  # what may change on resume: it has no part in what a step computes
    *("steps", "minutes", "out", "resume", "force", "preflight"),
    *("tracker", "trackers", "progress", "checkpoint", "checkpoint_every", "keep"),
)


@dataclass(frozen=True)
class Change:
    """A setting that differs from that of the run to go on with; `...` where a side has none."""

    key: str  # dotted
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.old)} -> {_short(self.new)}"


@dataclass(frozen=True)
class Start:
    """From where a run begins."""

    folder: Path
    checkpoint: Path | None  # None: from the first step
    changes: tuple[Change, ...] = ()  # settings that differ from the run before, the free ones included

    @property
    def step(self) -> int:
        return checkpoint.step_of(self.checkpoint) if self.checkpoint else 0


def begin(
    out: str | Path,
    config: Any,
    *,
    resume: str = "auto",
    force: bool = False,
    free: Sequence[str] = FREE,
) -> Start:
    """Decide where to start and make the folder ready; `resume` is auto, never, or a checkpoint or a run folder.

    Only the main process calls it, with the folder `locked`, and tells the others where to start.
    """
    folder = atomic.require_folder(out)
    source = _source(folder, resume, force=force)
    home = folder if source is None else source.parent.parent
    old = _config_of(home) if resume != "never" else None
    changes = tuple(differences(old, parse(dump(config), "the config"))) if old is not None else ()
    _allow(changes, home, free, force=force)
    start = Start(folder, source, changes)
    _prepare(start, home, config)
    return start


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What changed between two configs, key by dotted key, in the order of the new one."""
    before, after = _flat(old), _flat(new)
    keys = [*after, *(key for key in before if key not in after)]
    sides = [(key, before.get(key, ...), after.get(key, ...)) for key in keys]
    return [Change(key, a, b) for key, a, b in sides if json.dumps(a, default=str) != json.dumps(b, default=str)]


@contextmanager
def locked(out: str | Path) -> Iterator[None]:
    """Hold a run folder for this process; the lock of a process that died is free, whatever the file says."""
    try:
        import fcntl
    except ImportError:  # a system without such locks
        yield
        return
    path = atomic.require_folder(out) / LOCK
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            file.seek(0)
            raise OutputError(
                f"'{out}' is in use by {file.read().strip() or 'another process'}: two trainings in one folder would "
                "mix their steps. Wait for it or end it, or choose another --out."
            ) from e
        except OSError as e:
            warnings.warn(f"'{out}' cannot be locked ({e.strerror}); see that one run uses it at a time.", stacklevel=3)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


class Lines:
    """A file with a JSON object a line, on the disk when `append` returns; numbers that are not finite are null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a line; OutputError where the disk is full, and the lines before stay."""
        line = json.dumps(atomic.finite(row), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with self.path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise OutputError(
                f"cannot add to '{self.path}': {e.strerror or e}. Make room, then continue with --resume auto."
            ) from e

    def rows(self) -> list[dict[str, Any]]:
        """Every whole line; what comes after a torn one is not read."""
        return [row for _, row in self._whole()]

    def truncate(self, step: int) -> None:
        """Keep the lines up to this step, byte for byte, and drop a torn end."""
        if self.path.exists():
            kept = [line for line, row in self._whole() if row["step"] <= step]
            atomic.write_bytes(self.path, b"".join(kept))

    def _whole(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        content = self.path.read_bytes() if self.path.exists() else b""
        for line in content.splitlines(keepends=True):
            try:
                row = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n") or not isinstance(row, dict) or not isinstance(row.get("step"), int):
                return
            yield line, row


class Metrics:
    """metrics.jsonl, equal to the byte in a resumed run, and timing.jsonl with what depends on the clock."""

    def __init__(self, folder: Path) -> None:
        self.values, self.timing = Lines(folder / METRICS), Lines(folder / TIMING)

    def truncate(self, step: int) -> None:
        """Forget the steps after this one."""
        self.values.truncate(step)
        self.timing.truncate(step)


def holds_run(folder: Path) -> bool:
    """Whether a training began here."""
    return any((folder / name).exists() for name in (CONFIG, METRICS, CHECKPOINTS))


def _source(folder: Path, resume: str, *, force: bool) -> Path | None:
    """The checkpoint to go on from."""
    if resume == "auto":
        return checkpoint.latest(folder / CHECKPOINTS)
    if resume == "never":
        if holds_run(folder):
            raise OutputError(
                f"'{folder}' holds a run already, and resume is never. Choose another --out, or continue it with "
                "--resume auto."
            )
        return None
    given = Path(resume).expanduser()
    found = checkpoint.latest(given / CHECKPOINTS) if holds_run(given) else given
    if found is None or not found.is_dir():
        raise ConfigError(f"resume is '{resume}', but there is no checkpoint. Give auto, never, or .../step-N.")
    checkpoint.step_of(found)
    _require_no_other(folder, found, force=force)
    return found


def _require_no_other(folder: Path, found: Path, *, force: bool) -> None:
    """Going on from a chosen checkpoint must not mix with steps that another walk has left in the folder."""
    if found.parent.parent.resolve() != folder.resolve():
        if holds_run(folder):
            raise OutputError(
                f"'{folder}' holds a run already, and '{found}' belongs to another. Choose an --out that is empty."
            )
        return
    newer = [path.name for path in _newer(folder, checkpoint.step_of(found))]
    if newer and not force:
        raise OutputError(
            f"'{folder}' has checkpoints after {found.name}: {', '.join(newer)}. Going on from {found.name} there "
            "would delete them. Choose another --out, or pass --force."
        )


def _newer(folder: Path, step: int) -> list[Path]:
    return [path for path in checkpoint.listed(folder / CHECKPOINTS) if checkpoint.step_of(path) > step]


def _config_of(home: Path) -> Mapping[str, Any] | None:
    path = home / CONFIG
    if not path.exists():
        return None
    try:
        found = parse(path.read_text(encoding="utf-8"), f"'{path}'")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read '{path}', the config of the run to continue: {e}.") from e
    return found if isinstance(found, Mapping) else {}


def _allow(changes: Sequence[Change], home: Path, free: Sequence[str], *, force: bool) -> None:
    """Refuse changes that would make another run of it."""
    bound = [c for c in changes if not any(c.key == name or c.key.startswith(f"{name}.") for name in free)]
    if not bound:
        return
    shown = "\n".join(f"  {change}" for change in bound)
    if not force:
        raise ConfigError(
            f"the run in '{home}' has other settings, so going on would be neither run:\n{shown}\n"
            "Put them back, choose another --out, or pass --force to go on with the new ones."
        )
    warnings.warn(f"continuing '{home}' with other settings:\n{shown}", stacklevel=4)


def _prepare(start: Start, home: Path, config: Any) -> None:
    """Drop what lies after the start and what an interruption left half-written, and write the config down."""
    for part in start.folder.rglob(".*.part"):
        part.unlink() if part.is_file() else shutil.rmtree(part, ignore_errors=True)
    if home != start.folder:
        for name in (METRICS, TIMING, BASE):
            if (home / name).exists():
                atomic.write_bytes(start.folder / name, (home / name).read_bytes())
    Metrics(start.folder).truncate(start.step if start.checkpoint else -1)
    for path in _newer(start.folder, start.step):
        checkpoint.remove(path)
    atomic.write_text(start.folder / CONFIG, dump(config))


def _flat(value: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        dotted = f"{where}{key}"
        found |= _flat(item, f"{dotted}.") if isinstance(item, Mapping) and item else {dotted: item}
    return found


def _short(value: Any) -> str:
    text = "(not set)" if value is ... else str(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
