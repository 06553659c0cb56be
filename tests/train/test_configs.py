"""Every config of configs/train builds, its numbers agree, and its settings run on its pipeline class."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import config, registry, zoo
from diffalign.cli.train import Train
from diffalign.cli.verb import read_config, shipped_configs
from diffalign.errors import ConfigError
from diffalign.train import AdapterConfig, TrainConfig, train
from diffalign.train.known import DataConfig
from diffalign.train.objective import make
from tests.tiny import build
from tests.train.test_known import search_run
from tests.train.test_rto import saved
from tests.train.tiny_runs import WITHOUT_RATIO

CONFIGS = {path.stem: path for path in shipped_configs() if path.parent.name == "train"}
CLASSES = {  # the tiny pipeline of the class and scheduler that a config's model has
    "shapes-sd3": "sd3",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15_pndm",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "black-forest-labs/FLUX.1-dev": "flux",
    "diffusers/FLUX.1-dev-bnb-4bit": "flux",
}
TINY: dict[str, Any] = {"reward": "brightness", "panel": (), "truth": None, "split": None, "trackers": ()}
TINY |= {"groups": 2, "group_size": 4, "micro_batch": 4, "updates": 1, "steps": 1}

TAUGHT = [name for name in CONFIGS if read_config(name).get("objective") == "reward"]
TUNED = [name for name in CONFIGS if name not in TAUGHT]  # jobs that tune a pipeline
each = pytest.mark.parametrize("name", TUNED)


@cache
def told(name: str) -> Any:
    """The job as `diffalign train NAME` reads it."""
    told = dict(read_config(name))
    return config.build(Train.whole(told), told)


def steps_of(job: Any) -> int:
    """Steps of a training walk."""
    return int((job.pipeline_call() | job.sampling)["num_inference_steps"])


def tiny(name: str, tmp_path: Path, **asked: Any) -> tuple[dict[str, Any], list[str]]:
    """The config on a tiny pipeline of its class: its settings, but small pictures, few of them, and few steps."""
    job, said = told(name), list[str]()
    (tmp_path / "prompts.txt").write_text("red cube\nblue ball\ngreen tree\n")
    settings = {f.name: getattr(job, f.name) for f in dataclasses.fields(TrainConfig)}
    given = job.data.given
    (tmp_path / "others.txt").write_text("grey boat\npale star\n")
    others = str(tmp_path / "others.txt") if given else None
    look = dataclasses.replace(job.evaluate, prompts=others, split=None, limit=2 if given else 3, kl_prompts=2)
    settings |= TINY | {"prompts": str(tmp_path / "prompts.txt"), "evaluate": look}
    settings |= of_earlier(job, tmp_path)
    objective: Any = make(job.objective).config  # type: ignore[attr-defined]
    high = objective.noise.high if hasattr(objective, "noise") else None
    if leaves := getattr(objective, "leaves", 0):
        settings |= {"group_size": leaves, "micro_batch": leaves}
    small = {"height": 16, "width": 16, "max_sequence_length": 8}
    call = {k: small.get(k, v) for k, v in job.pipeline_call().items()} | {"num_inference_steps": 4}
    settings["sampling"] = job.sampling | {"num_inference_steps": max(5, (high or 0) + 1)}
    pipe = build(CLASSES[job.model])
    if job.dtype != "auto":
        pipe.to(getattr(torch, job.dtype))
    return train(pipe, TrainConfig(**settings), call=call, out=tmp_path / "run", say=said.append, **asked), said


def of_earlier(job: Any, tmp_path: Path) -> dict[str, Any]:
    """What a config takes from an earlier run, made here: judged pictures, or a LoRA."""
    if job.data.given:
        return {"prompts": None, "data": DataConfig(from_search=(str(search_run(tmp_path / "search")),))}
    if job.objective_name == "rto":
        told = {**job.objective["rto"], "preferred": str(saved(tmp_path / "dpo")), "samples": 4}
        return {"objective": {"rto": told}}
    return {}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_lines_say_what_runs_it_and_what_it_came_to(name: str) -> None:
    lines = CONFIGS[name].read_text().splitlines()
    assert lines[0].startswith(f"# diffalign train {name}")
    assert lines[1].startswith("# ")
    assert "not yet run" in lines[1] or "time:" in lines[1]
    assert 10 <= len(lines) <= 30
    assert max(map(len, lines)) <= 120


@each
def test_its_objective_builds_and_its_noise_fits_its_steps(name: str) -> None:
    job = told(name)
    objective = make(job.objective).config  # type: ignore[attr-defined]
    if hasattr(objective, "noise"):
        low, high = objective.noise.span(steps_of(job))
        assert high - low >= max(objective.noise.window, 1)


@each
def test_its_rewards_exist_and_none_of_them_is_also_held_out(name: str) -> None:
    job = told(name)
    assert set(job.reward) | set(job.panel) <= set(registry.reward_names())
    assert not set(job.reward) & set(job.panel)


@pytest.mark.parametrize("name", [name for name in TUNED if name.endswith("_shapes")])
def test_its_evaluations_see_variety_within_prompts_and_how_rewards_rank(name: str) -> None:
    assert told(name).evaluate.per_prompt >= 2


@pytest.mark.parametrize("name", TAUGHT)
def test_its_reward_model_is_there_and_learns_from_what_its_header_makes(name: str) -> None:
    job: Any = told(name)
    assert job.model in zoo.names()
    made = CONFIGS[name].read_text().splitlines()[2]
    assert all(f"--out {folder}" in made for folder in job.data.from_search)
    assert job.batch % job.micro_batch == 0


@each
def test_its_batches_come_out_even(name: str) -> None:
    job = told(name)
    assert job.images % job.micro_batch == 0
    assert (job.images // job.micro_batch) % job.updates == 0
    if job.objective_name == "tree_grpo":
        assert job.group_size % make(job.objective).config.leaves == 0  # type: ignore[attr-defined]
        assert job.micro_batch % job.group_size == 0


@pytest.mark.parametrize(
    "name", [name if not name.endswith("_80gb") else pytest.param(name, marks=pytest.mark.slow) for name in TUNED]
)
def test_its_settings_pass_the_preflight_of_a_tiny_pipeline_of_its_class(name: str, tmp_path: Path) -> None:
    found, _ = tiny(name, tmp_path, dry_run=True)
    objective = told(name).objective_name
    assert found["ratio_off"] == (None if objective in WITHOUT_RATIO else 0)
    assert found["reached"] > 0.4  # the first factors of a LoRA have no gradient before the first update
    assert objective == "direct" or found["spread"] > 0


@pytest.mark.parametrize(
    "name", ["dense_grpo_shapes", "flow_grpo_guard_shapes", "tree_grpo_shapes", "crd_shapes", "flow_grpo_flux_24gb"]
)
def test_its_settings_run_a_step_with_both_evaluations(name: str, tmp_path: Path) -> None:
    found, _ = tiny(name, tmp_path)
    assert (found["steps"], found["skipped_updates"]) == (1, 0)
    assert {"before", "after"} <= set(found)
    assert (tmp_path / "run" / "lora").is_dir()


def half(tmp_path: Path, pipe: Any, **asked: Any) -> dict[str, Any]:
    """The preflight of a small job on a pipeline in bfloat16."""
    (tmp_path / "prompts.txt").write_text("red cube\nblue ball\n")
    settings = TrainConfig(
        reward="brightness",
        prompts=str(tmp_path / "prompts.txt"),
        trackers=(),
        groups=2,
        group_size=2,
        micro_batch=4,
        **asked,
    )
    call = {"num_inference_steps": 3, "height": 16, "width": 16}
    return train(pipe, settings, call=call, out=tmp_path / "run", say=lambda text: None, dry_run=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_the_ratio_is_one_in_half_precision_and_the_pipeline_is_as_before_after_it(
    family: str, precision: str, tmp_path: Path
) -> None:
    pipe = build(family).to(torch.bfloat16)
    assert half(tmp_path, pipe, precision=precision)["ratio_off"] == 0
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}
    assert "decode" not in vars(pipe.vae)


def test_whole_weights_of_a_model_in_half_precision_need_autocast(tmp_path: Path) -> None:
    whole = AdapterConfig(kind="full")
    with pytest.raises(ConfigError, match="precision=bf16"):
        half(tmp_path, build("sd3").to(torch.bfloat16), adapter=whole)
    assert half(tmp_path, build("sd3").to(torch.bfloat16), adapter=whole, precision="bf16")["ratio_off"] == 0
