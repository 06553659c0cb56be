"""Reward chains: ordered key facts and style checks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.errors import ConfigError, UnknownName
from diffalign.rules.chain import MEASURES, Check, chain_score, combined, common, content, fact_score, hits, style

WORDS = st.lists(st.sampled_from("abcd"), max_size=8)


def one(*keywords):
    return (tuple(keywords),)


@pytest.mark.parametrize(
    ("found", "worth"),
    [("a c", 2 / 3), ("c a", 1 / 3), ("", 0), ("x y", 0), ("a b c", 1), ("a a b c", 3 / 4), ("A, b; C!", 1)],
)
def test_content_of_the_worked_examples(found, worth):
    assert fact_score(found, one("a", "b", "c")) == pytest.approx(worth)


@given(WORDS, WORDS)
def test_the_common_subsequence_is_symmetric_and_bounded(a, b):
    assert common(a, b) == common(b, a) <= min(len(a), len(b))
    assert common(a, a) == len(a)
    assert 0 <= chain_score(a, b) <= 1
    assert (chain_score(a, b) == 1) == (bool(a) and a == b)


def test_the_best_reference_counts_and_facts_are_averaged():
    circles = (("red circle", "red circle"), ("two red circles",))
    assert fact_score("two red circles", circles) == fact_score("a red circle and a red circle", circles) == 1
    assert fact_score("a red circle", circles) == 0.5
    assert content("a red circle", [circles, one("blue square")]) == 0.25
    assert math.isnan(content("a red circle", []))


def test_keywords_are_whole_words_of_any_case_and_the_longer_one_counts():
    assert hits("A Red\nCircle; two circles, a red square", ["red circle", "circle", "red"]) == ["red circle", "red"]
    assert hits("encircled", ["circle"]) == []
    assert hits("anything", []) == hits("anything", [" "]) == []
    assert hits("a (b) c++", ["(b)", "c++"]) == ["(b)", "c++"]


def test_style_is_the_weighted_share_of_the_checks_that_hold():
    checks = [Check(measure="aspect", at_least=1.0, weight=3.0), Check(measure="brightness", at_most=0.5)]
    assert style([True, False], checks) == 0.75
    assert style([True, True], checks) == 1
    assert style([], []) is None
    assert combined(0.5, 1.0, "mean") == 0.75
    assert combined(0.5, 1.0, "sum") == 1.5
    assert combined(0.5, None, "sum") == combined(0.5, None, "mean") == 0.5


def plain(colour, height=20, width=40):
    return torch.tensor(colour, dtype=torch.float32)[:, None, None].expand(3, height, width)


def test_measures_of_plain_pictures():
    red, grey = plain((1.0, 0.0, 0.0)), plain((0.5, 0.5, 0.5))
    found = {name: (measure(red), measure(grey)) for name, measure in MEASURES.items()}
    assert found["aspect"] == (2, 2)
    assert (found["width"], found["height"], found["short_side"]) == ((40, 40), (20, 20), (20, 20))
    assert found["brightness"] == pytest.approx((0.299, 0.5))
    assert found["contrast"] == pytest.approx((0, 0), abs=1e-6)
    assert found["saturation"] == pytest.approx((1, 0))
    assert found["colourfulness"][1] == pytest.approx(0, abs=1e-3)
    assert found["colourfulness"][0] > 80
    assert found["palette"] == (1, 1)


def test_the_palette_counts_what_covers_enough():
    picture = plain((1.0, 1.0, 1.0), 20, 20).clone()
    picture[:, :10] = 0
    picture[:, 0, 0] = torch.tensor([1.0, 0, 0])  # one pixel in 400 is no colour of the palette
    assert MEASURES["palette"](picture) == 2


def test_checks_hold_within_their_bounds():
    picture = plain((0.5, 0.5, 0.5))
    assert Check(measure="aspect", at_least=2.0, at_most=2.0).holds(picture)
    assert not Check(measure="aspect", at_most=1.9).holds(picture)
    assert not Check(measure="brightness", at_least=0.6).holds(picture)


def test_text_is_found_by_what_reads_it():
    check = Check(measure="text", says="Hello World")
    assert check.holds(plain((1.0, 1.0, 1.0)), lambda _: "it says HELLO\nWORLD!")
    assert not check.holds(plain((1.0, 1.0, 1.0)), lambda _: "hello")
    with pytest.raises(ConfigError, match="needs something that reads"):
        check.holds(plain((1.0, 1.0, 1.0)))


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"measure": "aspct", "at_least": 1.0}, UnknownName, "Did you mean 'aspect'"),
        ({"measure": "__import__('os')", "at_least": 1.0}, UnknownName, "no style check called"),
        ({"measure": "aspect"}, ConfigError, "has no bound"),
        ({"measure": "aspect", "at_least": 2.0, "at_most": 1.0}, ConfigError, "no picture can meet"),
        ({"measure": "aspect", "at_least": math.nan}, ConfigError, "no picture can meet"),
        ({"measure": "text"}, ConfigError, "does not say what to read"),
        ({"measure": "aspect", "at_least": 1.0, "weight": 0.0}, ConfigError, "weight"),
    ],
)
def test_a_check_that_means_nothing_is_refused(fields, error, says):
    with pytest.raises(error, match=says):
        Check(**fields)
