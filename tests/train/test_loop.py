"""The loop as a script meets it: a run folder, a pipeline left as it was, and equal results however it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import scoring
from diffalign.errors import ConfigError, MissingExtra, UnknownName
from diffalign.reward_specs import parse_spec
from diffalign.train import heldout, tracking
from diffalign.train.settings import TrainConfig
from diffalign.train.start import train
from tests.train import fake_rewards
from tests.train.tiny_runs import CALL, EVERY, FAKES, OBJECTIVES, files, pipeline, rows, run, settings

FIGURE = {"mean", "lo", "hi"}


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipe.transformer.state_dict().items()}


def picture(pipe: Any) -> torch.Tensor:
    made = pipe("red cube", **CALL, generator=torch.Generator().manual_seed(5), output_type="pt")
    return made.images  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", EVERY)
def test_a_run_leaves_its_result_its_curves_and_a_summary_with_intervals(tmp_path: Path, name: str):
    asked = {"truth": f"{FAKES}:brightness", "panel": ["colourfulness"], **OBJECTIVES[name]}
    found, said = run(tmp_path, **asked)
    out = tmp_path / "run"
    for file in (
        "config.yaml",
        "metrics.jsonl",
        "timing.jsonl",
        "summary.json",
        "plot.png",
        "samples/step-3/card.json",
    ):
        assert (out / file).is_file(), file
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(found))
    assert set(found) >= {"before", "after", "steps", "seconds", "model_calls", "alarms"}
    for side in ("before", "after"):
        for figure in ("proxy", "truth", "heldout", "diversity"):
            told = found[side][figure]
            assert set(told) == FIGURE
            assert told["lo"] <= told["mean"] <= told["hi"]
    assert [row["step"] for row in rows(out)] == [0, 1, 2, 3]
    assert any("the result is in" in line for line in said)


@pytest.mark.slow
def test_one_step_in_the_direction_of_the_reward_raises_it(tmp_path: Path):
    found, _ = run(tmp_path, steps=12, groups=4, group_size=8, optim={"learning_rate": 1e-2}, evaluate={"every": 12})
    assert found["after"]["proxy"]["mean"] > found["before"]["proxy"]["mean"]


def test_a_script_gets_its_pipeline_back_and_may_train_again(tmp_path: Path):
    pipe = pipeline()
    before, image = weights(pipe), picture(pipe)
    scheduler, flags = pipe.scheduler, [p.requires_grad for p in pipe.transformer.parameters()]
    noise = torch.get_rng_state()
    run(tmp_path, "a", pipe=pipe)
    assert torch.equal(torch.get_rng_state(), noise)
    run(tmp_path, "b", pipe=pipe)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    after = weights(pipe)
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(picture(pipe), image)
    assert pipe.scheduler is scheduler
    assert [p.requires_grad for p in pipe.transformer.parameters()] == flags


def test_a_failed_run_gives_the_pipeline_back_too(tmp_path: Path):
    pipe = pipeline()
    image = picture(pipe)
    with pytest.raises(ConfigError):
        run(tmp_path, pipe=pipe, reward=f"{FAKES}:constant")
    assert torch.equal(picture(pipe), image)
    assert not any("lora" in name for name in weights(pipe))


def test_the_result_in_a_stock_pipeline_draws_what_the_tuned_one_drew(tmp_path: Path):
    run(tmp_path, optim={"learning_rate": 0.03}, evaluate={"every": 3})
    stock = pipeline()
    plain = picture(stock)
    stock.load_lora_weights(str(tmp_path / "run/lora"))
    assert not torch.equal(picture(stock), plain)
    drawn = json.loads((tmp_path / "run/samples/step-3/results.jsonl").read_text().splitlines()[0])
    made = stock(drawn["prompt"], **CALL, generator=torch.Generator().manual_seed(drawn["seed"])).images[0]
    from PIL import Image, ImageChops

    kept = Image.open(tmp_path / "run/samples/step-3" / drawn["file"])
    assert max(high for _, high in ImageChops.difference(kept, made).getextrema()) <= 1


def test_another_lora_in_the_pipeline_stays_and_is_part_of_the_base(tmp_path: Path):
    run(tmp_path, "first", optim={"learning_rate": 0.03})
    pipe = pipeline()
    pipe.load_lora_weights(str(tmp_path / "first/lora"), adapter_name="mine")
    image = picture(pipe)
    run(tmp_path, "second", pipe=pipe)
    assert torch.equal(picture(pipe), image)
    assert pipe.get_active_adapters() == ["mine"]
    first, second = rows(tmp_path / "first")[-1], rows(tmp_path / "second")[0]
    assert second["proxy"] == pytest.approx(first["proxy"], abs=1e-5)
    assert second["kl_base"] == 0


def test_scoring_beside_the_sampling_changes_nothing(tmp_path: Path):
    run(tmp_path, "beside", overlap=True)
    run(tmp_path, "after", overlap=False)
    assert files(tmp_path / "beside") == files(tmp_path / "after")


def test_the_preflight_changes_nothing_and_costs_the_run_nothing(tmp_path: Path):
    asked: dict[str, Any] = {"reward": f"{FAKES}:random", "overlap": False}
    with_it, said = run(tmp_path, "with", preflight=True, **asked)
    without, silent = run(tmp_path, "without", preflight=False, **asked)
    assert files(tmp_path / "with") == files(tmp_path / "without")
    assert with_it["model_calls"] == without["model_calls"]
    assert len(said) > len(silent)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"ema": 0.0},
        {"gradient_checkpointing": True},
        {"updates": 2},
        {"evaluate": {"per_prompt": 2, "limit": 2}},
        {"evaluate": {"kl_prompts": 0}},
        {"precision": "bf16"},
        {"optim": {"decay": "cosine", "warmup": 2}},
        {"adapter": {"kind": "full", "rank": 2}},
        {"objective": {"flow_grpo": {"beta": 0.02, "kl": "path"}}},
    ],
    ids=str,
)
def test_every_setting_of_the_loop_ends_with_finite_numbers(tmp_path: Path, changed: dict[str, Any]):
    found, _ = run(tmp_path, **changed)
    assert found["ended"] == "all steps done"
    last = rows(tmp_path / "run")[-1]
    assert last["skipped"] == 0
    assert last["grad_norm"] > 0
    assert not [name for name, value in last.items() if value is None]


@pytest.mark.slow
def test_gradient_checkpointing_learns_the_same(tmp_path: Path):
    run(tmp_path, "kept")
    run(tmp_path, "again", gradient_checkpointing=True)
    assert (tmp_path / "kept/metrics.jsonl").read_bytes() == (tmp_path / "again/metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_without_an_average_the_raw_weights_are_evaluated_and_saved(tmp_path: Path):
    raw, _ = run(tmp_path, "raw", ema=0.0)
    averaged, _ = run(tmp_path, "averaged", ema=0.9, evaluate={"averaged": False})
    kept, _ = run(tmp_path, "kept", ema=0.9)
    assert raw["after"] == averaged["after"]
    assert raw["after"] != kept["after"]


def test_before_the_first_averaging_the_learnt_weights_are_evaluated_and_saved(tmp_path: Path):
    early, _ = run(tmp_path, "early", ema_every=8)
    run(tmp_path, "raw", ema=0.0)
    assert early["after"]["proxy"] != early["before"]["proxy"]
    assert files(tmp_path / "early") == files(tmp_path / "raw")


def test_a_divergence_that_is_not_walked_is_left_out(tmp_path: Path):
    run(tmp_path, evaluate={"kl_prompts": 0})
    assert not [row for row in rows(tmp_path / "run") if "kl_base" in row]


def test_held_out_rewards_of_any_scale_weigh_alike_and_begin_at_zero(tmp_path: Path):
    asked: dict[str, Any] = {"optim": {"learning_rate": 0.03}, "steps": 2}
    found, _ = run(tmp_path, "both", panel=["colourfulness", f"{FAKES}:large"], **asked)
    run(tmp_path, "one", panel=["colourfulness"], **asked)
    both, one = rows(tmp_path / "both"), rows(tmp_path / "one")
    assert found["before"]["heldout"] == {"mean": 0, "lo": 0, "hi": 0}
    assert both[-1]["heldout"] == pytest.approx(both[-1]["heldout_gain"])
    members = (one[-1]["heldout"], both[-1]["heldout_gain/large"])
    assert both[-1]["heldout"] == pytest.approx(sum(members) / 2)
    assert both[-1]["hacking_gap_lo"] <= both[-1]["hacking_gap"] <= both[-1]["hacking_gap_hi"]
    assert found["watch"]["hacking_gap"]["mean"] == both[-1]["hacking_gap"]
    assert found["watch"]["turn_over"]["step"] in (0, 2)


def test_a_member_of_the_panel_that_trains_is_told(tmp_path: Path):
    with pytest.warns(UserWarning, match="'brightness' is in the panel and in the reward"):
        run(tmp_path, "name", panel=["brightness"], steps=1)
    both = f"{FAKES}:brightness"
    with pytest.warns(UserWarning, match="in the panel and in the reward"):
        run(tmp_path, "file", reward={"colourfulness": 1.0, both: 1.0}, panel=[both], steps=1)


def test_the_variety_is_not_measured_in_the_clip_that_trains():
    def said(asked: str | None, reward: Any) -> tuple[str | None, list[str]]:
        lines: list[str] = []
        raised = [leaf for part, _ in parse_spec(reward) for leaf in scoring.leaves(part)]
        made = heldout.tower(asked, "shapes-sd3", raised, lines.append)
        return made and made.label, lines

    assert said("auto", "brightness") == ("shapes-clip", [])
    assert said(None, "clip") == (None, [])
    for reward in ("clip", {"brightness": 1.0, "clip": 0.1}):
        name, lines = said("auto", reward)
        assert name is None
        assert len(lines) == 1
        assert "variety is measured in pixels: reward 'clip' trains on shapes-clip" in lines[0]
    name, lines = said("shapes-clip", "clip")
    assert name == "shapes-clip"
    assert "take another evaluate.tower" in lines[0]


def test_variety_is_within_prompts_where_a_prompt_has_several_pictures(tmp_path: Path):
    one, _ = run(tmp_path, "one", steps=1)
    two, _ = run(tmp_path, "two", steps=1, evaluate={"per_prompt": 2, "every": 1})
    assert 0 < two["before"]["diversity"]["mean"] < one["before"]["diversity"]["mean"] * 2
    assert "diversity" in rows(tmp_path / "two")[0]
    assert "diversity" not in rows(tmp_path / "one")[0]


@pytest.mark.parametrize("name", ["flow_grpo", "tree_grpo"])
def test_a_reward_that_compares_pictures_sees_whole_groups(tmp_path: Path, name: str):
    fake_rewards.seen.clear()
    asked = settings(
        tmp_path, steps=1, preflight=False, micro_batch=4 if name == "tree_grpo" else 2, **OBJECTIVES[name]
    )
    told = TrainConfig(**{**vars(asked), "reward": (fake_rewards.Listwise(),)})
    train(pipeline(), told, call=CALL, out=tmp_path / "run", say=lambda line: None)
    assert all(count in (4, 8) for count in fake_rewards.seen), fake_rewards.seen
    assert rows(tmp_path / "run")[1]["reward"] == pytest.approx(0.5)


def test_trackers_that_are_missing_or_unknown_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracking, "installed", lambda name: False)
    for name in tracking.KNOWN:
        with pytest.raises(MissingExtra, match=name):
            run(tmp_path, trackers=[name])
    with pytest.raises(UnknownName, match="Did you mean 'wandb'"):
        run(tmp_path, trackers=["wnadb"])
    assert tracking.chosen(("auto",)) == []
    assert not (tmp_path / "run").exists()


def test_a_tracker_hears_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    heard: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr(tracking, "installed", lambda name: True)
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda self, *a, **k: None)
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, step: heard.append((step, values)))
    run(tmp_path, trackers=["tensorboard"])
    assert [step for step, _ in heard] == [0, 1, 2, 3]
    assert all(isinstance(v, float) for _, values in heard for v in values.values())
    assert {"proxy", "reward", "kl_base", "images_per_second"} <= set(heard[-1][1])


def test_tensorboard_writes_its_curves_beside_the_metrics(tmp_path: Path):
    run(tmp_path, trackers=["tensorboard"])
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_a_reward_given_as_an_object_trains(tmp_path: Path):
    """From a script a reward may be any callable; config.yaml then has its name."""
    asked = settings(tmp_path)
    told = TrainConfig(**{**vars(asked), "reward": fake_rewards.brightness})
    found = train(pipeline(), told, call=CALL, out=tmp_path / "run", say=lambda line: None)
    assert found["steps"] == 3
    assert "brightness" in (tmp_path / "run/config.yaml").read_text()
