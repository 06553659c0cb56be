"""`diffalign rubric`: rubrics written, contrasted and checked as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffalign.cli import main
from diffalign.judges import finding
from diffalign.judges.rubric_files import RubricFolder, read_rubric
from tests.judges.scripted_rubrics import Scripted, checks, findings, items_of, verdicts

GOOD = "name: cat\nprompt: a cat\nitems:\n  - Is it a cat?\n  - question: Is it alone?\n    must: true\n"


def says(question):
    """A judge that looks at the redness of a picture."""
    if items_of(question):
        return verdicts(["yes" if question.images[0][0].mean() > 0.5 else "no" for _ in items_of(question)])
    return findings() if "List what holds" in question.text else checks("Is it red?")


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scripted = Scripted(says)
    monkeypatch.setattr(finding, "find_judge", lambda spec: scripted)
    return scripted


@pytest.fixture
def prompts(here: Path) -> Path:
    (here / "prompts.txt").write_text("a red thing\na cat\na red thing\n")
    return here


def pair(here: Path, first: str, second: str, prompt: str = "a red thing") -> None:
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(here / f"{colour}.png")
    row = {"prompt": prompt, "images": [f"{first}.png", f"{second}.png"], "ranks": [1, 2]}
    with (here / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_write_makes_one_file_for_each_prompt(prompts: Path, judge: Scripted, capsys: pytest.CaptureFixture[str]):
    assert main(["rubric", "write", "prompts.txt", "--out", "rubrics", "--json", "w.json"]) == 0
    rows = json.loads((prompts / "w.json").read_text())
    assert [(row["about"], row["items"], row["new"]) for row in rows] == [
        ("a red thing", ["Is it red?"], True),
        ("a cat", ["Is it red?"], True),
    ]
    assert set(rows[0]) == {"about", "name", "version", "id", "items", "problem", "new"}
    assert len(list((prompts / "rubrics").iterdir())) == 2
    assert "2 written, 2 rubrics in rubrics" in capsys.readouterr().out


def test_write_leaves_alone_what_a_person_edited(prompts: Path, judge: Scripted):
    assert main(["rubric", "write", "prompts.txt", "--out", "rubrics"]) == 0
    for file in (prompts / "rubrics").iterdir():
        file.write_text(file.read_text().replace("Is it red?", "Is it mine?"))
    assert main(["rubric", "write", "prompts.txt", "--out", "rubrics"]) == 0
    assert len(judge.asked) == 2
    assert RubricFolder(prompts / "rubrics").find("a cat").items[0].question == "Is it mine?"


def test_a_writer_that_cannot_be_read_is_told_and_fails(prompts: Path, judge: Scripted, capsys):
    judge.says = lambda question: "I cannot."
    assert main(["rubric", "write", "prompts.txt", "--out", "rubrics"]) == 1
    assert "a cat: the judge's reply holds no list of questions" in capsys.readouterr().out
    assert list((prompts / "rubrics").iterdir()) == []


def test_contrast_keeps_what_finds_the_preferred_picture(here: Path, judge: Scripted):
    pair(here, "red", "blue")
    assert main(["rubric", "contrast", "pairs.jsonl", "--out", "rubrics", "--json", "c.json"]) == 0
    (row,) = json.loads((here / "c.json").read_text())
    assert (row["kept"], row["items"], row["problem"]) == (True, ["Is it red?"], "")
    assert RubricFolder(here / "rubrics").find("a red thing").id == row["id"]


def test_contrast_drops_what_does_not_and_takes_the_next_pair(here: Path, judge: Scripted, capsys):
    pair(here, "blue", "red")
    assert main(["rubric", "contrast", "pairs.jsonl", "--out", "rubrics"]) == 0
    assert "the preferred picture gets 0.000, the other one 1.000" in capsys.readouterr().out
    assert list((here / "rubrics").iterdir()) == []
    pair(here, "red", "blue")
    assert main(["rubric", "contrast", "pairs.jsonl", "--out", "rubrics", "--json", "c.json"]) == 0
    assert [row["kept"] for row in json.loads((here / "c.json").read_text())] == [True]


def test_a_contrast_is_the_next_version_of_what_is_there(here: Path, judge: Scripted):
    pair(here, "red", "blue", "a cat")
    (here / "rubrics").mkdir()
    (here / "rubrics" / "mine.yaml").write_text(GOOD)
    assert main(["rubric", "contrast", "pairs.jsonl", "--out", "rubrics"]) == 0
    assert RubricFolder(here / "rubrics").find("a cat").version == 2
    assert read_rubric(here / "rubrics" / "mine.yaml").version == 1


def test_check_says_what_is_in_a_file(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "good.yaml").write_text(GOOD)
    assert main(["rubric", "check", "good.yaml", "--json", "k.json"]) == 0
    (row,) = json.loads((here / "k.json").read_text())
    assert row["items"] == ["Is it a cat?", "Is it alone?"]
    assert row["id"] in capsys.readouterr().out


def test_check_names_every_wrong_file_and_line(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "r").mkdir()
    (here / "r" / "good.yaml").write_text(GOOD)
    (here / "r" / "bad.yaml").write_text(GOOD.replace("must: true", "must: perhaps"))
    (here / "r" / "worse.yml").write_text("items: [")
    assert main(["rubric", "check", "r"]) == 2
    said = capsys.readouterr().out
    assert "r/bad.yaml:6: items[1].must is 'perhaps'" in said
    assert "worse.yml" in said


def test_check_refuses_two_rubrics_of_one_version(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "a.yaml").write_text(GOOD)
    (here / "b.yaml").write_text(GOOD.replace("alone", "lonely"))
    assert main(["rubric", "check", "."]) == 2
    assert "are both version 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["check"], "FILES is missing"),
        (["check", "absent.yaml"], "cannot read the rubric"),
        (["check", "."], "there is no rubric in ."),
        (["write", "absent.txt"], "absent.txt"),
        (["write", "prompts.txt", "--items", "0"], "items is 0"),
        (["contrast", "absent.jsonl"], "absent.jsonl"),
        (["contrast", "absent.jsonl", "--n", "0"], "n is 0"),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(prompts: Path, judge: Scripted, capsys, words, says):
    assert main(["rubric", *words]) == 2
    told = capsys.readouterr()
    assert says in told.err + told.out


def test_a_run_can_be_planned(prompts: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["rubric", "write", "prompts.txt", "--dry-run", "--json", "plan.json"]) == 0
    assert json.loads((prompts / "plan.json").read_text())["cost"]["questions"] == 2
    assert not (prompts / "out").exists()
