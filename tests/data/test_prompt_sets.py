"""Every published prompt set becomes cases, with what its rules need in the metadata."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.data.kinds import kind_of
from diffalign.data.prompt_sets import FORMATS, read_prompts, sniff
from diffalign.errors import ConfigError, DiffalignError, UnknownName
from tests.data.files import encoded, jsonl, listed, parquet
from tests.data.test_tables import OBJECTS, VALUES

GENEVAL = {
    "tag": "position",
    "include": [
        {"class": "bench", "count": 1},
        {"class": "dog", "count": 2, "color": "red", "position": ["left of", 0]},
    ],
    "exclude": [{"class": "dog", "count": 3}],
    "prompt": "a photo of two red dogs left of a bench",
}


def test_geneval_metadata_is_the_row(tmp_path):
    path = jsonl(tmp_path / "evaluation_metadata.jsonl", [GENEVAL, {**GENEVAL, "tag": "counting"}])
    first, second = read_prompts(path, seed=5)
    assert first.metadata == {**GENEVAL, "kind": "spatial"}
    assert (first.prompt, first.seed, second.seed) == (GENEVAL["prompt"], 5, 6)
    assert second.metadata["kind"] == "counting"


def test_geneval_rows_that_exclude_nothing_say_so(tmp_path):
    row = {name: value for name, value in GENEVAL.items() if name != "exclude"}
    assert read_prompts(jsonl(tmp_path / "train_metadata.jsonl", [row]))[0].metadata["exclude"] == []


@pytest.mark.parametrize(
    "change",
    [
        {"include": []},
        {"include": [{"count": 1}]},
        {"include": [{"class": "dog", "count": 0}]},
        {"include": [{"class": "dog", "count": True}]},
        {"include": [{"class": "dog", "count": 1, "color": 3}]},
        {"include": [{"class": "dog", "count": 1, "color": "mauve"}]},
        {"include": [{"class": "dog", "count": 1, "colour": "red"}]},
        {"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]},
        {"include": [{"class": "dog"}, {"class": "cat", "position": ["near", 0]}]},
        {"include": ["dog"]},
        {"exclude": "dog"},
        {"prompt": " "},
        {"tag": None},
        {"seed": 1.5},
        {"seed": "one"},
        {"seed": True},
    ],
)
def test_a_broken_geneval_row_is_named(tmp_path, change):
    path = jsonl(tmp_path / "g.jsonl", [GENEVAL, {**GENEVAL, **change}])
    with pytest.raises(ConfigError, match=r"g\.jsonl:2"):
        read_prompts(path, "geneval")


@pytest.mark.parametrize(
    ("name", "category", "kind", "split"),
    [
        ("color_val.txt", "color", "colour", "val"),
        ("spatial_val.txt", "spatial", "spatial", "val"),
        ("3d_spatial.txt", "3d_spatial", "3d_spatial", None),
        ("non_spatial_train.txt", "non_spatial", "non_spatial", "train"),
        ("numeracy_val.txt", "numeracy", "counting", "val"),
        ("complex_val_spatialaction.txt", "complex", "complex", "val"),
        ("shape_val_seen.txt", "shape", "shape", "val"),
        ("texture.txt", "texture", "texture", None),
    ],
)
def test_compbench_takes_the_category_from_the_name(tmp_path, name, category, kind, split):
    (tmp_path / name).write_text("a green bench and a blue bowl\na blue bench\n")
    cases = read_prompts(tmp_path / name)
    assert [case.prompt for case in cases] == ["a green bench and a blue bowl", "a blue bench"]
    told = {"category": category, "kind": kind} | ({"split": split} if split else {})
    assert all(case.metadata == told for case in cases)


def test_a_folder_or_a_pattern_of_texts_is_read_file_by_file(tmp_path):
    for name in ("color_val.txt", "color_train.txt", "shape_val.txt"):
        (tmp_path / name).write_text(f"{name} one\n{name} two\n")
    cases = read_prompts(f"{tmp_path}/*_val.txt")
    assert [case.metadata["kind"] for case in cases] == ["colour", "colour", "shape", "shape"]
    assert [case.seed for case in cases] == [0, 1, 2, 3]
    assert len(read_prompts(tmp_path)) == 6
    assert len(read_prompts(tmp_path, limit=3)) == 3


def test_drawbench_keeps_its_categories(tmp_path):
    path = tmp_path / "drawbench.csv"
    path.write_text('Prompts,Category\n"A red car, parked.",Colors\nThree dogs.,Counting\nA pear.,Gary Marcus et al.\n')
    cases = read_prompts(path)
    assert cases[0].prompt == "A red car, parked."
    assert [case.metadata["kind"] for case in cases] == ["colour", "counting", "gary_marcus_et_al"]
    assert cases[0].metadata["category"] == "Colors"


def test_ocr_prompts_bring_what_is_to_be_written(tmp_path):
    path = tmp_path / "ocr" / "train.txt"
    path.parent.mkdir()
    path.write_text('A sign that says "Hello World" and "more".\n')
    assert read_prompts(path)[0].metadata == {"text": "Hello World", "kind": "text"}
    path.write_text("A sign\n")
    assert read_prompts(path)[0].metadata == {}  # somebody's own file that is only called so
    with pytest.raises(ConfigError, match="double quotes"):
        read_prompts(path, "ocr")
    path.write_text('A sign that says “Hello”.\nA sign «World» and "more".\n')
    assert [case.metadata["text"] for case in read_prompts(path)] == ["Hello", "World"]
    path.write_text('A sign that says "Hello".\nA sign that says “ ”.\n')
    with pytest.raises(ConfigError, match="double quotes"):
        read_prompts(path)


def test_hpd_prompts_carry_their_style(tmp_path):
    listed(tmp_path / "concept-art.json", ["a castle", "a \u2028 knight"])
    cases = read_prompts(tmp_path / "concept-art.json")
    assert [case.prompt for case in cases] == ["a castle", "a \u2028 knight"]
    assert cases[0].metadata == {"style": "concept-art", "kind": "concept_art"}
    styles = {"anime": ["a", "b"], "photo": ["c"]}
    listed(tmp_path / "all.json", styles)
    (tmp_path / "one_line.json").write_text(json.dumps(styles))
    for name in ("all.json", "one_line.json"):
        assert [case.metadata["style"] for case in read_prompts(tmp_path / name)] == ["anime", "anime", "photo"]


def test_pickapic_captions_come_once(tmp_path):
    rows = [{"caption": text, "label_0": 1.0, "jpg_0": b"x"} for text in ("a", "b", "a")]
    assert [case.prompt for case in read_prompts(parquet(tmp_path / "t.parquet", rows))] == ["a", "b"]
    listed(tmp_path / "dataset_infos.json", {"about": "the shards beside it"})
    assert [case.prompt for case in read_prompts(tmp_path)] == ["a", "b"]


def test_edits_bring_their_source_once(tmp_path):
    row = {"instruction": "make it blue", "task_type": "color_alter", "dimension": "overall"}
    rows = [{**row, "input_image": {"bytes": encoded(c, (12, 8)), "path": None}} for c in ("red", "red", "green")]
    cases = read_prompts(parquet(tmp_path / "e.parquet", rows))
    assert [case.source.getpixel((0, 0)) for case in cases] == [(255, 0, 0), (0, 128, 0)]
    assert cases[0].metadata == {"task_type": "color_alter", "kind": "color_alter"}


def test_any_table_with_prompts_will_do(tmp_path):
    path = tmp_path / "parti.tsv"
    path.write_text("Prompt\tCategory\tChallenge\na bear\tAnimals\tQuantity\n")
    assert read_prompts(path)[0].metadata == {"category": "Animals", "challenge": "Quantity", "kind": "animals"}


def test_rows_may_have_seeds_of_their_own(tmp_path):
    path = tmp_path / "parti.csv"
    path.write_text("prompt,Seed,tag\na,7,counting\nb,,counting\n")
    assert [(c.seed, c.metadata) for c in read_prompts(path, seed=3)] == [
        (7, {"tag": "counting", "kind": "counting"}),
        (4, {"tag": "counting", "kind": "counting"}),
    ]
    path.write_text("prompt,seed\na,7\nb,x\n")
    with pytest.raises(ConfigError, match=r"parti\.csv:3 has no whole number under 'seed', but 'x'"):
        read_prompts(path)
    first, second = read_prompts(jsonl(tmp_path / "g.jsonl", [{**GENEVAL, "seed": 9}, GENEVAL]), seed=3)
    assert (first.seed, second.seed, first.metadata) == (9, 4, {**GENEVAL, "kind": "spatial"})


def test_plain_files_are_read_as_everywhere(tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    jsonl(tmp_path / "p.jsonl", [{"prompt": "one", "seed": 9, "tag": "counting"}, {"prompt": "two"}])
    assert [(case.prompt, case.seed) for case in read_prompts(tmp_path / "p.txt", seed=3)] == [("one", 3), ("two", 4)]
    first, second = read_prompts(tmp_path / "p.jsonl", seed=3)
    assert (first.seed, second.seed, first.metadata) == (9, 4, {"tag": "counting", "kind": "counting"})


def test_the_shipped_prompts_are_read_as_the_world_reads_them():
    from diffalign import world
    from diffalign.world.promptsets import FOLDER

    cases = read_prompts(FOLDER / "hard.jsonl")
    assert [(c.prompt, c.seed) for c in cases] == [(c.prompt, c.seed) for c in world.prompts("hard")]


@pytest.mark.parametrize("name", ["a.xyz", "a.csv", "a.jsonl", "a.json"])
def test_what_nothing_fits_lists_the_formats(tmp_path, name):
    (tmp_path / name).write_text({"a.csv": "x,y\n1,2\n"}.get(name, '{"x": 1}\n'))
    with pytest.raises(ConfigError) as caught:
        read_prompts(tmp_path / name)
    assert all(known in str(caught.value) for known in FORMATS)


def test_an_unknown_format_suggests_the_nearest(tmp_path):
    with pytest.raises(UnknownName, match="'geneval'"):
        read_prompts(tmp_path / "a.jsonl", "genevl")


@pytest.mark.parametrize(
    ("name", "kind"), [("Positional", "spatial"), ("color_attr", "colour"), ("Rare Words", "rare_words")]
)
def test_kinds_share_one_vocabulary(name, kind):
    assert kind_of(name) == kind


@given(
    format=st.sampled_from(sorted(FORMATS)),
    suffix=st.sampled_from([".jsonl", ".json", ".txt"]),
    rows=st.lists(
        OBJECTS
        | VALUES
        | st.fixed_dictionaries({}, optional=dict.fromkeys(("tag", "prompt", "include", "exclude", "caption"), VALUES)),
        max_size=3,
    ),
)
def test_malformed_rows_give_cases_or_an_error_of_ours(tmp_path_factory, format, suffix, rows):
    path = jsonl(tmp_path_factory.mktemp("any") / f"a{suffix}", rows)
    for read in (lambda: read_prompts(path, format), lambda: sniff(path), lambda: read_prompts(path)):
        with contextlib.suppress(DiffalignError):
            read()
