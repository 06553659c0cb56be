"""Many trainings from one plan: each in a process of its own, resumable, and one that fails does not end the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from diffalign import atomic, config
from diffalign.errors import ConfigError
from diffalign.train.interrupt import ASKED
from diffalign.train.run_folder import CONFIG, FREE, differences

WHOLE = ("objective", "reward", "panel")  # mappings that name things: replaced, where all others are merged
SAME = ("model", "call", *(f"evaluate.{name}" for name in ("prompts", "split", "limit", "per_prompt", "call")))
COMMAND = (sys.executable, "-m", "diffalign", "train")
INTERRUPTED = 130  # the exit code of a run that was asked to stop
PAUSE = 0.5  # seconds between two looks at the processes
LENGTHS = ("steps", "minutes")  # free to change in a run, but longer ones are to be gone on with


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a plan: a config, what is different from it, and the seeds to run it with."""

    config: str | None = None  # a shipped name or a path; none starts from the defaults
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds is {list(self.seeds)}, but a run needs at least one, and each only once.")


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training to run."""

    name: str
    seed: int
    settings: Mapping[str, Any]  # what its config file holds
    told: Mapping[str, Any]  # the same, resolved as the run folder keeps it
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.name}-{self.seed}"


def merged(settings: Mapping[str, Any], *more: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others over them: mappings key by key, all else, and the mappings of WHOLE, replaced."""
    found = dict(settings)
    for each in more:
        for key, value in each.items():
            old = found.get(key)
            both = isinstance(old, Mapping) and isinstance(value, Mapping) and key not in WHOLE
            found[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return found


def require_paired(trainings: Sequence[Training]) -> None:
    """Refuse runs that do not evaluate the same pictures: their truths could not be compared prompt by prompt."""
    for training in trainings[1:]:
        for key in SAME:
            mine, first = _at(training.told, key), _at(trainings[0].told, key)
            if mine != first:
                raise ConfigError(
                    f"run '{training.name}' has {key} {mine!r} and run '{trainings[0].name}' has {first!r}, so their "
                    "evaluations could not be compared picture by picture. Say it once, under `common`."
                )


def finished(training: Training) -> bool:
    """Whether this run has ended by itself with these settings."""
    summary, before = training.folder / "summary.json", training.folder / CONFIG
    if not summary.exists() or not before.exists():
        return False
    if json.loads(summary.read_text(encoding="utf-8")).get("ended") == ASKED:
        return False
    old = config.parse(before.read_text(encoding="utf-8"), f"'{before}'")
    new = config.parse(config.dump(dict(training.told)), "the config")
    both = [key for key in new if key in old and (key in LENGTHS or key not in FREE)]
    return not differences({key: old[key] for key in both}, {key: new[key] for key in both})


def run_all(
    trainings: Sequence[Training],
    *,
    folder: Path,
    at_once: int = 1,
    threads: int = 1,
    say: Callable[[str], None] = print,
    command: Sequence[str] | None = None,
) -> dict[str, str]:
    """Run what is not finished, `at_once` at a time; gives back what went wrong, by label.

    An interruption asks every run to stop after its present step, with a checkpoint; a second one ends them at once.
    """
    waiting, running, failed = [t for t in trainings if not finished(t)], dict[str, _Running](), dict[str, str]()
    if done := len(trainings) - len(waiting):
        say(f"{done} of {len(trainings)} runs are done already")
    with _terminable():
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    training = waiting.pop(0)
                    running[training.label] = _Running.begin(training, folder, command or COMMAND, threads)
                    say(f"{training.label}: {'going on' if (training.folder / CONFIG).exists() else 'started'}")
                time.sleep(PAUSE)
                for label in [label for label, each in running.items() if each.ended]:
                    if problem := running[label].problem():
                        failed[label] = problem
                    say(f"{label}: {problem or 'done'} ({len(waiting) + len(running) - 1} to go)")
                    del running[label]
        except KeyboardInterrupt:
            say("stopping after the present steps; once more ends them at once")
            _stop(list(running.values()))
            raise
    return failed


@dataclass
class _Running:
    """A training in its process."""

    training: Training
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    begun: int  # where its part of the log starts

    @classmethod
    def begin(cls, training: Training, folder: Path, command: Sequence[str], threads: int) -> _Running:
        settings = folder / "jobs" / f"{training.label}.yaml"
        atomic.write_text(settings, config.say(config.plain(training.settings)))
        place = folder / "logs" / f"{training.label}.log"
        place.parent.mkdir(parents=True, exist_ok=True)
        log = place.open("ab")
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        env = os.environ | dict.fromkeys(names, str(threads)) | {"TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(  # its own session: an interruption from the keyboard reaches it only through us
            [*command, str(settings)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
        )
        return cls(training, process, log, place.stat().st_size)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def problem(self) -> str:
        """What went wrong, from the log's last line; empty where the run is finished."""
        self.log.close()
        if self.process.returncode in (0, INTERRUPTED):
            return "" if finished(self.training) else "was stopped before its end; run the same command to go on"
        with open(self.log.name, "rb") as file:
            file.seek(self.begun)
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip()[:300] if lines else "it said nothing"
        return f"failed with exit code {self.process.returncode}: {last} (see {self.log.name})"


def _stop(running: Sequence[_Running]) -> None:
    """Ask for an orderly end and wait; a second interruption kills."""
    for each in running:
        each.process.send_signal(signal.SIGTERM)
    try:
        for each in running:
            each.process.wait()
    except KeyboardInterrupt:
        for each in running:
            each.process.kill()
    finally:
        for each in running:
            each.log.close()


@contextmanager
def _terminable() -> Iterator[None]:
    """A request to end, as a scheduler sends it, is an interruption here too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _at(told: Mapping[str, Any], key: str) -> Any:
    value: Any = told
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
