"""Rows come one at a time from whatever people publish, and every error says where it stands."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.data import json_lists, tables
from diffalign.errors import ConfigError, DiffalignError, MissingExtra
from tests.data.files import encoded, jsonl, listed, parquet

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=8), VALUES, max_size=4)


def values(path: Path | str) -> list[dict[str, Any]]:
    return [dict(row.values) for row in tables.read_rows(path)]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
@given(rows=st.lists(OBJECTS, min_size=1, max_size=5), piece=st.integers(1, 40))
def test_json_comes_back_as_it_was_written(tmp_path_factory, suffix, rows, piece):
    path = tmp_path_factory.mktemp("rows") / f"rows{suffix}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lists, "PIECE", piece)  # values are cut anywhere
        jsonl(path, rows)
        assert values(path) == rows
        if suffix == ".json":
            listed(path, rows)
            assert values(path) == rows


def test_lines_end_at_newlines_only_and_a_byte_order_mark_is_no_text(tmp_path):
    rows = [{"prompt": f"a{mark}b"} for mark in SEPARATORS]
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert values(path) == rows
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffprompt,n\n"a\u2028b, c\nd",1\n', encoding="utf-8")
    assert values(path) == [{"prompt": "a\u2028b, c\nd", "n": "1"}]


def test_a_list_is_read_as_far_as_it_is_asked_for(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1},\n' + '{"a": 2},\n' * 100_000 + "broken")
    rows = tables.read_rows(path)
    assert [next(rows).values["a"] for _ in range(3)] == [1, 2, 2]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", '{"a": 1}\n{"a"', ":2"),
        ("a.jsonl", '{"a": 1}\n[1]', ":2"),
        ("a.jsonl", '{"a": 1}\n' + "[" * 100_000, ":2"),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}", ":1"),
        ("a.json", '[{"a": 1},\n\n {"a" 2}]', ":3"),
        ("a.json", '[{"a": 1},\n{"a": 2}', ":2"),
        ("a.json", '[{"a": 1},\n]', ":2"),
        ("a.json", '[{"a": 1}]\n\nmore', ":3"),
        ("a.json", '[{"a": 1}\n{"a": 1}]', ":2"),
        ("a.json", "{\n 1: 2}", ":1"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", ":3"),
    ],
)
def test_an_error_names_file_and_line(tmp_path, name, content, where):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        values(tmp_path / name)
    assert f"{name}{where}" in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_bytes_that_are_no_text_are_refused_where_they_stand(tmp_path, name):
    start = {"a.jsonl": b'{"prompt": "', "a.json": b'[{"prompt": "', "a.csv": b"prompt\n"}[name]
    (tmp_path / name).write_bytes(start + b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"a\.(jsonl:1|json:1|csv:2)"):
        [row.text("prompt") for row in tables.read_rows(tmp_path / name)]


def test_half_a_character_is_no_prompt(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "\\ud800"}')
    with pytest.raises(ConfigError, match="not Unicode"):
        next(tables.read_rows(path)).text("prompt")


def test_shards_of_a_folder_are_one_table_in_the_order_of_their_names(tmp_path):
    for k in (1, 0, 2):
        parquet(tmp_path / "data" / f"test-0000{k}-of-00003.parquet", [{"k": 2 * k}, {"k": 2 * k + 1}])
    assert [row["k"] for row in values(tmp_path)] == list(range(6))
    assert [row["k"] for row in values(f"{tmp_path}/data/test-0000[12]*")] == [2, 3, 4, 5]
    assert [row.where.rpartition("/")[2] for row in tables.read_rows(tmp_path)][3] == (
        "test-00001-of-00003.parquet row 2"
    )


def test_splits_are_not_mixed(tmp_path):
    for split in ("test", "train"):
        parquet(tmp_path / f"{split}-00000-of-00001.parquet", [{"k": 1}])
    with pytest.raises(ConfigError, match="test, train"):
        values(tmp_path)


def test_parquet_keeps_bytes_and_structs_and_leaves_dates_out(tmp_path):
    import datetime

    row = {"image": {"bytes": encoded(), "path": "a.png"}, "jpg": b"\x00\xff", "made": datetime.datetime(2024, 1, 1)}
    path = parquet(tmp_path / "a.parquet", [row])
    assert values(path) == [{"image": row["image"], "jpg": row["jpg"]}]
    assert [dict(r.values) for r in tables.read_rows(path, ("jpg", "absent"))] == [{"jpg": row["jpg"]}]


def test_a_damaged_parquet_file_is_an_error(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"a": 1}])
    for content in (b"", b"PAR1", path.read_bytes()[:-9]):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="parquet"):
            values(path)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", [{"a": 1}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"diffalign\[parquet\]"):
        values(path)


@pytest.mark.parametrize("name", ["absent.jsonl", "a.xlsx", "empty"])
def test_what_is_no_table_is_an_error(tmp_path, name):
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError):
        values(tmp_path / name)


@given(content=st.binary(max_size=60), suffix=st.sampled_from(tables.SUFFIXES))
def test_any_bytes_give_rows_or_an_error_of_ours(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("any") / f"a{suffix}"
    path.write_bytes(content)
    with contextlib.suppress(DiffalignError):
        assert all(isinstance(row, dict) for row in values(path))


@given(st.text('[]{},:"1e- \n\\tu', max_size=40))
def test_a_list_is_read_just_when_json_would_read_it(text):
    try:
        expected = json.loads("[" + text)
    except ValueError:
        with pytest.raises(ConfigError):
            list(json_lists.elements(io.StringIO("[" + text), Path("a.json")))
    else:
        assert [value for _, value in json_lists.elements(io.StringIO("[" + text), Path("a.json"))] == expected
