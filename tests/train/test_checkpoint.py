"""What is saved comes back to the bit, and an interruption never costs the checkpoint before."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.errors import ConfigError, ModelError, OutputError
from diffalign.train import checkpoint, tensors_file


def same(a: Any, b: Any) -> bool:
    """Equal in type, order, keys and every bit; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        bits = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return bits and a.detach().contiguous().reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and list(map(type, a)) == list(map(type, b)) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.tuples(st.integers()), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(value=PLAIN)
def test_plain_values_of_every_kind_come_back_as_they_were(value: Any) -> None:
    tree, tensors = tensors_file.pack(value)
    assert same(tensors_file.unpack(json.loads(json.dumps(tree, allow_nan=False)), tensors), value)


def tensors() -> dict[str, Any]:
    flat = torch.arange(24.0).reshape(4, 6)
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.bool, torch.int64)
    return {
        "transposed": flat.t(),
        "slice": flat[1:3, ::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "lone": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.tensor([math.nan, math.inf, -0.0])),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "wide": torch.tensor([1 + 2j], dtype=torch.complex128),
        "eight": torch.randn(3).to(torch.float8_e4m3fn),
        "kinds": [torch.tensor([0, 1, 2]).to(dtype) for dtype in dtypes],
        3: {"3": torch.ones(2), 3: torch.zeros(2)},
        "!": {"dtype": torch.bfloat16, "array": np.arange(5, dtype=np.uint32)},
        "number": np.float32(0.1),
    }


def test_tensors_of_every_dtype_and_layout_come_back_to_the_bit(tmp_path: Path) -> None:
    state = tensors()
    path = checkpoint.save(tmp_path, 7, state)
    found = checkpoint.load(path)
    state["number"] = float(state["number"])
    state["conjugate"] = state["conjugate"].resolve_conj()
    assert found.step == 7
    assert same(state, found.state)
    assert sorted(p.suffix for p in path.iterdir()) == [".json"] * 3 + [".safetensors"] * 2


