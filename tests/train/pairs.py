"""Two processes as a launcher starts them, forked so that they take a blink."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from diffalign.train import checkpoint, evaluate
from diffalign.train.job import Job
from diffalign.train.policy import PolicyGradient
from tests.train.tiny_runs import rows

PATIENCE = 30.0  # seconds within which a process must have ended once the other one is gone
EXACT: dict[str, Any] = {
    "evaluate": {"batch": 1},  # pictures one by one, so that the batches of an evaluation are the same
    "optim": {"epsilon": 1e-2},  # Adam makes a whole step of any gradient, such as one that is only rounding
}
MOMENTS: dict[str, tuple[Any, str]] = {
    "sampling": (PolicyGradient, "walk"),
    "learning": (Job, "backward"),
    "sharing gradients": (Job, "share_gradients"),
    "evaluating": (evaluate, "draw"),
    "writing a checkpoint": (checkpoint, "_write_own"),
}


def before(owner: Any, name: str, act: Callable[[int], None]) -> None:
    """Call `act` with the number of the call before every call of a function."""
    real, calls = getattr(owner, name), [0]

    def called(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        act(calls[0])
        return real(*args, **kwargs)

    setattr(owner, name, called)


def alike(a: Path, b: Path, *, tolerance: float = 1e-6) -> None:
    """Two runs with the same metrics and the same result but for rounding."""
    left, right = rows(a), rows(b)
    assert [row["step"] for row in left] == [row["step"] for row in right]
    for one, two in zip(left, right, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            if isinstance(value, float) and not name.endswith("_t"):
                assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-3), (one["step"], name)
    weights = [load_file(next((run / "lora").rglob("*.safetensors"))) for run in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=tolerance, rtol=0) for n in weights[0])


@dataclass
class Pair:
    """Two running processes and what they write to stderr."""

    pids: list[int]
    logs: list[Path]

    def kill(self, rank: int) -> None:
        os.kill(self.pids[rank], signal.SIGKILL)

    def wait(self, patience: float = 120.0) -> list[int]:
        """The exit codes; a process that does not end is killed, and its code is None's stand-in, 999."""
        codes, until = {}, time.monotonic() + patience
        while len(codes) < 2 and time.monotonic() < until:
            for pid in self.pids:
                if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(done[1])
            time.sleep(0.02)
        for pid in self.pids:
            if pid not in codes:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return [codes.get(pid, 999) for pid in self.pids]

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()


def pair(work: Callable[[int], object], folder: Path, **environment: str) -> Pair:
    """Start `work(rank)` in two processes of one run on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"stderr-{rank}.txt" for rank in range(2)]
    return Pair([_fork(work, rank, port, logs[rank], environment) for rank in range(2)], logs)


def both(work: Callable[[int], object], folder: Path, **environment: str) -> list[int]:
    """The same, waited for."""
    return pair(work, folder, **environment).wait()


def _fork(work: Callable[[int], object], rank: int, port: int, log: Path, environment: dict[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        of_launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in of_launcher.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **environment})
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        work(rank)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)
