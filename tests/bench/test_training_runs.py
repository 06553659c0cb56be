"""Runs of a plan: each in its own process, resumable, none ended by another's failure."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from diffalign.bench.training_runs import Training, finished, merged, run_all

TRAINER = """
import json, sys, time
from pathlib import Path
import yaml
told = yaml.safe_load(Path(sys.argv[1]).read_text())
folder = Path(told["out"])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write("x")
(folder / "config.yaml").write_text(yaml.safe_dump(told))
if told.get("fails"):
    sys.exit("ModelError: it cannot")
ended = "asked to stop" if told.get("stops") and (folder / "starts").read_text() == "x" else "all steps done"
(folder / "summary.json").write_text(json.dumps({"ended": ended}))
"""


def fake_training(place: Path, name: str, **told: Any) -> Training:
    folder = place / "runs" / f"{name}-0"
    settings = {"steps": 3, "out": str(folder), **told}
    return Training(name=name, seed=0, settings=settings, told=settings, folder=folder)


def command(place: Path) -> list[str]:
    (place / "trainer.py").write_text(TRAINER)
    return [sys.executable, str(place / "trainer.py")]


def starts(each: Training) -> int:
    return len((each.folder / "starts").read_text())


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path):
    jobs = [fake_training(tmp_path, "bad", fails=True), fake_training(tmp_path, "good")]
    failed = run_all(jobs, folder=tmp_path, command=command(tmp_path), say=lambda _: None)
    assert set(failed) == {"bad-0"}
    assert "ModelError: it cannot" in failed["bad-0"]
    assert [finished(each) for each in jobs] == [False, True]


def test_what_is_done_is_not_run_again_and_what_was_stopped_goes_on(tmp_path: Path):
    jobs = [fake_training(tmp_path, "done"), fake_training(tmp_path, "stopped", stops=True)]
    failed = run_all(jobs, folder=tmp_path, command=command(tmp_path), at_once=2, say=lambda _: None)
    assert "to go on" in failed["stopped-0"]
    assert run_all(jobs, folder=tmp_path, command=command(tmp_path), say=lambda _: None) == {}
    assert [starts(each) for each in jobs] == [1, 2]


@pytest.mark.parametrize(("changed", "again"), [({"steps": 9}, True), ({"groups": 4}, True), ({"keep": 9}, False)])
def test_a_run_is_done_only_with_the_settings_it_was_run_with(tmp_path: Path, changed: dict[str, int], again: bool):
    before = fake_training(tmp_path, "a", groups=2, keep=2)
    run_all([before], folder=tmp_path, command=command(tmp_path), say=lambda _: None)
    assert finished(before)
    assert finished(fake_training(tmp_path, "a", **{"groups": 2, "keep": 2, **changed})) is not again


def test_an_interruption_asks_every_run_to_stop_and_waits_for_it(tmp_path: Path):
    (tmp_path / "slow.py").write_text(
        "import signal, sys, time\nfrom pathlib import Path\n"
        "place = Path(sys.argv[1]).parent\n"
        "def stop(*_):\n    (place / 'stopped').write_text('yes'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n(place / 'ready').write_text('yes')\ntime.sleep(60)\n"
    )
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if text.endswith("started"):
            while not (tmp_path / "jobs" / "ready").exists():
                pass
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        run_all(
            [fake_training(tmp_path, "a")],
            folder=tmp_path,
            command=[sys.executable, str(tmp_path / "slow.py")],
            say=say,
        )
    assert (tmp_path / "jobs" / "stopped").exists()
    assert "once more" in said[-1]


def test_overrides_merge_settings_and_replace_what_names_things():
    base = {"evaluate": {"limit": 3, "every": 2}, "reward": {"a": 1.0}, "objective": {"x": {}}, "steps": 1}
    found = merged(base, {"evaluate": {"every": 5}, "reward": {"b": 1.0}, "objective": "y"}, {"steps": 2})
    assert found == {"evaluate": {"limit": 3, "every": 5}, "reward": {"b": 1.0}, "objective": "y", "steps": 2}
    assert base["evaluate"] == {"limit": 3, "every": 2}
