"""Questions answered several at once: alike ones together, and one that cannot be asked spoils no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from diffalign.errors import ConfigError

Found = TypeVar("Found")


class Refused(Exception):
    """One question that cannot be asked, while others can; it never leaves a judge."""


def answers(
    rows: Sequence[int],
    alike: Callable[[int], Any],
    most: int,
    answer: Callable[[list[int]], list[Found]],
    otherwise: Callable[[str], Found],
) -> Iterator[tuple[int, Found]]:
    """Each row with its answer, found for up to `most` alike rows at once; `otherwise` has the problem of a row."""
    for some in _parts(rows, alike, most):
        try:
            found = answer(some)
        except Refused:  # by one of them; the others have their answers alone
            found = [_alone(k, answer, otherwise) for k in some]
        yield from zip(some, found, strict=True)


def require_few(images: Sequence[Any], name: str, most: int) -> None:
    """Refuse more pictures than the judge `name` takes in one question."""
    if len(images) > most:
        raise ConfigError(
            f"a question has {len(images)} pictures, and the judge '{name}' takes {most}. Ask about fewer at once, or "
            "raise `most_images`."
        )


def _alone(k: int, answer: Callable[[list[int]], list[Found]], otherwise: Callable[[str], Found]) -> Found:
    try:
        return answer([k])[0]
    except Refused as e:
        return otherwise(str(e))


def _parts(rows: Sequence[int], alike: Callable[[int], Any], most: int) -> Iterator[list[int]]:
    """The rows in groups that are alike, in parts of `most`."""
    groups: dict[Any, list[int]] = {}
    for row in rows:
        groups.setdefault(alike(row), []).append(row)
    for group in groups.values():
        yield from (group[start : start + most] for start in range(0, len(group), most))
