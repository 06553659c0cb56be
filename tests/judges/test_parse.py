from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.judges import parse
from diffalign.judges.parse import (
    number,
    read_checks,
    read_final_score,
    read_json,
    read_labelled,
    read_list,
    read_scores,
    read_words,
)

GOOD = '{"reasoning": "the circle is red now", "score": [20, 10]}'
VERDICTS = ("yes", "partial", "no", "unsure")
LABELS = ("Alignment Score", "Coherence Score", "Style Score")


def two(text: Any) -> tuple[float, ...] | None:
    return read_scores(text, 2, 0, 25)


def final(text: Any) -> float | None:
    return read_final_score(text, "Final Score", 1, 5)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Here is what I found.\n\n```\n{GOOD}\n```\nAsk for more.",
        f"The picture {{a red one}} at [the left], item [1].\n{GOOD}",
        f'<think>First [20, 1], or {{"score": [1, 2]}}? No {{</think>\n{GOOD}',
        f"thoughts that the chat began, {{</think>{GOOD}",
        f"{GOOD}\n{GOOD}",
        "{'reasoning': 'it is the cat\\'s', 'score': [20, 10,],}",
        '{"score": [20.0, 1e1], "reasoning": "a } and a ] and \\" and\na new line"}',
        '{"reasoning": null, "seen": True, "score": [20, 10]}',
        '{"score": [20, 10], "score": [20, 10]}',
        "[20, 10]",
        "```\n[20, 10]\n```",
        f"[{GOOD}]",
        GOOD.replace("[20, 10]", "[20/25, 10 / 25.0]"),
        GOOD.replace('"', "'").replace("now'", "now, the cat's'"),
        GOOD.replace('now"', 'now "really""'),
        GOOD.replace("is red", 'says "STOP", "GO" and "score": it is red'),
        '{"score": [20, 10], "reasoning": "the sign says "STOP""}',
        "{\u201creasoning\u201d: \u201cthe \u201csign\u201d\u201d, \u201cscore\u201d: [20, 10]}",
        f"Let me see [note: {GOOD}",
        f"Nice :] and that is it. {GOOD}",
    ],
)
def test_a_sound_reply_is_read_whatever_stands_around_it(text: str) -> None:
    assert two(text) == (20.0, 10.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot help with that.",
        "20 and 10",
        "I see circles at [20, 10].",
        GOOD[:-1],
        GOOD[1:],
        f"{GOOD}}}",
        f"<think>{GOOD}",
        GOOD.replace("[20, 10]", '["20", "10"]'),
        GOOD.replace("[20, 10]", "[true, false]"),
        GOOD.replace("[20, 10]", "[null, 10]"),
        GOOD.replace("[20, 10]", "[[20, 10]]"),
        GOOD.replace("[20, 10]", "[20, 10, 5]"),
        GOOD.replace("[20, 10]", "[20]"),
        GOOD.replace("[20, 10]", "20, 10"),
        GOOD.replace("[20, 10]", "20"),
        GOOD.replace("[20, 10]", '{"a": 20, "b": 10}'),
        GOOD.replace("[20, 10]", "[20 10]"),
        GOOD.replace("[20, 10]", "(20, 10)"),
        GOOD.replace("score", "scores"),
        GOOD.replace('"reasoning"', "reasoning"),
        '{"score": [20, 10], "score": [20, 11]}',
        f"{GOOD} or rather {GOOD.replace('10', '11')}",
        f'{{"first": {GOOD}}}',
        f"[{GOOD}, {GOOD}]",
        f"[{GOOD}",
        f"] {GOOD}",
        f"It is {{so {GOOD}",
        f'the score": 20, 10]}} I mean {GOOD}',
        f"20, 10] I mean {GOOD}",
        f"{GOOD} Nice :]",
        f"{GOOD} [note",
        f"{'so ] ' * 50_000}{GOOD}"[: parse.LONGEST],
        GOOD.replace("[20, 10]", "[20/10, 10/10]"),
        GOOD.replace("[20, 10]", "[20/25/25, 10]"),
        GOOD.replace("[20, 10]", "[20/, 10]"),
        GOOD.replace("is red", 'says "go", "score": [1, 2], "b": "it'),
        GOOD.replace("is red", 'says "go", "score": [1, 2] "it'),
        GOOD.replace("is red", 'says "{"score": [1, 2], "a": "b"}" it'),
        GOOD.replace('now"', "now"),
        GOOD.replace('now"', 'now "really'),
        "[" * 50_000,
        "{'a':" * 50_000,
        '{"score": [20, 10], "deep": ' + "[" * 40 + "]" * 40 + "}",
        GOOD + " " * parse.LONGEST,
        None,
        b"[20, 10]",
        7,
    ],
)
def test_a_reply_that_leaves_a_doubt_is_no_number(text: Any) -> None:
    assert two(text) is None


