"""Reading what a judge wrote. Nothing here raises, and what cannot be read in one way only is None, never a number.

JSON is read by a parser of our own. It allows text around the value, a trailing comma, single quotes, line breaks in
strings and Python's True, False and None. It refuses what leaves a doubt: a cut-off end, brackets that do not pair,
two values that disagree, a key given twice with two values, NaN, Infinity and numbers that are no JSON. A number in
quotes stays text, and True is no number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

LONGEST = 100_000  # characters of a reply
DEEPEST = 24  # brackets inside brackets
DIGITS = 40  # characters of a number

_THOUGHT = re.compile(r"</?(?:think|thinking|thought)>", re.IGNORECASE)
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![\w.])", re.ASCII)
_WORD = re.compile(r"(?:true|false|null|True|False|None)\b")
_STRING = {mark: re.compile(rf"{mark}((?:[^{mark}\\]|\\.)*){mark}", re.DOTALL) for mark in "\"'"}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_MEANS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_NAMED = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_FENCE = re.compile(r"```\w*\s")
_BULLET = re.compile(r"(?:[-*•]\s+|\(?[0-9]+[.):]\s*)?", re.ASCII)


class _Malformed(Exception):
    """Of this file only: the readers turn it into None."""


def read_json(text: str) -> Any | None:
    """The one object in a reply, else the one list; None where there is none or two that differ."""
    values = _values(text)
    if values is None:
        return None
    return _one([v for v in values if isinstance(v, dict)] or values)


def read_list(text: str, count: int | None = None) -> list[Any] | None:
    """The one list in a reply, or the one that an object of a single entry holds; `count` is how long it must be."""
    lists = []
    for value in _values(text) or []:
        held = next(iter(value.values())) if isinstance(value, dict) and len(value) == 1 else value
        if isinstance(held, list):
            lists.append(held)
    found = _one(lists)
    return found if isinstance(found, list) and count in (None, len(found)) else None


def read_scores(text: str, count: int, low: float, high: float, key: str = "score") -> tuple[float, ...] | None:
    """`count` numbers of an object's `key`, or of a list that is the whole reply; a lone one may stand bare."""
    value = read_json(text)
    value = value.get(key) if isinstance(value, dict) else _whole(text)
    if count == 1 and not isinstance(value, list):
        value = [value]
    return numbers(value, count, low, high)


def read_checks(text: str, count: int, low: float = 0.0, high: float = 10.0) -> tuple[tuple[int, ...], float] | None:
    """`{"checks": [1, 0], "score": 7.5}`: `count` zeros or ones, and a score."""
    value = read_json(text)
    if not isinstance(value, dict):
        return None
    checks, score = numbers(value.get("checks"), count, 0, 1), number(value.get("score"), low, high)
    if checks is None or score is None or not set(checks) <= {0.0, 1.0}:
        return None
    return tuple(int(check) for check in checks), score


def read_final_score(text: str, label: str, low: float, high: float) -> float | None:
    """The number of a line such as `Final Score: 3.5`; None where such a line has none, or two lines differ."""
    said = _said(text)
    if said is None:
        return None
    begun = re.compile(
        rf"^[ \t>#*_`\-•]*{re.escape(label)}(?:[ \t*_]*\([^()\n]*\))?[ \t*_`]*[:\uff1a](.*)$", re.I | re.M
    )
    ends = re.compile(r"[\s*_`]*(-?[0-9]+(?:\.[0-9]+)?)(?:\s*(?:/|out of)\s*([0-9]+(?:\.[0-9]+)?))?[\s*_`.]*", re.ASCII)
    found = set()
    for line in begun.findall(said):
        match = ends.fullmatch(line)
        if match is None or len(match[1]) > DIGITS or len(match[2] or "") > DIGITS:
            return None
        if match[2] is not None and float(match[2]) != high:
            return None
        found.add(float(match[1]))
    return number(found.pop(), low, high) if len(found) == 1 else None


def read_labelled(text: str, labels: Sequence[str], low: float, high: float) -> tuple[float, ...] | None:
    """One line a label, each with a number."""
    found = [read_final_score(text, label, low, high) for label in labels]
    read = tuple(value for value in found if value is not None)
    return read if len(read) == len(labels) else None


def read_words(text: str, allowed: Sequence[str], count: int) -> tuple[str, ...] | None:
    """`count` of the `allowed` words: a JSON list of them or of objects with an `answer`, or nothing but the words."""
    listed = read_list(text)
    if listed is None:
        said = _said(text)
        if said is None:
            return None
        listed = [_BULLET.sub("", part.strip(), count=1) for part in re.split(r"[,;\n]+", _bare(said)) if part.strip()]
    said_as = {word.casefold(): word for word in allowed}
    words = [entry.get("answer") if isinstance(entry, dict) else entry for entry in listed]
    found = [said_as.get(word.strip(" \t\r\n.!*_`\"'").casefold()) for word in words if isinstance(word, str)]
    read = tuple(word for word in found if word is not None)
    return read if len(read) == len(words) == count else None


