"""The JSON in a reply, read by a parser of our own: it forgives how a value is written and never what it says.

It allows text around the value, a trailing comma, single and curly quotes, quotes of a word inside a text, line breaks
in texts, Python's True, False and None, a score with its scale (20/25), and a bracket without its other half in the
words before an object. It refuses what leaves a doubt: a cut-off end, other brackets that do not pair, two values that
disagree, a key given twice with two values, NaN, Infinity and numbers that are no JSON. A number in quotes stays text,
and True is no number. Nothing here raises.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LONGEST = 100_000  # characters of a reply
DEEPEST = 24  # brackets inside brackets
DIGITS = 40  # characters of a number
MOST_STRAY = 3  # brackets without their other half in the words before an object

_THOUGHT = re.compile(r".*<(/?)(?:think|thinking|thought)>", re.IGNORECASE | re.DOTALL)  # up to the last tag
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![\w.])", re.ASCII)
_OF = re.compile(r"\s*/\s*")
_WORD = re.compile(r"(?:true|false|null|True|False|None)\b")
_NAMED = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019"}  # what opens a text, and what closes it
_OPEN, _CLOSE = "".join(_QUOTES), "".join(dict.fromkeys(_QUOTES.values()))
_STRING = {a: re.compile(rf"{a}((?:[^{b}\\]|\\.)*){b}", re.DOTALL) for a, b in _QUOTES.items()}
_NEXT = re.compile(r"\s*(?:[,\]}]|\Z)")  # what follows the value of an entry
_KEY = rf"[{_OPEN}][^\W\d][\w -]{{0,40}}[{_CLOSE}]\s*:"
_QUOTED = {
    a: re.compile(rf"{a}((?:[^\\]|\\.)*?){b}(?=\s*(?:,\s*(?:{_KEY}|\}})|\}}))", re.DOTALL) for a, b in _QUOTES.items()
}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_MEANS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_BRACKET = re.compile(r"[\[{\]}]")
_FENCE = re.compile(r"```\w*\s")
_LETTERS = re.compile(r"[^\W\d_]{2}")
_DATA = re.compile(r"[\"\u201c\u201d\d{]|'\s*[:,\]}]")


class _Malformed(Exception):
    """Of this file only: the readers turn it into None."""


@dataclass(frozen=True)
class Share:
    """A score with its scale, as 20/25."""

    value: float
    of: float


def values(text: Any) -> list[Any] | None:
    """Every object and list that stands in no other; None where something that looks like one is broken or cut off."""
    said, found, at, strays = spoken(text), [], 0, 0
    if said is None:
        return None
    try:
        while (opened := _BRACKET.search(said, at)) is not None:
            start = opened.start()
            if opened[0] in "[{" and _looks_like_json(said, start):
                value, at = _value(said, start, 0)
                found.append(value)
            elif opened[0] in "[{" and (end := _past(said, start)):
                at = end
            elif found or opened[0] == "{" or strays == MOST_STRAY or not _stray(said, start):
                return None
            else:
                at, strays = start + 1, strays + 1
    except _Malformed:
        return None
    return found


def whole(text: Any) -> Any | None:
    """The value that a reply consists of, a code fence aside."""
    said = spoken(text)
    if said is None:
        return None
    said = unfenced(said)
    try:
        value, end = _value(said, 0, 0)
    except _Malformed:
        return None
    return value if end == len(said) else None


def same(found: Sequence[Any]) -> Any | None:
    """What all of them are."""
    return found[0] if len({json.dumps(value, sort_keys=True, default=repr) for value in found}) == 1 else None


def spoken(text: Any) -> str | None:
    """The reply after its thoughts; None where it is no text, too long, or the thoughts have no end."""
    if not isinstance(text, str) or len(text) > LONGEST:
        return None
    thought = _THOUGHT.match(text)
    if thought is None:
        return text
    return text[thought.end() :] if thought[1] else None


def unfenced(said: str) -> str:
    """A reply without the code fence that holds all of it."""
    said = said.strip()
    opened = _FENCE.match(said)
    return said[opened.end() : -3].strip() if opened and said.endswith("```") and len(said) > 6 else said


def _looks_like_json(text: str, at: int) -> bool:
    inside = _skip(text, at + 1)
    start = text[inside : inside + 1]
    if text[at] == "{":
        return start in ("", "}", *_QUOTES)
    return start in ("", "]", "{", "[", "-", *_QUOTES) or start.isdecimal() or _WORD.match(text, inside) is not None


def _past(text: str, at: int) -> int | None:
    """The end of words in brackets, None where they have none."""
    depth = 0
    for match in _BRACKET.finditer(text, at):
        depth += 1 if match[0] in "[{" else -1
        if depth == 0:
            return match.end()
    return None


def _stray(text: str, at: int) -> bool:
    """Whether a bracket without its other half belongs to mere words, with an object to come behind more of them."""
    opened = re.compile(r"\{\s*[\"'\u201c\u2018]").search(text, at)
    if opened is None or (text[at] == "[" and not text[at + 1 : at + 2].isalpha()):
        return False
    words = text[: opened.start()]
    return _LETTERS.search(words) is not None and _DATA.search(words) is None


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _value(text: str, at: int, depth: int, entry: bool = False) -> tuple[Any, int]:
    """The value that starts here, and where it ends; `entry` where it is that of a key."""
    start = text[at : at + 1]
    if depth > DEEPEST or not start:
        raise _Malformed
    if start == "{":
        return _object(text, at, depth)
    if start == "[":
        return _list(text, at, depth)
    if start in _QUOTES:
        return _string(text, at, entry)
    if match := _WORD.match(text, at):
        return _NAMED[match[0]], match.end()
    value, at = _number(text, at)
    if slash := _OF.match(text, at):
        of, at = _number(text, slash.end())
        return Share(value, of), at
    return value, at


def _number(text: str, at: int) -> tuple[int | float, int]:
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
        value, at = _value(text, _skip(text, at + 1), depth + 1, entry=True)
        if key in found and same([found[key], value]) is None:
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


def _string(text: str, at: int, entry: bool = False) -> tuple[str, int]:
    """A text; that of an entry may hold bare quotes, and then ends at the first before another key or the end.

    What a wrong end would leave behind is no JSON, or names a key twice.
    """
    mark = text[at : at + 1]
    match = _STRING[mark].match(text, at) if mark in _STRING else None
    if entry and match is not None and not _NEXT.match(text, match.end()):
        match = _QUOTED[mark].match(text, at)
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
