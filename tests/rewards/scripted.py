"""A judge that says what a test tells it to, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.cases import Case
from diffalign.judges.asking import Decision, Question, Reply


class Scripted:
    """`says` answers a question with a text, `chooses` a decision with probabilities."""

    name, most_images = "scripted", 4

    def __init__(
        self,
        says: Callable[[Question], str] = lambda q: "",
        chooses: Callable[[Decision], tuple[float, ...] | None] = lambda d: None,
        version: str | None = "1",
    ) -> None:
        self.says, self.chooses, self.version = says, chooses, version
        self.options: dict[str, Any] = {}
        self.questions: list[Question] = []
        self.decisions: list[Decision] = []

    def reply(self, questions: Sequence[Question]) -> list[Reply]:
        self.questions += questions
        return [Reply(self.says(question)) for question in questions]

    def decide(self, decisions: Sequence[Decision]) -> list[tuple[float, ...] | None]:
        self.decisions += decisions
        return [self.chooses(decision) for decision in decisions]


def plain(*levels: float, size: tuple[int, int] = (8, 8)) -> Tensor:
    """Grey pictures (B, 3, H, W), each of one level."""
    return torch.stack([torch.full((3, *size), round(level * 255) / 255) for level in levels])


def grey(level: float = 0.5, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """One such picture as PIL; `size` is height and width."""
    return Image.new("RGB", (size[1], size[0]), (round(level * 255),) * 3)


def level(image: Tensor) -> float:
    """The mean of a picture, which tells plain ones apart."""
    return round(float(image.mean()), 3)


def edit(prompt: str = "make it brighter", source: float = 0.5, size: tuple[int, int] = (8, 8), **told: Any) -> Case:
    return Case(prompt=prompt, source=grey(source, size), metadata=told)
