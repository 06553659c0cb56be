"""A judge on a server that speaks the protocol of OpenAI: vLLM, SGLang, `transformers serve` and others.

Replies are chat completions. Decisions are read off the log-probabilities of the first token where the server gives
them (vLLM, SGLang), else they are typed decisions (`transformers serve`). An error of the server is never a number.
"""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.judges import endpoint_forms as forms
from diffalign.judges.asking import Decision, Question, Reply
from diffalign.judges.endpoint_line import Line
from diffalign.judges.endpoint_sending import Sender, Told
from diffalign.judges.endpoint_settings import WAYS, check_settings, find_address
from diffalign.judges.request_cache import RequestCache, default_path, key_of

NOT_FINITE = Told(problem="a picture holds NaN or infinity")
NOBODY = Told(problem="not asked: the server did not answer the first question")


@dataclass(frozen=True)
class _Asked:
    """A question: what its answer is kept as, by the way it is found, and how it is sent."""

    keys: dict[str, str]
    send: Callable[[], Awaitable[Told]]


@dataclass
class _Going:
    """A request that several may wait for."""

    task: asyncio.Task[Told]
    waiting: int = 0


class EndpointJudge:
    """`url` may name the model, as in `http://127.0.0.1:8000/v1#model`; without one it is the only one served.

    The key is `key`, or $DIFFALIGN_JUDGE_KEY, or $OPENAI_API_KEY. `how` picks where decisions come from. `cache` is
    the file that answers are kept in, or false. `requests` counts what was sent, `answered` what the cache knew.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        key: str | None = None,
        *,
        concurrency: int = 8,  # requests at once, over all threads
        retries: int = 4,  # more tries, with growing pauses
        timeout: float = 120.0,  # seconds for one answer
        pixels: int | None = 512 * 512,  # of a picture at most; larger ones are scaled down
        most_images: int = 8,  # in one question
        how: str = "auto",  # or logprobs, systemone
        cache: str | Path | bool = True,
    ) -> None:
        counts = {"concurrency": concurrency, "retries": retries, "pixels": pixels, "most_images": most_images}
        check_settings(counts, timeout, how)
        address = find_address(url, model, key)
        self.url, self.pixels, self.most_images, self.how = address.url, pixels, most_images, how
        self.name = address.model or address.url
        self.cache = RequestCache(default_path() if cache is True else cache or None)
        self.answered = 0
        self.problems: deque[str] = deque(maxlen=64)  # why decisions have no answer, the latest last
        self._model, self._named = address.model, address.model
        self._line = Line(address.url, address.key, concurrency=concurrency, retries=retries, timeout=timeout)
        self._sender = Sender(self._line, how)
        self._going: dict[str, _Going] = {}
        self._lock, self._counting = threading.Lock(), threading.Lock()

    @property
    def requests(self) -> int:
        """Questions sent, second tries included."""
        return self._line.requests

    @property
    def model(self) -> str:
        """The model that is asked, as the server calls it."""
        with self._lock:
            if self._model is None:
                self._model = self._line.run(self._sender.only_model)
            return self._model

    @property
    def version(self) -> str:
        """The model alone: the same one behind another address is the same judge."""
        return f"endpoint {self.model}"

    @property
    def options(self) -> dict[str, Any]:
        """What makes one judge with this model another."""
        return {"url": self.url, "model": self._named, "pixels": self.pixels, "how": self.how}

    def reply(self, questions: Sequence[Question]) -> list[Reply]:
        """One text per question; a request that failed for good has a problem."""
        found = self._answers(list(map(self._question, questions, self._pictures(questions))))
        return [Reply(problem=one.problem) if one.value is None else Reply(**one.value) for one in found]

    def decide(self, decisions: Sequence[Decision]) -> list[tuple[float, ...] | None]:
        """Probabilities of the labels; None where a request failed for good, which `problems` explains."""
        for decision in decisions:
            _check_labels(decision)
        found = self._answers(list(map(self._decision, decisions, self._pictures(decisions))), choosing=True)
        missing = [one.problem for one in found if one.value is None]
        self.problems.extend(missing)
        if missing:
            warnings.warn(
                f"{len(missing)} of {len(found)} decisions of '{self.name}' have no answer: {missing[0]}", stacklevel=2
            )
        return [None if one.value is None else tuple(one.value) for one in found]

    def close(self) -> None:
        """End the thread that talks to the server; another question starts it again."""
        self._line.close()

    def _question(self, question: Question, pictures: Sequence[forms.Picture] | None) -> _Asked | None:
        if pictures is None:
            return None
        told: dict[str, Any] = {"temperature": question.temperature, "max_tokens": question.max_tokens}
        if question.temperature > 0:
            told |= {"top_p": question.top_p, "top_k": question.top_k, "seed": question.seed}
        told |= {"text": question.text, "system": question.system, "schema": question.schema}
        told |= {"images": [one.told for one in pictures], "model": self.model, "ask": "reply"}
        return _Asked({"reply": key_of(told)}, lambda: self._sender.ask(self.model, question, pictures))

    def _decision(self, decision: Decision, pictures: Sequence[forms.Picture] | None) -> _Asked | None:
        if pictures is None:
            return None
        told: dict[str, Any] = {"text": decision.text, "labels": decision.labels, "described": decision.described}
        told |= {"ordered": decision.ordered, "images": [one.told for one in pictures], "model": self.model}
        ways = [way for way in WAYS if self._sender.way in (None, way)]
        keys = {way: key_of({"ask": way, **told}) for way in ways}
        return _Asked(keys, lambda: self._sender.decide(self.model, decision, pictures))

    def _pictures(self, asked: Sequence[Question] | Sequence[Decision]) -> list[list[forms.Picture] | None]:
        """The pictures of each question as they are sent, None where one is not finite."""
        known: dict[int, forms.Picture] = {}
        found: list[list[forms.Picture] | None] = []
        for one in asked:
            if len(one.images) > self.most_images:
                raise ConfigError(
                    f"a question has {len(one.images)} pictures, and the judge '{self.name}' takes "
                    f"{self.most_images}. Ask about fewer at once, or raise `most_images`."
                )
            sound = all(bool(image.isfinite().all()) for image in one.images)
            for image in one.images if sound else ():
                if id(image) not in known:
                    known[id(image)] = forms.picture(_checked(image), self.pixels)
            found.append([known[id(image)] for image in one.images] if sound else None)
        return found

    def _answers(self, asked: Sequence[_Asked | None], *, choosing: bool = False) -> list[Told]:
        """From the cache, else from the server; `choosing` is whether the first answer may decide how to ask."""
        kept = self.cache.lookup([key for one in asked if one for key in one.keys.values()])
        found = [NOT_FINITE if one is None else _known(one, kept) for one in asked]
        rows = [k for k, told in enumerate(found) if told is None]
        missing = [one for k in rows if (one := asked[k]) is not None]
        self._count(sum(told is not None and told is not NOT_FINITE for told in found))
        if missing:
            try:
                came = self._line.run(lambda: self._sent(missing, choosing))
            finally:
                while self._sender.news:
                    warnings.warn(self._sender.news.popleft(), stacklevel=3)
            for k, told in zip(rows, came, strict=True):
                found[k] = told
        return [told or NOBODY for told in found]

    async def _sent(self, asked: Sequence[_Asked], choosing: bool) -> list[Told]:
        rest, found = list(asked), list[Told]()
        while choosing and self._sender.way is None and rest:
            found.append(await self._shared(rest.pop(0)))
            if found[-1].lost:
                return [*found, *[NOBODY] * len(rest)]
        tasks = [asyncio.ensure_future(self._shared(one)) for one in rest]
        try:
            return [*found, *await asyncio.gather(*tasks)]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _shared(self, one: _Asked) -> Told:
        """The answer to a question; two who ask the same at once wait for one request."""
        key = next(iter(one.keys.values()))
        going = self._going.get(key)
        if going is None:
            if known := _known(one, self.cache.lookup(list(one.keys.values()))):  # it came in the meantime
                self._count(1)
                return known
            going = self._going[key] = _Going(asyncio.ensure_future(self._kept(one)))
        else:
            self._count(1)
        going.waiting += 1
        try:
            return await asyncio.shield(going.task)
        finally:
            going.waiting -= 1
            if not going.waiting:
                going.task.cancel()
                if self._going.get(key) is going:
                    del self._going[key]

    def _count(self, answered: int) -> None:
        with self._counting:
            self.answered += answered

    async def _kept(self, one: _Asked) -> Told:
        told = await one.send()
        if told.sound and told.way in one.keys:
            self.cache.store(one.keys[told.way], told.value)
        return told


def _known(one: _Asked, kept: dict[str, Any]) -> Told | None:
    """The answer that is kept, if it has the form that was asked for."""
    for way, key in one.keys.items():
        value = kept.get(key)
        if isinstance(value, dict) if way == "reply" else isinstance(value, list):
            return Told(value, way)
    return None


def _checked(image: Tensor) -> Tensor:
    if image.ndim != 3 or image.shape[0] != 3:
        raise ConfigError(f"a picture has the shape {tuple(image.shape)}, but a judge takes (3, H, W).")
    return image


def _check_labels(decision: Decision) -> None:
    labels, described = decision.labels, decision.described
    if len(set(labels)) < 2 or len(set(labels)) != len(labels) or len(described) not in (0, len(labels)):
        raise ConfigError(
            f"a decision has the labels {', '.join(map(repr, labels))} and {len(described)} descriptions, but labels "
            "are two or more, all different, with one description each or none."
        )
