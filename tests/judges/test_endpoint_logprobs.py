"""Probabilities of labels, read off the log-probabilities of the first token in the form of vLLM."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from diffalign.errors import ConfigError
from diffalign.judges.asking import Decision
from diffalign.judges.endpoint import EndpointJudge
from tests.judges.scripted import Says, chat, likely, serving

RED = Decision(text="Is it red?")


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decided(logprobs: Any) -> tuple[float, ...] | None:
    with serving(lambda path, body, count: Says(chat("Yes", logprobs=logprobs))) as heard:
        return EndpointJudge(heard.url, how="logprobs", cache=False).decide([RED])[0]


def test_log_probabilities_become_shares_of_the_labels() -> None:
    found = decided(likely(Yes=math.log(0.6), No=math.log(0.15), Maybe=math.log(0.2)))
    assert found == pytest.approx((0.8, 0.2))
    assert decided(likely(Yes=math.log(0.3), _Yes=math.log(0.3), No=math.log(0.2))) == pytest.approx((0.75, 0.25))


def test_a_label_that_is_missing_has_no_chance_unless_the_others_are_unlikely_too() -> None:
    assert decided(likely(Yes=math.log(0.9), Sure=math.log(0.05))) == (1.0, 0.0)
    with pytest.warns(UserWarning, match="do not tell Yes, No"):
        assert decided(likely(Sure=math.log(0.7), Yes=math.log(0.2))) is None
    found = decided(likely(Sure=math.log(0.9), Yes=math.log(0.02), No=math.log(0.06)))
    assert found == pytest.approx((0.25, 0.75))  # unlikely, but both are there


def test_minus_infinity_is_no_chance() -> None:
    assert decided(likely(Yes=math.log(0.9), No=-math.inf)) == (1.0, 0.0)
    assert decided(likely(Yes=math.log(0.9), No=-9999.0)) == (1.0, 0.0)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.5, True, "-0.1", None, [], 10**400])
def test_log_probabilities_that_are_none_decide_nothing(wrong: Any) -> None:
    assert decided(likely(Yes=math.log(0.5), No=wrong)) is None


@pytest.mark.usefixtures("quiet")
def test_log_probabilities_of_another_form_decide_nothing() -> None:
    assert decided(likely(Yes=-math.inf, No=-math.inf)) is None
    assert decided(likely(Yes=0.0, No=0.0)) is None  # more than all
    for content in ([3], [{}], [{"token": "Yes", "logprob": 0.0}], [{"top_logprobs": [{"token": 5, "logprob": 0.0}]}]):
        assert decided({"content": content}) is None


def test_a_server_without_either_is_an_error_that_names_both_ways() -> None:
    def script(path: str, body: Any, count: int) -> Says:
        return Says(chat("Yes")) if path.endswith("/chat/completions") else Says({"detail": "Not Found"}, 404)

    with (
        serving(script) as heard,
        pytest.raises(ConfigError, match=r"log-probabilities \(vLLM.*typed decisions at /v1/systemone"),
    ):
        EndpointJudge(heard.url, cache=False).decide([RED])
