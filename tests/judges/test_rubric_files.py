"""Rubrics and principles as files: what is written is read again, and errors name file and line."""

from __future__ import annotations

import string
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffalign.errors import ConfigError
from diffalign.judges.rubric_files import (
    Principle,
    Rubric,
    RubricFolder,
    file_name,
    read_principle,
    read_rubric,
    rubric_of,
    write_rubric,
)
from diffalign.rules.rubrics import KINDS, Item

GOOD = """\
# a person may write here
name: circles
version: 2
prompt: two red circles
items:
  - id: number
    question: Are there two circles?
    must: true
  - question: Are they red?
    weight: 2
  - Is the ground plain?
"""
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30).filter(lambda t: t.strip())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "circles.yaml"
    path.write_text(GOOD, encoding="utf-8")
    return path


def rubric(prompt: str | None = "a cat", version: int = 1, **fields) -> Rubric:
    told = {"name": "cat", "version": version, "prompt": prompt, "items": (Item(id="q1", question="Is it a cat?"),)}
    return Rubric(**{**told, **fields})


def test_a_file_as_a_person_writes_it(file: Path):
    found = read_rubric(file)
    assert (found.name, found.version, found.prompt) == ("circles", 2, "two red circles")
    assert [(i.id, i.question, i.type, i.must, i.weight) for i in found.items] == [
        ("number", "Are there two circles?", "follow", True, 1.0),
        ("q2", "Are they red?", "follow", False, 2.0),
        ("q3", "Is the ground plain?", "follow", False, 1.0),
    ]


def test_the_id_is_of_the_content_and_not_of_the_layout(file: Path):
    first = read_rubric(file)
    file.write_text(GOOD.replace("# a person", "# another person").replace("weight: 2", "weight:   2.0"))
    assert read_rubric(file).id == first.id
    for old, new in (("two circles?", "two circles now?"), ("weight: 2", "weight: 3"), ("version: 2", "version: 3")):
        file.write_text(GOOD.replace(old, new))
        assert read_rubric(file).id != first.id


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    name=TEXT,
    about=st.sampled_from(["prompt", "instruction", "any"]),
    told=TEXT | st.sampled_from(["12e3", "no", "1e99999", "~", "0x1f", "2001-01-01"]),
    version=st.integers(1, 99),
    items=st.lists(
        st.builds(
            Item,
            id=st.text(string.ascii_letters + string.digits + "_.-", min_size=1, max_size=10),
            question=TEXT.map(lambda t: " ".join(t.split())),
            type=st.sampled_from(KINDS),
            must=st.booleans(),
            weight=st.floats(0.01, 100),
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda item: item.id,
    ),
)
def test_what_is_written_is_read_again(tmp_path: Path, name, about, told, version, items):
    given_rubric = Rubric(
        name=name, version=version, items=tuple(items), **{about: True if about == "any" else told}
    ).marked("writer")
    found = read_rubric(write_rubric(given_rubric, tmp_path / "r.yaml"))
    assert found == given_rubric
    assert found.id == given_rubric.id


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("version: 2", "version: two", 3, "version is 'two'"),
        ("version: 2", "version: 0", 3, "version"),
        ("version: 2", "verion: 2", 3, "unknown key 'verion'. Did you mean 'version'"),
        ("    must: true", "    must: maybe", 8, r"items\[0\]\.must is 'maybe'"),
        ("    weight: 2", "    weight: -2", 9, "weight -2"),
        ("    weight: 2", "    weigth: 2", 10, r"unknown key 'items\[1\]\.weigth'"),
        ("    weight: 2", "    type: style", 10, r"items\[1\]\.type is 'style'"),
        ("    weight: 2", "    id: number", 5, "two items with the id 'number'"),
        ("    weight: 2", "    id: 7", 10, r"items\[1\]\.id is 7"),
        ("  - Is the ground plain?", "  - 7", 11, r"items\[2\] is 7"),
        ("prompt: two red circles", "any: false", 5, "says 0 times what it is for"),
        ("prompt: two red circles", "prompt: a\nany: true", 6, "says 2 times what it is for"),
    ],
)
def test_an_error_names_the_file_the_line_and_the_field(file: Path, old, new, line, says):
    assert old in GOOD
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=says) as caught:
        read_rubric(file)
    assert str(caught.value).startswith(f"{file}:")
    near = int(str(caught.value).removeprefix(f"{file}:").partition(":")[0])
    assert near == line or ("version 0" in str(caught.value) and near == 5)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "a: [", "items: {}\nany: true\nname: x", "a: 1\na: 2", "[" * 3000, "items:\n - !!python/x 1"],
)
def test_what_is_no_rubric_is_one_clear_error(file: Path, text: str):
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"circles\.yaml"):
        read_rubric(file)
    with pytest.raises(ConfigError, match="cannot read the rubric"):
        read_rubric(file.with_name("absent.yaml"))


