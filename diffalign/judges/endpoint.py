"""A judge on a server that speaks the protocol of OpenAI: vLLM, SGLang, `transformers serve` and others.

Replies are chat completions. Decisions are read off the log-probabilities of the first token where the server gives
them (vLLM, SGLang), else they are typed decisions (`transformers serve`). An error of the server is never a number.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.errors import ConfigError, OutputError
from diffalign.judges import endpoint_forms as forms
from diffalign.judges.asking import Decision, Question, Reply
from diffalign.judges.batching import require_few
from diffalign.judges.endpoint_line import Line
from diffalign.judges.endpoint_sending import Sender
from diffalign.judges.endpoint_settings import KEYS, WAYS, check_settings, find_address
from diffalign.judges.endpoint_sharing import Asked, Sharing
from diffalign.judges.forking import Shared, renewed_in_forks
from diffalign.judges.opening import version_of
from diffalign.judges.request_cache import RequestCache, default_path, key_of


class EndpointJudge(Shared):
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
        self._settings = {name: value for name, value in locals().items() if name not in ("self", "key")}
        counts = {"concurrency": concurrency, "retries": retries, "pixels": pixels, "most_images": most_images}
        check_settings(counts, timeout, how)
        address = find_address(url, model, key)
        self.url, self.pixels, self.most_images, self.how = address.url, pixels, most_images, how
        self.name = address.model or address.url
        self.cache = _opened(cache)
        self._had_key = key is not None
        self.problems: deque[str] = deque(maxlen=64)  # why decisions have no answer, the latest last
        self._model, self._named = address.model, address.model
        self._line = Line(address.url, address.key, concurrency=concurrency, retries=retries, timeout=timeout)
        self._sender = Sender(self._line, how)
        self._sharing = Sharing(self._line, self._sender, self.cache)
        self._renew()
        renewed_in_forks(self)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return _again, (self._settings, self._had_key)

    @property
    def requests(self) -> int:
        """Questions sent, second tries included."""
        return self._line.requests

    @property
    def answered(self) -> int:
        """Questions that needed none."""
        return self._sharing.answered

    @property
    def model(self) -> str:
        """The model that is asked, as the server calls it."""
        with self._lock:
            if self._model is None:
                self._model = self._line.run(self._sender.only_model)
            return self._model

    @property
    def version(self) -> str:
        """The model alone, and the weights of a folder: the same one behind another address is the same judge."""
        return f"endpoint {' '.join(self._who())}"

    @property
    def options(self) -> dict[str, Any]:
        """What makes one judge with this model another."""
        return {"url": self.url, "model": self._named, "pixels": self.pixels, "how": self.how}

    def reply(self, questions: Sequence[Question]) -> list[Reply]:
        """One text per question; a request that failed for good has a problem."""
        asked = list(zip(questions, self._pictures(questions), strict=True))
        who = self._who() if asked else []
        found = self._sharing.answers([None if seen is None else self._question(one, seen, who) for one, seen in asked])
        self._warn("questions", [one.problem for one in found if one.value is None], len(found))
        return [
            Reply(problem=one.problem, lost=True)
            if one.value is None
            else Reply(text=one.value["text"], problem=one.value["problem"])
            for one in found
        ]

    def decide(self, decisions: Sequence[Decision]) -> list[tuple[float, ...] | None]:
        """Probabilities of the labels; None where a request failed for good, which `problems` explains."""
        for decision in decisions:
            _check_labels(decision)
        asked = list(zip(decisions, self._pictures(decisions), strict=True))
        who = self._who() if asked else []
        found = self._sharing.answers(
            [None if seen is None else self._decision(one, seen, who) for one, seen in asked], choosing=True
        )
        missing = [one.problem for one in found if one.value is None]
        self.problems.extend(missing)
        self._warn("decisions", missing, len(found))
        return [None if one.value is None else tuple(one.value) for one in found]

    def close(self) -> None:
        """End the thread that talks to the server; another question starts it again."""
        self._line.close()

    def _warn(self, what: str, missing: Sequence[str], count: int) -> None:
        if missing:
            warnings.warn(
                f"{len(missing)} of {count} {what} of '{self.name}' have no answer: {missing[0]}", stacklevel=3
            )

    def _who(self) -> list[str]:
        """What tells the model from others: its name, and the content of a folder that is here."""
        folder = Path(self.model).expanduser()
        here = (folder / "config.json").is_file()
        return [self.model, version_of(folder, self.model)] if here else [self.model]

    def _question(self, question: Question, pictures: Sequence[forms.Picture], who: Sequence[str]) -> Asked:
        told: dict[str, Any] = {"temperature": question.temperature, "max_tokens": question.max_tokens}
        if question.temperature > 0:
            told |= {"top_p": question.top_p, "top_k": question.top_k, "seed": question.seed % 2**63}
        told |= {"text": question.text, "system": question.system, "schema": question.schema}
        told |= {"images": [one.told for one in pictures], "model": _key(who), "ask": "reply"}
        return Asked({"reply": key_of(told)}, 0, lambda: self._sender.ask(self.model, question, pictures))

    def _decision(self, decision: Decision, pictures: Sequence[forms.Picture], who: Sequence[str]) -> Asked:
        told: dict[str, Any] = {"text": decision.text, "labels": decision.labels, "described": decision.described}
        told |= {"ordered": decision.ordered, "images": [one.told for one in pictures], "model": _key(who)}
        ways = [way for way in WAYS if self._sender.way in (None, way)]
        if "logprobs" in ways and forms.clashing(decision.labels):
            ways.remove("logprobs")
            if not ways:
                forms.check_first(decision.labels)
        keys = {way: key_of({"ask": way, **told}) for way in ways}
        return Asked(keys, len(decision.labels), lambda: self._sender.decide(self.model, decision, pictures))

    def _pictures(self, asked: Sequence[Question] | Sequence[Decision]) -> list[list[forms.Picture] | None]:
        """The pictures of each question as they are sent, None where one is not finite."""
        known: dict[int, forms.Picture] = {}
        found: list[list[forms.Picture] | None] = []
        for one in asked:
            require_few(one.images, self.name, self.most_images)
            sound = all(bool(image.isfinite().all()) for image in one.images)
            for image in one.images if sound else ():
                if id(image) not in known:
                    known[id(image)] = forms.picture(_checked(image), self.pixels)
            found.append([known[id(image)] for image in one.images] if sound else None)
        return found


def _again(settings: dict[str, Any], had_key: bool) -> EndpointJudge:
    """The judge in another process; its key does not travel."""
    if had_key and not any(os.environ.get(name) for name in KEYS):
        raise ConfigError(
            f"the judge at {settings['url']} was given a key, and keys are not copied between processes. Put it into "
            f"${KEYS[0]} instead."
        )
    return EndpointJudge(**settings)


def _opened(cache: str | Path | bool) -> RequestCache:
    if cache is not True:
        return RequestCache(cache or None)
    try:
        return RequestCache(default_path())
    except OutputError as e:  # of a place that nobody asked for
        warnings.warn(f"{e} Without it no answer is kept.", stacklevel=3)
        return RequestCache(None)


def _key(who: Sequence[str]) -> Any:
    return who[0] if len(who) == 1 else who


def _checked(image: Tensor) -> Tensor:
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ConfigError(f"a picture has the shape {tuple(image.shape)}, but a judge takes (3, H, W).")
    if not image.is_floating_point():
        raise ConfigError(f"a picture is of {image.dtype}, but a judge takes floats from 0 to 1. Divide it by 255.")
    return image


def _check_labels(decision: Decision) -> None:
    labels, described = decision.labels, decision.described
    if len(set(labels)) < 2 or len(set(labels)) != len(labels) or len(described) not in (0, len(labels)):
        raise ConfigError(
            f"a decision has the labels {', '.join(map(repr, labels))} and {len(described)} descriptions, but labels "
            "are two or more, all different, with one description each or none."
        )
