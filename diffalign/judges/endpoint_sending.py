"""How one question reaches a server and what it makes of the answer; it learns what the server takes and offers."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffalign.errors import ConfigError
from diffalign.judges import endpoint_forms as forms
from diffalign.judges.asking import Decision, Question
from diffalign.judges.endpoint_answer import Answer
from diffalign.judges.endpoint_line import Line
from diffalign.judges.endpoint_settings import KEYS, Refusals

CHAT, TYPED, MODELS = "/chat/completions", "/systemone", "/models"
NOT_OFFERED = (404, 405, 501)
REFUSED = (400, 422)
PINNED = "pinned to"  # `transformers serve` says so of a model that it does not serve
NO_MODEL = re.compile(
    r"not a valid model|invalid model|unknown model|no such model|model\b.{0,200}(not exist|not found)", re.I
)
NO_WAY = (
    "gives no probabilities: its chat completions come without log-probabilities (vLLM, SGLang and OpenAI give them), "
    "and it has no typed decisions at /v1/systemone (`transformers serve` has). Serve the model with one of these, or "
    "take a reward that reads replies."
)


class Refused(ConfigError):
    """Of the whole server, unless it has answered other questions; then `said` is the problem of one."""

    def __init__(self, text: str, said: str) -> None:
        super().__init__(text)
        self.said = said


@dataclass(frozen=True)
class Told:
    """What came of a question."""

    value: Any = None  # None where nothing did
    way: str = "reply"  # how a decision was found
    sound: bool = False  # whether it may be kept
    problem: str = ""
    lost: bool = False  # whether the next question would fare no better


class Sender:
    """Asks the questions of one judge; an error that no other question would escape is a ConfigError."""

    def __init__(self, line: Line, how: str) -> None:
        self.line = line
        self.way = None if how == "auto" else how  # where decisions come from, None until that is known
        self.news: deque[str] = deque()  # what the caller is to be warned of
        self._refusals, self._top = Refusals(), forms.TOPS[0]
        self._typed: bool | None = None  # whether the server has typed decisions
        self._decided = False  # whether one of them had an answer

    async def only_model(self) -> str:
        """The one model that the server lists."""
        answer = await self.line.get(MODELS)
        self._refuse(answer, "")
        listed = answer.content.get("data") if isinstance(answer.content, dict) else None
        rows = listed if isinstance(listed, list) else []
        names = [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]
        if len(names) == 1:
            return str(names[0])
        why = answer.problem or f"it lists {', '.join(map(repr, sorted(names))) or 'none'}"
        raise ConfigError(
            f"the server at {self.line.url} does not tell which model to ask: {why}. Name it after the address: "
            f"{self.line.url}#model. (`transformers serve` lists the hub's cache; its model is called as it was "
            "started, a folder by its path.)"
        )

    async def ask(self, model: str, question: Question, pictures: Sequence[forms.Picture]) -> Told:
        """The reply, as a mapping of its fields."""

        def body() -> dict[str, Any]:
            return forms.chat(model, question, pictures)

        if question.temperature > 0 and await self._has_types():
            # `transformers serve` has one source of randomness for all its requests, which each seed resets.
            async with self.line.alone():
                answer = await self._chat(model, lambda: forms.sampled_by_transformers(body()))
        else:
            answer = await self._chat(model, body)
        if answer.whole:
            return _lost(answer)
        reply = forms.read_text(answer.content, question.max_tokens)
        if reply.lost:
            return Told(problem=reply.problem)
        # A reply that was cut off is what the model says; another request would bring the same.
        sound = bool(reply.text) and (not reply.problem or reply.problem.startswith(forms.CUT))
        return Told({"text": reply.text, "problem": reply.problem}, sound=sound, problem=reply.problem)

    async def decide(self, model: str, decision: Decision, pictures: Sequence[forms.Picture]) -> Told:
        """The probabilities, as a tuple."""
        found = Told()
        if self.way in (None, "logprobs"):
            found = await self._by_logprobs(model, decision, pictures)
        if self.way in (None, "systemone") and not found.lost:
            found = await self._by_types(model, decision, pictures, found)
        return found

    async def _by_logprobs(self, model: str, decision: Decision, pictures: Sequence[forms.Picture]) -> Told:
        if self.way == "logprobs":
            forms.check_first(decision.labels)
        while True:
            top = self._top
            answer = await self._chat(model, partial(forms.first_token, model, decision, pictures, top))
            refused = answer.status in REFUSED and "logprobs" in answer.whole
            if not refused or top == forms.TOPS[-1]:
                break
            self._top = forms.TOPS[-1]
        if answer.whole and not refused:
            return _lost(answer)
        if refused or not forms.offers_logprobs(answer.content):
            said = answer.problem or f"the answer has no log-probabilities: {forms.shown(answer.content)}"
            offered = self.way == "logprobs" or not forms.is_chat(answer.content)
            return Told(problem=said if offered and not refused else "")
        forms.check_first(decision.labels)
        self.way = "logprobs"
        found = forms.read_logprobs(answer.content, decision.labels)
        said = f"the likely first tokens do not tell {', '.join(decision.labels)}: {forms.shown(answer.content)}"
        return Told(found, "logprobs", found is not None, "" if found else said)

    async def _by_types(self, model: str, decision: Decision, pictures: Sequence[forms.Picture], before: Told) -> Told:
        if len(pictures) > forms.MOST_TYPED:
            raise ConfigError(
                f"a decision has {len(pictures)} pictures, but typed decisions take {forms.MOST_TYPED}. Ask about "
                "fewer at once, or serve the model where log-probabilities are given (vLLM, SGLang)."
            )
        answer = await self.line.post(TYPED, lambda: forms.typed(model, decision, pictures))
        if answer.status in NOT_OFFERED and not self._decided:
            if before.problem:
                return before
            url = self.line.url
            hint = "" if url.endswith("/v1") else f" Or the address is to be {url}/v1."
            raise ConfigError(f"the server at {url} {NO_WAY}{hint}")
        self._refuse(answer, model)
        if answer.whole:
            return _lost(answer)
        found = forms.read_typed(answer.content, decision)
        self._decided |= found is not None
        self.way = self.way or ("systemone" if found else None)
        said = f"the answer is no typed decision: {forms.shown(answer.content)}"
        return Told(found, "systemone", found is not None, "" if found else said)

    async def _chat(self, model: str, make: Callable[[], Mapping[str, Any]]) -> Answer:
        """The answer to a chat completion, without the fields that the server refuses."""
        sent = set[str]()

        async def post(left: Sequence[str]) -> Answer:
            def body() -> dict[str, Any]:
                made = self._refusals.without(make())
                for name in left:
                    made = self._refusals.changed(made, name)
                sent.clear()
                sent.update(made)
                return made

            return await self.line.post(CHAT, body)

        tried, guessed = list[str](), list[str]()
        answer = await post(tried)
        while _over_a_field(answer):
            name, named = self._refusals.suspect(answer.whole, sent)
            if name is None:
                break
            tried.append(name)
            guessed += [] if named else [name]
            answer = await post(tried)
        if not answer.whole:
            for name in guessed if len(tried) > 1 else ():  # it may be innocent: another one had to go too
                fuller = await post(rest := [one for one in tried if one != name])
                tried, answer = (tried, answer) if fuller.whole else (rest, fuller)
        if not answer.whole and (learnt := set(tried) - self._refusals.known):
            self._refusals.known |= learnt
            self.news.append(f"the server at {self.line.url} refuses {', '.join(sorted(learnt))}; asked without.")
        self._refuse(answer, model)
        return answer

    async def _has_types(self) -> bool:
        if self._typed is None:
            answer = await self.line.get(TYPED)  # what only takes questions refuses to be read, if it is there
            if answer.status:
                self._typed = answer.status == 405
        return bool(self._typed)

    def _refuse(self, answer: Answer, model: str) -> None:
        """Raise what the user must mend."""
        url, said = self.line.url, answer.problem
        if answer.unreachable and not self.line.reached:
            raise ConfigError(
                f"nobody answers at {url} ({said}), so no question can be asked. Start the server, for example with "
                f"`transformers serve MODEL` or `vllm serve MODEL`, or correct the address."
            )
        if answer.status in (401, 403):
            told = f"the server at {url} refuses the key ({said}). Put the right one into ${KEYS[0]}, or give `key`."
            if answer.status == 401:
                raise ConfigError(told)
            raise Refused(told, said)  # some servers say so of a single question that they do not like
        if answer.status == 404 or _over_the_model(answer):
            raise Refused(
                f"the server at {url} does not know the model '{model}' or the address ({said}). The address ends in "
                f"/v1 for most servers, and {url}/models lists the models.",
                said,
            )


def _over_the_model(answer: Answer) -> bool:
    return answer.status in REFUSED and (PINNED in answer.whole or bool(NO_MODEL.search(answer.whole)))


def _over_a_field(answer: Answer) -> bool:
    return answer.status in REFUSED and not _over_the_model(answer)


def _lost(answer: Answer) -> Told:
    return Told(problem=answer.problem, lost=answer.again or not answer.status)
