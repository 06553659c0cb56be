"""The embedded judge behind a real `transformers serve`: it says what it says in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffalign import zoo
from diffalign.judges.asking import Decision, Question
from diffalign.judges.endpoint import EndpointJudge
from diffalign.judges.local import LocalJudge
from diffalign.judges.wording import BETTER, FIRST, LEVELS, POINTS, SECOND, TELL, fill
from diffalign.scoring import make_reward, score
from diffalign.zoo.vlm_measure import attempts, questions
from tests.judges.server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(zoo.folder("shapes-vlm"), tmp_path_factory.mktemp("served") / "log") as started:
        yield started


@pytest.fixture(scope="module")
def both(server: Server) -> tuple[LocalJudge, EndpointJudge]:
    return LocalJudge(str(zoo.folder("shapes-vlm"))), EndpointJudge(server.url, cache=False)


def test_decisions_are_the_same(both: tuple[LocalJudge, EndpointJudge]) -> None:
    asked = questions(12, 3)
    images = [one.image for one in asked]
    prompt, pair = "a red circle", (FIRST, SECOND)
    decisions = [
        *(Decision(text=one.question, images=(one.image,)) for one in asked),
        Decision(text=fill(POINTS, prompt=prompt), images=(images[0],), labels=tuple("ABCDE"), described=LEVELS),
        Decision(text=fill(BETTER, prompt=prompt), images=tuple(images[:2]), labels=("A", "B"), described=pair),
    ]
    here, there = (judge.decide(decisions) for judge in both)
    for one, other in zip(here, there, strict=True):
        assert one is not None
        assert other == pytest.approx(one, abs=1e-3)  # pictures go there in 8 bits


def test_what_it_tells_is_the_same(both: tuple[LocalJudge, EndpointJudge]) -> None:
    told = [Question(text=TELL, images=(one.image,), max_tokens=60) for one in questions(6, 4)]
    here, there = ([reply.text for reply in judge.reply(told)] for judge in both)
    assert here == there


def test_edits_are_scored_through_the_server_and_a_second_run_asks_nothing(server: Server, tmp_path: Path) -> None:
    tried = attempts(6, 5)
    media, cases = torch.stack([one.media for one in tried]), [one.case for one in tried]
    scores, requests = [], []
    for _ in range(2):
        judge = EndpointJudge(server.url, cache=tmp_path / "requests.sqlite")
        scores.append(score(make_reward({"editscore": {"judge": judge}}), media, cases).total)
        requests.append(judge.requests)
    assert requests[0] >= 12
    assert requests[1] == 0
    assert torch.equal(*scores)
