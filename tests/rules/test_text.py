from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign.rules.text import (
    bmas,
    distinct_share,
    levenshtein,
    normal,
    ocr_distance,
    ocr_score,
    prompt_score,
    quoted,
)

words = st.text(alphabet="abc ", max_size=12)
hostile = st.one_of(
    st.text(max_size=80),
    st.text(alphabet='"“”„«»\0 \n\ud83d😀éßİ', max_size=60),
    st.sampled_from(['"' * 10_000, "“" * 10_000, "a" * 10_000, '"' + "\0" * 9_998 + '"', '"👩‍👩‍👧"', '"', "", '"İ" ß']),
)


def table_distance(a: str, b: str) -> int:
    """The distance by the textbook's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b):
            row.append(min(row[j] + 1, above[j + 1] + 1, above[j] + (x != y)))
    return row[-1]


@given(words, words)
def test_the_distance_is_that_of_the_table(a: str, b: str) -> None:
    assert levenshtein(a, b) == table_distance(a, b)


@given(words, words, words)
def test_the_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert levenshtein(a, b) == levenshtein(b, a)
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


# the specification's golden values of Flow-GRPO's rule
@pytest.mark.parametrize(("read", "score"), [("helo", 0.8), ("xxhelloyy", 1.0), ("", 0.0), ("zzzzzzzzzz", 0.0)])
def test_the_published_examples(read: str, score: float) -> None:
    assert ocr_score(read, "hello") == pytest.approx(score, abs=1e-12)


@given(read=st.text(alphabet="abcXYZ 1", max_size=20), target=st.text(alphabet="abcXYZ 1", max_size=10))
def test_case_and_spaces_do_not_count(read: str, target: str) -> None:
    spaced = " ".join(read.upper())
    assert ocr_score(spaced, target.lower()) == pytest.approx(ocr_score(read, target), nan_ok=True)


@given(read=words, target=words, precision=st.booleans())
def test_a_score_lies_in_0_to_1_and_is_nan_only_without_a_target(read: str, target: str, precision: bool) -> None:
    found = ocr_score(read, target, precision=precision)
    assert math.isnan(found) == (not target.strip())
    assert math.isnan(found) or 0 <= found <= 1
    assert math.isnan(found) or ocr_distance(read, target) <= len(normal(target))


@given(target=words.filter(str.strip), before=words, after=words)
def test_a_reading_that_holds_the_target_scores_1_and_precision_pays_only_for_its_share(
    target: str, before: str, after: str
) -> None:
    read = before + target + after
    assert ocr_score(read, target) == 1
    assert ocr_score(read, target, precision=True) == pytest.approx(len(normal(target)) / len(normal(read)))
    assert ocr_score(target, target, precision=True) == 1


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ('a sign that says "Open" and "24/7"', ["Open", "24/7"]),
        ("a sign that says “Open” or „offen“ or «ouvert»", ["Open", "offen", "ouvert"]),
        ('a sign that says "he said “hi”" here', ["he said “hi”"]),
        ("a sign with no quotes, it's plain", []),
        ('one " alone', []),
        ('empty ""', [""]),
        ('two\n"lines\nof text"', ["lines\nof text"]),
    ],
)
def test_what_stands_in_quotes_is_the_target(prompt: str, found: list[str]) -> None:
    assert quoted(prompt) == found


@pytest.mark.parametrize("prompt", ["no quotes", 'empty ""', 'blank "  "', 'half "open', ""])
def test_a_prompt_without_a_target_is_nan_and_no_error(prompt: str) -> None:
    assert math.isnan(prompt_score("anything", prompt))
    assert math.isnan(prompt_score("anything", prompt, which="all", precision=True))


def test_the_first_string_counts_or_all_of_them() -> None:
    prompt = '"hello" above "world"'
    assert prompt_score("hello", prompt) == 1
    assert prompt_score("hello", prompt, which="all") == pytest.approx((1 + 0.2) / 2)  # one letter in place: the l
    assert prompt_score("helloworld", prompt, which="all", precision=True) == 1
    assert prompt_score("hello", '"" then "hello"', which="all") == 1  # an empty one is no target
    assert math.isnan(prompt_score("hello", '"" then "hello"'))


def test_curly_quotes_dashes_and_full_width_letters_are_read_as_plain_ones() -> None:
    assert (
        ocr_score("it\u2019s 9\u20135", "it's 9-5")
        == ocr_score("\uff2fpen", "open")
        == ocr_score("\ufb01sh", "fish")
        == 1
    )


@given(prompt=hostile, read=hostile, which=st.sampled_from(["first", "all"]), precision=st.booleans())
def test_no_text_whatever_is_an_error(prompt: str, read: str, which: str, precision: bool) -> None:
    found = prompt_score(read, prompt, which=which, precision=precision)  # type: ignore[arg-type]
    assert math.isnan(found) or 0 <= found <= 1
    assert normal(normal(read)) == normal(read) or not read.isascii()


def test_ten_thousand_letters_are_compared() -> None:
    long = "ab" * 5000
    assert levenshtein(long, long[1:] + "c") == 2
    assert ocr_score("b" + long[2:], long) == pytest.approx(1 - 1 / 10_000)


@pytest.mark.parametrize(
    ("text", "share"), [("a b c d", 1.0), ("a a a a", 0.5), ("a b a b a", 2 / 3), ("a b", math.nan)]
)
def test_the_share_of_distinct_trigrams(text: str, share: float) -> None:
    assert distinct_share(text.split()) == pytest.approx(share, nan_ok=True)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 4))
def test_the_share_is_1_only_where_nothing_repeats(tokens: list[int], n: int) -> None:
    share = distinct_share(tokens, n)
    grams = [tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1)]
    assert math.isnan(share) == (not grams)
    assert math.isnan(share) or (0 < share <= 1 and (share == 1) == (len(set(grams)) == len(grams)))


def vectors(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))


@given(
    n=st.integers(1, 6), m=st.integers(1, 6), seed=st.integers(0, 99), mean=st.sampled_from(["arithmetic", "harmonic"])
)
def test_bmas_is_symmetric_blind_to_order_and_at_most_1(n: int, m: int, seed: int, mean: str) -> None:
    a, b = vectors(n, seed), vectors(m, seed + 100)
    found = bmas(a, b, mean)  # type: ignore[arg-type]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(found, bmas(b, a, mean), atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(found, bmas(a[order], b, mean), atol=1e-6)  # type: ignore[arg-type]
    assert found <= 1 + 1e-6
    assert torch.allclose(bmas(a, 3 * a[order], mean), torch.tensor(1.0))  # type: ignore[arg-type]


def test_bmas_of_a_worked_example() -> None:
    a, b = torch.eye(2), torch.tensor([[1.0, 0.0]])  # P = (1 + 0) / 2, R = 1
    assert float(bmas(a, b)) == pytest.approx(0.75)
    assert float(bmas(a, b, "harmonic")) == pytest.approx(2 / 3)
    assert float(bmas(b, -b, "harmonic")) == 0
    assert bmas(torch.empty(0, 2), b).isnan()
    assert torch.allclose(bmas(torch.stack([a, a]), torch.stack([b, -b])), torch.tensor([0.75, -0.25]))
