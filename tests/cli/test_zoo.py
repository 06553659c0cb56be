"""`zoo` verbs name models and recipes, and refuse the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign import zoo
from diffalign.cli import main


def test_list_has_the_documented_keys(here: Path):
    assert main(["zoo", "list", "--json", "z.json"]) == 0
    rows = json.loads((here / "z.json").read_text())
    assert [row["name"] for row in rows] == zoo.names()
    assert all(set(row) == {"name", "class", "bytes", "strict", "seed"} for row in rows)


def test_a_build_can_be_planned_without_running(here: Path):
    assert main(["zoo", "build", "shapes-sd3", "--dry-run", "--json", "plan.json"]) == 0
    assert json.loads((here / "plan.json").read_text())["cost"]["writes"] == "out/zoo/shapes-sd3"
    assert not (here / "out").exists()


@pytest.mark.parametrize("verb", ["show", "measure", "build"])
def test_an_unknown_model_is_refused(verb: str, here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["zoo", verb, "shapes-sd9"]) == 2
    assert "'shapes-sd9'" in capsys.readouterr().err


@pytest.mark.parametrize("name", zoo.names())
def test_show_gives_the_card(name: str, here: Path):
    assert main(["zoo", "show", name, "--json", "card.json"]) == 0
    assert json.loads((here / "card.json").read_text()) == zoo.card(name)


@pytest.mark.skipif("shapes-turbo" not in zoo.names(), reason="shapes-turbo is not in this tree")
def test_measure_gives_the_documented_keys(here: Path):
    assert main(["zoo", "measure", "shapes-turbo", "--n", "4", "--seed", "1", "--json", "m.json"]) == 0
    found = json.loads((here / "m.json").read_text())
    assert {"name", "strict", "lo", "hi", "n"} <= set(found)
    assert found["lo"] <= found["strict"] <= found["hi"]