NO_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 41, "9" * 5000, "26", "-1", "25.0001", "-0.1", "007"]
NO_NUMBERS += ["+3", "3.", ".5", "0x10", "1_0", "½", "٣", "３", "20/20", "20%", "~20", "'20'", "1e", "--2"]  # noqa: RUF001
NO_NUMBERS += ["2-3", "nan", "inf", "1,5", "1j"]


@pytest.mark.parametrize("written", NO_NUMBERS)
def test_what_is_no_number_of_the_scale_makes_the_reply_malformed(written: str) -> None:
    assert two(GOOD.replace("20", written, 1)) is None
    assert read_scores(GOOD.replace("[20, 10]", written), 1, 0, 25) is None


def test_the_ends_of_the_scale_belong_to_it() -> None:
    assert two('{"score": [0, 25]}') == (0.0, 25.0)
    assert number(True, 0, 1) is None
    assert number(float("nan"), 0, 1) is None
    assert number("1", 0, 1) is None


def test_a_score_may_name_its_scale() -> None:
    assert two('{"score": [20/25, 10]}') == (20.0, 10.0)
    assert two('{"score": [20/10, 10]}') is None
    assert read_scores('{"score": [30/25, 10]}', 2, -1e6, 1e6, of=25) == (30.0, 10.0)
    assert read_scores('{"score": [30/1000000, 10]}', 2, -1e6, 1e6, of=25) is None


def test_one_score_may_stand_alone_or_bare() -> None:
    for text in ('{"score": 7.5}', '{"score": [7.5]}', "7.5", "```\n7.5\n```", "[7.5]"):
        assert read_scores(text, 1, 0, 10) == (7.5,)
    assert read_scores('{"rating": 7.5}', 1, 0, 10, key="rating") == (7.5,)
    assert read_scores("I say 7.5", 1, 0, 10) is None


def test_text_in_json_has_no_lone_surrogates() -> None:
    found = read_json('{"a": "\\ud83d\\ude00 \\ud800", "b": "\ud800"}')
    assert found == {"a": "\U0001f600 \ufffd", "b": "\ufffd"}
    json.dumps(found, ensure_ascii=False).encode("utf-8")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc\"'{", max_size=3), inner, max_size=4),
        max_leaves=12,
    ),
    st.sampled_from([None, 2]),
    st.booleans(),
)  # fmt: skip
def test_all_that_json_writes_is_read_as_it_was(value: Any, indent: int | None, plain: bool) -> None:
    told = json.dumps({"it": value}, indent=indent, ensure_ascii=plain)
    assert read_json(f"So: {told}.") == {"it": value}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It fits.\nFinal Score: 3.5", 3.5),
        ("**Final Score:** 3.5/5\n", 3.5),
        ("- Final score : **4**.", 4.0),
        ("Final Score (1-5): 2 out of 5", 2.0),
        ("# Final Score: `1`\r\nThank you.", 1.0),
        ("Final Score: 3\nso\nFinal Score: 3.0", 3.0),
        ("<think>Final Score: 2</think>Final Score: 3", 3.0),
        ("Final Score: 4 (good)", 4.0),
        ("Final Score: **4** (nearly all of it).", 4.0),
        ("Final Score: [4]", 4.0),
        ("Final Score: [4/5]", 4.0),
        ("1. Final Score: 4", 4.0),
        ("**2)** It fits\n3) **Final Score:** 4", 4.0),
        ("Final Score: 4!", 4.0),
        ("Final Score:\n4", 4.0),
        ("**Final Score:**\n\n**4/5**\nIt fits.", 4.0),
        ("Final Score:\n4\n5", None),
        ("Final Score:\n4\nor 5", None),
        ("Final Score:\n4\nout of 10", None),
        ("Final Score:\nIt fits.\n4", None),
        ("Final Score:\n4\nFinal Score: 5", None),
        ("Final Score: 4 (or 5)", None),
        ("Final Score: 4 (or five)", None),
        ("Final Score: 4 (out of ten)", None),
        ("Final Score: [4", None),
        ("Final Score: [4, 5]", None),
        ("Final Score: .5", None),
        ("Final Score: !4", None),
        ("Final Score: 3\nFinal Score: 4", None),
        ("Final Score: 3 or 4", None),
        ("Final Score: 3-4", None),
        ("Final Score: 3/10", None),
        ("Final Score: 6", None),
        ("Final Score: -1", None),
        ("Final Score: three", None),
        ("Final Score:", None),
        ("Final Score: nan", None),
        ("Final Score: ٣", None),
        ("Final Score: 1e1", None),
        ("Final Score: 3,5", None),
        (f"Final Score: 3.{'1' * 50}", None),
        ("Final Score 3", None),
        ("The Final Score: 3 is what I would not give.", None),
        ("My score: 3", None),
        ("Final Score: and the number.\nFinal Score: 3", None),
    ],
)
def test_a_final_score_is_a_line_with_one_number(text: str, found: float | None) -> None:
    assert final(text) == found


