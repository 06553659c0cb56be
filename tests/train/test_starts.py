"""What a job is refused for before anything runs, and what it leaves behind then: nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffalign import config
from diffalign.errors import ConfigError, UnknownName
from diffalign.snapshot import differences, snapshot
from diffalign.train import data
from diffalign.train.settings import EvaluateConfig, OptimConfig, TrainConfig
from diffalign.train.start import train
from diffalign.train.watch import WatchConfig
from tests.tiny import build
from tests.train import jobs
from tests.train.tiny_runs import CALL, FAKES, pipeline, run, settings


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"truth": "nosuch"}, UnknownName, "nosuch"),
        ({"panel": ["nosuch"]}, UnknownName, "nosuch"),
        ({"panel": {"brightness": 2.0}}, ConfigError, "only watches"),
        ({"panel": ["colourfulness", "colourfulness"]}, ConfigError, "two rewards called 'colourfulness'"),
        ({"objective": {"flow_grpo": {"noise": {"low": 9}}}}, ConfigError, "noise"),
    ],
)
def test_a_start_that_fails_leaves_the_pipeline_as_it_was(tmp_path: Path, asked, error, says):
    pipe = pipeline()
    pipe(prompt="once", **CALL)  # text encoders set up hooks of their own at their first call
    before = snapshot(pipe)
    with pytest.raises(error, match=says):
        train(pipe, settings(tmp_path, **asked), call=CALL, out=tmp_path / "run", say=lambda line: None)
    assert differences(before, snapshot(pipe)) == []


def test_a_reward_that_tells_prompts_apart_but_not_their_images_is_refused(tmp_path: Path):
    (tmp_path / "length.py").write_text(
        "import torch\ndef length(media, cases):\n    return torch.tensor([float(len(c.prompt)) for c in cases])\n"
    )
    asked = settings(tmp_path, reward=f"{tmp_path / 'length.py'}:length", micro_batch=8)
    with pytest.raises(ConfigError, match="the same for every prompt's"):
        train(pipeline(), asked, call=CALL, out=tmp_path / "run", say=lambda line: None)


def test_prompts_bring_the_pictures_that_their_rows_name(tmp_path: Path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    rows = [{"prompt": "make it blue", "source": "red.png"}, {"prompt": "make it green", "source": "red.png"}]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cases = data.read(data.PromptsConfig(file=str(tmp_path / "edits.jsonl")))
    assert [case.source.size for case in cases if case.source] == [(16, 16), (16, 16)]


def test_a_pipeline_that_needs_a_picture_says_how_to_give_one(tmp_path: Path):
    asked = settings(tmp_path, reward=f"{FAKES}:brightness")
    with pytest.raises(ConfigError, match="rows name a `source`"):
        train(build("sd_img2img"), asked, call={"num_inference_steps": 4}, out=tmp_path / "run")


@pytest.mark.parametrize(
    "wrong",
    [
        {"betas": [2.0, 3.0]},
        {"epsilon": -1.0},
        {"weight_decay": -1.0},
        {"warmup": -5},
        {"learning_rate": float("inf")},
        {"learning_rate": float("nan")},
    ],
)
def test_an_optimiser_that_cannot_be_is_refused_with_its_settings(wrong):
    with pytest.raises(ConfigError, match=r"optim"):
        config.build(OptimConfig, wrong)


@pytest.mark.parametrize("wrong", [{"keep": -1}, {"kl_prompts": -1}, {"limit": 0}, {"batch": 0}])
def test_counts_of_an_evaluation_are_counts(wrong):
    with pytest.raises(ConfigError, match="at least"):
        EvaluateConfig(**wrong)


def test_a_ceiling_needs_the_divergence_that_it_is_for():
    with pytest.raises(ConfigError, match="no divergence is measured"):
        TrainConfig(watch=WatchConfig(kl_ceiling=5.0), evaluate=EvaluateConfig(kl_prompts=0))


def test_prompts_are_used_as_often_as_their_kind_weighs(tmp_path: Path):
    kinds = tmp_path / "kinds.jsonl"
    kinds.write_text("".join(json.dumps({"prompt": f"cube {k}", "tag": "ab"[k % 2]}) + "\n" for k in range(8)))
    with jobs.job("sd3", prompts=[f"cube {k}" for k in range(8)], tags="ab" * 4, prompt_weights={"a": 0}) as (found, _):
        assert {case.metadata["tag"] for step in range(4) for case in found.cases_of(step)} == {"b"}
    with pytest.raises(ConfigError, match="prompt_weights names 'c'"):
        run(tmp_path, prompts=str(kinds), prompt_weights={"c": 2.0})


def test_a_judge_of_none_of_the_pictures_is_told(tmp_path: Path):
    nobody = {"judge": {"reward": f"{FAKES}:fails", "one_in": 1}}
    with pytest.warns(UserWarning, match="panel member judge judges none of the 4 evaluation pictures"):
        run(tmp_path, panel=nobody, steps=1, preflight=False)
