"""What is sent, what it is kept as, and which settings are taken."""

from __future__ import annotations

import base64
import io
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffalign.errors import ConfigError
from diffalign.judges import endpoint_forms as forms
from diffalign.judges import endpoint_line
from diffalign.judges.asking import Decision, Question
from diffalign.judges.endpoint import EndpointJudge
from tests.judges.scripted import Says, chat, likely, serving

PICTURE = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "logprobs", "top_logprobs", "token", "logprob", "answers"]
            )
            | st.sampled_from(["decision", "noul", "probabilities", "Yes", "No", "0", "1", "finish_reason", "text"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_line, "FIRST_WAIT", 0.01)
    for name in ("DIFFALIGN_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def sent(question: Question, **settings: Any) -> Any:
    with serving(lambda path, body, count: Says(chat() if body else {"detail": "no"}, 200 if body else 404)) as heard:
        EndpointJudge(heard.url, cache=False, **settings).reply([question])
        return heard.posts[-1]


def shown(url: str) -> Image.Image:
    assert url.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_pictures_are_sent_as_png_without_loss_and_before_the_words() -> None:
    body = sent(Question(text="What?", images=(PICTURE, 1 - PICTURE), system="Be brief."))
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in user["content"]] == ["image_url", "image_url", "text"]
    found = shown(user["content"][0]["image_url"]["url"])
    levels = torch.tensor(list(found.getdata())).reshape(24, 32, 3).movedim(-1, 0)
    assert torch.equal(levels, (PICTURE * 255).round().long())


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 400))
def test_no_picture_has_more_pixels_than_allowed(height: int, width: int, most: int) -> None:
    made = forms.picture(torch.zeros(3, height, width), most).image
    assert made.width * made.height <= most or made.size == (width, height)
    assert made.width * made.height <= max(most, 1)
    if height * width <= most:
        assert made.size == (width, height)


def test_a_picture_keeps_its_shape_when_it_is_scaled_down() -> None:
    made = shown(
        sent(Question(text="?", images=(torch.rand(3, 64, 128),)), pixels=2048)["messages"][0]["content"][0][
            "image_url"
        ]["url"]
    )
    assert made.size == (64, 32)


def test_a_greedy_question_has_no_seed_and_a_sampled_one_all_settings() -> None:
    assert set(sent(Question(text="?"))) == {"model", "messages", "max_tokens", "temperature"}
    body = sent(Question(text="?", temperature=0.7, top_p=0.9, top_k=40, seed=5, max_tokens=9))
    assert {k: body[k] for k in ("temperature", "top_p", "top_k", "seed", "max_tokens")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 5,
        "max_tokens": 9,
    }
    assert sent(Question(text="?", temperature=0.7))["top_k"] == -1


def test_a_schema_holds_the_reply_to_it_where_the_server_can() -> None:
    schema = {"type": "object", "properties": {"score": {"type": "number"}}}
    asked = sent(Question(text="?", schema=schema))["response_format"]
    assert asked == {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}


@pytest.mark.parametrize(
    ("refused", "left"),
    [
        ("response_format is not supported", {"seed", "top_k", "top_p"}),
        ("Unrecognized request argument supplied: top_k", {"seed", "response_format", "top_p"}),
        ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", {"max_completion_tokens"}),
        ("temperature does not support 0.5", {"seed", "top_k"}),
    ],
)
def test_a_refused_field_is_left_out_and_that_is_told_once(refused: str, left: set[str]) -> None:
    name = next(n for n in ("response_format", "top_k", "max_tokens", "temperature") if n in refused)
    asked = Question(text="?", temperature=0.5, schema={"type": "object"}, max_tokens=7)

    def script(path: str, body: Any, count: int) -> Says:
        if body is None:
            return Says({}, 404)
        return Says({"error": {"message": refused}}, 400) if name in body else Says(chat())

    with serving(script) as heard:
        judge = EndpointJudge(heard.url, cache=False)
        with pytest.warns(UserWarning, match=f"refuses {name}; asked without"):
            assert judge.reply([asked])[0].text == "fine"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert judge.reply([asked])[0].text == "fine"
        assert len(heard.posts) == 3
        assert left <= set(heard.posts[-1])
        assert name not in heard.posts[-1]


