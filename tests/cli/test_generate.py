"""`generate` writes what it says, repeats, and spends what --dry-run announced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.cli import main
from tests.cli.conftest import SMALL

ROW = {"method", "nfe", "decodes", "reward_calls", "seconds", "proxy", "truth"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stock_images_are_written_with_results_and_card(tiny: str, here: Path):
    assert main(["generate", "-m", tiny, "-p", "one", "-p", "two", "--json", "run.json", *SMALL]) == 0
    rows = lines(here / "out/generate/results.jsonl")
    assert [row["prompt"] for row in rows] == ["one", "two"]
    assert all((here / "out/generate" / row["file"]).read_bytes().startswith(b"\x89PNG") for row in rows)
    card = json.loads((here / "out/generate/card.json").read_text())
    assert card["call"]["num_inference_steps"] == 2
    assert card["seeds"] == [row["seed"] for row in rows]
    [row] = json.loads((here / "run.json").read_text())["rows"]
    assert set(row) == ROW
    assert (row["method"], row["nfe"], row["proxy"]) == ("stock", 4, None)


def test_best_of_n_scores_no_lower_than_stock_and_costs_n_times_as_much(tiny: str, here: Path):
    ask = ["generate", "-m", tiny, "-p", "one", "-p", "two", "--reward", "brightness", *SMALL]
    assert main([*ask, "--json", "a.json", "--out", "a"]) == 0
    assert main([*ask, "--method", "best_of_n", "--n", "3", "--json", "b.json", "--out", "b"]) == 0
    [stock], [best] = (json.loads((here / name).read_text())["rows"] for name in ("a.json", "b.json"))
    assert best["proxy"]["mean"] >= stock["proxy"]["mean"]
    assert best["nfe"] == 3 * stock["nfe"]
    assert best["proxy"]["lo"] <= best["proxy"]["mean"] <= best["proxy"]["hi"]


def test_the_same_seed_writes_the_same_files(tiny: str, here: Path):
    ask = ["generate", "-m", tiny, "-p", "one", "--method", "best_of_n", "--n", "2", "-r", "brightness", "--seed", "7"]
    assert main([*ask, *SMALL, "--out", "a"]) == main([*ask, *SMALL, "--out", "b"]) == 0
    for name in ("images/00000.png", "results.jsonl", "card.json"):
        assert (here / "a" / name).read_bytes() == (here / "b" / name).read_bytes()


def test_an_image_does_not_depend_on_the_batch_it_was_made_in(tiny: str, here: Path):
    ask = ["generate", "-m", tiny, "-p", "one", "-p", "two", "-p", "three", *SMALL]
    assert main([*ask, "--batch", "3", "--out", "a"]) == main([*ask, "--batch", "1", "--out", "b"]) == 0
    rows = [lines(here / name / "results.jsonl") for name in "ab"]
    assert rows[0] == rows[1]


def test_a_budget_bounds_the_cost(tiny: str, here: Path):
    ask = ["generate", "-m", tiny, "-p", "one", "--method", "best_of_n", "--budget", "11", "-r", "brightness"]
    assert main([*ask, *SMALL, "--json", "run.json"]) == 0
    assert json.loads((here / "run.json").read_text())["rows"][0]["nfe"] == 8


def test_top_k_images_are_written_best_first(tiny: str, here: Path):
    ask = ["generate", "-m", tiny, "-p", "one", "--method", "best_of_n", "--n", "3", "--top-k", "2", "-r", "brightness"]
    assert main([*ask, *SMALL]) == 0
    rows = lines(here / "out/generate/results.jsonl")
    assert [row["file"] for row in rows] == ["images/00000-0.png", "images/00000-1.png"]
    assert rows[0]["reward"] >= rows[1]["reward"]


def test_prompts_come_from_a_file_with_their_seeds(tiny: str, here: Path):
    (here / "p.jsonl").write_text('{"prompt": "one", "seed": 11}\n{"prompt": "two", "seed": 22}\n')
    assert main(["generate", "-m", tiny, "--prompts", "p.jsonl", *SMALL]) == 0
    assert [row["seed"] for row in lines(here / "out/generate/results.jsonl")] == [11, 22]


def test_a_dry_run_writes_nothing_and_its_settings_run_as_a_config(
    tiny: str, here: Path, capsys: pytest.CaptureFixture[str]
):
    ask = ["generate", "-m", tiny, "-p", "one", "--method", "best_of_n", "--n", "2", "-r", "brightness", *SMALL]
    assert main([*ask, "--dry-run", "--json", "plan.json"]) == 0
    assert sorted(path.name for path in here.iterdir()) == ["plan.json"]
    (here / "again.yaml").write_text(capsys.readouterr().out)
    assert main(["generate", "--config", "again.yaml", "--json", "run.json"]) == 0
    plan, run = (json.loads((here / name).read_text()) for name in ("plan.json", "run.json"))
    assert plan["cost"]["decodes"] == run["rows"][0]["decodes"] == 2


def test_options_beat_the_config_and_overrides_beat_options(tiny: str, here: Path):
    (here / "c.yaml").write_text("n: 5\nseed: 5\nmethod: best_of_n\nreward: {brightness: 2.0}\nprompt: [one]\n")
    ask = ["generate", "-m", tiny, "--config", "c.yaml", "--seed", "6", "--n", "4", "n=3", *SMALL]
    assert main([*ask, "--dry-run", "--json", "plan.json"]) == 0
    config = json.loads((here / "plan.json").read_text())["config"]
    assert (config["seed"], config["n"], config["reward"]) == (6, 3, {"brightness": 2.0})


@pytest.mark.parametrize("spec", ["mine.py:dark:2.0", "mine:dark"])
def test_a_reward_of_your_own_is_a_file_or_a_module(spec: str, tiny: str, here: Path):
    (here / "mine.py").write_text("def dark(media, cases):\n    return 1 - media.flatten(1).mean(1)\n")
    ask = ["generate", "-m", tiny, "-p", "one", "--method", "best_of_n", "--n", "2", "--reward", spec]
    assert main([*ask, *SMALL, "--json", "run.json"]) == 0
    [row] = lines(here / "out/generate/results.jsonl")
    assert "dark" in row["parts"]


def test_scores_are_not_asked_twice_with_a_cache(tiny: str, here: Path):
    ask = ["generate", "-m", tiny, "-p", "one", "-r", "brightness", "--cache", "scores.sqlite", *SMALL]
    assert main([*ask, "--out", "a"]) == main([*ask, "--out", "b"]) == 0
    assert lines(here / "a/results.jsonl") == lines(here / "b/results.jsonl")
    assert (here / "scores.sqlite").is_file()


MUTE = """
import torch
from diffalign.judges.asking import Judgement

