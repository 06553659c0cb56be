"""How many key facts the judge tells of a picture, in their order, and whether the picture keeps to style checks.

Yuxin Jiang et al.: "From Verifiable Dot to Reward Chain: Harnessing Verifiable Reference-based Rewards for
Reinforcement Learning of Open-ended Generation" (RLVRR), 2026 (arXiv 2601.18533). The arithmetic, and where it differs:
diffalign/rules/chain.py.

The metadata's `key_facts` is a list of facts, each a list of keywords in order, or a list of such lists of which the
best counts; a word that stands alone is a list of one. Without it the prompt is split.

Where we differ:
- The answer that is held against the facts is what a judge says a picture shows.
- Facts come from the prompt, not from reference answers: in the grammar of the shapes world an object is named once for
  each time it is asked for (or in the plural), and "above" and "below" ask for an order; else every clause is a fact of
  its words without fillers.
- `order: across` makes one chain of all keywords of the first reference of each fact, for panels and long prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any, Literal

from torch import Tensor

from diffalign import vision
from diffalign.cases import Case
from diffalign.errors import ConfigError, MissingExtra, ModelError
from diffalign.judges import wording as words
from diffalign.judges.asking import Backend, Judgement, Question, ask
from diffalign.judges.finding import EMBEDDED
from diffalign.judges.protocols import OURS, read_wording
from diffalign.judges.rewarding import JudgeReward
from diffalign.registry import register_reward
from diffalign.rules.chain import Fact, combined, content, fact_score, read_checks, style
from diffalign.scoring import engine_version
from diffalign.world.grammar import COUNTS, Clauses, Want, parse

_SMALL = "a an the of in on at to with and or is are be by from for its their this that it there as into over"
FILLERS = frozenset(_SMALL.split())
LONGEST = 2000  # characters of a prompt that are split
MOST = 64  # facts of a case


@register_reward("key_facts", range=(0.0, 1.0))
class KeyFacts(JudgeReward):
    """Parts: `content`, `style`, every fact and check; `checks` are bounds such as {measure: aspect, at_least: 1.5}."""

    reads = ("key_facts",)

    def __init__(
        self,
        judge: str | Mapping[str, Any] | Backend = EMBEDDED,
        log: str | None = None,
        *,
        checks: Sequence[Mapping[str, Any]] = (),
        order: Literal["within", "across"] = "within",
        total: Literal["mean", "sum"] = "mean",
        engine: Any = "tesseract",
        max_tokens: int = 256,
        wording: str = OURS,
    ) -> None:
        super().__init__(judge, log)
        if order not in ("within", "across") or total not in ("mean", "sum") or max_tokens < 1:
            raise ConfigError(
                f"key_facts has order {order!r}, total {total!r} and max_tokens {max_tokens}; order is within or "
                "across, total mean or sum, max_tokens at least 1."
            )
        self.checks = read_checks(checks, "key_facts.checks")
        self.order, self.total, self.max_tokens = order, total, max_tokens
        self._engine = engine
        self.wording = read_wording(wording, {"tell": words.TELL}, self.name)
        self.revision = f"1 {self.wording.mark}"
        self.range = (0.0, 2.0) if self.checks and total == "sum" else (0.0, 1.0)
        told = engine if isinstance(engine, str) else type(engine).__qualname__
        self.options = self.judge_options | {"checks": [asdict(check) for check in self.checks], "order": order}
        self.options |= {"total": total, "engine": told, "max_tokens": max_tokens, "wording": wording}

    @property
    def version(self) -> str | None:
        """That of the judge, and of the engine where a check reads text."""
        own = super().version
        if own is None or not self._reads_text:
            return own
        other = engine_version("reads", self.engine, self._engine)
        return None if other is None else f"{own} {other}"

    @property
    def _reads_text(self) -> bool:
        return any(check.measure == "text" for check in self.checks)

    @cached_property
    def engine(self) -> Any:
        """What reads text in a picture: an object with `read(image)` that has `text`, such as that of `ocr`."""
        if self._engine == "tesseract":
            return Tesseract()
        if isinstance(self._engine, str):
            raise ConfigError(f"key_facts.engine is '{self._engine}'; it is 'tesseract' or an object with `read`.")
        return self._engine

    def judge(self, media: Tensor, cases: Sequence[Case]) -> list[Judgement]:
        pictures = vision.quantise(media)
        asked = [facts_of(case) for case in cases]
        rows = [k for k, facts in enumerate(asked) if facts]
        text = self.wording.say("tell")
        questions = [Question(text=text, images=(pictures[k],), max_tokens=self.max_tokens) for k in rows]
        replies = dict(zip(rows, ask(self.backend, questions, _said) if rows else [], strict=True))
        return [
            self._judged(pictures[k], facts, *replies[k]) if facts else Judgement(problem="the case has no key facts")
            for k, facts in enumerate(asked)
        ]

    def _judged(self, picture: Tensor, facts: Sequence[Fact], said: str | None, raw: tuple[str, ...]) -> Judgement:
        if said is None:
            return Judgement(raw=raw, problem="the judge said nothing")
        chain = [across(facts)] if self.order == "across" else list(facts)
        read = cache(self._read)  # by several checks of text
        held = [check.holds(picture, read) for check in self.checks]
        told, kept = content(said, chain), style(held, self.checks)
        parts = {"content": told} | ({} if kept is None else {"style": kept})
        parts |= {f"fact/{k}": fact_score(said, fact) for k, fact in enumerate(chain, 1)}
        names = [check.measure for check in self.checks]
        for k, (name, yes) in enumerate(zip(names, held, strict=True)):
            parts[f"check/{name}" + (f" {k + 1}" if names.count(name) > 1 else "")] = float(yes)
        return Judgement(combined(told, kept, self.total), parts, raw)

    def _read(self, picture: Tensor) -> str:
        return str(self.engine.read(vision.to_pil(picture[None])[0]).text)


@dataclass(frozen=True)
class Reading:
    """What an engine read."""

    text: str


class Tesseract:
    """The program tesseract through pytesseract, at its own settings."""

    def __init__(self) -> None:
        try:
            import pytesseract  # type: ignore[import-untyped]
        except ImportError as e:
            raise MissingExtra.of("the check 'text' of reward 'key_facts'", "pytesseract", "ocr") from e
        self._program = pytesseract

    @cached_property
    def version(self) -> str:
        return f"tesseract {self._asked(self._program.get_tesseract_version)}"

    def read(self, image: Any) -> Reading:
        return Reading(str(self._asked(self._program.image_to_string, image)))

    def _asked(self, what: Callable[..., Any], *given: Any) -> Any:
        try:
            return what(*given)
        except (self._program.TesseractNotFoundError, self._program.TesseractError) as e:
            raise ModelError(
                f"tesseract cannot read a picture: {str(e)[:300]}. Install it with apt-get install tesseract-ocr, or "
                "give `engine` an object with `read`."
            ) from e


def facts_of(case: Case) -> list[Fact]:
    """The key facts of a case: its metadata's, else those of its prompt."""
    given = case.metadata.get("key_facts")
    if given is not None:
        return _read_facts(given, case.prompt)
    clauses = parse(case.prompt)
    return list(_clauses_facts(clauses)) if clauses else split(case.prompt)


