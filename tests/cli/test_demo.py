"""`demo` shows the same prompts before and after, and counts honestly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffalign.cli import main
from diffalign.cli.demo import Demo
from diffalign.gallery import manifest
from tests.cli.conftest import SMALL


def test_rows_sheet_and_card_are_written(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]):
    ask = ["demo", "-m", tiny, "--n", "3", "--prompts", "4", "-r", "brightness", "--json", "demo.json", *SMALL]
    assert main(ask) == 0
    stock, best, tree, reno = json.loads((here / "demo.json").read_text())["rows"]
    assert set(stock) == {"method", "nfe", "decodes", "reward_calls", "seconds", "proxy", "truth"}
    assert [row["method"] for row in (stock, best, tree, reno)] == ["stock", "best of 3", "tree", "ReNO"]
    assert max(tree["nfe"], reno["nfe"]) <= best["nfe"]
    assert best["proxy"]["mean"] >= stock["proxy"]["mean"]
    assert (best["nfe"], best["decodes"], best["reward_calls"]) == (3 * stock["nfe"], 3, 3)
    assert stock["truth"]["lo"] <= stock["truth"]["mean"] <= stock["truth"]["hi"]
    assert Image.open(here / "out/demo/sheet.png").size[0] > 700
    assert json.loads((here / "out/demo/card.json").read_text())["method"]["n"] == 3
    page = manifest.read(here / "out/demo")
    assert [len(page["entries"]), len(page["systems"])] == [4, 4]
    assert page["unlike"] == []  # the tiny model has few steps anyway
    assert "sheet.png" in capsys.readouterr().out


def test_the_stock_row_is_what_generate_makes_of_the_same_prompts(tiny: str, here: Path):
    ask = ["-m", tiny, "-r", "brightness", "--seed", "3", *SMALL]
    assert main(["demo", "--n", "2", "--prompts", "3", "--json", "demo.json", *ask]) == 0
    prompts = [word for case in Demo(prompts=3, seed=3).cases() for word in ("-p", case.prompt)]
    assert main(["generate", *prompts, "--json", "stock.json", *ask]) == 0
    demo, stock = (json.loads((here / name).read_text())["rows"][0] for name in ("demo.json", "stock.json"))
    assert demo["proxy"]["mean"] == pytest.approx(stock["proxy"]["mean"], abs=1e-6)
    assert demo["nfe"] == stock["nfe"]


def test_prompts_differ_and_cover_every_kind_of_task():
    cases = Demo(prompts=12).cases()
    assert len({case.prompt for case in cases}) == 12
    assert len({case.metadata["tag"] for case in cases[:6]}) == 6
    assert len({case.seed for case in cases}) == 12


def test_a_dry_run_counts_what_would_be_spent(tiny: str, here: Path):
    assert main(["demo", "-m", tiny, "--dry-run", "--json", "plan.json", *SMALL]) == 0
    plan = json.loads((here / "plan.json").read_text())
    assert plan["cost"] == {"prompts": 8, "nfe_per_prompt": 64, "methods": ["stock", "best_of_n", "tree", "reno"]}
    assert not (here / "out").exists()