class Mute:
    name, differentiable, modality, version, range = "mute", False, "image", None, None
    def __init__(self, judge=None):
        self.judgements, self.options = [], {}
    def __call__(self, media, cases):
        bad = [case.prompt == "one" for case in cases]
        self.judgements += [(c, Judgement(problem="the reply is a poem")) for c, b in zip(cases, bad) if b]
        return torch.tensor([float("nan") if b else 0.5 for b in bad])
"""


def test_an_image_without_a_score_does_not_end_the_run_and_is_counted(
    tiny: str, here: Path, capsys: pytest.CaptureFixture[str]
):
    (here / "mine.py").write_text(MUTE)
    ask = ["generate", "-m", tiny, "-p", "one", "-p", "two", "--batch", "1", "-r", "mine.py:Mute", *SMALL]
    assert main(ask) == 0
    rows = lines(here / "out/generate/results.jsonl")
    assert [row["reward"] for row in rows] == [None, 0.5]
    assert "1 of 2 images could not be scored (mute: the reply is a poem)" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["stock", "best_of_n"])
def test_a_judges_key_is_written_nowhere(
    method: str, tiny: str, here: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
):
    elsewhere = tmp_path_factory.mktemp("settings")
    (elsewhere / "mine.py").write_text(MUTE)
    judge = "{url: 'http://127.0.0.1:9/v1', model: m, key: sk-very-secret}"
    (elsewhere / "c.yaml").write_text(f"reward: {{'{elsewhere}/mine.py:Mute': {{judge: {judge}}}}}\nprompt: [two]\n")
    ask = ["generate", "-m", tiny, "--config", str(elsewhere / "c.yaml"), "--method", method, *SMALL]
    ask += ["n=2"] if method == "best_of_n" else []
    assert main([*ask, "--dry-run", "--json", "plan.json"]) == 0
    assert main([*ask, "--json", "run.json"]) == 0
    files = [path for path in here.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not [path for path in files if b"sk-very-secret" in path.read_bytes()]
    assert "sk-very-secret" not in capsys.readouterr().out
    [row] = lines(here / "out/generate/results.jsonl")
    if method == "best_of_n":
        assert "http://127.0.0.1:9/v1" in row["command"]