def test_an_error_that_no_field_explains_teaches_nothing() -> None:
    with serving(lambda path, body, count: Says({"detail": "bad picture"}, 400) if body else Says({}, 404)) as heard:
        judge = EndpointJudge(heard.url, cache=False)
        asked = Question(text="?", temperature=0.5, schema={"type": "object"})
        assert "bad picture" in judge.reply([asked])[0].problem
        assert judge._sender._refusals.known == set()


def test_fewer_likely_tokens_are_asked_for_where_the_server_gives_few() -> None:
    def script(path: str, body: Any, count: int) -> Says:
        if body["top_logprobs"] > 5:
            return Says({"error": {"message": "top_logprobs must be at most 5"}}, 400)
        return Says(chat("Yes", logprobs=likely(Yes=math.log(0.75), No=math.log(0.25))))

    with serving(script) as heard:
        judge = EndpointJudge(heard.url, cache=False)
        assert judge.decide([Decision(text="?")])[0] == pytest.approx((0.75, 0.25))
        assert judge.decide([Decision(text="??")])[0] == pytest.approx((0.75, 0.25))
        assert [body["top_logprobs"] for body in heard.posts] == [20, 5, 5]
        assert heard.posts[0]["messages"][0]["content"][-1]["text"] == Decision(text="?").prompt


def test_typed_decisions_take_the_form_of_the_question() -> None:
    seen = [forms.picture(PICTURE, None)] * 2
    body = forms.typed("m", Decision(text="A picture-1?", images=(PICTURE,) * 2), seen)
    assert body["state"] == "<picture---1><picture---2>"  # a name that the words do not hold
    assert set(body["assets"]) == {"<picture---1>", "<picture---2>"}
    assert body["questions"] == {"decision": {"type": "noul", "instructions": "A picture-1?"}}
    levels = Decision(text="How?", labels=("1", "2", "3"), described=("bad", "so", "good"), ordered=True)
    assert forms.typed("m", levels, [])["questions"]["decision"]["criteria"] == ["bad", "so", "good"]
    choice = Decision(text="Which?", labels=("A", "B"))
    assert forms.typed("m", choice, [])["questions"]["decision"]["criteria"] == {"A": None, "B": None}
    assert forms.typed("m", choice, [])["state"] == "Which?"


@pytest.mark.parametrize(
    "answer",
    [
        {"noul": 1.5},
        {"noul": True},
        {"noul": "0.5"},
        {"noul": math.nan},
        {"noul": None},
        {"score": 0.5},
        {},
        None,
        [0.5],
    ],
)
def test_a_typed_answer_that_is_no_probability_decides_nothing(answer: Any) -> None:
    assert forms.read_typed({"answers": {"decision": answer}}, Decision(text="?")) is None


@pytest.mark.parametrize(
    "shares",
    [{"A": 0.5}, {"A": 0.5, "B": 0.5, "C": 0.0}, {"A": 0.9, "B": 0.9}, {"A": -0.5, "B": 1.5}, {"A": 1, "B": "0"}],
)
def test_typed_shares_that_do_not_add_up_decide_nothing(shares: Any) -> None:
    choice = Decision(text="?", labels=("A", "B"))
    assert forms.read_typed({"answers": {"decision": {"probabilities": shares}}}, choice) is None


