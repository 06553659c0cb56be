"""Where the server is, which model, which key, and which settings are taken."""

from __future__ import annotations

import math
from typing import Any

import pytest

from diffalign.errors import ConfigError
from diffalign.judges.asking import Question
from diffalign.judges.endpoint import EndpointJudge
from diffalign.judges.endpoint_settings import find_address
from tests.judges.scripted import Says, chat, serving


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIFFALIGN_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_name_the_only_model_is_taken() -> None:
    def script(path: str, body: Any, count: int) -> Says:
        return Says(chat(body["model"])) if body else Says({"object": "list", "data": [{"id": "only/one"}]})

    with serving(script) as heard:
        judge = EndpointJudge(heard.url.partition("#")[0], cache=False)
        assert judge.reply([Question(text="?")])[0].text == "only/one"
        assert judge.version == "endpoint only/one"
        assert heard.paths == ["/v1/models", "/v1/chat/completions"]


@pytest.mark.parametrize("listed", [[], [{"id": "a"}, {"id": "b"}], "no", None])
def test_without_a_name_several_or_no_models_are_an_error_that_lists_them(listed: Any) -> None:
    with (
        serving(lambda path, body, count: Says({"data": listed})) as heard,
        pytest.raises(
            ConfigError, match="'a', 'b'.*#model" if listed and len(listed) > 1 and listed != "no" else "none"
        ),
    ):
        EndpointJudge(heard.url.partition("#")[0], cache=False).reply([Question(text="?")])


def test_a_given_name_is_not_asked_for() -> None:
    judge = EndpointJudge("http://127.0.0.1:1/v1/#org/model", cache=False)
    assert judge.version == "endpoint org/model"
    assert judge.options == {"url": "http://127.0.0.1:1/v1", "model": "org/model", "pixels": 512 * 512, "how": "auto"}


def test_the_key_is_given_or_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_address("http://h/v1", None, None).key == "none"
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    assert find_address("http://h/v1", None, None).key == "second"
    monkeypatch.setenv("DIFFALIGN_JUDGE_KEY", "first")
    assert find_address("http://h/v1", None, None).key == "first"
    assert find_address("http://h/v1", None, "mine").key == "mine"
    assert "mine" not in repr(find_address("http://h/v1", None, "mine"))


@pytest.mark.parametrize(
    "url",
    ["", "h:8000", "ftp://h/v1", "http://", "http:///v1", "http://h:port/v1", "http://h:99999/v1", "http://a b/v1"],
)
def test_what_is_no_address_is_an_error(url: str) -> None:
    with pytest.raises(ConfigError, match="no address of a server"):
        EndpointJudge(url, cache=False)


def test_secrets_do_not_belong_into_the_address() -> None:
    for url in ("http://me:secret@h/v1#m", "http://h/v1?key=secret#m"):
        with pytest.raises(ConfigError, match="DIFFALIGN_JUDGE_KEY") as told:
            EndpointJudge(url, cache=False)
        assert "secret" not in str(told.value)
    with pytest.raises(ConfigError, match="characters that no key has") as told:
        EndpointJudge("http://h/v1#m", key="two\nlines", cache=False)
    assert "lines\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("concurrency", 0),
        ("concurrency", True),
        ("retries", -1),
        ("retries", 1.5),
        ("timeout", 0),
        ("timeout", math.inf),
        ("timeout", "5"),
        ("pixels", 0),
        ("most_images", 0),
        ("how", "guess"),
    ],
)
def test_settings_that_make_no_sense_are_errors_that_name_them(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} of the judge is {value!r}"):
        EndpointJudge("http://h/v1#m", cache=False, **{name: value})


def test_two_names_for_the_model_are_an_error() -> None:
    with pytest.raises(ConfigError, match="names the model 'a', and `model` is 'b'"):
        EndpointJudge("http://h/v1#a", "b", cache=False)
