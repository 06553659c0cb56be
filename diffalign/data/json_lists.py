"""A JSON list of any length, read element by element."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from diffalign.errors import ConfigError

PIECE = 2**16  # characters read at once
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)  # NaN and Infinity are no JSON, and no number to count on


def parse(text: str) -> Any:
    """One JSON value."""
    return _DECODER.decode(text)


def elements(file: IO[str], path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of each element; ConfigError names the line where the list breaks off."""
    reader = _Reader(file, path)
    reader.take_mark("[")
    if reader.peek() != "]":
        yield reader.line, reader.take_value()
        while reader.peek() == ",":
            reader.take_mark(",")
            reader.peek()
            yield reader.line, reader.take_value()
    reader.take_mark("]")
    if reader.peek():
        raise reader.error("something follows the end of the list")


class _Reader:
    """A window over the text that grows until a value fits."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.line = "", 0, 1

    def error(self, why: str) -> ConfigError:
        return ConfigError(f"{self.path}:{self.line} is not JSON ({why}). The file is one list, or one object a line.")

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None
            self._advance(space.end())
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def take_mark(self, mark: str) -> None:
        if (found := self.peek()) != mark:
            raise self.error(f"'{mark}' is missing before {found!r}" if found else f"the file ends before '{mark}'")
        self.at += 1

    def take_value(self) -> Any:
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as e:
                if self._more():
                    continue
                raise self.error(getattr(e, "msg", str(e))) from e
            if end == len(self.text) and self._more():
                continue  # a number may go on
            self._advance(end)
            return value

    def _more(self) -> bool:
        piece = self.file.read(max(PIECE, len(self.text) - self.at))  # doubles, so that a long value is soon whole
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)

    def _advance(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end
