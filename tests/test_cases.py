"""Cases: reading them, batching them, repeating them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.cases import Case, batched, read_cases, repeat
from diffalign.errors import ConfigError

TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1).filter(lambda t: t.strip())


@given(st.lists(st.tuples(TEXT, st.integers(0, 2**40)), min_size=1, max_size=6))
def test_jsonl_returns_what_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("cases") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "seed": s, "tag": "x"}) for p, s in rows), encoding="utf-8")
    cases = read_cases(path)
    assert [(c.prompt, c.seed) for c in cases] == rows
    assert all(c.metadata == {"tag": "x"} for c in cases)


def test_a_text_file_is_a_prompt_a_line_with_counting_seeds(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("red cube\n\n  blue ball \n", encoding="utf-8")
    assert [(c.prompt, c.seed) for c in read_cases(path, seed=5)] == [("red cube", 5), ("blue ball", 6)]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_prompt_ends_at_a_newline_and_at_no_other_separator(tmp_path, mark):
    prompt = f"a red{mark}cube"
    (tmp_path / "p.txt").write_text(f"\ufeff{prompt}\r\nblue ball\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [case.prompt for case in read_cases(tmp_path / "p.txt")] == [prompt, "blue ball"]
    assert [case.prompt for case in read_cases(tmp_path / "p.jsonl")] == [prompt]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", "not JSON"),
        ('{"text": "a"}', "'prompt'"),
        ('{"prompt": 3}', "'prompt'"),
        ('{"prompt": "a", "seed": "three"}', "whole number"),
        ('{"prompt": "a", "metadata": [1]}', "names and values"),
        ("[1]", "'prompt'"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, says):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(ConfigError, match=says) as caught:
        read_cases(path)
    assert ":2 " in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_file_without_a_prompt_is_refused(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        read_cases(path)


@given(st.integers(1, 20), st.integers(1, 7))
def test_batches_hold_every_case_once_in_order(count, size):
    cases = [Case(prompt=str(k)) for k in range(count)]
    parts = list(batched(cases, size))
    assert [c for part in parts for c in part] == cases
    assert all(len(part) <= size for part in parts)


def test_the_first_of_a_group_keeps_the_cases_own_seed():
    group = repeat([Case(prompt="a", seed=7)], 4)
    assert group[0].seed == 7
    assert len({c.seed for c in group}) == 4
