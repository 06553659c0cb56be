from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.rules.phrases import numbers_of, relation_of, singular


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a cat on the left of a chair", ("cat", "on the left of", "chair")),
        ("A balloon on the top of the giraffe.", ("balloon", "on the top of", "giraffe")),
        ("a horse on top of a car", ("horse", "on top of", "car")),
        ("a wooden table next to an orange cat", ("wooden table", "next to", "orange cat")),
        ("a dog on side of a man", ("dog", "on side of", "man")),
        ("a dog", None),
        ("near", None),
        ("a cat near a dog near a bird", None),
    ],
)
def test_two_objects_and_their_relation_are_read(prompt: str, found: tuple[str, str, str] | None) -> None:
    assert relation_of(prompt) == found


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("two frogs, three apples and a dog", {"frog": 2, "apple": 3, "dog": 1}),
        ("four butterflies", {"butterfly": 4}),
        ("five people and two sheep.", {"person": 5, "sheep": 2}),
        ("three boxes, two tomatoes and one glass", {"box": 3, "tomato": 2, "glass": 1}),
        ("2 teddy bears and a teddy bear", {"teddy bear": 3}),
        ("some dogs", None),
        ("", None),
        ("two", None),
    ],
)
def test_objects_and_their_numbers_are_read(prompt: str, found: dict[str, int] | None) -> None:
    assert numbers_of(prompt) == found


@given(st.text())
def test_any_text_is_read_or_is_none(text: str) -> None:
    relation_of(text)
    numbers_of(text)
    singular(text)
