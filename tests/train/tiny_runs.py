"""Trainings that take a blink: a tiny Stable Diffusion 3, four prompts, three steps."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from diffalign import config
from diffalign.train.settings import TrainConfig
from diffalign.train.start import train
from tests.tiny import build

CALL = {"num_inference_steps": 4, "height": 16, "width": 16, "guidance_scale": 1.0}
SMALL: dict[str, Any] = {
    "objective": {"flow_grpo": {"noise": {"level": 0.7}}},
    "reward": "brightness",
    "steps": 3,
    "groups": 2,
    "group_size": 4,
    "micro_batch": 4,
    "adapter": {"rank": 2},
    "optim": {"learning_rate": 3e-3},
    "ema_every": 1,
    "trackers": [],
    "evaluate": {"limit": 4, "every": 2, "batch": 8, "kl_prompts": 2},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "flow_grpo": {},
    "dense_grpo": {
        "objective": {"dense_grpo": {"calibrate": {"enabled": True, "samples": 4, "rounds": 2}}},
        "advantage": {"step_norm": "group_step"},
    },
    "tree_grpo": {"objective": {"tree_grpo": {"noise": {"window": 2, "rule": "geometric"}}}},
    "crd": {"objective": {"crd": {"draws": 2, "drawing": {"first": 0.5, "last": 0.5}}}, "passes": 2},
    "nft": {"objective": {"nft": {"draws": 2}}},
    "sft": {"objective": "sft"},
    "prdp": {"objective": {"prdp": {"beta": 0.01}}, "passes": 2},
    "direct": {"objective": {"direct": {"rule": "random"}}},
    "dpo": {"objective": {"dpo": {"reset_every": 2}}},
    "kto": {"objective": {"dpo": {"loss": "kto", "beta": 50.0, "draws": 2}}},
    "t_reg": {"objective": {"dpo": {"draws": 2, "regularise": {"weight": 0.5}}}},
}
WITHOUT_RATIO = ("crd", "nft", "visurf", "sft", "direct", "dpo", "kto", "t_reg")
REPEATED = (
    "tree_grpo",
    "nft",
    "sft",
    "direct",
    "dpo",
    "kto",
    "t_reg",
    "dense_grpo",
    "prdp",
)  # whose laws of the loop others hold too: `-m slow`
EVERY = [pytest.param(name, marks=[pytest.mark.slow] if name in REPEATED else []) for name in sorted(OBJECTIVES)]
FAKES = Path(__file__).with_name("fake_rewards.py")
PROMPTS = "red cube\nblue ball\ngreen tree\ngrey boat\n"


@cache
def _stock() -> Any:
    return build("sd3")


def pipeline() -> Any:
    """A fresh tiny pipeline, faster than building it anew."""
    return copy.deepcopy(_stock())


def settings(folder: Path, **asked: Any) -> TrainConfig:
    """SMALL with other settings in it; the prompts are written into `folder`."""
    file = folder / "prompts.txt"
    if not file.exists():
        file.write_text(PROMPTS)
    whole: dict[str, Any] = {"prompts": str(file), **copy.deepcopy(SMALL)}
    for name, value in asked.items():
        inside = isinstance(value, dict) and isinstance(whole.get(name), dict) and name != "objective"
        whole[name] = whole[name] | value if inside else value
    return config.build(TrainConfig, whole)


def run(folder: Path, out: str = "run", *, pipe: Any = None, **asked: Any) -> tuple[dict[str, Any], list[str]]:
    """Train into folder/out: the summary and the lines for people."""
    said: list[str] = []
    more = {name: asked.pop(name) for name in ("show", "dry_run", "seed", "call") if name in asked}
    made = pipe if pipe is not None else pipeline()
    found = train(made, settings(folder, **asked), out=folder / out, say=said.append, **{"call": CALL, **more})
    return found, said


def files(out: Path) -> dict[str, bytes]:
    """What must not depend on how often a run was interrupted: its metrics, its result, and its pictures."""
    kept = [out / "metrics.jsonl", *sorted((out / "lora").glob("*.safetensors")), *sorted(out.rglob("samples/**/*.*"))]
    return {str(path.relative_to(out)): path.read_bytes() for path in kept if path.is_file()}


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a child process: its exit code, or the negative number of the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
