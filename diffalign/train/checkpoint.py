"""Checkpoints that are whole or absent: written into `.step-N.part`, down to the disk, then renamed to `step-N`.

A checkpoint holds `state` (.json, .safetensors) from the main process, `rng-<rank>` of every process and
`manifest.json` with the size and hash of each file, by which a torn copy is told. All processes see one folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign.errors import ConfigError, ModelError, OutputError
from diffalign.train import tensors_file

FORMAT = 1
MANIFEST = "manifest.json"
STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds for one process."""

    step: int
    state: dict[str, Any]
    rng: dict[str, Any] | None  # None where the run had fewer processes
    processes: int


def save(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    *,
    rng: Mapping[str, Any] | None = None,
    rank: int = 0,
    processes: int = 1,
    barrier: Callable[[], object] = lambda: None,
) -> Path:
    """Write `folder/step-N`; every process calls it, `state` counts on rank 0, and its random numbers on each.

    Where any process cannot write, all of them raise OutputError and the checkpoints before stay as they are.
    """
    part, place = folder / f".step-{step}.part", folder / f"step-{step}"
    fault = _faults(folder, step, lambda: _begin(folder, part)) if rank == 0 else None
    barrier()
    if fault is None:
        own = dict(capture_rng() if rng is None else rng)
        fault = _faults(folder, step, lambda: _write_own(part, rank, own))
    barrier()
    if rank == 0:
        try:
            fault = fault or _faults(folder, step, lambda: _finish(part, place, dict(state), processes))
        finally:
            shutil.rmtree(part, ignore_errors=True)
    barrier()  # whoever waits here sees how it ended
    if fault is None and not place.exists():
        fault = OutputError(_failure(folder, step, "another process could not write its part"))
    if fault is not None:
        raise fault
    return place


def load(path: Path, rank: int = 0) -> Checkpoint:
    """What `save` was given; ModelError where the checkpoint is torn."""
    manifest = _manifest(path)
    if manifest is None or not _same_content(path, manifest):
        raise ModelError(f"'{path}' is no complete checkpoint. Resume from an older one, or with --resume auto.")
    processes = int(manifest["processes"])
    rng = tensors_file.read(path, f"rng-{rank}") if rank < processes else None
    return Checkpoint(int(manifest["step"]), tensors_file.read(path, "state"), rng, processes)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint; torn ones are passed over with a warning."""
    if folder.is_dir():
        _recover(folder)
    for path in reversed(listed(folder)):
        manifest = _manifest(path)
        if manifest is not None and _same_content(path, manifest):
            return path
        warnings.warn(f"'{path}' is no complete checkpoint; an older one is used.", stacklevel=2)
    return None


def listed(folder: Path) -> list[Path]:
    """Every `step-N`, complete or torn, oldest first."""
    found = folder.iterdir() if folder.is_dir() else iter(())
    return sorted((path for path in found if STEP.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """N of `step-N`."""
    match = STEP.fullmatch(path.name)
    if match is None:
        raise ConfigError(f"'{path}' is no checkpoint: its name is not step-N. Give a folder such as step-100.")
    return int(match[1])


def prune(folder: Path, keep: int, protect: Iterable[int | None] = ()) -> list[Path]:
    """Remove all but the `keep` newest checkpoints and those of the steps in `protect`; gives back what went."""
    if keep < 1:
        raise ConfigError(f"keep is {keep}, but at least 1 checkpoint must stay to resume from.")
    spared = set(protect)
    whole = [path for path in listed(folder) if _manifest(path) is not None]
    gone = [path for path in whole[:-keep] if step_of(path) not in spared]
    for path in gone:
        remove(path)
    return gone


def remove(path: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that an interruption leaves no torn one under its name."""
    aside = path.with_name(f".{path.name}.gone")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def capture_rng() -> dict[str, Any]:
    """The states of this process's random generators: Python, numpy, torch, and the current CUDA device."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put the generators where `capture_rng` found them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _begin(folder: Path, part: Path) -> None:
    """An empty folder to write into, and nothing left of interrupted runs."""
    _recover(folder)
    for path in [*folder.glob(".step-*.gone"), *folder.glob(".step-*.part")]:
        shutil.rmtree(path, ignore_errors=True)
    part.mkdir(parents=True)


def _write_own(part: Path, rank: int, rng: Mapping[str, Any]) -> None:
    """The random numbers of this process, and a mark that they are on the disk."""
    tensors_file.write(part, f"rng-{rank}", rng)
    (part / f"rng-{rank}.done").touch()


def _finish(part: Path, place: Path, state: Mapping[str, Any], processes: int) -> None:
    """Add what the main process writes, then give the folder its name."""
    missing = [r for r in range(processes) if not (part / f"rng-{r}.done").exists()]
    if missing:
        raise OSError(errno.EIO, f"process {missing[0]} could not write its part")
    tensors_file.write(part, "state", state)
    _seal(part, step_of(place), processes)
    aside = place.with_name(f".{place.name}.old")
    if place.exists():  # the same step again, such as after a resume
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
    part.rename(place)
    tensors_file.sync(place.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _seal(part: Path, step: int, processes: int) -> None:
    """Write the manifest over everything in the folder, and wait for the disk."""
    for mark in part.glob("*.done"):
        mark.unlink()
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in sorted(part.iterdir())}
    content = {"format": FORMAT, "step": step, "processes": processes, "files": files}
    (part / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors_file.sync(part / MANIFEST)
    tensors_file.sync(part)


def _recover(folder: Path) -> None:
    """Give a checkpoint its name back whose replacement was interrupted between two renames."""
    for aside in folder.glob(".step-*.old"):
        place = folder / aside.name.removeprefix(".").removesuffix(".old")
        with contextlib.suppress(OSError):  # another process may do the same
            if place.exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.rename(place)


def _manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint whose files are all there with their sizes, else None."""
    try:
        found: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        whole = all((path / name).stat().st_size == told["bytes"] for name, told in found["files"].items())
        return found if whole and found["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _same_content(path: Path, manifest: Mapping[str, Any]) -> bool:
    try:
        return all(_hash(path / name) == told["sha256"] for name, told in manifest["files"].items())
    except OSError:
        return False


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _faults(folder: Path, step: int, write: Callable[[], None]) -> OutputError | None:
    """Run a write; what the system has against it, as our error, so that every process reaches every barrier."""
    try:
        write()
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        fault = OutputError(_failure(folder, step, "the disk is full" if full else e.strerror or str(e)))
        fault.__cause__ = e
        return fault
    return None


def _failure(folder: Path, step: int, why: str) -> str:
    before = listed(folder)
    kept = f"'{before[-1].name}' is intact" if before else "there is no earlier one"
    return (
        f"cannot write the checkpoint of step {step} into '{folder}': {why}; {kept}. "
        "Make room or choose another place with --out, then continue with --resume auto."
    )
