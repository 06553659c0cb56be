"""One run a folder, one process at a time, and what a resumed run finds there."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.errors import ConfigError, OutputError
from diffalign.train import checkpoint, run_folder
from diffalign.train.run_folder import Metrics, begin, differences, locked


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class Job:
    steps: int = 10
    keep: int = 2
    optim: Inner = field(default_factory=Inner)
    reward: dict[str, float] = field(default_factory=lambda: {"clip": 1.0})


def run(out: Path, upto: int, job: Job = Job(), **options: object) -> None:
    """A run that writes a line a step and a checkpoint every third."""
    start = begin(out, job, **options)  # type: ignore[arg-type]
    metrics = Metrics(out)
    for step in range(start.step + 1, upto + 1):
        metrics.values.append({"step": step, "loss": 1 / step, "nan": math.nan if step % 2 else 0.5})
        metrics.timing.append({"step": step, "seconds": step * 0.1})
        if step % 3 == 0:
            checkpoint.save(out / "checkpoints", step, {"step": step})


def test_an_empty_folder_starts_at_the_first_step_whatever_resume_says(tmp_path: Path) -> None:
    for resume in ("auto", "never"):
        start = begin(tmp_path / resume, Job(), resume=resume)
        assert (start.checkpoint, start.step, start.changes) == (None, 0, ())
        assert (tmp_path / resume / "config.yaml").exists()


def test_a_folder_that_holds_a_run_is_refused_unless_it_is_resumed(tmp_path: Path) -> None:
    run(tmp_path, 4)
    with pytest.raises(OutputError, match=r"holds a run already.*--resume auto"):
        begin(tmp_path, Job(), resume="never")
    assert begin(tmp_path, Job(), resume="auto").checkpoint == tmp_path / "checkpoints" / "step-3"


@pytest.mark.parametrize("stopped", [1, 2, 3, 5, 6, 8])
def test_the_metrics_of_a_resumed_run_equal_those_of_an_uninterrupted_one(tmp_path: Path, stopped: int) -> None:
    run(tmp_path / "through", 9)
    run(tmp_path / "again", stopped)
    with (tmp_path / "again" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # a line that the kill cut
    run(tmp_path / "again", 9)
    for name in ("metrics.jsonl", "timing.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "through" / name).read_bytes()


def test_numbers_that_are_not_finite_are_null_and_tensors_are_numbers(tmp_path: Path) -> None:
    lines = Metrics(tmp_path).values
    lines.append({"step": 1, "a": math.inf, "b": [math.nan, 1], "c": torch.tensor(0.5), "d": np.float32(2), "e": "ü"})
    assert lines.rows() == [{"step": 1, "a": None, "b": [None, 1], "c": 0.5, "d": 2.0, "e": "ü"}]
    assert Metrics(tmp_path).timing.rows() == []


def test_a_line_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    lines = run_folder.Lines(Path("/dev/full"))
    with pytest.raises(OutputError, match=r"No space left.*--resume auto"):
        lines.append({"step": 1})


def test_changed_settings_are_shown_and_refused_unless_forced(tmp_path: Path) -> None:
    run(tmp_path, 3)
    other = Job(optim=Inner(rate=1e-3, betas=(0.9, 0.99)), reward={"pick": 1.0})
    with pytest.raises(ConfigError) as told:
        begin(tmp_path, other)
    for line in (
        "optim.rate: 0.0003 -> 0.001",
        "optim.betas: [0.9, 0.999] -> [0.9, 0.99]",
        "reward.pick: (not set) -> 1.0",
        "reward.clip: 1.0 -> (not set)",
        "--force",
    ):
        assert line in str(told.value)
    with pytest.warns(UserWarning, match=r"optim\.rate: 0\.0003 -> 0\.001"):
        begin(tmp_path, other, force=True)
    assert begin(tmp_path, other).changes == ()  # what was forced is the run's config now


def test_length_and_housekeeping_may_change_freely(tmp_path: Path) -> None:
    run(tmp_path, 3)
    start = begin(tmp_path, Job(steps=500, keep=9))
    assert [change.key for change in start.changes] == ["steps", "keep"]
    assert start.step == 3


def test_a_config_compared_with_itself_differs_in_nothing() -> None:
    told = {"a": {"b": [1, 2], "c": {}}, "d": None, "e": 1e-4}
    assert differences(told, told) == []
    assert [str(c) for c in differences({"a": {}}, {"a": {"b": 1}})] == ["a.b: (not set) -> 1", "a: {} -> (not set)"]


def test_a_chosen_checkpoint_of_another_folder_starts_a_new_run_with_its_history(tmp_path: Path) -> None:
    run(tmp_path / "old", 7)
    source = tmp_path / "old" / "checkpoints" / "step-3"
    start = begin(tmp_path / "new", Job(), resume=str(source))
    assert start.checkpoint == source
    assert [row["step"] for row in Metrics(tmp_path / "new").values.rows()] == [1, 2, 3]
    assert begin(tmp_path / "newer", Job(), resume=str(tmp_path / "old")).step == 6
    with pytest.raises(OutputError, match="belongs to another"):
        begin(tmp_path / "new", Job(), resume=str(source))
    assert len(Metrics(tmp_path / "old").values.rows()) == 7


def test_going_back_to_an_older_checkpoint_asks_before_newer_ones_go(tmp_path: Path) -> None:
    run(tmp_path, 7)
    older = str(tmp_path / "checkpoints" / "step-3")
    with pytest.raises(OutputError, match=r"step-6.*--force"):
        begin(tmp_path, Job(), resume=older)
    assert begin(tmp_path, Job(), resume=older, force=True).step == 3
    assert begin(tmp_path, Job()).step == 3


@pytest.mark.parametrize("resume", ["nowhere", "."])
def test_a_place_without_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="checkpoint"):
        begin(tmp_path / "out", Job(), resume=resume)


def test_a_torn_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    run(tmp_path, 7)
    (tmp_path / "checkpoints" / "step-6" / "state.json").write_text("")
    with pytest.warns(UserWarning, match="step-6"):
        assert begin(tmp_path, Job()).step == 3


HOLDER = """
import sys, time
from diffalign.train.run_folder import locked
with locked(sys.argv[1]):
    print(1, flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_train_into_one_folder_and_a_dead_one_lets_go(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(OutputError, match=f"in use by process {child.pid} on"), locked(tmp_path):
            pass
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert str(child.pid) in (tmp_path / ".lock").read_text()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    with locked(tmp_path):
        pass
