"""Rubric arithmetic: labels of yes-or-no items become one number.

Linyue Ma et al.: "An Efficient Rubric-based Generative Verifier for Search-Augmented LLMs" (Search-Gen-V), 2025 (arXiv
2510.14660), its labels and mean; Zae Myung Kim et al.: "Toward Evaluative Thinking: Meta Policy Optimization with
Evolving Reward Models" (MPO), 2025 (arXiv 2504.20157), its sum.

With v_i in [0, 1] and weights w_i: mean = sum w_i v_i / sum w_i, sum = sum w_i v_i, times a gate over the items that
must hold.

Where we differ:
- Support, partial and not become 1, 1/2 and 0, which the paper leaves open; unsure counts as 0.
- `mean` divides by what the items can reach, so a longer rubric is no larger reward; `sum` is MPO's.
- MPO counts a missing item as 0; here an answer too few or too many makes the row invalid (NaN).
- A must that is violated makes the total 0 (`hard`) or multiplies it by `strength` (`soft`); a question asked twice is
  violated once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from diffalign.errors import ConfigError

Kind = Literal["follow", "keep", "quality"]
Gate = Literal["hard", "soft", "none"]
Total = Literal["mean", "sum"]
KINDS: tuple[str, ...] = get_args(Kind)
VALUES = {"yes": 1.0, "partial": 0.5, "no": 0.0, "unsure": 0.0}
LABELS = tuple(VALUES)
VIOLATED = 0.5  # a must below it is violated: no, unsure, or a probability of yes under one half
_ID = re.compile(r"[\w.-]{1,60}")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One atomic check, with yes as the good answer."""

    id: str
    question: str
    type: Kind = "follow"  # the instruction was followed, the rest was kept, or the picture is good
    must: bool = False  # whether a no spoils the whole
    weight: float = 1.0  # share in the total, relative to the other items

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise ConfigError(
                f"an item has the id {self.id!r}, but an id is up to 60 letters, digits, '_', '-' and '.': "
                "it names a column."
            )
        if not self.question.strip():
            raise ConfigError(f"the item '{self.id}' has no question. Write one that a good picture answers with yes.")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(f"the item '{self.id}' has the weight {self.weight}, but a weight is a number above 0.")


def values_of(labels: Iterable[str]) -> tuple[float, ...]:
    """The value of each label; KeyError for a word that is none."""
    return tuple(VALUES[label] for label in labels)


def aggregate(
    values: Sequence[float], items: Sequence[Item], *, gate: Gate = "soft", strength: float = 0.5, total: Total = "mean"
) -> float:
    """One number from one value in [0, 1] per item, NaN where the counts differ or a value is missing."""
    if len(values) != len(items) or not items or not all(0 <= value <= 1 for value in values):  # NaN is not
        return math.nan
    reached = math.fsum(item.weight * value for item, value in zip(items, values, strict=True))
    if total == "mean":
        reached = min(1.0, reached / math.fsum(item.weight for item in items))
    return reached * passed(values, items, gate=gate, strength=strength)


def passed(values: Sequence[float], items: Sequence[Item], *, gate: Gate = "soft", strength: float = 0.5) -> float:
    """The factor of the gate: 1 where every must holds."""
    count = len(violated(values, items))
    if gate == "none" or not count:
        return 1.0
    return 0.0 if gate == "hard" else strength**count


def violated(values: Sequence[float], items: Sequence[Item]) -> set[str]:
    """The questions of the musts that do not hold."""
    pairs = zip(items, values, strict=True)
    return {item.question for item, value in pairs if item.must and value < VIOLATED}


def by_kind(values: Sequence[float], items: Sequence[Item]) -> dict[str, float]:
    """The weighted mean over the items of each type that occurs, without a gate."""
    found = {}
    for kind in KINDS:
        own = [k for k, item in enumerate(items) if item.type == kind]
        if own:
            found[kind] = aggregate([values[k] for k in own], [items[k] for k in own], gate="none")
    return found


def require_arithmetic(gate: str, strength: float, total: str, who: str) -> None:
    """Refuse settings that the arithmetic does not know, in the name of `who`."""
    for name, value, known in (("gate", gate, get_args(Gate)), ("total", total, get_args(Total))):
        if value not in known:
            raise ConfigError(f"{who}.{name} is {value!r}; it is one of {', '.join(known)}.")
    if isinstance(strength, bool) or not 0 <= strength <= 1:
        raise ConfigError(f"{who}.strength is {strength!r}; it is a factor from 0, as a hard gate, to 1, as none.")


def require_one_version(groups: Iterable[str], versions: Iterable[str]) -> None:
    """Refuse rows of one group that were judged by different rubrics: their scores do not compare."""
    known: dict[str, str] = {}
    for group, version in zip(groups, versions, strict=True):
        if known.setdefault(group, version) != version:
            raise ConfigError(
                f"the group '{group[:80]}' is judged by the rubrics {known[group]} and {version}, and scores of two "
                "rubrics do not compare. Give every row of a group the same rubric."
            )
