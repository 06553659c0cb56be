"""Ctrl-C and SIGTERM as a request: the first is heard, the second ends at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ASKED = "asked to stop"  # why a run that heard the first signal ended
ECHO = 5.0  # seconds within which a launcher repeats to its processes a Ctrl-C that they have heard themselves


@contextmanager
def heard(ask: Callable[[], None]) -> Iterator[None]:
    """Run a block in which the first signal calls `ask` and a later one raises KeyboardInterrupt."""
    asked: float | None = None
    echo = ECHO if "LOCAL_RANK" in os.environ else 0.0

    def hear(number: int, frame: Any) -> None:
        nonlocal asked
        if asked is None:
            asked = time.monotonic()
            ask()
        elif time.monotonic() - asked >= echo:
            raise KeyboardInterrupt

    kept: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            kept[number] = signal.signal(number, hear)
    except ValueError:  # not the main thread, which alone hears signals
        pass
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
