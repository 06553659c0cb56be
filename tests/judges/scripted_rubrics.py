"""Backends that follow a script, for the protocols of rubrics."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from diffalign.judges.asking import Decision, Question, Reply

_NUMBERED = re.compile(r"^\d+\. (.*)$", re.MULTILINE)


class Scripted:
    """Says what `says` makes of each question, and remembers what it was asked."""

    def __init__(
        self,
        says: Callable[[Question], str],
        decides: Callable[[Decision], tuple[float, ...] | None] = lambda decision: (0.5, 0.5),
        *,
        name: str = "scripted",
        most_images: int = 4,
        version: str | None = "1",
    ) -> None:
        self.says, self.decides = says, decides
        self.name, self.most_images, self.version = name, most_images, version
        self.options: dict[str, Any] = {}
        self.asked: list[Question] = []
        self.decided: list[Decision] = []

    def reply(self, questions: Sequence[Question]) -> list[Reply]:
        self.asked += questions
        return [Reply(text=self.says(question)) for question in questions]

    def decide(self, decisions: Sequence[Decision]) -> list[tuple[float, ...] | None]:
        self.decided += decisions
        return [self.decides(decision) for decision in decisions]


def items_of(question: Question) -> list[str]:
    """The numbered items of a question."""
    return _NUMBERED.findall(question.text)


def verdicts(labels: Sequence[str]) -> str:
    return json.dumps([{"answer": label, "evidence": "there"} for label in labels])


def checks(*questions: str, must: bool = False) -> str:
    return json.dumps([{"question": question, "must": must} for question in questions])


def findings(status: str = "pass") -> str:
    return json.dumps([{"criterion": "the circle is red", "status": status, "severity": 0, "evidence": "at the top"}])
