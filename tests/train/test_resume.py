"""A run that was killed, however often and wherever, ends where the uninterrupted one ends, to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import ConfigError
from diffalign.train import checkpoint, run_folder
from tests.train.tiny_runs import EVERY, FAKES, OBJECTIVES, die, files, forked, rows, run

WRITES = ("fsync", "rename", "replace")  # calls of `os` between which a process may die


@pytest.fixture(scope="module", params=EVERY)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with an uninterrupted run of an objective, and its settings."""
    folder, asked = tmp_path_factory.mktemp(request.param), OBJECTIVES[request.param]
    run(folder, "whole", **asked)
    return folder, asked


def dying(folder: Path, out: str, asked: dict[str, Any], *, at: int) -> int:
    """Train in a child process that is killed before its `at`-th call that settles something on the disk."""

    def work() -> None:
        left = [at]
        for name in WRITES:
            real = getattr(os, name)

            def counted(*args: Any, real: Any = real, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    die()
                return real(*args, **kwargs)

            setattr(os, name, counted)
        run(folder, out, **asked)

    return forked(work)


def until_done(folder: Path, out: str, asked: dict[str, Any], moments: Iterator[int]) -> int:
    """Train, dying again and again, until the run is over; how often it died."""
    for deaths, at in enumerate(moments):
        if (code := dying(folder, out, asked, at=at)) == 0:
            return deaths
        assert code == -signal.SIGKILL
    raise AssertionError("it never ended")


def test_killed_between_any_two_writes_it_ends_with_the_same_bytes(whole: tuple[Path, dict[str, Any]]):
    folder, asked = whole
    rng = random.Random(0)
    deaths = until_done(folder, "killed", asked, iter([rng.randint(5, 50) for _ in range(5)] + [10**9]))
    assert deaths > 2
    assert files(folder / "killed") == files(folder / "whole")
    told, other = (json.loads((folder / name / "summary.json").read_text()) for name in ("killed", "whole"))
    for name in ("before", "after", "steps", "model_calls", "chosen"):
        assert told[name] == other[name], name


def test_killed_while_a_checkpoint_is_written_it_goes_on_from_the_one_before(tmp_path: Path):
    run(tmp_path, "whole")

    def work() -> None:
        real = checkpoint._seal
        checkpoint._seal = lambda part, step, count: die() if step == 2 else real(part, step, count)  # type: ignore[assignment]
        run(tmp_path, "killed")

    assert forked(work) == -signal.SIGKILL
    assert [path.name for path in checkpoint.listed(tmp_path / "killed/checkpoints")] == ["step-0"]
    said = run(tmp_path, "killed")[1]
    assert any("resumed at step 0" in line for line in said)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_a_random_moment_it_ends_with_the_same_bytes(tmp_path: Path):
    run(tmp_path, "whole")
    for wait in (0.25, 0.5, 0.75):

        def work(wait: float = wait) -> None:
            timer = threading.Timer(wait, die)
            timer.daemon = True
            timer.start()
            run(tmp_path, "killed")

        forked(work)
    run(tmp_path, "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_reward_that_draws_random_numbers_draws_the_same_after_a_resume(tmp_path: Path):
    asked: dict[str, Any] = {"reward": f"{FAKES}:random", "overlap": False}
    run(tmp_path, "whole", **asked)
    until_done(tmp_path, "killed", asked, iter([35, 30, 10**9]))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_ends_the_run_after_the_step_and_it_goes_on_later(tmp_path: Path, number: signal.Signals):
    asked: dict[str, Any] = {"checkpoint_every": 1, "steps": 5, "evaluate": {"every": 5}}
    run(tmp_path, "whole", **asked)
    kept = signal.getsignal(number)

    def press(step: int, row: Any) -> None:
        if step == 2:
            os.kill(os.getpid(), number)

    found, said = run(tmp_path, "stopped", show=press, **asked)
    assert (found["ended"], found["steps"]) == ("asked to stop", 3)
    assert (found["after_step"], found["chosen"]) == (0, 3)
    assert any("figures of step 0, the weights saved are those of step 3" in line for line in said)
    assert any("stopping after this step" in line for line in said)
    assert (tmp_path / "stopped/checkpoints/step-3/manifest.json").exists()
    assert signal.getsignal(number) is kept
    run(tmp_path, "stopped", **asked)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path):
    def press(step: int, row: Any) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, show=press)
    assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.slow
