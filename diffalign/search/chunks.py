"""Rows in chunks: at most so many at once, and smaller chunks from where memory runs short."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from diffalign.budget import Budget

T = TypeVar("T")


class Chunks:
    """Runs something over rows a chunk at a time; what was learnt about the memory holds for later calls."""

    def __init__(self, budget: Budget, most: int | None = None) -> None:
        self.budget = budget
        self.most = most  # rows at once; None is all

    def over(self, count: int, run: Callable[[slice], T]) -> list[T]:
        """`run` over `count` rows; a chunk that did not fit is paid for once only, in smaller ones."""
        parts: list[T] = []
        at = 0
        while at < count:
            size = min(self.most or count, count - at)
            spent = self.budget.nfe, self.budget.decodes, self.budget.reward_calls
            try:
                parts.append(run(slice(at, at + size)))
                at += size
            except (RuntimeError, MemoryError) as e:
                if size == 1 or not out_of_memory(e):
                    raise
                self.budget.nfe, self.budget.decodes, self.budget.reward_calls = spent  # nothing came of it
                self.most = math.ceil(size / 2)
                warnings.warn(
                    f"{size} rows do not fit the memory; going on with {self.most} at a time. The result is the same.",
                    stacklevel=2,
                )
        return parts


def out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "out of memory" in text or "can't allocate" in text
