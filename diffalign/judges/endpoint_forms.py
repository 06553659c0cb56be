"""What is sent to a server and how its answers are read; nothing here talks to one, and no answer makes it raise."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffalign import vision
from diffalign.errors import ConfigError
from diffalign.judges.asking import Decision, Question, Reply

if TYPE_CHECKING:
    from PIL import Image

TOPS = (20, 5)  # how many likely tokens are asked for; some servers give few
COVERED = 0.5  # mass that the labels found must have, if one is not among the likely tokens
SPILL = 0.01  # how far a sum of probabilities may be from 1
CUT = "cut off"  # how the problem of a reply begins that did not end in time
SPACES = " \t\r\n\u2581\u0120"  # around a token; the last two are how some tokenizers write a space
MOST_TYPED = 4  # pictures of a typed decision
Probabilities = tuple[float, ...]


@dataclass(frozen=True)
class Picture:
    """A picture as it is sent."""

    image: Image.Image

    @property  # not kept: a long list of questions would hold all of them
    def png(self) -> str:
        held = io.BytesIO()
        self.image.save(held, "PNG", compress_level=1)
        return base64.b64encode(held.getvalue()).decode()

    @cached_property
    def told(self) -> list[Any]:
        """What a hash of it needs: the pixels themselves, as PNG files differ between versions of the library."""
        return [self.image.size, hashlib.sha256(self.image.tobytes()).hexdigest()]


def picture(image: Tensor, most: int | None) -> Picture:
    """A tensor (3, H, W) in [0, 1] in 8-bit levels, scaled down to at most that many pixels."""
    from PIL import Image

    made = vision.to_pil(image[None])[0]
    if most is not None and made.width * made.height > most:
        shrink = math.sqrt(most / (made.width * made.height))
        width, height = max(1, math.floor(made.width * shrink)), max(1, math.floor(made.height * shrink))
        made = made.resize((min(width, most), min(height, most)), Image.Resampling.BICUBIC)
    return Picture(made)


def chat(model: str, question: Question, pictures: Sequence[Picture]) -> dict[str, Any]:
    """The body of a chat completion."""
    body: dict[str, Any] = {"model": model, "messages": _messages(question.text, pictures, question.system)}
    body |= {"max_tokens": question.max_tokens, "temperature": question.temperature}
    if question.temperature > 0:
        # Servers have defaults of their own for what is left out; -1 is how they write "all tokens".
        body |= {"top_p": question.top_p, "top_k": question.top_k or -1, "seed": question.seed % 2**63}
    if question.schema is not None:
        schema = {"name": "reply", "schema": dict(question.schema), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def sampled_by_transformers(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same for `transformers serve`, which takes a temperature but samples only if its own settings say so."""
    given: dict[str, Any] = {
        "do_sample": True,
        "max_new_tokens": body["max_tokens"],
        "temperature": body["temperature"],
    }
    given |= {"top_p": body["top_p"], "top_k": max(0, body["top_k"])}
    return {k: v for k, v in body.items() if k != "top_k"} | {"generation_config": json.dumps(given)}


def first_token(model: str, decision: Decision, pictures: Sequence[Picture], top: int) -> dict[str, Any]:
    """The body that asks for the likely first tokens of an answer."""
    body: dict[str, Any] = {"model": model, "messages": _messages(decision.prompt, pictures), "max_tokens": 1}
    return body | {"temperature": 1.0, "logprobs": True, "top_logprobs": top}


def typed(model: str, decision: Decision, pictures: Sequence[Picture]) -> dict[str, Any]:
    """The body of a typed decision: `noul` for yes and no, `score` for levels, else `choice`."""
    text, described = clean(decision.text), tuple(clean(meaning) for meaning in decision.described)
    mark = "picture"
    while any(mark in words for words in (text, *described)):
        mark += "-"  # so that no words hold the name of a picture
    names = [f"<{mark}-{k + 1}>" for k in range(len(pictures))]
    question: dict[str, Any] = {"type": kind_of(decision), "instructions": text if names else None}
    meanings = described or (None,) * len(decision.labels)
    if question["type"] == "score":
        question["criteria"] = list(described or decision.labels)
    elif question["type"] == "choice":
        question["criteria"] = dict(zip(decision.labels, meanings, strict=True))
    elif described:
        of = dict(zip(decision.labels, meanings, strict=True))
        question["criteria"] = {"true": of["Yes"], "false": of["No"]}
    assets = {
        name: {"type": "image", "format": "png", "data_base64": one.png}
        for name, one in zip(names, pictures, strict=True)
    }
    return {"model": model, "state": "".join(names) or text, "questions": {"decision": question}, "assets": assets}


def kind_of(decision: Decision) -> str:
    if sorted(decision.labels) == ["No", "Yes"]:
        return "noul"
    return "score" if decision.ordered else "choice"