def test_the_time_ends_a_run_and_a_resumed_one_counts_the_time_before(tmp_path: Path):
    found, _ = run(tmp_path, minutes=1e-6)
    assert (found["ended"], found["steps"]) == ("the time is over", 1)
    again, _ = run(tmp_path, minutes=1e-6)
    assert (again["ended"], again["steps"]) == ("the time is over", 1)
    run(tmp_path, "whole")
    run(tmp_path, minutes=None)
    weights = [load_file(next((tmp_path / name / "lora").glob("*.safetensors"))) for name in ("run", "whole")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


@pytest.mark.slow
def test_interrupted_twice_and_resumed_with_more_steps_it_has_the_weights_of_the_longer_run(tmp_path: Path):
    run(tmp_path, "whole", steps=6)
    until_done(tmp_path, "killed", {}, iter([45, 30, 10**9]))
    found, said = run(tmp_path, "killed", steps=6)
    assert found["steps"] == 6
    assert any("resumed at step 3" in line for line in said)
    whole, resumed = (load_file(next((tmp_path / name / "lora").glob("*.safetensors"))) for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_changed_settings_are_shown_and_refused_unless_forced(tmp_path: Path):
    run(tmp_path, steps=2)
    with pytest.raises(ConfigError, match=r"optim.learning_rate: 0.003 -> 0.1(.|\n)*--force") as refused:
        run(tmp_path, steps=3, optim={"learning_rate": 0.1})
    assert "steps" not in str(refused.value).split("\n")[1]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found, _ = run(tmp_path, steps=3, optim={"learning_rate": 0.1}, force=True)
    assert found["steps"] == 3
    assert any("optim.learning_rate" in str(each.message) for each in told)
    assert rows(tmp_path / "run")[-1]["lr"] == pytest.approx(0.1)


def test_a_run_that_the_watch_ended_stays_ended_with_the_weights_it_went_back_to(tmp_path: Path):
    """Killed after the checkpoint of the alarm, before the result is written."""
    asked: dict[str, Any] = {"steps": 4, "evaluate": {"every": 1}, "optim": {"learning_rate": 0.3}, "ema": 0.0}
    asked["watch"] = {"action": "rollback", "patience": 1, "kl_ceiling": 1e-3, "read": ["kl"]}
    found, _ = run(tmp_path, "whole", **asked)
    assert "the watch says rollback" in found["ended"]
    assert found["chosen"] < found["steps"] < 4

    def work() -> None:
        real = checkpoint.save

        def save(folder: Path, step: int, *args: Any, **kwargs: Any) -> Path:
            place = real(folder, step, *args, **kwargs)
            return die() if step == found["steps"] else place  # type: ignore[return-value, func-returns-value]

        checkpoint.save = save  # type: ignore[assignment]
        run(tmp_path, "killed", **asked)

    assert forked(work) == -signal.SIGKILL
    again, _ = run(tmp_path, "killed", **asked)
    assert again["ended"] == found["ended"]
    assert again["chosen"] == found["chosen"]
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_rollback_finds_its_checkpoint_however_few_are_kept(tmp_path: Path):
    asked: dict[str, Any] = {"steps": 8, "keep": 1, "evaluate": {"every": 1}, "ema": 0.0, "panel": ["colourfulness"]}
    asked |= {"optim": {"learning_rate": 0.1}, "watch": {"action": "rollback", "kl_ceiling": 0.2, "read": ["kl"]}}
    found, _ = run(tmp_path, **asked)
    assert "the watch says rollback" in found["ended"]
    kept = {checkpoint.step_of(path) for path in checkpoint.listed(tmp_path / "run/checkpoints")}
    assert kept == {found["chosen"], found["steps"]}
    assert found["after_step"] == found["chosen"]


def test_a_rollback_of_a_run_that_began_elsewhere_finds_a_checkpoint_of_its_own(tmp_path: Path):
    asked: dict[str, Any] = {"steps": 4, "evaluate": {"every": 1}, "ema": 0.0, "optim": {"learning_rate": 0.3}}
    limits = {"action": "rollback", "patience": 1, "read": ["kl"]}
    run(tmp_path, "first", **{**asked, "steps": 2}, watch=limits)
    asked |= {"watch": {**limits, "kl_ceiling": 1e-3}, "resume": str(tmp_path / "first/checkpoints/step-2")}
    with pytest.warns(UserWarning, match="with other settings"):
        found, _ = run(tmp_path, "second", **asked, force=True)
    assert "the watch says rollback" in found["ended"]
    assert found["chosen"] == 3


@pytest.mark.slow
def test_killed_before_the_first_averaging_it_ends_with_the_same_bytes(tmp_path: Path):
    asked: dict[str, Any] = {"ema_every": 3, "steps": 4, "evaluate": {"every": 1}}
    run(tmp_path, "whole", **asked)
    assert until_done(tmp_path, "killed", asked, iter([45, 40, 10**9])) == 2
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_two_runs_never_share_a_folder(tmp_path: Path):
    with run_folder.locked(tmp_path / "run"):
        code = forked(lambda: run(tmp_path))
    assert code == 1
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_finished_run_started_again_writes_the_same_result(tmp_path: Path):
    first, _ = run(tmp_path)
    before = files(tmp_path / "run")
    again, said = run(tmp_path)
    assert files(tmp_path / "run") == before
    assert again["model_calls"] == first["model_calls"]
    assert any("resumed at step 3" in line for line in said)


def test_resume_never_refuses_a_folder_that_holds_a_run(tmp_path: Path):
    run(tmp_path, steps=1)
    with pytest.raises(Exception, match="resume is never"):
        run(tmp_path, steps=1, resume="never")


def test_going_on_from_a_chosen_checkpoint_elsewhere_ends_the_same(tmp_path: Path):
    run(tmp_path, keep=5)
    chosen = tmp_path / "run/checkpoints/step-2"
    run(tmp_path, "branch", keep=5, resume=str(chosen))
    assert (tmp_path / "branch/metrics.jsonl").read_bytes() == (tmp_path / "run/metrics.jsonl").read_bytes()
    whole, other = (load_file(next((tmp_path / name / "lora").glob("*.safetensors"))) for name in ("run", "branch"))
    assert all(torch.equal(whole[key], other[key]) for key in whole)
