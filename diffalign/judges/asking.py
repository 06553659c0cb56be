"""What is asked of a judge and what it says: questions, decisions, replies, and the rule for malformed ones.

A reply that cannot be read is asked for once more; if that fails too the row is invalid. It never becomes a number.
One that was lost on its way is not asked for again: the backend has tried all it may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.judges.wording import options

Read = TypeVar("Read")
SECOND_TRY = 1_000_003  # added to the seed of a question that is asked again
LARGEST_SEED = 2**31 - 1  # that servers take
WARM = 0.7  # least temperature of the second try: a greedy judge would say the same again


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """Pictures, then words; the answer is free text."""

    text: str
    images: tuple[Tensor, ...] = ()  # each (3, H, W) in [0, 1]
    system: str = ""
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int = 0
    schema: Mapping[str, Any] | None = None  # of a JSON reply, where the backend can hold it to one

    def __post_init__(self) -> None:
        whole = (self.top_k, self.max_tokens, self.seed)
        numbers = (*whole, self.temperature, self.top_p)
        sound = all(isinstance(value, int) for value in whole)
        sound &= all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
        sound = sound and 0 <= self.temperature < math.inf and 0 < self.top_p <= 1
        if not sound or self.top_k < 0 or self.max_tokens < 1:
            raise ConfigError(
                f"a question has temperature {self.temperature!r}, top_p {self.top_p!r}, top_k {self.top_k!r}, "
                f"max_tokens {self.max_tokens!r} and seed {self.seed!r}, but they start at 0, above 0 (up to 1), at 0 "
                "and at 1, and the last three are whole numbers."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """Pictures, then a question with a closed set of answers; the answer is a probability for each."""

    text: str
    images: tuple[Tensor, ...] = ()
    labels: tuple[str, ...] = ("Yes", "No")
    described: tuple[str, ...] = ()  # what labels such as A and B stand for
    ordered: bool = False  # whether the labels are the levels of a score, lowest first

    @property
    def prompt(self) -> str:
        """The question as a judge reads it."""
        return options(self.text, self.labels, self.described)


@dataclass(frozen=True)
class Reply:
    """What came back; `problem` says why nothing did."""

    text: str = ""
    problem: str = ""
    lost: bool = False  # whether asking again is of no use: it was the way there, and not what the judge says


@runtime_checkable
class Backend(Protocol):
    """Where a judge runs: this process or a server."""

    name: str
    most_images: int  # in one question

    @property
    def version(self) -> str | None:
        """What tells this judge from others; None where nothing does, so that its scores are not cached."""
        ...

    def reply(self, questions: Sequence[Question]) -> list[Reply]:
        """One free text per question, in order."""
        ...

    def decide(self, decisions: Sequence[Decision]) -> list[tuple[float, ...] | None]:
        """One probability per label, summing to 1, in order; None where the judge said nothing that can be used."""
        ...


@dataclass(frozen=True)
class Judgement:
    """What a judge found about one row: sub-scores, the scalar, and every word it said."""

    total: float = math.nan
    parts: dict[str, float] = field(default_factory=dict)
    raw: tuple[str, ...] = ()
    problem: str = ""  # why it is invalid

    @property
    def valid(self) -> bool:
        return math.isfinite(self.total)


@runtime_checkable
class ImageJudge(Protocol):
    """Judges pictures (B, 3, H, W) by their cases."""

    def judge(self, media: Tensor, cases: Sequence[Any]) -> list[Judgement]: ...


@runtime_checkable
class EditJudge(ImageJudge, Protocol):
    """Judges edited pictures (B, 3, H, W); every case has the source."""


Reader = Callable[[str], Read | None]


def ask(
    backend: Backend, questions: Sequence[Question], read: Reader[Read] | Sequence[Reader[Read]]
) -> list[tuple[Read | None, tuple[str, ...]]]:
    """What `read` makes of each reply, and the texts; a reply it makes nothing of is asked for once more.

    `read` is one reader for all, or one for each question.
    """
    readers = [read] * len(questions) if callable(read) else list(read)
    replies = backend.reply(questions) if questions else []
    found: list[tuple[Read | None, tuple[str, ...]]] = [
        (None if reply.problem else reader(reply.text), (reply.text or reply.problem,))
        for reader, reply in zip(readers, replies, strict=True)
    ]
    again = [k for k, (value, _) in enumerate(found) if value is None and not replies[k].lost]
    if again:
        second = [
            replace(
                questions[k],
                seed=(questions[k].seed + SECOND_TRY) & LARGEST_SEED,
                temperature=max(questions[k].temperature, WARM),
            )
            for k in again
        ]
        for k, reply in zip(again, backend.reply(second), strict=True):
            value = None if reply.problem else readers[k](reply.text)
            found[k] = value, (*found[k][1], reply.text or reply.problem)
    return found


def expected(probabilities: Sequence[float] | None, values: Sequence[float]) -> float:
    """The mean of `values` under the probabilities, NaN where there are none."""
    if probabilities is None:
        return math.nan
    return sum(p * v for p, v in zip(probabilities, values, strict=True))