def read_text(content: Any, most: int) -> Reply:
    """The text of a chat completion."""
    choice = _choice(content)
    message = choice.get("message")
    told = message.get("content") if isinstance(message, dict) else None
    if isinstance(told, list):  # in parts
        parts = [part.get("text") if isinstance(part, dict) else None for part in told]
        told = "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(told, str):
        return Reply(problem=f"the server's answer has no text: {shown(content)}", lost=not isinstance(message, dict))
    text = clean(told).strip()
    if choice.get("finish_reason") == "content_filter":
        return Reply(text, "the server withheld the reply")
    if choice.get("finish_reason") == "length":
        return Reply(text, f"{CUT} after {most} tokens")
    return Reply(text, "" if text else "the reply is empty")


def is_chat(content: Any) -> bool:
    """Whether it is a chat completion at all."""
    return isinstance(_choice(content).get("message"), dict)


def offers_logprobs(content: Any) -> bool:
    """Whether a chat completion brings the likely tokens, readable or not."""
    held = _choice(content).get("logprobs")
    return isinstance(held, dict) and bool(held.get("content"))


def clashing(labels: Sequence[str]) -> tuple[str, str] | None:
    """A label and another that begins with it."""
    return next(((a, b) for a in labels for b in labels if a != b and b.startswith(a)), None)


def check_first(labels: Sequence[str]) -> None:
    """Refuse labels whose first tokens may be the same: `1` also begins `10`, and would get its probability."""
    if clash := clashing(labels):
        raise ConfigError(
            f"the labels {clash[0]!r} and {clash[1]!r} may begin with the same token, so the log-probabilities of one "
            "token do not tell them apart. Use labels such as A, B and C, or levels of one digit."
        )


def read_logprobs(content: Any, labels: Sequence[str]) -> Probabilities | None:
    """The share of each label in the mass of all labels; one that is not among the likely tokens has none.

    None where a number is not sound, or where a label is missing and those that are there are unlikely too.
    """
    held = _choice(content).get("logprobs")
    tokens = held.get("content") if isinstance(held, dict) else None
    first = tokens[0] if isinstance(tokens, list) and tokens else None
    top = first.get("top_logprobs") if isinstance(first, dict) else None
    if not isinstance(first, dict) or not isinstance(top, list):
        return None
    mass: dict[str, float] = {}
    for one in [*top, first]:
        token, chance = (one.get("token"), _chance(one.get("logprob"))) if isinstance(one, dict) else (None, None)
        if not isinstance(token, str) or chance is None:
            return None
        if one is not first or token not in mass:  # the token that was drawn may be a likely one
            mass[token] = mass.get(token, 0.0) + chance
    if sum(mass.values()) > 1 + SPILL:
        return None
    spoken = [token.strip(SPACES) for token in mass]
    found = [sum(p for word, p in zip(spoken, mass.values(), strict=True) if word == label) for label in labels]
    total = sum(found)
    if total <= 0 or (total < COVERED and not set(labels) <= set(spoken)):
        return None
    return tuple(p / total for p in found)


def read_typed(content: Any, decision: Decision) -> Probabilities | None:
    """The probabilities of a typed decision, in the order of the labels."""
    answers = content.get("answers") if isinstance(content, dict) else None
    answer = answers.get("decision") if isinstance(answers, dict) else None
    if not isinstance(answer, dict):
        return None
    kind = kind_of(decision)
    if kind == "noul":
        yes = _number(answer.get("noul"))
        if yes is None or not 0 <= yes <= 1:
            return None
        return tuple(yes if label == "Yes" else 1 - yes for label in decision.labels)
    held = answer.get("probabilities")
    names = list(decision.labels) if kind == "choice" else [str(k) for k in range(len(decision.labels))]
    if not isinstance(held, dict) or set(held) != set(names):
        return None
    read = [p for p in (_number(held[name]) for name in names) if p is not None and 0 <= p <= 1]
    total = sum(read)
    if len(read) != len(names) or abs(total - 1) > SPILL:
        return None
    return tuple(p / total for p in read)


def shown(content: Any) -> str:
    """The beginning of an answer, on one line."""
    text = " ".join(clean(content if isinstance(content, str) else repr(content)).split())
    return f"{text[:200]}..." if len(text) > 200 else text or "nothing"


def clean(text: str) -> str:
    """Without halves of characters, which cannot be written anywhere."""
    return text.encode("utf-8", "replace").decode()


def _messages(text: str, pictures: Sequence[Picture], system: str = "") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{one.png}"}} for one in pictures
    ]
    told = [{"role": "system", "content": clean(system)}] if system else []
    return [*told, {"role": "user", "content": [*parts, {"type": "text", "text": clean(text)}]}]


def _choice(content: Any) -> dict[str, Any]:
    choices = content.get("choices") if isinstance(content, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def _chance(logprob: Any) -> float | None:
    """The probability; minus infinity is none at all."""
    if logprob == -math.inf:
        return 0.0
    value = _number(logprob)
    return None if value is None or value > SPILL else math.exp(min(value, 0.0))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e9 else None