def split(prompt: str) -> list[Fact]:
    """Every clause of a prompt as a fact: its words in order, without fillers."""
    found: list[Fact] = []
    for clause in re.split(r"[,.;:!?\n]|\band\b", prompt[:LONGEST].casefold()):
        keywords = tuple(word for word in re.findall(r"\w[\w'-]*", clause) if word not in FILLERS)
        if keywords and (keywords,) not in found:
            found.append((keywords,))
    return found[:MOST]


def across(facts: Sequence[Fact]) -> Fact:
    """One chain of all facts, each by its first reference."""
    return (tuple(word for fact in facts for word in fact[0]),)


def _clauses_facts(clauses: Clauses) -> list[Fact]:
    found: list[Fact] = [_asked(want) for want in dict.fromkeys(clauses.wants)]
    for relation in clauses.relations:
        a, b = _named(clauses.wants[relation.a]), _named(clauses.wants[relation.b])
        if relation.kind in ("above", "below") and a != b:
            found.append(((a, b) if relation.kind == "above" else (b, a),))
    return found


def _asked(want: Want) -> Fact:
    """An object told as often as it is asked for, or once with its number."""
    name = _named(want)
    number = next(word for word, count in COUNTS.items() if count == want.count)
    each = (name,) * want.count
    return (each, (f"{number} {name}s",)) if want.count > 1 else (each,)


def _named(want: Want) -> str:
    """Colour and shape; a size stands before them, and without a colour it is not told next to the shape."""
    named = (want.size, want.colour, want.shape) if want.colour else (want.shape,)
    return " ".join(word for word in named if word)


def _read_facts(given: Any, prompt: str) -> list[Fact]:
    if not isinstance(given, list | tuple) or len(given) > MOST:
        raise ConfigError(
            f"the case '{prompt[:60]}' has the key_facts {str(given)[:80]!r}, but they are a list of up to {MOST} "
            "lists of keywords, in order."
        )
    return [_fact(fact, k) for k, fact in enumerate(given)]


def _fact(fact: Any, k: int) -> Fact:
    """Keywords, or several lists of them."""
    rows = [[fact]] if isinstance(fact, str) else fact if _nested(fact) else [fact]
    for row in rows:
        listed = isinstance(row, list | tuple) and 0 < len(row) <= MOST
        if not listed or not all(isinstance(word, str) and word.strip() for word in row):
            raise ConfigError(
                f"key_facts[{k}] is {str(fact)[:80]!r}, but a fact is a list of 1 to {MOST} keywords: ['red circle']."
            )
    return tuple(tuple(row) for row in rows)


def _nested(fact: Any) -> bool:
    return isinstance(fact, list | tuple) and bool(fact) and all(isinstance(row, list | tuple) for row in fact)


def _said(text: str) -> str | None:
    """What a judge says after thinking, if it says anything."""
    said = text.rpartition("</think>")[2].strip()
    return said or None
