"""The endpoint backend against a real `transformers serve` with a tiny random judge."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import ConfigError
from diffalign.judges import endpoint_line
from diffalign.judges.asking import Backend, Decision, Question
from diffalign.judges.endpoint import EndpointJudge
from diffalign.judges.local import LocalJudge
from tests.judges import tiny_judges
from tests.judges.server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("served")
    with Server(tiny_judges.folder(place / "judge", kind="internvl"), place / "log") as started:
        yield started


@pytest.fixture(autouse=True)
def _swift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_line, "FIRST_WAIT", 0.01)


def judge(server: Server, **settings: Any) -> EndpointJudge:
    return EndpointJudge(server.url, **{"cache": False, "retries": 1, "timeout": 30.0, **settings})


def picture(seed: int = 0, side: int = 16) -> torch.Tensor:
    return torch.rand(3, side, 16, generator=torch.Generator().manual_seed(seed))


def questions(count: int, **more: Any) -> list[Question]:
    return [Question(text=f"What is in picture {k}?", images=(picture(k),), max_tokens=8, **more) for k in range(count)]


DECISIONS = [
    Decision(text="Is it red?", images=(picture(),)),
    Decision(text="Is it red?", images=(picture(),), labels=("No", "Yes"), described=("it is not", "it is")),
    Decision(text="Which?", images=(picture(), picture(1)), labels=("A", "B", "C"), described=("x", "y", "z")),
    Decision(text="How red?", images=(picture(),), labels=("1", "2", "3", "4", "5"), ordered=True),
    Decision(text="Is red a colour?"),
]


@pytest.mark.slow
def test_greedy_replies_are_those_of_the_model_in_this_process(server: Server) -> None:
    asked = judge(server)
    assert isinstance(asked, Backend)
    local = LocalJudge(str(server.model))
    two = Question(text="Which is better?", images=(picture(1), picture(2, 20)), system="Be brief.", max_tokens=8)
    found = asked.reply([*questions(3), two])
    assert found == local.reply([*questions(3), two])
    assert all(reply.text for reply in found)


def test_decisions_are_probabilities(server: Server) -> None:
    asked = judge(server)
    found = asked.decide(DECISIONS)
    for decision, shares in zip(DECISIONS, found, strict=True):
        assert shares is not None
        assert len(shares) == len(decision.labels)
        assert sum(shares) == pytest.approx(1)
        assert all(0 < share < 1 for share in shares)
    assert asked.requests == len(DECISIONS) + 1  # the first one also asked for log-probabilities
    assert judge(server, how="systemone").decide(DECISIONS) == found


def test_log_probabilities_that_are_not_offered_decide_nothing(server: Server) -> None:
    asked = judge(server, how="logprobs")
    with pytest.warns(UserWarning, match="no log-probabilities"):
        assert asked.decide(DECISIONS[:2]) == [None, None]


def test_a_repeated_run_makes_no_request(server: Server, tmp_path: Path) -> None:
    asked = [*questions(4), *questions(2, temperature=0.7, seed=3)]
    first = judge(server, cache=tmp_path / "c.sqlite")
    found = first.reply(asked), first.decide(DECISIONS)
    assert (first.answered, len(first.cache)) == (0, len(asked) + len(DECISIONS))
    again = EndpointJudge(f"http://127.0.0.1:1/v1#{server.model}", cache=tmp_path / "c.sqlite")  # nobody is there
    assert (again.reply(asked), again.decide(DECISIONS)) == found
    assert (again.requests, again.answered) == (0, len(asked) + len(DECISIONS))


def test_samples_repeat_with_their_seed_whatever_is_asked_beside_them(server: Server) -> None:
    first, second = (replace(questions(1)[0], temperature=1.0, seed=seed) for seed in (1, 2))
    asked = judge(server, concurrency=8)
    beside = questions(6)
    together = asked.reply([*beside[:3], first, second, *beside[3:]])[3:5]
    assert together == asked.reply([second, first])[::-1]
    assert together[0].text != together[1].text
    assert asked.reply([replace(first, top_k=1)]) == asked.reply(questions(1))  # the likeliest token alone is greedy


def test_fields_that_the_server_does_not_know_are_left_out(server: Server) -> None:
    asked = judge(server)
    asked._sender._typed = False  # as if it were another server
    sampled = replace(questions(1)[0], temperature=0.7, schema={"type": "object"})
    with pytest.warns(UserWarning, match=r"refuses top_k; asked without"):
        assert asked.reply([sampled])[0].text
    sent = asked.requests
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked.reply([sampled])
    assert asked.requests == sent + 1


def test_a_model_that_is_not_served_is_an_error(server: Server) -> None:
    address = server.url.partition("#")[0]
    with pytest.raises(ConfigError, match="does not know the model '/no/such'"):
        EndpointJudge(address, "/no/such", cache=False).reply(questions(1))


def test_a_server_too_slow_is_a_problem_and_not_a_number(server: Server) -> None:
    asked = judge(server, timeout=0.001, retries=0)
    assert all("no answer within 0.001 s" in reply.problem for reply in asked.reply(questions(3)))
    with pytest.warns(UserWarning, match="no answer within"):
        assert judge(server, timeout=0.001, retries=0, how="systemone").decide(DECISIONS[:2]) == [None, None]
    assert judge(server).reply(questions(1))[0].text  # and it still answers those with patience


def test_two_clients_at_once_get_what_each_would_alone(server: Server) -> None:
    local = LocalJudge(str(server.model)).reply(questions(6))
    found: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: judge(server).reply(questions(6))})) for n in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == {"a": local, "b": local}


def test_a_server_killed_mid_run_costs_what_was_under_way_and_a_restarted_one_finishes(
    server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "c.sqlite"
    asked = judge(server, concurrency=20, cache=path)
    asked.reply(questions(1))
    rows = [replace(question, max_tokens=24) for question in questions(20)]
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(asked.reply(rows)))
    thread.start()
    deadline = time.monotonic() + 30
    while len(asked.cache) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    server.kill()
    thread.join(timeout=15)
    assert not thread.is_alive()
    done = [reply for reply in found if reply.text]
    assert 3 <= len(done) < 20
    assert all(reply.problem and not reply.text for reply in found if reply not in done)
    assert len(asked.cache) == len(done) + 1

    server.start()
    again = judge(server, cache=path)
    finished = again.reply(rows)
    assert again.requests == 20 - len(done)
    assert again.answered == len(done)
    assert finished == LocalJudge(str(server.model)).reply(rows)
    assert [old for old in found if old.text] == [new for old, new in zip(found, finished, strict=True) if old.text]
