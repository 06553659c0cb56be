"""One row of a table that somebody else wrote: values are taken for no more than they are, errors say where."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """Named values with the place they come from."""

    where: str  # file:line, or file row n
    file: Path
    values: Mapping[str, Any]

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def has(self, *names: str) -> bool:
        """Whether the row has all of these columns, empty or not."""
        return all(name in self.values for name in names)

    def error(self, what: str) -> ConfigError:
        return ConfigError(f"{self.where} {what}")

    def text(self, name: str) -> str:
        """Text that is not blank."""
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"has no text under '{name}', but {_short(value)}.")
        return self._sound(value, name)

    def text_or(self, name: str, default: str = "") -> str:
        """Text, or a number as text, or the default where there is neither."""
        value = self.values.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._sound(value, name) if isinstance(value, str) and value.strip() else default

    def number(self, name: str) -> float:
        """A finite number, also one written as text, as CSV has it."""
        return self.as_number(self.values.get(name), name)

    def numbers(self, name: str) -> list[float]:
        return [self.as_number(value, name) for value in self.several(name)]

    def several(self, name: str) -> list[Any]:
        """The values of a list."""
        value = self.values.get(name)
        if not isinstance(value, list | tuple):
            raise self.error(f"has no list under '{name}', but {_short(value)}.")
        return list(value)

    def as_number(self, value: Any, name: str) -> float:
        try:
            found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            found = math.nan
        if not math.isfinite(found):
            raise self.error(f"has no number under '{name}', but {_short(value)}.")
        return found

    def as_whole(self, value: Any, name: str) -> int:
        """A whole number, also one written as text."""
        if isinstance(value, int | str) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                return int(value)
        raise self.error(f"has no whole number under '{name}', but {_short(value)}.")

    def same_length(self, names: str, *lists: Sequence[Any], least: int = 2) -> None:
        """Refuse lists that do not belong together, or that hold too little to compare."""
        lengths = [len(values) for values in lists]
        if len(set(lengths)) > 1 or lengths[0] < least:
            raise self.error(
                f"has {' and '.join(map(str, lengths))} values under {names}; it needs {least} or more, one for each."
            )

    def _sound(self, text: str, name: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise self.error(f"has text under '{name}' that is not Unicode: {text[:60]!a}.") from e
        return text


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    shown = f"{len(value)} bytes" if isinstance(value, bytes) else ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
