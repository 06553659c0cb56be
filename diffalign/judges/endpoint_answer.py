"""What comes back from a server, and what goes there, as the line sees it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from diffalign.errors import ConfigError
from diffalign.judges.endpoint_forms import clean, shown

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 507, 529)  # statuses of a server that may answer later


@dataclass(frozen=True)
class Answer:
    """What came back from a server."""

    status: int = 0  # of HTTP; 0 where nothing came
    content: Any = None  # of a good answer, without the key
    whole: str = ""  # why there is none, in full and without the key
    unreachable: bool = False  # nobody listens there
    again: bool = False  # whether another try may go better
    pause: float | None = None  # seconds that the server asks for

    @property
    def problem(self) -> str:
        """Why there is none, short enough to be shown."""
        return shown(self.whole) if self.whole else ""


def written(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body; one that is no JSON is an error of ours and not the server's answer."""
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as e:
        raise ConfigError(
            f"a question cannot be written as JSON: {e}. Its schema, its labels and the model's name are to be plain."
        ) from e
    return dict(body)


def line(text: str) -> str:
    """On one line."""
    return " ".join(clean(text).split())


def message(body: Any, error: Any) -> str:
    """What the server itself says about an error."""
    if isinstance(body, dict):
        told = body.get("message") or body.get("detail") or body.get("error") or body
        return told if isinstance(told, str) else repr(told)
    return str(body or error.response.text or error.message)


def pause_of(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: a number, or the time from when on it answers."""
    told = headers.get("retry-after")
    if told is None:
        return None
    try:
        pause = float(told)
    except ValueError:
        try:
            pause = parsedate_to_datetime(told).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, pause) if math.isfinite(pause) else None