@given(JSON)
def test_no_answer_makes_a_reader_raise_or_decide_what_is_no_probability(content: Any) -> None:
    for decision in (Decision(text="?"), Decision(text="?", labels=("A", "B", "C")), Decision(text="?", ordered=True)):
        found = [forms.read_logprobs(content, decision.labels), forms.read_typed(content, decision)]
        for shares in found:
            assert shares is None or (sum(shares) == pytest.approx(1) and all(0 <= p <= 1 for p in shares))
    reply = forms.read_text(content, 5)
    assert reply.text or reply.problem


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.floats(0.1, 1))
def test_shares_are_those_of_the_labels_mass(weights: list[float], mass: float) -> None:
    total = sum(weights)
    labels = [str(k) for k in range(len(weights))]
    top = likely(**{name: math.log(mass * w / total) for name, w in zip(labels, weights, strict=True)})
    found = forms.read_logprobs(chat("0", logprobs=top), labels)
    assert found == pytest.approx([w / total for w in weights])


def test_an_answer_is_kept_under_everything_it_depends_on(tmp_path: Path) -> None:
    asked = {"text": "?", "images": (PICTURE,), "temperature": 0.5}
    changes: list[dict[str, Any]] = [{}, {"text": "!"}, {"images": (1 - PICTURE,)}, {"images": ()}, {"seed": 1}]
    changes += [{"top_p": 0.5}, {"top_k": 3}, {"temperature": 0.6}, {"max_tokens": 3}, {"system": "x"}, {"schema": {}}]
    with serving(lambda path, body, count: Says(chat(str(count)) if body else {}, 200 if body else 404)) as heard:
        judge = EndpointJudge(heard.url, cache=tmp_path / "c.sqlite")
        rows = [Question(**{**asked, **change}) for change in changes]
        found = judge.reply(rows)
        assert len({reply.text for reply in found}) == len(rows) == judge.requests
        assert judge.reply([Question(**{**asked, **change}) for change in changes]) == found
        assert judge.requests == len(rows)
        other = EndpointJudge(heard.url.replace("judge", "other"), cache=tmp_path / "c.sqlite")
        other.reply(rows[:1])
        assert other.requests == 1
        small = EndpointJudge(heard.url, cache=tmp_path / "c.sqlite", pixels=64)
        small.reply(rows[:1])
        assert small.requests == 1
        greedy = [Question(text="?", seed=seed) for seed in range(3)]  # a seed changes nothing there
        before = judge.requests
        assert len({reply.text for reply in judge.reply(greedy)}) == 1
        assert judge.requests == before + 1


def test_answers_in_the_file_are_readable_text(tmp_path: Path) -> None:
    import sqlite3

    with serving(lambda path, body, count: Says(chat("grün"))) as heard:
        EndpointJudge(heard.url, cache=tmp_path / "c.sqlite").reply([Question(text="?")])
    with sqlite3.connect(tmp_path / "c.sqlite") as db:
        ((answer,),) = db.execute("SELECT answer FROM answers_1").fetchall()
    assert json.loads(answer) == {"text": "grün", "problem": ""}


def test_a_picture_that_is_not_finite_is_not_sent() -> None:
    with serving(lambda path, body, count: Says(chat())) as heard:
        judge = EndpointJudge(heard.url, cache=False)
        replies = judge.reply([Question(text="?", images=(PICTURE * math.nan,)), Question(text="?")])
        assert [reply.problem for reply in replies] == ["a picture holds NaN or infinity", ""]
        assert len(heard.posts) == 1


def test_too_many_pictures_and_wrong_labels_are_errors() -> None:
    judge = EndpointJudge("http://127.0.0.1:1/v1#m", cache=False, most_images=2)
    with pytest.raises(ConfigError, match="has 3 pictures, and the judge 'm' takes 2"):
        judge.reply([Question(text="?", images=(PICTURE,) * 3)])
    with pytest.raises(ConfigError, match=r"shape \(24, 32\)"):
        judge.reply([Question(text="?", images=(PICTURE[0],))])
    for labels, described in (((), ()), (("A",), ()), (("A", "A"), ()), (("A", "B"), ("x",))):
        with pytest.raises(ConfigError, match="labels are two or more"):
            judge.decide([Decision(text="?", labels=labels, described=described)])
    assert judge.reply([]) == []
    assert judge.decide([]) == []
