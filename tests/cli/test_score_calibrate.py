"""`score --calibrate` adds references of a base model, which it takes from a run's card or from --base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffalign import calibration
from diffalign.cli import main
from tests.cli.conftest import SMALL

ASK = ["score", "out/generate", "-r", "brightness", "-r", "jpeg_size", "--calibrate", "t.json"]


@pytest.fixture
def run(tiny: str, here: Path) -> Path:
    """A run of two prompts, one of them twice."""
    prompts = ["-p", "one", "-p", "two", "-p", "one"]
    assert main(["generate", "-m", tiny, *prompts, *SMALL]) == 0
    return here


def test_a_run_becomes_tables_of_its_base_model(run: Path, tiny: str, capsys: pytest.CaptureFixture[str]):
    assert main([*ASK, "--json", "r.json"]) == 0
    tables = {str(table.reward["name"]): table for table in calibration.read_tables(run / "t.json")}
    assert set(tables) == {"brightness", "jpeg_size"}
    base = tables["brightness"].base
    assert (base["model"], base["steps"], base["height"]) == (tiny, 2, 16)
    scores = [json.loads(line) for line in (run / "out/score/scores.jsonl").read_text().splitlines()]
    ones = sorted(row["brightness"] for row in scores if row["prompt"] == "one")
    assert tables["brightness"].prompts["one"] == pytest.approx(ones)
    told = json.loads((run / "r.json").read_text())["calibration"][0]
    assert (told["prompts"], told["references_per_prompt"]) == (2, [1, 2])
    assert told["hash"] == tables["brightness"].hash
    assert told["hash"][:12] in capsys.readouterr().out


def test_an_unreadable_reference_counts_as_invalid(run: Path):
    (run / "out/generate/images/00001.png").write_text("broken")
    assert main(ASK) == 0
    assert calibration.read_tables(run / "t.json")[0].invalid == {"two": 1}


def test_plain_images_need_to_say_what_drew_them(here: Path, capsys: pytest.CaptureFixture[str]):
    Image.new("RGB", (8, 8), "red").save(here / "a.png")
    ask = ["score", "a.png", "-p", "x", "-r", "brightness", "--calibrate", "t.json"]
    assert main(ask) == 2
    assert "--base model=NAME" in capsys.readouterr().err
    assert main([*ask, "--base", "model"]) == 2
    assert main([*ask, "--base", "model=mine", "--base", "steps=28"]) == 0
    assert dict(calibration.read_tables(here / "t.json")[0].base) == {"model": "mine", "steps": 28}
    assert main([*ask, "base.model=other"]) == 2
    assert "another base" in capsys.readouterr().err


def test_images_that_a_search_chose_are_no_references(run: Path, capsys: pytest.CaptureFixture[str]):
    card = json.loads((run / "out/generate/card.json").read_text())
    (run / "out/generate/card.json").write_text(json.dumps(card | {"method": {"name": "best_of_n", "n": 4}}))
    assert main(ASK) == 2
    assert "chosen by 'best_of_n'" in capsys.readouterr().err


def test_runs_of_two_bases_do_not_mix(run: Path, tiny: str, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "-m", tiny, "-p", "one", *SMALL, "call.num_inference_steps=3", "--out", "other"]) == 0
    assert main(["score", "out/generate", "other", "-r", "brightness", "--calibrate", "t.json"]) == 2
    assert "steps is 2 and 3" in capsys.readouterr().err
