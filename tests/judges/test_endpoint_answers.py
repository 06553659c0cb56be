"""What servers may answer, over real HTTP: nothing that is not an answer becomes a number, and nothing hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import ConfigError, MissingExtra
from diffalign.judges import endpoint_line
from diffalign.judges.asking import Decision, Question
from tests.judges.scripted import Says, always, chat, judge, serving

PICTURE = torch.linspace(0, 1, 3 * 8 * 8).reshape(3, 8, 8)
ASKED = Question(text="What is this?", images=(PICTURE,), max_tokens=8)
RED = Decision(text="Is it red?", images=(PICTURE,))
HTML = Says(b"<html><body>score: 10</body></html>", headers={"Content-Type": "text/html"})
GARBAGE = {
    "html": HTML,
    "html that says it is json": Says(b"<html>10</html>"),
    "nothing": Says(b""),
    "nothing, as text": Says(b"", headers={}),
    "a number": Says(b"10"),
    "a list": Says([1, 2]),
    "no choices": Says({"object": "chat.completion"}),
    "empty choices": Says({"choices": []}),
    "choices of null": Says({"choices": [None]}),
    "no message": Says({"choices": [{"index": 0}]}),
    "null content": Says(chat(None)),
    "a number as content": Says(chat(7)),
    "true as content": Says(chat(True)),
    "empty content": Says(chat("")),
    "spaces as content": Says(chat(" \n ")),
    "parts without text": Says(chat([{"type": "image"}])),
    "an error with status 200": Says({"error": {"message": "score 10", "code": 500}}),
    "deep json": Says(b"[" * 200_000),
    "half a json": Says(b'{"choices": [{"message": {"content": "sco'),
    "a cut body": Says(chat("score: 10"), cut=True),
    "bytes that are no text": Says(b"\xff\xfe\x00\x81"),
    "compressed, it says": Says(b"score", headers={"Content-Type": "application/json", "Content-Encoding": "gzip"}),
    "a withheld reply": Says(chat("score: 10", finish="content_filter")),
    "closes the connection": Says(hangs_up=True),
    "500": Says({"error": {"message": "score 10"}}, status=500),
    "503 in html": Says(b"<h1>score 10</h1>", status=503, headers={"Content-Type": "text/html"}),
    "400": Says({"detail": "score 10"}, status=400),
    "413": Says(b"", status=413),
}


@pytest.fixture(autouse=True)
def _swift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_line, "FIRST_WAIT", 0.01)
    for name in ("DIFFALIGN_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_a_problem_and_never_a_reply_that_is_kept(name: str, tmp_path: Path) -> None:
    with serving(always(GARBAGE[name])) as heard:
        asked = judge(heard.url, cache=tmp_path / "c.sqlite")
        (reply,) = asked.reply([ASKED])
        assert reply.problem
        assert len(asked.cache) == 0


@pytest.mark.parametrize("name", GARBAGE)
@pytest.mark.parametrize("how", ["logprobs", "systemone"])
@pytest.mark.usefixtures("quiet")
def test_garbage_decides_nothing(name: str, how: str, tmp_path: Path) -> None:
    with serving(always(GARBAGE[name])) as heard:
        asked = judge(heard.url, how=how, cache=tmp_path / "c.sqlite")
        assert asked.decide([RED, RED]) == [None, None]
        assert asked.problems
        assert len(asked.cache) == 0


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_server_that_fails_once_is_asked_again(status: int) -> None:
    with serving(lambda path, body, count: Says(chat("fine")) if count else Says({"error": "x"}, status)) as heard:
        asked = judge(heard.url)
        assert asked.reply([ASKED])[0].text == "fine"
        assert asked.requests == len(heard.posts) == 2


def test_a_connection_that_closes_once_is_tried_again() -> None:
    with serving(lambda path, body, count: Says(chat("fine")) if count else Says(hangs_up=True)) as heard:
        assert judge(heard.url).reply([ASKED])[0].text == "fine"


@pytest.mark.parametrize("told", ["0.4", "date"])
def test_retry_after_is_respected(told: str) -> None:
    when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2)) if told == "date" else told
    busy = Says({"error": {"message": "slow down"}}, 429, {"Retry-After": when, "Content-Type": "application/json"})
    with serving(lambda path, body, count: Says(chat("fine")) if count else busy) as heard:
        start = time.monotonic()
        assert judge(heard.url).reply([ASKED])[0].text == "fine"
        assert time.monotonic() - start > (0.4 if told == "0.4" else 0.8)


def test_nobody_waits_an_hour() -> None:
    busy = Says({"error": {"message": "come back later"}}, 429, {"Retry-After": "3600"})
    with serving(always(busy)) as heard:
        start = time.monotonic()
        assert "come back later" in judge(heard.url).reply([ASKED])[0].problem
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("told", ["soon", "-5", "nan", "inf", "Mon, 99 Foo 2020"])
def test_a_retry_after_that_is_no_time_is_ignored(told: str) -> None:
    with serving(lambda p, b, count: Says(chat("fine")) if count else Says({}, 429, {"Retry-After": told})) as heard:
        assert judge(heard.url).reply([ASKED])[0].text == "fine"


def test_a_bad_request_is_not_repeated() -> None:
    with serving(always(Says({"error": {"message": "the prompt is too long"}}, 400))) as heard:
        assert "too long" in judge(heard.url).reply([ASKED])[0].problem
        assert len(heard.posts) == 1


def test_a_slow_server_is_a_problem_and_not_a_number() -> None:
    def slow(path: str, body: Any, count: int) -> Says:
        time.sleep(1.0)
        return Says(chat("10"))

    with serving(slow) as heard:
        start = time.monotonic()
        (reply,) = judge(heard.url, timeout=0.2, retries=1).reply([ASKED])
        assert "no answer within 0.2 s" in reply.problem
        assert time.monotonic() - start < 0.9


def test_others_are_answered_while_one_fails() -> None:
    def script(path: str, body: Any, count: int) -> Says:
        return HTML if "3" in body["messages"][0]["content"][-1]["text"] else Says(chat("fine"))

    with serving(script) as heard:
        replies = judge(heard.url).reply([Question(text=f"{k}?") for k in range(6)])
        assert [bool(one.problem) for one in replies] == [k == 3 for k in range(6)]


def test_a_reply_that_was_cut_off_says_so_and_halves_of_characters_are_replaced() -> None:
    with serving(always(Says(b'{"choices": [{"message": {"content": "a \\ud800"}, "finish_reason": "length"}]}'))) as h:
        (reply,) = judge(h.url).reply([Question(text="\udfff what?", max_tokens=8)])
        assert (reply.text, reply.problem) == ("a ?", "cut off after 8 tokens")


@pytest.fixture
def _interruptible() -> Iterator[None]:
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # test workers ignore it
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupted_call_leaves_nothing_running() -> None:
    done = threading.Event()
    with serving(lambda path, body, count: Says(chat("late")) if done.wait(20) else Says()) as heard:
        asked = judge(heard.url, timeout=30.0)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            asked.reply([Question(text=f"{k}") for k in range(12)])
        assert time.monotonic() - start < 3
        deadline = time.monotonic() + 3
        while asked._sharing.going and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not asked._sharing.going
        assert len(heard.posts) == 8  # those beyond the limit were never sent
        done.set()
        assert asked.reply([Question(text="and now?")])[0].text == "late"
        asked.close()
        while any(thread.name == "diffalign-judge" for thread in threading.enumerate()):
            assert time.monotonic() < deadline + 5
            time.sleep(0.01)


def test_no_more_requests_are_under_way_than_allowed_even_from_many_threads() -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def script(path: str, body: Any, count: int) -> Says:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.03)
        with lock:
            now[0] -= 1
        return Says(chat("fine"))

    with serving(script) as heard:
        asked = judge(heard.url, concurrency=3)
        threads = [
            threading.Thread(target=lambda n=n: asked.reply([Question(text=f"{n} {k}") for k in range(6)]))
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        assert (most[0], len(heard.posts)) == (3, 24)


def test_the_same_question_at_once_makes_one_request(tmp_path: Path) -> None:
    def script(path: str, body: Any, count: int) -> Says:
        time.sleep(0.1)
        return Says(chat(f"reply {count}"))

    with serving(script) as heard:
        asked = judge(heard.url, cache=tmp_path / "c.sqlite")
        found: list[str] = []
        threads = [
            threading.Thread(target=lambda: found.extend(one.text for one in asked.reply([ASKED, ASKED])))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=10)
        assert found == ["reply 0"] * 6
        assert (asked.requests, asked.answered) == (1, 5)


def test_nobody_at_the_address_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"nobody answers at http://127.0.0.1:1/v1 .* Start the server"):
        judge("http://127.0.0.1:1/v1#judge").reply([ASKED])
    with pytest.raises(ConfigError, match="nobody answers"):
        judge("http://127.0.0.1:1/v1#judge").decide([RED])
    with pytest.raises(ConfigError, match="nobody answers"):
        _ = judge("http://127.0.0.1:1/v1").version
    moved = Says(b"", status=302, headers={"Location": "http://127.0.0.1:1/"})
    with serving(always(moved)) as heard, pytest.raises(ConfigError, match="nobody answers"):
        judge(heard.url).reply([ASKED])


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_an_error_that_does_not_show_it(status: int, tmp_path: Path) -> None:
    secret = "sk-very-secret-1234567890"
    with serving(always(Says({"error": {"message": f"Incorrect API key: {secret}"}}, status))) as heard:
        asked = judge(heard.url, key=secret, cache=tmp_path / "c.sqlite")
        for ask in (lambda: asked.reply([ASKED]), lambda: asked.decide([RED])):
            with pytest.raises(ConfigError, match=r"refuses the key .* into \$DIFFALIGN_JUDGE_KEY") as told:
                ask()
            assert secret not in str(told.value)
        assert heard.keys[0] == f"Bearer {secret}"
        assert secret not in f"{asked.options} {asked.version} {asked.name} {asked!r}"
        assert secret.encode() not in (tmp_path / "c.sqlite").read_bytes()


def test_an_unknown_model_is_an_error() -> None:
    with (
        serving(always(Says({"message": "The model `judge` does not exist."}, 404))) as heard,
        pytest.raises(ConfigError, match="does not know the model 'judge'"),
    ):
        judge(heard.url).reply([ASKED])


def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(MissingExtra, match=r"diffalign\[judge\]"):
        judge("http://127.0.0.1:1/v1#judge").reply([ASKED])
