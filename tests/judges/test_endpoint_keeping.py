"""What a judge on a server keeps, what becomes of it in other processes, and what it refuses to send."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import ConfigError, OutputError
from diffalign.judges.asking import Decision, Question
from diffalign.judges.request_cache import RequestCache
from diffalign.scoring import make_reward
from tests.judges.scripted import Says, always, chat, judge, likely, serving

SECRET = "sk-very-secret-1234567890"
RED = Decision(text="Is it red?")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("DIFFALIGN_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def several(count: int, **more: Any) -> list[Question]:
    return [Question(text=f"{k}?", **more) for k in range(count)]


def test_another_model_in_the_same_folder_is_another_judge(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"first")
    with serving(lambda path, body, count: Says(chat(str(count)))) as heard:
        url = f"{heard.url.partition('#')[0]}#{folder}"
        asked = [judge(url, cache=tmp_path / "c.sqlite") for _ in range(3)]
        first = asked[0].version
        assert [asked[0].reply(several(1))[0].text, asked[1].reply(several(1))[0].text] == ["0", "0"]
        (folder / "model.safetensors").write_bytes(b"second")
        assert asked[2].version != first
        assert asked[2].reply(several(1))[0].text == "1"


def test_a_cache_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tries = itertools.count()

    def full(self: RequestCache, key: str, answer: Any) -> None:
        next(tries)
        raise OutputError("the disk is full.")

    with serving(always(Says(chat()))) as heard:
        asked = judge(heard.url, cache=tmp_path / "c.sqlite", concurrency=1)
        monkeypatch.setattr(RequestCache, "store", full)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert all(reply.text for reply in asked.reply(several(5)))
            assert all(reply.text for reply in asked.reply(several(5)))
        assert [str(one.message) for one in warned] == ["the disk is full. From here on no answer is kept."]
        assert next(tries) == 1


def test_a_cache_that_fails_later_is_done_without(tmp_path: Path) -> None:
    with serving(always(Says(chat()))) as heard:
        asked = judge(heard.url, cache=tmp_path / "c.sqlite")
        assert asked.reply(several(1))[0].text
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "c.sqlite").mkdir()
        assert all(reply.text for reply in asked.reply(several(3)))
        with pytest.raises(OutputError):  # at first use it is a wrong path
            judge(heard.url, cache=tmp_path / "c.sqlite").reply(several(1))


def test_a_slow_cache_does_not_hold_up_other_questions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(RequestCache, "store", lambda *_: time.sleep(0.4))
    with serving(always(Says(chat()))) as heard:
        asked = judge(heard.url, cache=tmp_path / "c.sqlite", concurrency=4)
        asked.reply(several(1))
        start = time.monotonic()
        asked.reply([Question(text=f"{k}!") for k in range(4)])
        assert time.monotonic() - start < 1.2  # of 1.6 one after the other


@pytest.mark.parametrize(
    "row",
    [
        *('{"foo": 1}', '{"text": 3, "problem": ""}', "[NaN, 2]", '["a", "b"]', "[]", "[5, 5]", "[0.5]"),
        *("[true, false]", "[0.9, 0.9]", "[-0.5, 1.5]", "3", "null", '{"text": "x"}', "[0.2, 0.3, 0.5]"),
    ],
)
def test_a_row_of_another_form_is_no_answer(row: str, tmp_path: Path) -> None:
    with serving(always(Says(chat("fine", logprobs=likely(Yes=math.log(0.75), No=math.log(0.25)))))) as heard:
        first = judge(heard.url, how="logprobs", cache=tmp_path / "c.sqlite")
        found = first.reply(several(1)), first.decide([RED])
        with sqlite3.connect(tmp_path / "c.sqlite") as db:
            db.execute("UPDATE answers_1 SET answer = ?", (row,))
        again = judge(heard.url, how="logprobs", cache=tmp_path / "c.sqlite")
        assert (again.reply(several(1)), again.decide([RED])) == found
        assert again.requests == 2


def _child(work: Any) -> int:
    """The exit code of a forked process that does this, -9 where it hangs."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return -9


def test_a_fork_in_the_middle_of_a_question_asks_on_its_own() -> None:
    def script(path: str, body: Any, count: int) -> Says:
        time.sleep(0.5 if count == 0 else 0)
        return Says({"data": [{"id": "m"}]} if body is None else chat())

    with serving(script) as heard:
        asked = judge(heard.url.partition("#")[0])  # the first question asks for the model's name, under a lock
        thread = threading.Thread(target=lambda: asked.reply(several(1)))
        thread.start()
        time.sleep(0.2)
        assert _child(lambda: asked.reply(several(1))[0].text) == 0
        thread.join(timeout=10)
    with serving(lambda path, body, count: Says(chat()) if count or time.sleep(0.5) is None else Says()) as heard:
        asked = judge(heard.url)
        thread = threading.Thread(target=lambda: asked.reply(several(1)))
        thread.start()
        time.sleep(0.2)
        assert _child(lambda: asked.reply(several(1))[0].text) == 0  # the very question that is under way
        thread.join(timeout=10)


def test_judges_and_their_rewards_are_copied_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(always(Says(chat()))) as heard:
        asked = judge(heard.url, key=SECRET, concurrency=3)
        asked.reply(several(1))
        assert copy.deepcopy(asked) is asked
        held = pickle.dumps(asked)
        assert SECRET.encode() not in held
        with pytest.raises(ConfigError, match="keys are not copied"):
            pickle.loads(held)
        monkeypatch.setenv("DIFFALIGN_JUDGE_KEY", "another")
        again = pickle.loads(held)
        assert (again._line.concurrency, again.options) == (3, asked.options)
        again.reply(several(1))
        assert heard.keys[-1] == "Bearer another"
        for name in ("editscore", "edit_r1", "pairwise", "unifiedreward"):
            reward = make_reward({name: {"judge": {"url": heard.url, "key": SECRET, "cache": False}}})
            version = reward.version
            same = copy.deepcopy(reward)
            assert same.backend is reward.backend
            assert SECRET.encode() not in pickle.dumps(reward)
            other = pickle.loads(pickle.dumps(reward))
            assert other.version == same.version == version
            assert other._lock is not reward._lock


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": wrong} for wrong in (-1.0, math.nan, True, "1", torch.tensor(0.5))),
        *({"top_p": 2.0}, {"top_p": 0}, {"top_k": -1}, {"top_k": 1.5}, {"max_tokens": 0}, {"max_tokens": 2.5}),
        *({"seed": 1.5}, {"seed": "3"}),
    ],
)
def test_a_question_whose_settings_make_no_sense_is_never_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a question has temperature"):
        Question(text="?", **wrong)


def test_what_cannot_be_sent_is_an_error_of_ours() -> None:
    with serving(always(Says(chat()))) as heard:
        for schema in ({"a": "\ud800"}, {"a": math.nan}, {"a": object()}):
            with pytest.raises(ConfigError, match="cannot be written as JSON"):
                judge(heard.url).reply([Question(text="?", schema=schema)])
        for picture, why in ((torch.rand(3, 0, 4), "shape"), (torch.zeros(3, 4, 4, dtype=torch.uint8), "uint8")):
            with pytest.raises(ConfigError, match=why):
                judge(heard.url).reply([Question(text="?", images=(picture,))])
        assert not heard.posts
