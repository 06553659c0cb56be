"""What a templated prompt of T2I-CompBench asks for: two objects and their relation, or objects with their numbers.

The published code leaves this to a language model's noun phrases; the prompts are made from templates, so theirs are
enough here: "a cat on the left of a chair", "two frogs, three apples and a dog". Others give None.
"""

from __future__ import annotations

import re

from diffalign.rules.compbench import RELATIONS

NUMBERS = {
    word: value
    for value, words in enumerate(
        ("a an one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), 1
    )
    for word in words.split()
}
PLURALS = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "knives": "knife"}
PLURALS |= {
    "sheep": "sheep",
    "fish": "fish",
    "skis": "skis",
    "scissors": "scissors",
    "leaves": "leaf",
    "shelves": "shelf",
}
_ARTICLE = re.compile(r"^(?:an?|the|one)\s+", re.IGNORECASE)
_RELATION = re.compile("|".join(rf"\b{name}\b" for name in sorted(RELATIONS, key=len, reverse=True)), re.IGNORECASE)


def relation_of(prompt: str) -> tuple[str, str, str] | None:
    """(first object, relation, second object) of a spatial prompt."""
    found = list(_RELATION.finditer(prompt))
    if len(found) != 1:
        return None
    first, second = (_noun(prompt[: found[0].start()]), _noun(prompt[found[0].end() :]))
    return (first, found[0][0].lower(), second) if first and second else None


def numbers_of(prompt: str) -> dict[str, int] | None:
    """The count of each class of a numeracy prompt."""
    counts: dict[str, int] = {}
    for phrase in re.split(r",|\band\b", prompt.strip().rstrip(".").lower()):
        words = phrase.split()
        if not words:
            continue
        number = NUMBERS.get(words[0]) or (int(words[0]) if words[0].isdecimal() and len(words[0]) < 3 else 0)
        name = " ".join(words[1:])
        if not number or not name:
            return None
        name = singular(name) if number > 1 else name
        counts[name] = counts.get(name, 0) + number
    return counts or None


def singular(name: str) -> str:
    """The class of a plural, by its last word."""
    *before, last = name.split(" ")
    if last in PLURALS:
        last = PLURALS[last]
    elif last.endswith("ies") and len(last) > 4:
        last = last[:-3] + "y"
    elif last.endswith(("ches", "shes", "sses", "xes", "oes")):
        last = last[:-2]
    elif last.endswith("s") and not last.endswith("ss"):
        last = last[:-1]
    return " ".join([*before, last])


def _noun(text: str) -> str:
    return _ARTICLE.sub("", text.strip().rstrip(".")).strip().lower()
