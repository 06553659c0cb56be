"""What goes wrong while a run is on: it is counted, said, and costs no more than it must."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import ConfigError, ModelError, OutputError
from diffalign.train import checkpoint, tensors_file
from diffalign.train.policy import PolicyGradient
from tests.train.tiny_runs import FAKES, files, pipeline, rows, run


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Micro-batches, counted from 0 after the preflight, whose loss is NaN; the fixture is the list of them."""
    bad: list[int] = []
    real, count = PolicyGradient.learn, [0]

    def learn(self: Any, job: Any, micro: Any, share: float) -> Any:
        told = real(self, job, micro, share)
        if count[0] in bad:
            for parameter in job.trained.parameters():
                parameter.grad = torch.full_like(parameter, torch.nan)
            told = {**told, "loss": torch.tensor(torch.nan)}
        count[0] += 1
        return told

    monkeypatch.setattr(PolicyGradient, "learn", learn)
    return bad


def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(tmp_path: Path, losing: list[int]):
    losing += [2, 3]
    found, _ = run(tmp_path, preflight=False, ema=0.0)
    assert found["skipped_updates"] == 1
    lines = rows(tmp_path / "run")
    assert [line.get("skipped") for line in lines] == [None, 0, 1, 1]
    assert lines[2]["loss"] is None
    assert lines[2]["kl_base"] == pytest.approx(lines[2]["kl_base"])
    assert lines[3]["kl_base"] > 0


def test_three_such_steps_in_a_row_end_the_run(tmp_path: Path, losing: list[int]):
    losing += list(range(2, 20))
    with pytest.raises(ModelError, match=r"not finite in 3 updates in a row(.|\n)*learning_rate"):
        run(tmp_path, preflight=False, steps=8, evaluate={"every": 8})
    assert len(rows(tmp_path / "run")) < 5


def test_the_count_of_bad_steps_survives_a_resume(tmp_path: Path, losing: list[int]):
    losing += [2, 3, 4, 5]
    run(tmp_path, preflight=False, steps=3)
    losing += [6, 7]
    with pytest.raises(ModelError, match="3 updates in a row"):
        run(tmp_path, preflight=False, steps=6)


def test_weights_that_are_not_finite_are_named(tmp_path: Path):
    pipe = pipeline()
    with torch.no_grad():
        next(pipe.transformer.parameters()).fill_(torch.nan)
    with pytest.raises(ModelError, match="the model gave NaN or inf"):
        run(tmp_path, pipe=pipe)


def test_a_reward_that_fails_on_a_few_pictures_loses_only_these(tmp_path: Path):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found, _ = run(tmp_path, reward={"judge": {"reward": f"{FAKES}:fails", "one_in": 4}}, invalid_limit=0.9)
    assert found["ended"] == "all steps done"
    assert any("the judge is out" in str(each.message) for each in told)
    lines = rows(tmp_path / "run")
    assert 0 < lines[1]["invalid"] < 1
    assert all(line["reward"] is not None for line in lines if "reward" in line)
    assert all(line["grad_norm"] is not None for line in lines if "grad_norm" in line)


def test_a_reward_that_fails_on_many_pictures_ends_the_run(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match=r"failed on \d+% of the images of step \d(.|\n)*invalid_limit"):
            run(tmp_path, reward={"judge": {"reward": f"{FAKES}:fails", "one_in": 2}}, preflight=False)


def test_prompt_files_that_are_empty_or_repeat_themselves(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("\n  \n")
    with pytest.raises(ConfigError, match="prompt"):
        run(tmp_path)
    (tmp_path / "prompts.txt").write_text("red cube\nred cube\nblue ball\n")
    with pytest.warns(UserWarning, match="1 of 3 prompts again"):
        found, _ = run(tmp_path, steps=1)
    assert found["steps"] == 1
    with pytest.raises(ConfigError, match=r"nowhere.txt"):
        run(tmp_path, "other", prompts=str(tmp_path / "nowhere.txt"))


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_during_a_checkpoint_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(tmp_path, "whole")
    real = tensors_file.write
    monkeypatch.setattr(
        tensors_file, "write", lambda part, name, value: full() if ".step-2." in str(part) else real(part, name, value)
    )
    with pytest.raises(OutputError, match=r"step 2(.|\n)*the disk is full; 'step-0' is intact(.|\n)*--resume auto"):
        run(tmp_path)
    assert [path.name for path in checkpoint.listed(tmp_path / "run/checkpoints")] == ["step-0"]
    checkpoint.load(tmp_path / "run/checkpoints/step-0")
    monkeypatch.undo()
    run(tmp_path)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_disk_that_fills_while_a_line_is_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(tmp_path, steps=1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        run(tmp_path, steps=3)
    monkeypatch.undo()
    run(tmp_path, steps=3)
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_settings_file_that_asks_for_what_cannot_be_is_refused_at_once(tmp_path: Path):
    for asked, says in (
        ({"steps": 0}, "steps is 0"),
        ({"groups": -1}, "groups is -1"),
        ({"minutes": -1.0}, "minutes is -1"),
        ({"ema": 1.5}, "ema is 1.5"),
        ({"invalid_limit": 0.0}, "invalid_limit"),
        ({"split": "train"}, "both prompts and split"),
        ({"objective": "flow_grpq"}, "Did you mean 'flow_grpo'"),
        ({"objective": {"flow_grpo": {}, "tree_grpo": {}}}, "2 names"),
        ({"optim": {"learning_rate": 0}}, "learning_rate is 0"),
        ({"optim": {"lr": 1}}, "lr"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"resume": "nowhere/step-3"}, "there is no checkpoint"),
    ):
        with pytest.raises(Exception, match=says) as raised:
            run(tmp_path, **asked)
        assert type(raised.value).__module__ == "diffalign.errors", (asked, raised.value)
        assert not (tmp_path / "run/metrics.jsonl").exists()
