"""`bench loop` pairs each step with the very model calls it made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import atomic, config
from diffalign.bench import overhead
from diffalign.cases import Case
from diffalign.cli import main
from diffalign.errors import ConfigError
from diffalign.scoring import make_reward, score
from tests.cli.conftest import here, tiny  # noqa: F401

JOB: dict[str, Any] = {
    "call": {"num_inference_steps": 3, "height": 16, "width": 16},
    "reward": {"brightness": 1.0},
    "split": "train",
    "groups": 2,
    "group_size": 2,
    "micro_batch": 2,
    "adapter": {"rank": 2},
    "objective": {"flow_grpo": {"noise": {"window": 1}}},
    "evaluate": {"split": "heldout"},
}


def test_every_step_is_paired_with_the_calls_it_needs(
    tiny: str,  # noqa: F811
    here: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    seen: list[list[str]] = []
    again = overhead.Pairs._again

    def noted(self: overhead.Pairs, calls: list[overhead.Call]) -> dict[str, float]:
        seen.append([call.kind for call in calls])
        return again(self, calls)

    monkeypatch.setattr(overhead.Pairs, "_again", noted)
    atomic.write_text(here / "job.yaml", config.say({**JOB, "model": tiny}))
    assert main(["bench", "loop", "--job", "job.yaml", "--pairs", "2", "--json", "loop.json"]) == 0
    found = json.loads((here / "loop.json").read_text())
    for kinds in seen:  # 2 micro-batches: 3 steps and a picture each, then a replay of one step where advantages differ
        assert kinds.count("forward") == 2 * 3
        assert kinds.count("decode") == 2
        assert kinds.count("learn") == 2
    assert found["pairs"] == 2
    assert len(seen) == 3  # the first warms up
    assert 0 < found["ratio"]["lo"] <= found["ratio"]["mean"] <= found["ratio"]["hi"]
    whole = sum(found["bare_seconds"].values()) + found["rest_seconds"]
    assert whole == pytest.approx(found["step_seconds"])


def test_the_ratio_is_that_of_the_pairs():
    pairs = overhead.Pairs(step=[1.0, 2.0], bare=[0.9, 1.8], parts={"learn": 2.7})
    found = overhead.told(pairs, 12)
    assert found["ratio"]["mean"] == pytest.approx(0.9)
    assert found["images_per_second"] == pytest.approx(8.0)
    assert found["rest_seconds"] == pytest.approx(0.15)


def test_a_timed_reward_says_what_the_reward_says():
    media, cases = torch.rand(2, 3, 8, 8), [Case(prompt="a red circle")] * 2
    overhead.Timed.spent = 0.0
    timed = score(make_reward({overhead.TIMED: {"rewards": {"brightness": 2.0}}}), media, cases).total
    assert torch.equal(timed, score(make_reward({"brightness": 2.0}), media, cases).total)
    assert overhead.Timed.spent > 0


def test_one_pair_is_too_few(tiny: str, here: Path):  # noqa: F811
    from diffalign.train.settings import TrainConfig

    with pytest.raises(ConfigError, match="at least 2"):
        overhead.measure(None, TrainConfig(), folder=here, pairs=1)
