"""Nothing that is malformed becomes a number, and nothing raises."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.judges import parse
from tests.judges.test_parse import GOOD, LABELS, VERDICTS, final, two

READERS = (
    parse.read_json,
    two,
    final,
    parse.read_list,
    lambda text: parse.read_scores(text, 1, 0, 10),
    lambda text: parse.read_labelled(text, LABELS, 1, 5),
    lambda text: parse.read_words(text, VERDICTS, 3),
    lambda text: parse.read_checks(text, 2),
)


UNITS = [" ", "```", "``` ", "\n", "[", "{", '"', "'", "\\", "{'", "[1,", "<think>", "(", "*", "9", "a,", "- "]
UNITS += ["Final Score", "Final Score:", "Final Score (", "Final Score:\n", "so ] ", "so [so ", "1/"]
UNITS += [
    '{"a": "b" c ',
    "\u201c",
    "Alignment Score: 1 ",
    "Style Score ",
    '"a" ',
    '{"a": "b "c", ',
    "1. yes\n",
    '{"answer": "yes"} ',
]


@pytest.mark.parametrize("unit", UNITS)
def test_the_longest_replies_are_read_in_no_time(unit: str) -> None:
    text = (unit * parse.LONGEST)[: parse.LONGEST]
    start = time.perf_counter()
    for read in READERS:
        for said in (text, f"```{text[4:]}", f"Final Score{text[12:]}", '{"a": ' + text[7:]):
            read(said)
    assert time.perf_counter() - start < 10


@given(st.text(st.characters(), max_size=60) | st.text("[]{}\",:0123456789.eE-+'\\ ntrufalsk\n", max_size=60))
def test_no_text_raises_or_becomes_a_score_by_chance(text: str) -> None:
    for read in READERS:
        read(text)
    if (found := two(text)) is not None:
        assert list(found) == strict(text)


def strict(text: str) -> Any:
    """What the standard library makes of a reply that is JSON, once its text around is cut."""
    for first, last in ("{}", "[]"):
        try:
            value = json.loads(text[text.index(first) : text.rindex(last) + 1])
        except (ValueError, RecursionError):
            continue
        return value.get("score") if isinstance(value, dict) else value
    return None


def written(text: str) -> Any:
    """The only list of numbers behind a key `score`, whatever JSON makes of the rest."""
    lists = re.findall(r'"score"\s*:\s*(\[[^\[\]]*\])', text)
    return json.loads(lists[0]) if len(lists) == 1 else None


def broken(rng: random.Random) -> str:
    """A good reply with one fault that makes it malformed."""
    a, b = rng.randint(0, 25), round(rng.uniform(0, 25), rng.choice([0, 1, 3]))
    words = " ".join(rng.choice(["red", "circle", "left", "of", "a", "blue", "square", "fits"]) for _ in range(6))
    good = json.dumps({"reasoning": words, "score": [a, b]}, indent=rng.choice([None, 1]))
    fault = rng.randrange(8)
    if fault == 0:  # cut off
        return good[: rng.randrange(1, len(good) - 1)]
    if fault == 1:  # a structural character is lost, or another stands for it
        place = rng.choice([k for k, letter in enumerate(good) if letter in '{}[]":,'])
        return good[:place] + rng.choice(["", "(", ")", ";", "|", "="]) + good[place + 1 :]
    if fault == 2:  # another value
        bad = ["NaN", "Infinity", "null", "true", f'"{a}"', f"[{a}]", "1e999", "-3", "26", "1/2", "{}", f"{a} {a}", "?"]
        return good[: good.rindex("[")] + f"[{rng.choice(bad)}, {b}]" + "}"
    if fault == 3:  # another number of scores
        return good[: good.rindex("[")] + json.dumps([a] * rng.choice([0, 1, 3, 9])) + "}"
    if fault == 4:  # two that disagree
        return f"{good}\n{json.dumps({'score': [a, (b + 1) % 25 + 0.25]})}"
    if fault == 5:  # another key
        return good.replace('"score"', rng.choice(['"scores"', '"Score"', '"a score"', '""', "score", "1"]))
    if fault == 6:  # the key twice
        return good.replace('"reasoning"', '"score"')
    return rng.choice(["<think>", "{", "[", "]", "}"]) + good  # a bracket or thought that never ends


def scrambled(rng: random.Random, good: str) -> str:
    """A reply with a few characters put in, lost, exchanged or moved."""
    letters = list(good)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(letters))
        act = rng.randrange(4)
        if act == 0:
            letters.insert(place, rng.choice('[]{}:0123456789.-eE \n\\tnaf"<\ud800\u0663'))
        elif act == 1 and len(letters) > 1:
            del letters[place]
        elif act == 2:
            letters[place] = rng.choice('[]{}:0123456789.-+"\x00')
        else:
            start = rng.randrange(len(letters))
            letters[start:start] = letters[place : place + rng.randint(1, 12)]
    return "".join(letters)


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_no_malformed_reply_becomes_a_number(count: int) -> None:
    for seed in range(count):
        text = broken(random.Random(seed))
        assert two(text) is None, text


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_scrambled_reply_gives_what_it_says_or_nothing(count: int) -> None:
    for seed in range(count):
        text = scrambled(random.Random(seed), GOOD)
        found = two(text)
        assert found in (None, (20.0, 10.0)) or list(found) in (strict(text), written(text)), text
        lines = scrambled(random.Random(seed), "It fits.\nFinal Score: 3.5\n")
        for read in READERS:
            read(text)
            read(lines)
