"""A rubric put to a judge: all items in one question, or one yes-or-no decision an item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from diffalign.judges import wording
from diffalign.judges.asking import Backend, Decision, Question, ask
from diffalign.judges.parse import read_words
from diffalign.judges.protocols import Wording
from diffalign.judges.rubric_files import Rubric
from diffalign.rules.rubrics import LABELS, Item, values_of

MOST = 10  # items in one question; verifiers lose count beyond
TOKENS = 64  # of a reply, for one item
TEXTS = {
    "items": wording.ITEMS,
    "edited": "The first picture was edited and became the second one.\nThe instruction was: {instruction}\n",
    "rubric": wording.RUBRIC,
    "principles": wording.PRINCIPLES,
    "profile": wording.PROFILE,
    "contrast": wording.CONTRAST,
}
OUR_WORDING = Wording(TEXTS)
How = Literal["together", "each"]


@dataclass(frozen=True, eq=False)
class Row:
    """A picture (3, H, W), for an edit after its source, and the rubric it is held against."""

    images: tuple[Tensor, ...]
    rubric: Rubric
    instruction: str = ""  # of an edit


@dataclass(frozen=True)
class Checked:
    """What a judge answered: one value in [0, 1] per item, None where it did not answer them all."""

    values: tuple[float, ...] | None
    raw: tuple[str, ...]

    @property
    def problem(self) -> str:
        return "" if self.values is not None else "the judge did not answer every item with one of its labels"


def check(
    backend: Backend, rows: Sequence[Row], *, how: How = "together", words: Wording = OUR_WORDING, most: int = MOST
) -> list[Checked]:
    """The answers for each row, in labels (`together`) or as probabilities of yes (`each`)."""
    return _each(backend, rows, words) if how == "each" else _together(backend, rows, words, most)


def _together(backend: Backend, rows: Sequence[Row], words: Wording, most: int) -> list[Checked]:
    """Labels from lists of at most `most` items, nearly equally long; one that cannot be read makes the row invalid."""
    pieces = [
        (k, row.rubric.items[at:to]) for k, row in enumerate(rows) for at, to in _cuts(len(row.rubric.items), most)
    ]
    labels: list[list[tuple[str, ...] | None]] = [[] for _ in rows]
    raw: list[tuple[str, ...]] = [() for _ in rows]
    found: dict[int, tuple[tuple[str, ...] | None, tuple[str, ...]]] = {}
    for count in sorted({len(items) for _, items in pieces}):  # a reply is read by how many answers it must hold
        places = [place for place, (_, items) in enumerate(pieces) if len(items) == count]
        asked = [_question(rows[pieces[place][0]], pieces[place][1], words) for place in places]

        def read(text: str, count: int = count) -> tuple[str, ...] | None:
            return read_words(text, LABELS, count)

        found |= dict(zip(places, ask(backend, asked, read), strict=True))
    for place, (k, _) in enumerate(pieces):
        labels[k].append(found[place][0])
        raw[k] += found[place][1]
    return [Checked(_joined(own), texts) for own, texts in zip(labels, raw, strict=True)]


def _each(backend: Backend, rows: Sequence[Row], words: Wording) -> list[Checked]:
    """The probability of yes of each item, from a decision of its own."""
    decisions = [
        Decision(text=_before(row, words) + _sayable(item.question), images=row.images)
        for row in rows
        for item in row.rubric.items
    ]
    answers = iter(backend.decide(decisions) if decisions else [])
    checked = []
    for row in rows:
        own = [next(answers) for _ in row.rubric.items]
        said = tuple(f"{item.id}: {_shown(answer)}" for item, answer in zip(row.rubric.items, own, strict=True))
        read = tuple(answer[0] for answer in own if answer is not None)
        checked.append(Checked(read if len(read) == len(own) else None, said))
    return checked


def _question(row: Row, items: Sequence[Item], words: Wording) -> Question:
    listed = "\n".join(f"{n}. {item.question}" for n, item in enumerate(items, 1))
    text = _before(row, words) + words.say("items", items=listed)
    return Question(text=text, images=row.images, max_tokens=64 + TOKENS * len(items))


def _before(row: Row, words: Wording) -> str:
    return words.say("edited", instruction=row.instruction) if row.instruction else ""


def _cuts(count: int, most: int) -> list[tuple[int, int]]:
    """Where pieces of at most `most` items begin and end, all of nearly one size."""
    pieces = math.ceil(count / most)
    ends = [math.ceil(count * k / pieces) for k in range(pieces + 1)]
    return list(pairwise(ends))


def _joined(labels: Sequence[tuple[str, ...] | None]) -> tuple[float, ...] | None:
    read = [own for own in labels if own is not None]
    return tuple(value for own in read for value in values_of(own)) if len(read) == len(labels) else None


def _sayable(text: str) -> str:
    """Without half characters, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def _shown(answer: tuple[float, ...] | None) -> str:
    return "no answer" if answer is None else f"yes {answer[0]:.3f}"
