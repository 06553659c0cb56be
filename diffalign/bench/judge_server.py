"""How many questions a second a judge's server answers, one at a time and several at once, and what the cache saves."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from diffalign import world
from diffalign.errors import ConfigError, ModelError
from diffalign.intervals import bootstrap
from diffalign.judges.asking import Decision, Question
from diffalign.judges.endpoint import EndpointJudge

KINDS = ("reply", "decide")


@dataclass(frozen=True, kw_only=True)
class JudgeServerBench:
    """How much is asked."""

    at_once: tuple[int, ...] = (1, 2, 4, 8, 16)  # requests under way; the first is what the others are compared with
    questions: int = 32  # in each measurement
    rounds: int = 5  # each takes all of `at_once` in turn, in another order
    tokens: int = 32  # of a reply at most
    side: int = 64  # of the picture
    pictures: bool = True  # without them a server that batches text only can show it
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("questions", "rounds", "tokens", "side"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bench.{name} is {getattr(self, name)}, but it must be at least 1.")
        if not self.at_once or min(self.at_once) < 1 or len(set(self.at_once)) != len(self.at_once):
            raise ConfigError(f"bench.at_once is {self.at_once}, but it is different numbers of at least 1.")


def measure(
    url: str,
    config: JudgeServerBench | None = None,
    *,
    on_step: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> dict[str, Any]:
    """Requests per second and gains over one at a time, with intervals over rounds; `settings` are the judge's."""
    config = config or JudgeServerBench()
    kinds: dict[str, Sequence[Any]] = {"reply": _questions(config), "decide": _decisions(config)}
    found: dict[str, Any] = {"questions": config.questions, "rounds": config.rounds}
    for kind, asked in kinds.items():
        judges = {n: EndpointJudge(url, **{**settings, "concurrency": n, "cache": False}) for n in config.at_once}
        for judge in judges.values():
            _ask(judge, kind, asked[:1])  # connects, and learns what the server offers
        rates: dict[int, list[float]] = {n: [] for n in config.at_once}
        for k in range(config.rounds):
            on_step(f"{kind}, round {k + 1} of {config.rounds}")
            turn = k % len(config.at_once)
            for n in (*config.at_once[turn:], *config.at_once[:turn]):
                rates[n].append(_rate(judges[n], kind, asked))
        for judge in judges.values():
            judge.close()
        found[kind] = _summary(rates, config)
    on_step("the same run again")
    return found | {"repeated": repeated(url, config, **settings)}


def repeated(url: str, config: JudgeServerBench, **settings: Any) -> dict[str, Any]:
    """Requests of a run, and of the same run again by another judge with the same cache; `same` is if they agree."""
    requests, said = [], []
    with tempfile.TemporaryDirectory() as place:
        for _ in range(2):
            judge = EndpointJudge(url, **{**settings, "cache": Path(place) / "requests.sqlite"})
            said.append((_ask(judge, "reply", _questions(config)), _ask(judge, "decide", _decisions(config))))
            requests.append(judge.requests)
            judge.close()
    return {"first": requests[0], "again": requests[1], "same": said[0] == said[1]}


def _summary(rates: dict[int, list[float]], config: JudgeServerBench) -> dict[str, Any]:
    alone = rates[config.at_once[0]]
    gains = {n: [a / b for a, b in zip(found, alone, strict=True)] for n, found in rates.items()}
    return {
        str(n): {"per_second": fmean(rates[n]), "gain": bootstrap(gains[n], seed=config.seed).json()} for n in rates
    }


def _rate(judge: EndpointJudge, kind: str, asked: Sequence[Any]) -> float:
    start = time.perf_counter()
    _ask(judge, kind, asked)
    return len(asked) / (time.perf_counter() - start)


def _ask(judge: EndpointJudge, kind: str, asked: Sequence[Any]) -> list[Any]:
    """The answers; a rate over requests that failed would be no rate."""
    if kind == "decide":
        decided = judge.decide(asked)
        failed = list(judge.problems)[-1:] if None in decided else []
        answers: list[Any] = list(decided)
    else:
        replies = judge.reply(asked)
        failed = [reply.problem for reply in replies if not reply.text][:1]
        answers = [reply.text for reply in replies]
    if failed:
        raise ModelError(f"the server at {judge.url} does not answer all questions: {failed[0]}. Nothing was measured.")
    return answers


def _questions(config: JudgeServerBench) -> list[Question]:
    return [
        Question(text=f"{text} ({k})", images=images, max_tokens=config.tokens)
        for k, (text, images) in enumerate(_asked(config))
    ]


def _decisions(config: JudgeServerBench) -> list[Decision]:
    return [Decision(text=f"{text} ({k})", images=images) for k, (text, images) in enumerate(_asked(config))]


def _asked(config: JudgeServerBench) -> list[tuple[str, tuple[torch.Tensor, ...]]]:
    """Questions about pictures of noise; what is in them costs a server nothing."""
    prompts = [case.prompt for case in world.prompts("heldout")]
    generator = torch.Generator().manual_seed(config.seed)
    return [
        (
            f'Does the picture show "{prompts[k % len(prompts)]}"?',
            (torch.rand(3, config.side, config.side, generator=generator),) if config.pictures else (),
        )
        for k in range(config.questions)
    ]