def test_a_list_of_questions_is_a_rubric():
    found = rubric_of(
        ["Is it red?", {"question": "Is it round?", "must": True}], "here", None, {"name": "x", "any": True}
    )
    assert [(i.id, i.must) for i in found.items] == [("q1", False), ("q2", True)]
    with pytest.raises(ConfigError, match=r"^here: items is 'red'"):
        rubric_of("red", "here", None, {"name": "x", "any": True})


def test_a_folder_finds_by_prompt_and_instruction_and_takes_the_latest_version(tmp_path: Path):
    folder = RubricFolder(tmp_path / "new")
    assert folder.find("a cat") is None
    folder.add(rubric("a cat"))
    folder.add(rubric("a cat", 2))
    folder.add(rubric(None, instruction="make it red"))
    assert len(list((tmp_path / "new").iterdir())) == 3
    again = RubricFolder(tmp_path / "new")
    assert again.find("a  cat").version == 2
    assert again.find("a cat", "make it red").instruction == "make it red"
    assert again.find("a dog") is None
    again.add(rubric(None, any=True))
    assert RubricFolder(tmp_path / "new").find("a dog").any
    again.add(rubric(None, instruction="make it red", source="picture 1"))
    assert again.find("a cat", "make it red", "picture 1").source == "picture 1"
    assert again.find("a cat", "make it red", "picture 2").source == ""
    assert again.add_next(rubric("a cat")).version == 3
    assert again.add_next(rubric("a bird")).version == 1


def test_two_rubrics_of_one_version_for_one_prompt_are_refused(tmp_path: Path):
    write_rubric(rubric(), tmp_path / "a.yaml")
    write_rubric(rubric(), tmp_path / "b.yaml")
    assert len(RubricFolder(tmp_path)) == 1  # the same rubric twice is no conflict
    write_rubric(replace(rubric(), name="other"), tmp_path / "b.yaml")
    with pytest.raises(ConfigError, match="are both version 1 of the rubric for 'a cat'"):
        RubricFolder(tmp_path)


def test_a_mark_holds_until_a_person_edits_the_file(tmp_path: Path):
    path = write_rubric(rubric().marked("writer 1"), tmp_path / "a.yaml")
    assert read_rubric(path).is_as_written("writer 1")
    assert not read_rubric(path).is_as_written("writer 2")
    assert not rubric().is_as_written("writer 1")
    path.write_text(path.read_text().replace("Is it a cat?", "Is it one cat?"))
    assert not read_rubric(path).is_as_written("writer 1")


def test_file_names_are_safe_and_tell_prompts_apart():
    names = {file_name(rubric(prompt)) for prompt in ("a cat", "a CAT!", "../../etc/passwd", "猫", "", "x" * 500)}
    assert len(names) == 6
    assert all("/" not in name and len(name) < 80 for name in names)


def test_principles_are_text_or_files(tmp_path: Path):
    assert read_principle("more red is better").principle == "more red is better"
    (tmp_path / "few.txt").write_text("fewer objects are better\n")
    assert read_principle(str(tmp_path / "few.txt")) == Principle(principle="fewer objects are better", name="few")
    (tmp_path / "few.yaml").write_text("version: 3\nprinciple: |\n  fewer objects\n  are better\n")
    found = read_principle(tmp_path / "few.yaml")
    assert (found.name, found.version, found.principle) == ("few", 3, "fewer objects\nare better\n")
    assert found.id != read_principle(str(tmp_path / "few.txt")).id


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.yaml", "name: x", "principle"),
        ("p.yaml", "principle: ' '", "is empty"),
        ("p.yaml", "[]", "is a mapping with"),
        ("p.yaml", "principle: x\nversion: yes", "version is True"),
        ("p.txt", "", "is empty"),
    ],
)
def test_a_principle_without_content_is_refused(tmp_path: Path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_principle(str(tmp_path / name))
    with pytest.raises(ConfigError, match="cannot read the principle"):
        read_principle(str(tmp_path / "absent.yaml"))


def test_a_folder_may_grow_while_it_is_gone_through(tmp_path: Path):
    folder = RubricFolder(tmp_path)
    for k in range(2):
        folder.add(Rubric(name="r", prompt=f"prompt {k}", items=(Item(id="a", question="?"),)))
    for rubric in folder:
        folder.add(replace(rubric, prompt=f"{rubric.prompt} more"))
    assert len(folder) == 4
