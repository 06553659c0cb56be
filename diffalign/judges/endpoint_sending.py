"""How one question reaches a server and what it makes of the answer; it learns what the server takes and offers."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffalign.errors import ConfigError
from diffalign.judges import endpoint_forms as forms
from diffalign.judges.asking import Decision, Question
from diffalign.judges.endpoint_line import Answer, Line
from diffalign.judges.endpoint_settings import KEYS, Refusals

CHAT, TYPED, MODELS = "/chat/completions", "/systemone", "/models"
NOT_OFFERED = (404, 405, 501)
REFUSED = (400, 422)
PINNED = "pinned to"  # `transformers serve` says so of a model that it does not serve
NO_WAY = (
    "gives no probabilities: its chat completions come without log-probabilities (vLLM, SGLang and OpenAI give them), "
    "and it has no typed decisions at /v1/systemone (`transformers serve` has). Serve the model with one of these, or "
    "take a reward that reads replies."
)


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
        body = forms.chat(model, question, pictures)
        if question.temperature > 0 and await self._has_types():
            # `transformers serve` has one source of randomness for all its requests, which each seed resets.
            async with self.line.alone:
                answer = await self._chat(forms.sampled_by_transformers(body))
        else:
            answer = await self._chat(body)
        if answer.problem:
            return _lost(answer)
        reply = forms.read_text(answer.content, question.max_tokens)
        # A reply that was cut off is what the model says; another request would bring the same.
        sound = bool(reply.text) and (not reply.problem or reply.problem.startswith(forms.CUT))
        return Told(asdict(reply), sound=sound, problem=reply.problem)

    async def decide(self, model: str, decision: Decision, pictures: Sequence[forms.Picture]) -> Told:
        """The probabilities, as a tuple."""
        found = Told()
        if self.way in (None, "logprobs"):
            found = await self._by_logprobs(model, decision, pictures)
        if self.way in (None, "systemone") and not found.lost:
            found = await self._by_types(model, decision, pictures, found)
        return found

    async def _by_logprobs(self, model: str, decision: Decision, pictures: Sequence[forms.Picture]) -> Told:
        while True:
            top = self._top
            answer = await self._chat(forms.first_token(model, decision, pictures, top))
            refused = answer.status in REFUSED and "logprobs" in answer.problem
            if not refused or top == forms.TOPS[-1]:
                break
            self._top = forms.TOPS[-1]
        if answer.problem and not refused:
            return _lost(answer)
        if refused or not forms.offers_logprobs(answer.content):
            said = answer.problem or f"the answer has no log-probabilities: {forms.shown(answer.content)}"
            offered = self.way == "logprobs" or not forms.is_chat(answer.content)
            return Told(problem=said if offered and not refused else "")
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
        answer = await self.line.post(TYPED, forms.typed(model, decision, pictures))
        if answer.status in NOT_OFFERED:
            if before.problem:
                return before
            raise ConfigError(f"the server at {self.line.url} {NO_WAY}")
        self._refuse(answer, model)
        if answer.problem:
            return _lost(answer)
        found = forms.read_typed(answer.content, decision)
        self.way = self.way or ("systemone" if found else None)
        said = f"the answer is no typed decision: {forms.shown(answer.content)}"
        return Told(found, "systemone", found is not None, "" if found else said)

    async def _chat(self, body: Mapping[str, Any]) -> Answer:
        """The answer to a chat completion, without the fields that the server refuses."""
        sent = self._refusals.without(body)
        answer, tried = await self.line.post(CHAT, sent), list[str]()
        while _over_a_field(answer) and (name := self._refusals.suspect(answer.problem, sent)):
            sent = self._refusals.changed(sent, name)
            tried.append(name)
            answer = await self.line.post(CHAT, sent)
        if not answer.problem and (learnt := set(tried) - self._refusals.known):
            self._refusals.known |= learnt
            self.news.append(f"the server at {self.line.url} refuses {', '.join(sorted(learnt))}; asked without.")
        self._refuse(answer, str(body["model"]))
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
            raise ConfigError(
                f"the server at {url} refuses the key ({said}). Put the right one into ${KEYS[0]}, or give `key`."
            )
        if answer.status == 404 or (answer.status in REFUSED and PINNED in said):
            raise ConfigError(
                f"the server at {url} does not know the model '{model}' or the address ({said}). The address ends in "
                f"/v1 for most servers, and {url}/models lists the models."
            )


def _over_a_field(answer: Answer) -> bool:
    return answer.status in REFUSED and PINNED not in answer.problem


def _lost(answer: Answer) -> Told:
    return Told(problem=answer.problem, lost=answer.again or not answer.status)
