"""Servers that die, hang, misjudge a question or give secrets away, and what one of them costs a whole run."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffalign.errors import ConfigError
from diffalign.judges import endpoint_breaker, endpoint_forms, endpoint_line
from diffalign.judges.asking import Decision, Question, Reply, ask
from diffalign.judges.endpoint_breaker import Breaker
from tests.judges.scripted import Says, always, chat, judge, likely, serving

SECRET = "sk-very-secret-1234567890"
RED = Decision(text="Is it red?")
LONG = "x" * 300


@pytest.fixture(autouse=True)
def _swift(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(endpoint_line, "FIRST_WAIT", 0.01)
    for name in ("DIFFALIGN_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def text_of(body: Any) -> str:
    return str(body["messages"][0]["content"][-1]["text"])


def several(count: int, **more: Any) -> list[Question]:
    return [Question(text=f"{k}?", **more) for k in range(count)]


@pytest.mark.parametrize(
    "says",
    [
        Says({"error": {"message": "e" * 185 + SECRET}}, 401),
        Says({"error": {"message": "e" * 185 + SECRET}}, 500),
        Says({"headers": {"Authorization": f"Bearer {SECRET}"}}),
        Says({SECRET: 1}),
        Says(chat(f"you sent {SECRET}")),
        Says(f"<html>{SECRET}</html>".encode(), headers={"Content-Type": "text/html"}),
    ],
)
def test_a_server_that_gives_the_key_back_finds_nobody_to_tell_it(says: Says, tmp_path: Path) -> None:
    with serving(always(says)) as heard:
        asked = judge(heard.url, key=SECRET, how="logprobs", cache=tmp_path / "c.sqlite")
        told: list[Any] = []
        for work in (lambda: asked.reply([Question(text="?")]), lambda: asked.decide([RED])):
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                try:
                    told.append(work())
                except ConfigError as e:
                    told.append(str(e))
            told += [str(one.message) for one in warned]
        told += [*asked.problems, (tmp_path / "c.sqlite").read_bytes()]
        assert SECRET[:8] not in str(told)


def test_bodies_are_built_as_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    built, ahead, lock = [0], [0], threading.Lock()
    make = endpoint_forms.chat

    def counted(*given: Any) -> Any:
        with lock:
            built[0] += 1
        return make(*given)

    def script(path: str, body: Any, count: int) -> Says:
        with lock:
            ahead[0] = max(ahead[0], built[0] - count)
        time.sleep(0.01)
        return Says(chat())

    monkeypatch.setattr(endpoint_forms, "chat", counted)
    with serving(script) as heard:
        assert all(reply.text for reply in judge(heard.url, concurrency=3).reply(several(30)))
    assert built[0] == 30
    assert ahead[0] <= 3


def test_a_question_that_was_lost_is_not_asked_for_again_and_never_warmer() -> None:
    with serving(always(Says({}, 503))) as heard:
        assert judge(heard.url, retries=2).reply([Question(text="?")]) == [Reply(problem="HTTP 503: {}", lost=True)]
        ((value, texts),) = ask(judge(heard.url, retries=2), [Question(text="?")], lambda text: text)
        assert (value, texts) == (None, ("HTTP 503: {}",))
        assert [body["temperature"] for body in heard.posts] == [0.0] * 6
    for text in ("no number", "", None):
        with serving(always(Says(chat(text)))) as heard:
            ask(judge(heard.url), [Question(text="?")], lambda text: None)
            assert len([body for body in heard.posts if body["temperature"] > 0]) == 1  # what it says is


def test_a_server_that_hangs_does_not_cost_a_timeout_for_each_question() -> None:
    def script(path: str, body: Any, count: int) -> Says:
        if count:
            time.sleep(1.5)
        return Says(chat())

    with serving(script) as heard:
        asked = judge(heard.url, timeout=0.2, concurrency=2)
        asked.reply(several(1))
        start = time.monotonic()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            replies = asked.reply([Question(text=f"{k}!") for k in range(60)])
        assert time.monotonic() - start < 3  # of 60 * 2 * 0.2 / 2 s
        assert len(heard.posts) <= 10
        assert all(reply.problem and reply.lost for reply in replies)
        assert ["60 of 60 questions" in str(one.message) for one in warned] == [True]


def test_a_server_that_comes_back_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_breaker, "REST", 0.2)
    alive = [True]
    with serving(lambda path, body, count: Says(chat()) if alive[0] else Says({}, 503)) as heard:
        asked = judge(heard.url, concurrency=2)
        assert asked.reply(several(1))[0].text
        alive[0] = False
        assert all(reply.problem for reply in asked.reply([Question(text=f"{k}!") for k in range(40)]))
        sent = len(heard.posts)
        assert sent <= 12
        alive[0] = True
        time.sleep(0.3)
        assert all(reply.text for reply in asked.reply([Question(text=f"{k}!") for k in range(40)]))
        assert len(heard.posts) == sent + 40


def test_a_breaker_opens_after_enough_misses_over_enough_time_and_closes_at_one_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    breaker = Breaker(most=3, patience=5.0)
    for _ in range(10):
        breaker.note(0)
    assert not breaker.open  # all at once: it may be starting again
    now[0] = 6.0
    breaker.note(503)
    assert breaker.open
    assert not breaker.resting  # one may try
    breaker.note(0)
    assert breaker.resting
    now[0] += endpoint_breaker.REST
    assert not breaker.resting
    breaker.note(400)  # an error of the question is an answer
    assert not breaker.open
    for status in (200, 0, 429, 0):
        now[0] += 9
        breaker.note(status)
    assert not breaker.open


def test_a_pause_between_two_tries_takes_no_place() -> None:
    def script(path: str, body: Any, count: int) -> Says:
        return Says({}, 429, {"Retry-After": "1"}) if count == 0 else Says(chat(str(count)))

    with serving(script) as heard:
        replies = judge(heard.url, concurrency=1).reply(several(4))
        assert sorted(reply.text for reply in replies) == ["1", "2", "3", "4"]
        assert text_of(heard.posts[0]) == text_of(heard.posts[-1])  # the one that waited came last


def test_a_field_is_found_wherever_a_long_message_names_it() -> None:
    def script(path: str, body: Any, count: int) -> Says:
        if "response_format" in body:
            return Says({"error": {"message": f"{LONG} Unknown field: response_format"}}, 400)
        if body.get("top_logprobs", 0) > 5:
            return Says({"error": {"message": f"{LONG} top_logprobs must be at most 5"}}, 400)
        return Says(chat("Yes", logprobs=likely(Yes=-0.1, No=-3.0)))

    with serving(script) as heard:
        asked = judge(heard.url)
        assert asked.decide([RED])[0] is not None
        assert asked.reply([Question(text="?", schema={})])[0].text == "Yes"
        assert len(heard.posts) == 4


def test_fields_that_were_only_suspected_come_back() -> None:
    def script(path: str, body: Any, count: int) -> Says:
        if body is None:
            return Says({}, 404)
        return Says({"error": {"message": "bad request"}}, 400) if "response_format" in body else Says(chat())

    with serving(script) as heard:
        asked = judge(heard.url)
        question = Question(text="?", temperature=0.5, schema={})
        assert asked.reply([question])[0].text
        assert asked._sender._refusals.known == {"response_format"}
        asked.reply([question])
        assert {"top_k", "seed", "top_p"} <= set(heard.posts[-1])


@pytest.mark.parametrize("status", [403, 404])
def test_a_single_question_that_is_refused_costs_its_own_row(status: int) -> None:
    def script(path: str, body: Any, count: int) -> Says:
        return Says({"error": {"message": "flagged"}}, status) if text_of(body) in ("0?", "3?") else Says(chat())

    with serving(script) as heard:
        replies = judge(heard.url, concurrency=2).reply(several(6))
        assert [reply.problem for reply in replies] == [
            f"HTTP {status}: flagged" if k in (0, 3) else "" for k in range(6)
        ]


@pytest.mark.parametrize("message", ["x is not a valid model ID", "The model `x` does not exist", "Model x not found"])
def test_an_unknown_model_is_one_error_and_few_requests(message: str) -> None:
    with serving(always(Says({"error": {"message": message}}, 400))) as heard:
        with pytest.raises(ConfigError, match="does not know the model 'judge'"):
            judge(heard.url, concurrency=2).reply(several(50, temperature=0.0, schema={}))
        assert len(heard.posts) <= 4


def test_a_typed_decision_that_fails_midway_costs_its_own_row() -> None:
    def script(path: str, body: Any, count: int) -> Says:
        return Says({}, 404) if count == 2 else Says({"answers": {"decision": {"noul": 0.5}}})

    with serving(script) as heard:
        asked = judge(heard.url, how="systemone", concurrency=1)
        found = asked.decide([Decision(text=f"{k}?") for k in range(5)])
        assert found == [(0.5, 0.5), (0.5, 0.5), None, (0.5, 0.5), (0.5, 0.5)]
    with serving(always(Says({}, 404))) as heard, pytest.raises(ConfigError, match=r"is to be .*/v1"):
        judge(heard.url.replace("/v1", ""), how="systemone").decide([RED])


@pytest.mark.parametrize("how", ["auto", "logprobs"])
def test_labels_that_begin_with_another_are_not_read_off_one_token(how: str) -> None:
    tens = Decision(text="?", labels=tuple(map(str, range(1, 11))))
    with (
        serving(always(Says(chat("1", logprobs=likely(**{"1": -0.05, "2": -4.0}))))) as heard,
        pytest.raises(ConfigError, match="'1' and '10' may begin with the same token"),
    ):
        judge(heard.url, how=how).decide([tens])


def test_nobody_there_at_first_is_found_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_line, "FIRST_WAIT", 5.0)
    start = time.monotonic()
    with pytest.raises(ConfigError, match="nobody answers"):
        judge("http://127.0.0.1:1/v1#judge", retries=4).reply(several(1))
    assert time.monotonic() - start < 2.5


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(always(Says(chat()))) as heard:
        assert judge(heard.url, retries=0).reply(several(1))[0].text


def test_a_judge_that_is_closed_while_it_is_asked_says_so() -> None:
    done = threading.Event()
    with serving(lambda path, body, count: Says(chat()) if count or done.wait(10) else Says()) as heard:
        asked = judge(heard.url, timeout=30.0)
        threading.Timer(0.3, asked.close).start()
        with pytest.raises(ConfigError, match="was closed while it was asked"):
            asked.reply(several(1))
        done.set()
        assert asked.reply([Question(text="!")])[0].text
