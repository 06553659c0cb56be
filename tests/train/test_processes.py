"""Several processes are one run: they compute what one computes, and none of them outlives the others."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import ConfigError, OutputError
from diffalign.train import checkpoint, evaluate, interrupt, processes, steps
from diffalign.train.job import Job
from diffalign.train.policy import PolicyGradient
from tests.train.pairs import EXACT, MOMENTS, PATIENCE, Pair, alike, before, both, pair
from tests.train.tiny_runs import EVERY, OBJECTIVES, die, files, forked, rows, run

# one run


@pytest.mark.parametrize("objective", EVERY)
def test_two_processes_compute_what_one_does(objective: str, tmp_path: Path) -> None:
    asked = {**OBJECTIVES[objective], **EXACT}
    assert forked(lambda: run(tmp_path, "one", **asked)) == 0
    assert both(lambda rank: run(tmp_path, "two", **asked), tmp_path / "log") == [0, 0]
    alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_processes_share_out_every_update_and_not_the_step(tmp_path: Path) -> None:
    asked = {**EXACT, "groups": 4, "group_size": 2, "micro_batch": 2, "updates": 2}
    assert forked(lambda: run(tmp_path, "one", **asked)) == 0
    assert both(lambda rank: run(tmp_path, "two", **asked), tmp_path / "log") == [0, 0]
    alike(tmp_path / "one", tmp_path / "two")


def test_groups_are_shared_whole_and_once() -> None:
    for groups, updates, count in ((12, 1, 3), (12, 2, 3), (8, 2, 2), (6, 4, 2)):
        job = object.__new__(Job)
        job.config = settings_of(groups, updates)
        job.accelerator = type("Many", (), {"num_processes": count})()
        dealt = [job.groups_of(rank) for rank in range(count)]
        assert sorted(group for part in dealt for group in part) == list(range(groups))
        assert {len(part) for part in dealt} == {groups // count}


def settings_of(groups: int, updates: int) -> Any:
    from diffalign.train.settings import TrainConfig

    return TrainConfig(groups=groups, updates=updates)


@pytest.mark.slow
def test_two_processes_repeat_themselves_to_the_bit(tmp_path: Path) -> None:
    for out in ("a", "b"):
        assert both(lambda rank, out=out: run(tmp_path, out), tmp_path / "log") == [0, 0]  # type: ignore[misc]
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_processes_stay_in_step_where_one_of_them_has_nothing_to_learn(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if rank:
            PolicyGradient.teaches = lambda self, micro: False  # type: ignore[method-assign]
        run(tmp_path, "run", preflight=False)

    assert both(work, tmp_path / "log") == [0, 0]
    assert all(row["grad_norm"] > 0 for row in rows(tmp_path / "run")[1:])


def test_where_no_process_has_a_gradient_the_weights_stay_as_they_are(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        PolicyGradient.teaches = lambda self, micro: False  # type: ignore[method-assign]
        run(tmp_path, "run", preflight=False, optim={"weight_decay": 0.5})

    assert both(work, tmp_path / "log") == [0, 0]
    first, last = (checkpoint.load(tmp_path / f"run/checkpoints/step-{step}").state["trained"] for step in (2, 3))
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        def spoil(call: int) -> None:
            if rank and call == 2:
                spoilt.append(call)

        spoilt: list[int] = []
        real = Job.backward

        def backward(self: Job, loss: torch.Tensor) -> None:
            real(self, loss * (torch.nan if spoilt else 1.0))
            spoilt.clear()

        Job.backward = backward  # type: ignore[method-assign]
        before(PolicyGradient, "learn", spoil)
        run(tmp_path, "run", preflight=False)

    assert both(work, tmp_path / "log") == [0, 0]
    assert [row["skipped"] for row in rows(tmp_path / "run")[1:]] == [0, 1, 1]


def test_a_checkpoint_has_the_random_numbers_of_every_process(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        before(checkpoint, "save", lambda call: torch.manual_seed(rank) and None)
        run(tmp_path, "run")

    assert both(work, tmp_path / "log") == [0, 0]
    kept = [checkpoint.load(tmp_path / "run/checkpoints/step-3", rank).rng for rank in range(2)]
    for rank, state in enumerate(kept):
        assert state is not None
        assert torch.equal(state["torch"], torch.manual_seed(rank).get_state())


# going on


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_pair_that_is_killed_anywhere_ends_as_the_one_that_was_not(seed: int, tmp_path: Path) -> None:
    assert both(lambda rank: run(tmp_path, "whole"), tmp_path / "log") == [0, 0]
    draw = random.Random(seed)
    for _ in range(3):
        running = pair(lambda rank: run(tmp_path, "torn"), tmp_path / "log")
        time.sleep(draw.uniform(0.5, 4.0))
        for rank in range(2):
            running.kill(rank)
        running.wait()
    assert both(lambda rank: run(tmp_path, "torn"), tmp_path / "log") == [0, 0]
    assert files(tmp_path / "whole") == files(tmp_path / "torn")


# the end of one is the end of all


def lost(moment: str, victim: int, folder: Path, **asked: Any) -> tuple[float, Pair, list[int]]:
    """A run one process of which is killed at its third arrival at a moment, and how long the other one lives on."""
    owner, name = MOMENTS[moment]

    def work(rank: int) -> None:
        if rank == victim:
            before(owner, name, lambda call: die() if call == 3 else None)
        run(folder, "run", **{"checkpoint_every": 1, **asked})

    running = pair(work, folder / "log")
    os.waitid(os.P_PID, running.pids[victim], os.WEXITED | os.WNOWAIT)
    since = time.monotonic()
    codes = running.wait(PATIENCE)
    return time.monotonic() - since, running, codes


@pytest.mark.parametrize(
    ("moment", "victim"),
    [
        ("sampling", 1),
        pytest.param("learning", 0, marks=pytest.mark.slow),
        ("sharing gradients", 1),
        pytest.param("evaluating", 0, marks=pytest.mark.slow),
        pytest.param("writing a checkpoint", 0, marks=pytest.mark.slow),
        ("writing a checkpoint", 1),
    ],
)
def test_when_one_process_is_killed_the_other_one_ends_and_says_why(moment: str, victim: int, tmp_path: Path) -> None:
    seconds, running, codes = lost(moment, victim, tmp_path)
    assert codes[victim] == -9
    assert codes[1 - victim] == processes.CODE
    assert seconds < 5
    told = running.said(1 - victim)
    assert f"process {victim} (pid {running.pids[victim]}" in told
    assert "ended without a word" in told
    assert "--resume auto" in told


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_busy_hears_of_a_loss_at_once(victim: int, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        wait = (lambda call: time.sleep(0.5) or die()) if rank == victim else (lambda call: time.sleep(60))
        before(PolicyGradient, "walk", wait)
        run(tmp_path, "run", preflight=False)

    began = time.monotonic()
    running = pair(work, tmp_path / "log")
    codes = running.wait(PATIENCE)
    assert sorted(codes) == [-9, processes.CODE]
    assert time.monotonic() - began < 15
    assert "ended without a word" in running.said(1 - victim)


@pytest.mark.parametrize("where", ["metrics", "samples", "lock"])
def test_an_error_of_the_main_process_alone_ends_all_with_its_message(where: str, tmp_path: Path) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OutputError("cannot write it: the disk is full. Make room.")

    def work(rank: int) -> None:
        if where == "metrics":
            steps.Metrics.__init__ = full  # type: ignore[method-assign]
        elif where == "samples":
            evaluate.keep_samples = full
        if where != "lock":
            run(tmp_path, "run")
            return
        from diffalign.train import run_folder

        if rank == 0:
            with run_folder.locked(tmp_path / "other"):
                run_folder.locked = full  # type: ignore[assignment]
                run(tmp_path, "run")
        else:
            run(tmp_path, "run")

    running = pair(work, tmp_path / "log")
    codes = running.wait(PATIENCE)
    assert all(code in (1, processes.CODE) for code in codes)
    assert "OutputError: cannot write it: the disk is full. Make room." in running.said(1)


def test_an_error_of_another_process_alone_ends_all_with_its_message(tmp_path: Path) -> None:
    def broken(call: int) -> None:
        raise ConfigError("the judge of process 1 has no key. Set it.")

    def work(rank: int) -> None:
        if rank:
            before(evaluate, "draw", broken)
        run(tmp_path, "run")

    running = pair(work, tmp_path / "log")
    assert running.wait(PATIENCE) == [processes.CODE, 1]
    assert "process 1 ended with ConfigError: the judge of process 1 has no key. Set it." in running.said(0)


def test_changed_settings_are_refused_in_every_process(tmp_path: Path) -> None:
    assert both(lambda rank: run(tmp_path, "run", steps=1), tmp_path / "log") == [0, 0]
    running = pair(lambda rank: run(tmp_path, "run", seed=1), tmp_path / "log")
    codes = running.wait(PATIENCE)
    assert 0 not in codes
    assert 999 not in codes
    assert all("seed: 0 -> 1" in running.said(rank) for rank in range(2))


def test_a_signal_to_one_process_ends_all_of_them_after_the_same_step(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if rank:
            before(PolicyGradient, "walk", lambda call: os.kill(os.getpid(), 15) if call == 2 else None)
        run(tmp_path, "run", preflight=False)

    assert both(work, tmp_path / "log") == [0, 0]
    assert json.loads((tmp_path / "run/summary.json").read_text())["ended"] == "asked to stop"
    assert both(lambda rank: run(tmp_path, "run"), tmp_path / "log") == [0, 0]
    assert rows(tmp_path / "run")[-1]["step"] == 3


def test_the_echo_of_a_signal_that_a_launcher_sends_is_not_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    with interrupt.heard(lambda: heard.append(1)):
        os.kill(os.getpid(), 2)
        os.kill(os.getpid(), 2)
    assert heard == [1]


# launchers


def test_a_launcher_that_started_one_process_of_several_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    processes.require_group()  # one process was asked for
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match="--multi_gpu --num_processes 2"):
        processes.require_group()
    monkeypatch.setenv("LOCAL_RANK", "0")
    processes.require_group()


def test_more_processes_than_prompts_to_evaluate_are_refused(tmp_path: Path) -> None:
    running = pair(lambda rank: run(tmp_path, "run", evaluate={"limit": 1, "per_prompt": 2}), tmp_path / "log")
    assert 0 not in running.wait(PATIENCE)
    assert "Raise evaluate.limit to at least 2" in running.said(0)
