"""Reading what a judge wrote. Nothing here raises, and what cannot be read in one way only is None, never a number.

How JSON is read is in loose_json.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from diffalign.judges.loose_json import DIGITS, LONGEST, Share, same, spoken, unfenced, values, whole

__all__ = [
    "LONGEST",
    "number",
    "numbers",
    "read_checks",
    "read_final_score",
    "read_json",
    "read_labelled",
    "read_list",
    "read_object",
    "read_scores",
    "read_words",
]

_NUMBERED = re.compile(r"\(?([0-9]{1,4})[.):]\s*", re.ASCII)
_BULLET = re.compile(r"[-*•]\s+")
_POINTS = re.compile(r"(-?[0-9]+(?:\.[0-9]+)?)(?:\s*(?:/|out of)\s*([0-9]+(?:\.[0-9]+)?))?", re.ASCII)
_ASIDE = re.compile(r"\([^()\d]*\)\Z")
_OTHER = re.compile(r"\b(?:or|to|and|not|but|zero|one|two|three|four|five|six|seven|eight|nine|ten|half|minus)\b", re.I)
_PLACES = ("id", "number", "index", "item", "question", "check", "n")  # what an entry may call its place
_ENDS = " \t\r\n*_`"


def read_json(text: str) -> Any | None:
    """The one object in a reply, else the one list; None where there is none or two that differ."""
    found = values(text)
    if found is None:
        return None
    return same([v for v in found if isinstance(v, dict)] or found)


def read_object(text: str) -> dict[str, Any] | None:
    """The one object in a reply, alone or as the only entry of a list."""
    value = read_json(text)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, dict) else None


def read_list(text: str, count: int | None = None) -> list[Any] | None:
    """The one list in a reply, or the one that an object of a single entry holds; `count` is how long it must be."""
    found = same(_lists(values(text) or []))
    return found if isinstance(found, list) and count in (None, len(found)) else None


def read_scores(
    text: str, count: int, low: float, high: float, key: str = "score", of: float | None = None
) -> tuple[float, ...] | None:
    """`count` numbers of an object's `key`, or of a list that is the whole reply; a lone one may stand bare.

    A number may name its scale, as 20/25: `of`, which is `high` unless told.
    """
    told = read_object(text)
    value = whole(text) if told is None else told.get(key)
    if count == 1 and not isinstance(value, list):
        value = [value]
    return numbers(value, count, low, high, of)


def read_checks(text: str, count: int, low: float = 0.0, high: float = 10.0) -> tuple[tuple[int, ...], float] | None:
    """`{"checks": [1, 0], "score": 7.5}`: `count` zeros or ones, and a score."""
    value = read_object(text)
    if value is None:
        return None
    checks, score = numbers(value.get("checks"), count, 0, 1), number(value.get("score"), low, high)
    if checks is None or score is None or not set(checks) <= {0.0, 1.0}:
        return None
    return tuple(int(check) for check in checks), score


def read_final_score(text: str, label: str, low: float, high: float) -> float | None:
    """The number of a line such as `Final Score: 3.5`; None where such a line has none, or two lines differ.

    The number may be alone on the next line.
    """
    said = spoken(text)
    return None if said is None else _final(said, label, low, high)


def read_labelled(text: str, labels: Sequence[str], low: float, high: float) -> tuple[float, ...] | None:
    """A number for each label, on lines of their own or one behind the other."""
    said = spoken(text)
    if said is None:
        return None
    lines = _apart(said, labels)
    found = [_final(lines, label, low, high) for label in labels]
    read = tuple(value for value in found if value is not None)
    return read if len(read) == len(labels) else None


def read_words(text: str, allowed: Sequence[str], count: int) -> tuple[str, ...] | None:
    """`count` of the `allowed` words: JSON, a list or objects with an `answer`, or nothing but the words.

    Words that carry numbers are put in their order, and the numbers must be 1 to `count`.
    """
    listed = _listed(text, count)
    if listed is None or not _in_places(listed):
        return None
    said_as = {word.casefold(): word for word in allowed}
    words = [entry.get("answer") if isinstance(entry, dict) else entry for entry in listed]
    found = [said_as.get(word.strip(" \t\r\n.!*_`\"'").casefold()) for word in words if isinstance(word, str)]
    read = tuple(word for word in found if word is not None)
    return read if len(read) == len(words) == count else None


def number(value: Any, low: float, high: float, of: float | None = None) -> float | None:
    """The value as a float if it is a number from `low` to `high`, its scale left out if that is `of` or `high`."""
    if isinstance(value, Share):
        if value.of != (high if of is None else of):
            return None
        value = value.value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if low <= value <= high and math.isfinite(value) else None


def numbers(value: Any, count: int, low: float, high: float, of: float | None = None) -> tuple[float, ...] | None:
    """A list of exactly `count` numbers from `low` to `high`."""
    if not isinstance(value, list) or len(value) != count:
        return None
    read = tuple(found for entry in value if (found := number(entry, low, high, of)) is not None)
    return read if len(read) == count else None


def _final(said: str, label: str, low: float, high: float) -> float | None:
    start, end = r"^[ \t>#*_`\-•]*(?:[0-9]{1,2}[.)][ \t*_`]*)?", r"(?:[ \t*_]*\([^()\n]*\))?[ \t*_`]*[:\uff1a](.*)$"
    begun = re.compile(f"{start}{re.escape(label)}{end}", re.I | re.M)
    found = set()
    for match in begun.finditer(said):
        line = match[1] if match[1].strip(_ENDS) else _next_line(said[match.end() : match.end() + LONGEST // 100])
        value = _points(line, high)
        if value is None:
            return None
        found.add(value)
    return number(found.pop(), low, high) if len(found) == 1 else None


def _points(line: str, high: float) -> float | None:
    """The number that a line consists of; around it marks, its scale, and a remark in brackets without numbers."""
    line = _bare_end(line)
    if (aside := _ASIDE.search(line)) and not _OTHER.search(aside[0]):
        line = _bare_end(line[: aside.start()])
    if line.startswith("[") and line.endswith("]"):
        line = line[1:-1].strip(_ENDS)
    match = _POINTS.fullmatch(line)
    if match is None or len(match[1]) > DIGITS or len(match[2] or "") > DIGITS:
        return None
    return float(match[1]) if match[2] is None or float(match[2]) == high else None


def _bare_end(line: str) -> str:
    return line.strip(_ENDS).rstrip(f"{_ENDS}.!")


def _next_line(rest: str) -> str:
    """The first line that is not empty, if no line that is more of a number comes behind it."""
    lines = [line.strip(_ENDS) for line in rest.split("\n")]
    told = [line for line in lines if line][:2]
    doubt = len(told) == 2 and re.match(r"[-+(\[]?[\d./,]|(?:out of|or|to|and)\b", told[1], re.I)
    return told[0] if told and not doubt else ""


def _apart(said: str, labels: Sequence[str]) -> str:
    """The lines that begin with one of the labels, broken before each other one that stands behind a number."""
    named = "|".join(map(re.escape, labels))
    begun = re.compile(rf"^[ \t>#*_`\-•]*(?:{named})\b.*$", re.I | re.M)
    between = re.compile(rf"(?<=[0-9*_`)\]])[ \t]*[,;|]?[ \t]+(?=[*_`]{{0,3}}(?:{named})\b[^\n:]{{0,20}}:)", re.I)
    return begun.sub(lambda line: between.sub("\n", line[0]), said)


def _lists(found: Sequence[Any]) -> list[Any]:
    held = [next(iter(one.values())) if isinstance(one, dict) and len(one) == 1 else one for one in found]
    return [one for one in held if isinstance(one, list)]


def _listed(text: str, count: int) -> list[Any] | None:
    """The entries of a reply: of its list, its objects one after the other, or its words by line or comma."""
    found = values(text) or []
    lists, objects = _lists(found), [one for one in found if isinstance(one, dict) and "answer" in one]
    objects = [one for one in objects if not isinstance(one["answer"], list)]
    if lists or objects:
        only = objects if not lists else same(lists) if not objects else None
        return only if isinstance(only, list) and len(only) == count else None
    said = spoken(text)
    if said is None:
        return None
    said = unfenced(said)
    said = said[1:-1] if said.startswith("[") and said.endswith("]") else said
    parts = [_BULLET.sub("", part.strip(), count=1) for part in re.split(r"[,;\n]+", said) if part.strip()]
    places = [_NUMBERED.match(part) for part in parts]
    if not any(places):
        return parts
    told = {int(place[1]): part[place.end() :] for place, part in zip(places, parts, strict=True) if place}
    whole_row = list(range(1, count + 1))
    return [told[k] for k in whole_row] if len(parts) == count and sorted(told) == whole_row else None


def _in_places(listed: Sequence[Any]) -> bool:
    """Whether no entry says that it belongs elsewhere."""
    for name in _PLACES:
        told = [entry.get(name) if isinstance(entry, dict) else None for entry in listed]
        read = [int(one) for one in (str(t).strip("#qQ. ") for t in told) if one.isdecimal() and len(one) < 5]
        if read and read not in (list(range(1, len(listed) + 1)), list(range(len(listed)))):
            return False
    return True