def number(value: Any, low: float, high: float) -> float | None:
    """The value as a float if it is a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if low <= value <= high and math.isfinite(value) else None


def numbers(value: Any, count: int, low: float, high: float) -> tuple[float, ...] | None:
    """A list of exactly `count` numbers from `low` to `high`."""
    if not isinstance(value, list) or len(value) != count:
        return None
    read = tuple(found for entry in value if (found := number(entry, low, high)) is not None)
    return read if len(read) == count else None


def _said(text: Any) -> str | None:
    """The reply after its thoughts; None where it is no text, too long, or the thoughts have no end."""
    if not isinstance(text, str) or len(text) > LONGEST:
        return None
    tags = list(_THOUGHT.finditer(text))
    if tags and not tags[-1][0].startswith("</"):
        return None
    return text[tags[-1].end() :] if tags else text


def _inner(said: str) -> str:
    """A reply without the code fence that holds all of it."""
    said = said.strip()
    opened = _FENCE.match(said)
    return said[opened.end() : -3].strip() if opened and said.endswith("```") and len(said) > 6 else said


def _bare(said: str) -> str:
    """A reply without its code fence and the brackets that hold all of it."""
    said = _inner(said)
    return said[1:-1] if said.startswith("[") and said.endswith("]") else said


def _whole(text: Any) -> Any | None:
    """The value that a reply consists of, a code fence aside."""
    said = _said(text)
    if said is None:
        return None
    said = _inner(said)
    try:
        value, end = _value(said, 0, 0)
    except _Malformed:
        return None
    return value if end == len(said) else None


def _one(values: Sequence[Any]) -> Any | None:
    """What all of them are."""
    return values[0] if len({json.dumps(value, sort_keys=True) for value in values}) == 1 else None


def _values(text: Any) -> list[Any] | None:
    """Every object and list that stands in no other; None where something that looks like one is broken or cut off."""
    said, found, at = _said(text), [], 0
    if said is None:
        return None
    try:
        while (opened := re.compile(r"[\[{\]}]").search(said, at)) is not None:
            if opened[0] in "]}":
                return None
            if _looks_like_json(said, opened.start()):
                value, at = _value(said, opened.start(), 0)
                found.append(value)
            else:
                at = _past(said, opened.start())
    except _Malformed:
        return None
    return found


def _looks_like_json(text: str, at: int) -> bool:
    inside = _skip(text, at + 1)
    start = text[inside : inside + 1]
    if text[at] == "{":
        return start in ("", "}", '"', "'")
    return start in ("", "]", '"', "'", "{", "[", "-") or start.isdecimal() or _WORD.match(text, inside) is not None


def _past(text: str, at: int) -> int:
    """The end of words in brackets."""
    depth = 0
    for match in re.compile(r"[\[{\]}]").finditer(text, at):
        depth += 1 if match[0] in "[{" else -1
        if depth == 0:
            return match.end()
    raise _Malformed


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """The value that starts here, and where it ends."""
    start = text[at : at + 1]
    if depth > DEEPEST or not start:
        raise _Malformed
    if start == "{":
        return _object(text, at, depth)
    if start == "[":
        return _list(text, at, depth)
    if start in _STRING:
        return _string(text, at)
    if match := _WORD.match(text, at):
        return _NAMED[match[0]], match.end()
    match = _NUMBER.match(text, at)
    if match is None or len(match[0]) > DIGITS:
        raise _Malformed
    value = int(match[0]) if match[0].lstrip("-").isdecimal() else float(match[0])
    if not math.isfinite(value):
        raise _Malformed
    return value, match.end()


def _list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        value, at = _value(text, at, depth + 1)
        found.append(value)
        at = _after_entry(text, at, "]")
    return found, at + 1


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    at = _skip(text, at + 1)
    while text[at : at + 1] != "}":
        key, at = _string(text, at)
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise _Malformed
        value, at = _value(text, _skip(text, at + 1), depth + 1)
        if key in found and _one([found[key], value]) is None:
            raise _Malformed
        found[key] = value
        at = _after_entry(text, at, "}")
    return found, at + 1


def _after_entry(text: str, at: int, closing: str) -> int:
    """Behind the comma after an entry, or at the closing bracket."""
    at = _skip(text, at)
    if text[at : at + 1] == ",":
        return _skip(text, at + 1)
    if text[at : at + 1] != closing:
        raise _Malformed
    return at


def _string(text: str, at: int) -> tuple[str, int]:
    pattern = _STRING.get(text[at : at + 1])
    match = pattern.match(text, at) if pattern else None
    if match is None:
        raise _Malformed
    found = _ESCAPE.sub(_unescaped, match[1])
    return found.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), match.end()


def _unescaped(match: re.Match[str]) -> str:
    if match[1]:
        return chr(int(match[1], 16))
    if match[2] == "u":
        raise _Malformed
    return _MEANS.get(match[2], match[2])
