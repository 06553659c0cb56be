"""Before the first step: what cannot work is refused, saying what to change."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import ConfigError, DiffalignError, ModelError
from diffalign.noise import Transition
from diffalign.train import preflight
from diffalign.train.objective import Collected
from tests.train import jobs
from tests.train.tiny_runs import FAKES, OBJECTIVES, WITHOUT_RATIO, pipeline, run

TOO_FEW: list[tuple[dict[str, Any], str]] = [
    ({"group_size": 1, "micro_batch": 1}, "group_size is 1(.|\n)*at least 2"),
    ({"micro_batch": 9}, "micro_batch is 9(.|\n)*micro_batch=8"),
    ({"updates": 3}, "updates is 3(.|\n)*Lower updates or micro_batch"),
    ({"evaluate": {"limit": 1}}, "1 picture(.|\n)*evaluate.per_prompt"),
    ({"reward": ()}, "no reward(.|\n)*reward: "),
    ({"reward": f"{FAKES}:constant"}, "for all of 16 images(.|\n)*partial credit"),
    ({"reward": f"{FAKES}:blind"}, "could not judge any"),
    ({"precision": "fp16"}, "fp16(.|\n)*precision=bf16"),
    ({"objective": {"flow_grpo": {"noise": {"level": 0.0}}}}, "without noise there is no ratio"),
    ({"objective": {"flow_grpo": {"noise": {"level": 1e-6}}}}, "next to none(.|\n)*noise.level"),
    ({"objective": {"flow_grpo": {"noise": {"level": 20.0}}}}, "never seen(.|\n)*Lower noise.level"),
    ({"advantage": {"hardness": "responsiveness"}}, "demonstration"),
]


@pytest.mark.parametrize(("asked", "says"), TOO_FEW, ids=lambda value: str(value)[:50])
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path, asked: dict[str, Any], says: str):
    for dry in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(DiffalignError, match=says):
                run(tmp_path, dry_run=dry, **asked)
        assert not list((tmp_path / "run").glob("*.jsonl"))
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_tree_that_does_not_fit_its_group_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"group_size is 6(.|\n)*group_size=4"):
        run(tmp_path, group_size=6, micro_batch=6, **OBJECTIVES["tree_grpo"])


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_dry_run_tells_time_and_memory_and_leaves_no_trace(tmp_path: Path, name: str):
    pipe = pipeline()
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    found, said = run(tmp_path, "run/deep", pipe=pipe, dry_run=True, **OBJECTIVES[name])
    assert not (tmp_path / "run").exists()
    assert found["ratio_off"] == (None if name in WITHOUT_RATIO else 0)
    assert found["reached"] > 0.5
    assert found["seconds_per_step"] > 0
    assert found["gigabytes"] > 0
    text = "\n".join(said)
    assert "2 prompts x 4 images = 8 images" in text
    assert "GB" in text
    assert "model rows a step" in text
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_log_probabilities_in_half_precision_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = Transition.log_prob
    monkeypatch.setattr(Transition, "log_prob", lambda self, *a, **k: real(self, *a, **k).half())
    with pytest.raises(ConfigError, match=r"log-probabilities are torch.float16(.|\n)*float32"):
        run(tmp_path)


def test_a_model_loaded_in_half_precision_has_ratios_of_1(tmp_path: Path):
    pipe = pipeline().to(torch.bfloat16)
    found, _ = run(tmp_path, pipe=pipe, dry_run=True)
    assert found["ratio_off"] == 0


def test_a_replay_that_differs_from_its_sampling_is_refused(tmp_path: Path):
    pipe = pipeline()
    calls = itertools.count()
    pipe.transformer.register_forward_hook(
        lambda module, args, output: (output[0] + 0.01 * next(calls),) if isinstance(output, tuple) else None
    )
    with pytest.raises(ModelError, match=r"ratio before any update is off by(.|\n)*dropout"):
        run(tmp_path, pipe=pipe)


def test_layers_that_no_gradient_reaches_are_refused(tmp_path: Path):
    blind = r"transformer_blocks\.1\.attn\.add_q_proj"  # the last block drops what its text queries find
    with pytest.raises(ModelError, match=r"no gradient reaches(.|\n)*adapter.targets"):
        run(tmp_path, adapter={"targets": [blind]})


def test_a_time_limit_says_how_many_steps_it_leaves(tmp_path: Path):
    _, said = run(tmp_path, dry_run=True, steps=10**6, minutes=1)
    assert any("minutes=1 will end it after about" in line for line in said)


PLAIN_DENSE = {"objective": "dense_grpo", "advantage": {"step_norm": "group_step"}}


@pytest.mark.parametrize("settings", [{}, PLAIN_DENSE, OBJECTIVES["tree_grpo"]], ids=["flow", "dense", "tree"])
def test_an_estimate_of_model_rows_is_what_a_step_takes(tmp_path: Path, settings: dict[str, Any]):
    found, _ = run(tmp_path, "dry", dry_run=True, **settings)
    run(tmp_path, "run", steps=2, **settings)
    lines = [json.loads(line) for line in (tmp_path / "run/timing.jsonl").read_text().splitlines()]
    taken = lines[1]["nfe"] - lines[0]["nfe"]
    assert found["nfe_per_step"] == taken


def test_the_reward_of_a_preflight_may_be_seen_in_later_micro_batches(tmp_path: Path):
    """A reward that is silent on the first pictures is no reason to refuse."""
    found, _ = run(tmp_path, reward=f"{FAKES}:late", dry_run=True)
    assert found["spread"] > 0


class Bright:
    """An objective without walks: a pull on every trained weight."""

    def __init__(self, pull: float = 1.0) -> None:
        self.pull, self.collected = pull, 0

    def check(self, job: Any) -> None: ...

    def collect(self, job: Any, step: int) -> Collected:
        self.collected += 1
        return Collected([[0, 1], [2]])

    def learn(self, job: Any, micro: Any, share: float) -> dict[str, torch.Tensor]:
        job.budget.charge(nfe=len(micro))
        loss = self.pull * sum((p + 1).square().sum() for p in job.trained.parameters()) * share
        job.backward(loss)
        return {"loss": loss.detach()}

    def state(self) -> dict[str, Any]:
        return {"collected": self.collected}

    def restore(self, state: Any) -> None:
        self.collected = state["collected"]


def test_an_objective_without_walks_is_tried_on_a_step_and_has_neither_ratio_nor_spread():
    with jobs.job("sd3") as (job, _):
        chosen: Any = Bright()
        spent = job.budget.nfe
        found = preflight.fly(job, chosen)
        assert (found.ratio_off, found.spread, found.reached, found.nfe_per_step) == (None, None, 1, 3)
        assert found.seconds_per_step > 0
        assert not any("ratio" in line or "spread" in line for line in found.lines(job))
        assert chosen.collected == 0
        assert job.budget.nfe == spent
        assert not jobs.gradients(job).any()
        with pytest.raises(ModelError, match="no gradient reaches"):
            preflight.fly(job, Bright(0.0))  # type: ignore[arg-type]
