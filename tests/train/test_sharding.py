"""Weights that are shared out over processes learn, are saved and resumed as whole ones; and the launcher's files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffalign.errors import ConfigError
from diffalign.train import checkpoint, processes, sharding
from diffalign.train.policy import PolicyGradient
from tests.train.pairs import EXACT, MOMENTS, PATIENCE, alike, before, both, pair
from tests.train.tiny_runs import die, files, forked, run, settings

ROOT = Path(__file__).parents[2]
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    "adapter",
    [pytest.param({"kind": "full"}, marks=pytest.mark.slow), {"kind": "lora", "rank": 2}],
    ids=["full", "lora"],
)
def test_sharded_weights_learn_and_are_saved_as_whole_ones(adapter: dict[str, Any], tmp_path: Path) -> None:
    asked = {**EXACT, "adapter": adapter, "objective": {"flow_grpo": {"noise": {"level": 0.7}, "beta": 0.01}}}
    assert forked(lambda: run(tmp_path, "one", **asked)) == 0
    assert both(lambda rank: run(tmp_path, "two", **asked), tmp_path / "log", **SHARDED) == [0, 0]
    alike(tmp_path / "one", tmp_path / "two")
    notes = [{p.name: p.read_bytes() for p in (tmp_path / out).rglob("lora/config.json")} for out in ("one", "two")]
    assert notes[0] == notes[1]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{"kind": "full"}, {"kind": "lora", "rank": 2}], ids=["full", "lora"])
def test_sharded_weights_are_resumed_to_the_bit(adapter: dict[str, Any], tmp_path: Path) -> None:
    asked = {"adapter": adapter, "checkpoint_every": 1}
    assert both(lambda rank: run(tmp_path, "whole", **asked), tmp_path / "log", **SHARDED) == [0, 0]
    owner, name = MOMENTS["learning"]

    def dying(rank: int) -> None:
        if rank:
            before(owner, name, lambda call: die() if call == 10 else None)
        run(tmp_path, "torn", **asked)

    assert sorted(pair(dying, tmp_path / "log", **SHARDED).wait(PATIENCE)) == [-9, processes.CODE]
    assert checkpoint.listed(tmp_path / "torn/checkpoints")
    assert both(lambda rank: run(tmp_path, "torn", **asked), tmp_path / "log", **SHARDED) == [0, 0]
    assert files(tmp_path / "whole") == files(tmp_path / "torn")


def test_shards_stay_in_step_where_one_process_has_nothing_to_learn(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if rank:
            PolicyGradient.teaches = lambda self, micro: False  # type: ignore[method-assign]
        run(tmp_path, "run", preflight=False, evaluate={"limit": 3})

    assert both(work, tmp_path / "log", **SHARDED) == [0, 0]


@pytest.mark.parametrize(
    ("told", "asked", "says"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "fsdp2.yaml"),
        ({**SHARDED, "FSDP_VERSION": "1"}, {}, "fsdp_version: 2"),
        ({**SHARDED, "FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params: false"),
        ({**SHARDED, "FSDP_RESHARD_AFTER_FORWARD": "false"}, {}, "fsdp_reshard_after_forward: true"),
        (SHARDED, {"precision": "fp16"}, "precision=bf16"),
        (SHARDED, {"compile": True}, "compile=true"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(
    told: dict[str, str], asked: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=says):
        sharding.check(settings(tmp_path, **asked))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["ddp", "fsdp2"])
def test_the_launcher_files_start_two_processes(file: str, tmp_path: Path) -> None:
    told = tmp_path / "job.yaml"
    told.write_text(
        "{model: shapes-sd3, reward: {shapes_soft: 1.0}, split: train, steps: 1, groups: 2, group_size: 2, "
        "micro_batch: 2, preflight: false, sampling: {num_inference_steps: 3}, evaluate: {limit: 2}, trackers: []}"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{file}.yaml"]
    train = ["--main_process_port", "0", "-m", "diffalign", "train", str(told), "--out", str(tmp_path / "run")]
    done = subprocess.run([*launch, *train], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "run/checkpoints/step-1").glob("rng-*.json"))) == 2