def test_every_label_has_its_line() -> None:
    lines = [f"{label}: {k + 2}" for k, label in enumerate(LABELS)]
    assert read_labelled("\n".join(lines), LABELS, 1, 5) == (2.0, 3.0, 4.0)
    assert read_labelled("\n".join(reversed(lines)), LABELS, 1, 5) == (2.0, 3.0, 4.0)
    for k in range(3):
        assert read_labelled("\n".join(lines[:k] + lines[k + 1 :]), LABELS, 1, 5) is None
    for between in (", ", " ", "; ", " | ", " **"):
        assert read_labelled(between.join(lines), LABELS, 1, 5) == (2.0, 3.0, 4.0)
    assert read_labelled(" ".join([*lines, "Style Score: 5"]), LABELS, 1, 5) is None
    assert read_labelled(" or ".join(lines), LABELS, 1, 5) is None
    assert read_labelled(f"I would say {', '.join(lines)}", LABELS, 1, 5) is None
    assert read_labelled(" ".join(lines).replace("3", "3 to 4"), LABELS, 1, 5) is None
    assert read_labelled("Alignment Score: 4", ("Score",), 1, 5) is None


@pytest.mark.parametrize(
    "text",
    [
        "yes, no, unsure",
        "Yes\nNo.\nUnsure",
        "1. yes\n2. no\n3. unsure",
        "2. no\n3. unsure\n1. yes",
        "1) yes, 2) no, 3) unsure",
        '{"answer": "yes"}\n{"answer": "no", "evidence": "none"}\n{"answer": "unsure"}',
        '[{"id": 1, "answer": "yes"}, {"id": 2, "answer": "no"}, {"id": 3, "answer": "unsure"}]',
        "- **yes**\n- no\n- unsure",
        "[yes, no, unsure]",
        '["yes", "no", "unsure"]',
        "['YES', 'no', 'unsure']",
        'Well: [{"answer": "yes", "evidence": "it is [red]"}, {"answer": "no"}, {"answer": "unsure"}]',
        '{"answers": ["yes", "no", "unsure"]}',
        "<think>no, no, no</think>yes; no; unsure",
    ],
)
def test_verdicts_are_read_in_every_form(text: str) -> None:
    assert read_words(text, VERDICTS, 3) == ("yes", "no", "unsure")


NO_VERDICTS = ["", "[]", "yes, no", "yes, no, no, no", "yes, no, perhaps", "I say yes, no, no", "yes no unsure"]
NO_VERDICTS += ['["yes", "no", true]', '["yes", "no", 1]', '["yes", "no", "unsure"', '[["yes", "no", "unsure"]]']
NO_VERDICTS += ['["yes","no","no"] ["no","no","no"]', '[{"answer": "yes"}, {"answer": "no"}, {"said": "no"}]']


NO_VERDICTS += ["1. yes\n2. no\n2. no", "1. yes\n2. no\n4. no", "0. yes\n1. no\n2. no", "1. yes\nno\nno"]
NO_VERDICTS += ['{"answer": "yes"} {"answer": "no"}', '{"answer": "yes"} ["yes", "no", "no"]']
NO_VERDICTS += ['[{"id": 2, "answer": "yes"}, {"id": 1, "answer": "no"}, {"id": 3, "answer": "no"}]']
NO_VERDICTS += ['[{"question": "Q3", "answer": "yes"}, {"answer": "no"}, {"answer": "no"}]']


@pytest.mark.parametrize("text", NO_VERDICTS)
def test_another_number_of_verdicts_or_another_word_is_malformed(text: str) -> None:
    assert read_words(text, VERDICTS, 3) is None


def test_one_verdict_may_be_an_object_without_its_list() -> None:
    for text in (
        '{"evidence": "a cat", "answer": "yes"}',
        '{"answer": "Yes."}',
        '[{"answer": "yes"}]',
        "yes",
        "1. yes",
    ):
        assert read_words(text, VERDICTS, 1) == ("yes",)
    for text in (
        '{"answer": "yes"} {"answer": "no"}',
        '{"answer": "yes", "answer": "no"}',
        "2. yes",
        '{"said": "yes"}',
    ):
        assert read_words(text, VERDICTS, 1) is None


def test_checks_are_zeros_and_ones_and_a_score() -> None:
    assert read_checks('{"checks": [1, 0], "reasoning": "fine", "score": 7.5}', 2) == ((1, 0), 7.5)
    for text in (
        '{"checks": [1], "score": 7.5}',
        '{"checks": [1, 0.5], "score": 7.5}',
        '{"checks": [1, true], "score": 7.5}',
        '{"checks": [1, 0], "score": 11}',
        '{"checks": [1, 0], "score": "7.5"}',
        '{"checks": [1, 0]}',
        "[1, 0]",
    ):
        assert read_checks(text, 2) is None


def test_a_list_may_be_the_only_entry_of_an_object() -> None:
    assert read_list('[{"question": "a"}]') == [{"question": "a"}]
    assert read_list('{"questions": ["a", "b"]}', 2) == ["a", "b"]
    assert read_list('["a", "b"]', 3) is None
    assert read_list('{"a": ["b"], "c": 1}') is None
