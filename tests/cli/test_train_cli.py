"""`diffalign train` as people type it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from diffalign.cli import main
from tests.rewards import clips
from tests.train.tiny_runs import FAKES, files

CALL = {"num_inference_steps": 4, "height": 16, "width": 16, "guidance_scale": 1.0}


@pytest.fixture
def job(tiny: str, here: Path) -> Path:
    """A config file in an empty working folder."""
    (here / "prompts.txt").write_text("red cube\nblue ball\ngreen tree\ngrey boat\n")
    told = {"model": tiny, "reward": {"brightness": 1.0}, "prompts": "prompts.txt", "call": CALL, "steps": 3}
    told |= {"groups": 2, "group_size": 4, "micro_batch": 4, "adapter": {"rank": 2}, "trackers": [], "ema_every": 1}
    told |= {"optim": {"learning_rate": 0.01}, "evaluate": {"limit": 4, "every": 2, "batch": 8, "kl_prompts": 2}}
    (here / "job.yaml").write_text(yaml.safe_dump(told))
    return here


def test_a_config_trains_and_the_config_in_its_folder_goes_on(job: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "job.yaml", "--json", "told.json", "--out", "a"]) == 0
    assert json.loads((job / "told.json").read_text()) == json.loads((job / "a/summary.json").read_text())
    assert "step 2: proxy" in capsys.readouterr().err
    assert main(["train", "a/config.yaml"]) == 0
    assert "resumed at step 3 from a/checkpoints/step-3" in capsys.readouterr().err
    assert main(["train", "a/config.yaml", "--out", "b"]) == 0
    assert files(job / "b") == files(job / "a")
    assert main(["train", "a/config.yaml", "--steps", "4"]) == 0
    assert json.loads((job / "a/summary.json").read_text())["steps"] == 4


def test_settings_are_overridden_with_dots_and_misspelt_ones_are_named(job: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "job.yaml", "--steps", "1", "optim.learning_rate=0.5", "evaluate.limit=2", "--out", "a"]) == 0
    kept = yaml.safe_load((job / "a/config.yaml").read_text())
    assert (kept["steps"], kept["optim"]["learning_rate"], kept["evaluate"]["limit"]) == (1, 0.5, 2)
    for words, says in (
        (["optim.learning_rat=1"], "learning_rate"),
        (["group_sizes=4"], "group_size"),
        (["evaluate=3"], "evaluate"),
        (["objective={flow_grpo: {clip_hi: 1}}"], "clip_high"),
        (["steps=many"], "steps is 'many'"),
    ):
        assert main(["train", "job.yaml", "--out", "b", *words]) == 2
        assert says in capsys.readouterr().err
    assert main(["train", "flow_grpo_shape"]) == 2
    assert "flow_grpo_shapes" in capsys.readouterr().err
    assert not (job / "b").exists()


def test_a_dry_run_shows_the_settings_and_the_cost_once_and_writes_nothing(
    job: Path, capsys: pytest.CaptureFixture[str]
):
    before = sorted(job.rglob("*"))
    assert main(["train", "job.yaml", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["group_size"] == 4
    assert "# nfe_per_step: " in out
    assert err.count("ratio before the first update") == 1
    assert sorted(job.rglob("*")) == before


def test_a_shipped_config_runs_by_its_name(here: Path, capsys: pytest.CaptureFixture[str]):
    small = ["groups=2", "group_size=2", "micro_batch=4", "steps=1", "precision=no", "evaluate.limit=2", "panel=[]"]
    small += ["evaluate.tower=null", "evaluate.kl_prompts=0", "sampling.num_inference_steps=6", "trackers=[]"]
    assert main(["train", "flow_grpo_shapes", *small, "--out", "a"]) == 0
    told = json.loads((here / "a/summary.json").read_text())
    assert set(told["after"]) >= {"proxy", "truth", "diversity"}


def test_other_settings_are_refused_on_resume_with_exit_code_2(job: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "job.yaml", "--steps", "1", "--out", "a"]) == 0
    assert main(["train", "job.yaml", "--steps", "2", "--out", "a", "groups=4"]) == 2
    err = capsys.readouterr().err
    assert "groups: 2 -> 4" in err
    assert "--force" in err
    assert main(["train", "job.yaml", "--steps", "2", "--out", "a", "groups=4", "--force"]) == 0


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_generate_with_the_result_draws_what_the_tuned_model_drew(job: Path, kind: str):
    assert main(["train", "job.yaml", "--out", "a", f"adapter.kind={kind}"]) == 0
    drawn = [json.loads(line) for line in (job / "a/samples/step-3/results.jsonl").read_text().splitlines()]
    asked = "".join(json.dumps({"prompt": row["prompt"], "seed": row["seed"]}) + "\n" for row in drawn)
    (job / "again.jsonl").write_text(asked)
    model = yaml.safe_load((job / "job.yaml").read_text())["model"]
    call = [f"call.{name}={value}" for name, value in CALL.items()]
    ask = ["generate", "-m", model, "--prompts", "again.jsonl", "--lora", "a/lora", "--batch", "8", "--out", "g", *call]
    assert main(ask) == 0
    from PIL import Image, ImageChops

    for k, row in enumerate(drawn):
        kept, made = Image.open(job / "a/samples/step-3" / row["file"]), Image.open(job / f"g/images/{k:05d}.png")
        assert max(high for _, high in ImageChops.difference(kept, made).getextrema()) <= 1


def test_the_gallery_shows_a_run(job: Path):
    assert main(["train", "job.yaml", "--out", "a"]) == 0
    assert main(["gallery", "a", "--out", "page"]) == 0
    text = "".join(path.read_text() for path in (job / "page").rglob("*") if path.suffix in (".html", ".json", ".js"))
    assert "red cube" in text
    assert "proxy" in text


def test_ctrl_c_has_exit_code_130_and_the_same_command_goes_on(job: Path, capsys: pytest.CaptureFixture[str]):
    reward = f"reward={{{FAKES}:interrupts: 1.0}}"
    words = ["train", "job.yaml", reward, "--out", "a", "preflight=false", "overlap=false"]
    assert main(words) == 130
    assert "interrupted" in capsys.readouterr().err
    assert json.loads((job / "a/summary.json").read_text())["ended"] == "asked to stop"
    assert main(words) == 0
    assert json.loads((job / "a/summary.json").read_text())["ended"] == "all steps done"


@pytest.mark.slow
def test_a_real_process_that_is_killed_goes_on_to_the_same_bytes(job: Path):
    """One run through the interpreter, killed with -9 as soon as a checkpoint stands."""
    words = [sys.executable, "-m", "diffalign", "train", "job.yaml", "--steps", "3"]
    assert subprocess.run([*words, "--out", "whole"], capture_output=True, timeout=120).returncode == 0
    killed = subprocess.Popen([*words, "--out", "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (job / "killed/checkpoints/step-0").exists() and time.monotonic() < until:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(10) == -signal.SIGKILL
    again = subprocess.run([*words, "--out", "killed"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "resumed at step" in again.stderr
    assert files(job / "killed") == files(job / "whole")


def test_help_does_not_load_torch():
    code = "from diffalign.cli import main; main(['train', '--help']); import sys; assert 'torch' not in sys.modules"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for word in ("--minutes", "--resume", "--force", "--dry-run", "flow_grpo_shapes"):
        assert word in told


def test_no_and_off_are_words_where_a_setting_has_them(job: Path):
    words = ["precision=no", "advantage.hardness=off", "--steps", "1", "--out", "a"]
    assert main(["train", "job.yaml", *words]) == 0
    kept = yaml.safe_load((job / "a/config.yaml").read_text())
    assert (kept["precision"], kept["advantage"]["hardness"]) == ("no", "off")


def test_a_reward_is_taught_named_used_and_gone_on_with(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = clips.transformers_folder(tmp_path / "clip")
    found = []
    for k in range(24):
        for name, shade in ((f"{k}-a.png", 200), (f"{k}-b.png", 90)):
            Image.new("RGB", (16, 16), (shade, shade // 2, k)).save(here / name)
        found.append({"prompt": f"thing {k}", "images": [f"{k}-a.png", f"{k}-b.png"], "ranks": [1, 2]})
    (here / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    told = {"objective": "reward", "model": str(model), "data": {"pairs": ["pairs.jsonl"]}, "steps": 3, "batch": 4}
    told |= {"evaluate": {"every": 2}, "optim": {"learning_rate": 0.001}, "trackers": [], "name": "mine"}
    (here / "taste.yaml").write_text(yaml.safe_dump(told))
    assert main(["train", "taste.yaml", "--dry-run"]) == 0
    assert "seconds_per_step" in capsys.readouterr().out
    assert not (here / "out").exists()
    assert main(["train", "taste.yaml", "--json", "told.json", "--out", "a", "--device", "cpu"]) == 0
    summary = json.loads((here / "a/summary.json").read_text())
    assert json.loads((here / "told.json").read_text()) == summary
    assert set(summary["before"]["accuracy"]) == {"mean", "lo", "hi"}
    assert "step 2: held out" in capsys.readouterr().err
    assert main(["train", "a/config.yaml", "--steps", "4"]) == 0
    assert "resumed at step 3" in capsys.readouterr().err
    assert main(["ls", "rewards", "mine"]) == 0
    assert " needed " not in capsys.readouterr().out
    for words in (["mine"], []):
        assert main(["ls", "rewards", *words]) == 0
        shown = capsys.readouterr().out
        assert "pairs of" in " ".join(shown.split())
        assert max(map(len, shown.splitlines())) <= 80
    assert main(["score", "0-a.png", "--prompt", "thing 0", "--reward", "mine", "--out", "scored"]) == 0
    assert main(["train", "taste.yaml", "--out", "b", "loss.kinds=pick"]) == 2
    assert "kind" in capsys.readouterr().err
    assert (
        main(["train", "objective=reward", f"model={model}", "data.pairs=[pairs.jsonl]", "steps=1", "--out", "c"]) == 0
    )
    assert (here / "c/reward/reward.json").is_file()
    capsys.readouterr()
    assert main(["train", "objective={reward: {steps: 1}}", "--out", "d"]) == 2
    assert "Write objective: reward" in capsys.readouterr().err
    (here / "plan.yaml").write_text(yaml.safe_dump({"runs": {"taste": {"config": "taste.yaml"}}}))
    assert main(["bench", "train", "--config", "plan.yaml", "--out", "e"]) == 2
    assert "teaches a reward model" in capsys.readouterr().err