def test_tied_tensors_come_back_tied(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    found = checkpoint.load(checkpoint.save(tmp_path, 1, {"in": weight, "out": weight, "row": weight[0]})).state
    assert found["in"] is found["out"]
    assert found["row"].equal(weight[0])


def test_a_value_that_json_has_not_is_refused_by_its_place() -> None:
    with pytest.raises(TypeError, match=r"state\.watch\.0 is a object"):
        tensors_file.pack({"watch": [object()]})
    with pytest.raises(TypeError, match="sharded or sparse"):
        tensors_file.pack({"w": torch.eye(2).to_sparse()})


class Training:
    """A small training with everything that keeps state."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        groups = [
            {"params": self.model[0].parameters(), "lr": 1e-2},
            {"params": self.model[2].parameters(), "lr": 0.1 / 3, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), **options)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda k: 1 / (1 + 0.1 * k))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)

    def steps(self, count: int) -> None:
        for _ in range(count):
            x = torch.randn(5, 4) * random.random() + float(np.random.rand())
            self.optimizer.zero_grad()
            self.scaler.scale(self.model(x).square().mean()).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()

    def state(self) -> dict[str, Any]:
        schedule = {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"}
        kept = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**kept, "scaler": self.scaler.state_dict(), "schedule": schedule}

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None, None]})


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"amsgrad": True}], ids=str)
def test_training_on_from_a_checkpoint_equals_training_through(tmp_path: Path, options: dict[str, Any]) -> None:
    random.seed(1)
    np.random.seed(1)
    through = Training(**options)
    through.steps(5)
    path = checkpoint.save(tmp_path, 5, through.state())
    through.steps(6)

    random.seed(2)
    np.random.seed(2)
    again = Training(**options)
    again.steps(2)
    found = checkpoint.load(path)
    again.restore(found.state)
    assert found.rng is not None
    checkpoint.restore_rng(found.rng)
    assert isinstance(again.optimizer.param_groups[0]["betas"], tuple)
    again.steps(6)
    assert same(again.state(), through.state())


def test_the_newest_whole_checkpoint_is_taken_and_torn_ones_are_named(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        checkpoint.save(tmp_path, step, {"w": torch.full((100,), float(step))})
    assert checkpoint.latest(tmp_path) == tmp_path / "step-10"
    weights = tmp_path / "step-10" / "state.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)  # same size, other content
    (tmp_path / "step-9" / "state.json").unlink()
    with pytest.warns(UserWarning, match="step-10.*no complete"), pytest.warns(UserWarning, match="step-9"):
        assert checkpoint.latest(tmp_path) == tmp_path / "step-2"
    with pytest.raises(ModelError, match="no complete checkpoint"):
        checkpoint.load(tmp_path / "step-10")
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_pruning_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, {})
    gone = checkpoint.prune(tmp_path, 2, protect=(1, None))
    assert [path.name for path in gone] == ["step-2"]
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-3", "step-4"]
    with pytest.raises(ConfigError, match="keep is 0"):
        checkpoint.prune(tmp_path, 0)


def test_saving_the_same_step_again_replaces_it_also_when_interrupted_between_the_renames(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, {"k": 1})
    path = checkpoint.save(tmp_path, 3, {"k": 2})
    assert checkpoint.load(path).state == {"k": 2}
    path.rename(tmp_path / ".step-3.old")
    assert checkpoint.latest(tmp_path) == path
    assert os.listdir(tmp_path) == ["step-3"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Any:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.getuid() != 0 or mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a file system here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tiny_disk: Path) -> None:
    checkpoint.save(tiny_disk, 1, {"w": torch.ones(100)})
    with pytest.raises(OutputError, match=r"step 2.*the disk is full; 'step-1' is intact.*--resume auto"):
        checkpoint.save(tiny_disk, 2, {"w": torch.ones(100_000)})
    with pytest.raises(OutputError, match="the disk is full"):
        checkpoint.save(tiny_disk, 2, {"words": "x" * 400_000})
    assert os.listdir(tiny_disk) == ["step-1"]
    assert checkpoint.load(tiny_disk / "step-1").state["w"].sum() == 100


@pytest.mark.parametrize("write", range(8))
def test_a_disk_that_fills_up_at_any_write_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    checkpoint.save(tmp_path, 1, {"k": 1})
    sync, count = tensors_file.sync, [0]

    def full(path: Path) -> None:
        count[0] += 1
        if count[0] == write + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    monkeypatch.setattr(tensors_file, "sync", full)
    told = ""
    try:
        checkpoint.save(tmp_path, 2, {"k": 2})
    except OutputError as e:
        told = str(e)
    left = sorted(os.listdir(tmp_path))
    if count[0] <= 6:
        assert "the disk is full" in told
        assert left == ["step-1"]
    else:  # the wait after the rename: the new one is whole
        assert left == ["step-1", "step-2"]
    monkeypatch.undo()
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert checkpoint.load(found).state == {"k": checkpoint.step_of(found)}


def save_for_ever(folder: Path, step: int, pipe: int) -> None:
    """What the killed process does."""
    try:
        while True:
            step += 1
            checkpoint.save(folder, step, {"step": step, "w": torch.full((20_000,), float(step))})
            os.write(pipe, f"{step}\n".encode())
            checkpoint.prune(folder, 2)
    finally:
        os._exit(1)


@pytest.mark.parametrize("deaths", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_newest_checkpoint_loads(deaths: int, tmp_path: Path) -> None:
    said, rng = 0, random.Random(0)
    for _ in range(deaths):
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(tmp_path, said, writes)
        os.close(writes)
        with os.fdopen(reads) as lines:
            time.sleep(rng.random() * 0.25)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            said = max([said, *map(int, lines.read().split())])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            newest = checkpoint.latest(tmp_path)
        if newest is not None:
            found = checkpoint.load(newest)
            assert found.step in (said, said + 1)
            assert found.state["step"] == found.step == found.state["w"].mean()
            said = found.step
    assert said > deaths // 4


def in_processes(work: Any, count: int) -> list[Any]:
    """Run `work(rank, barrier)` in threads that stand for processes."""
    barrier, results = threading.Barrier(count, timeout=10), [None] * count

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank, barrier.wait)
        except Exception as e:
            results[rank] = e  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_process_gets_its_own_random_numbers_back(tmp_path: Path) -> None:
    def work(rank: int, barrier: Any) -> Path:
        state = {"w": 1} if rank == 0 else {}
        return checkpoint.save(tmp_path, 4, state, rng={"own": rank}, rank=rank, processes=3, barrier=barrier)

    assert in_processes(work, 3) == [tmp_path / "step-4"] * 3
    assert [checkpoint.load(tmp_path / "step-4", rank).rng for rank in range(4)] == [
        *({"own": r} for r in range(3)),
        None,
    ]


@pytest.mark.parametrize("unlucky", [0, 1])
def test_where_one_process_cannot_write_all_of_them_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unlucky: int
) -> None:
    checkpoint.save(tmp_path, 1, {})
    write = tensors_file.write

    def failing(folder: Path, name: str, value: Any) -> Any:
        if name == f"rng-{unlucky}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(folder, name, value)

    monkeypatch.setattr(tensors_file, "write", failing)
    found = in_processes(
        lambda rank, barrier: checkpoint.save(tmp_path, 2, {}, rank=rank, processes=2, barrier=barrier), 2
    )
    assert all(isinstance(each, OutputError) for each in found)
    assert os.listdir(tmp_path) == ["step-1"]


def test_a_folder_that_cannot_be_made_ends_every_process(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    found = in_processes(
        lambda rank, barrier: checkpoint.save(tmp_path / "taken", 2, {}, rank=rank, processes=2, barrier=barrier), 2
    )
    assert all(isinstance(each, OutputError) for each in found)
