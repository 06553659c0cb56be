"""`ls rewards` says what there is, what is missing here and how to get it; with names, everything a card holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign import registry
from diffalign.cli import ls_rewards, main
from diffalign.registry import Card


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """One reward whose module is not installed, one whose program is not."""
    long = "1.5 GB in half precision, and as much again while the weights are loaded from the disk into memory"
    cards = {
        "bright": Card(module="brightness", meaning="mean luminance"),
        "reads_text": Card(module="brightness", meaning="text", requires=("pytesseract",), extra="ocr", memory=long),
        "finds_all": Card(module="brightness", meaning="x " * 60, requires=("no_such_module",), extra="judge"),
    }
    monkeypatch.setattr(registry, "cards", lambda: cards)
    monkeypatch.setattr(registry, "_rewards", {})
    monkeypatch.setitem(ls_rewards.PROGRAMS, "pytesseract", ("no-such-program", "apt install no-such-program"))


def listed(here: Path, *names: str) -> dict[str, dict[str, Any]]:
    assert main(["ls", "rewards", *names, "--json", "r.json"]) == 0
    return {row["name"]: row for row in json.loads((here / "r.json").read_text())}


def test_json_has_every_field_of_a_card(here: Path):
    clip = listed(here)["clip"]
    fields = {"name", "modality", "differentiable", "range", "typical", "installable", "memory", "cost", "proof"}
    assert fields | {"misses", "meaning", "licence", "hub", "revision", "reads_prompt", "install"} <= set(clip)
    assert clip["range"] == [-1, 1]
    assert clip["install"] == []


def test_what_is_missing_comes_with_the_command_that_brings_it(
    here: Path, lacking: None, capsys: pytest.CaptureFixture[str]
):
    rows = listed(here)
    assert rows["bright"]["install"] == []
    assert rows["reads_text"]["install"][-1] == "apt install no-such-program"
    assert rows["finds_all"]["install"] == ['pip install "diffalign[judge]"']
    shown = capsys.readouterr().out
    assert 'for finds_all:\n  pip install "diffalign[judge]"' in shown


@pytest.mark.parametrize("width", [80, 160])
def test_no_line_is_wider_than_the_terminal_and_no_name_is_cut(
    width: int, here: Path, lacking: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", str(width))
    main(["ls", "rewards"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    assert all(f" {name} " in shown for name in ("bright", "reads_text", "finds_all"))
    assert ("memory" in shown) == (width > 80)


def test_every_shipped_reward_fits_80_columns(here: Path, capsys: pytest.CaptureFixture[str]):
    main(["ls", "rewards"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert all(f" {name} " in shown for name in registry.cards())


def test_names_show_whole_cards_with_options_and_defaults(here: Path, capsys: pytest.CaptureFixture[str]):
    clip = listed(here, "clip", "jpeg_size")["clip"]
    options = {option["name"]: option for option in clip["options"]}
    assert options["model"]["default"] == "shapes-clip"
    assert clip["reads_prompt"] is True
    assert clip["about"]
    shown = capsys.readouterr().out
    assert "'shapes-clip'" in shown
    assert "misses" in shown
    assert "goal: 'compressible'" in shown


def test_a_card_shows_what_a_case_needs(here: Path, capsys: pytest.CaptureFixture[str]):
    assert listed(here, "psnr")["psnr"]["needs"].startswith("a reference picture")
    assert "needs          a reference picture" in capsys.readouterr().out


def test_every_shipped_card_can_be_shown(here: Path, capsys: pytest.CaptureFixture[str]):
    names = sorted(registry.cards())
    assert list(listed(here, *names)) == names
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_an_unknown_name_suggests_the_nearest(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["ls", "rewards", "clp"]) == 2
    assert "Did you mean 'clip'?" in capsys.readouterr().err


def test_names_are_for_rewards_only(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["ls", "pipelines", "tree"]) == 2
    assert "ls rewards NAME" in capsys.readouterr().err
