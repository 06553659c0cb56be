"""When a server is given up: so that one that dies or hangs costs minutes, however many questions are left."""

from __future__ import annotations

import time

REST = 10.0  # seconds between two attempts to reach a server that was given up
DEAD = (0, 408, 500, 502, 503, 504)  # statuses of a server that is gone; 0 is no answer at all


class Breaker:
    """Opens after so many tries without an answer over at least `patience` seconds; one good answer closes it.

    While it is open one question after the other may try the server once, and not sooner than `REST` after the last.
    """

    def __init__(self, most: int, patience: float) -> None:
        self.most, self.patience = most, patience
        self.open = False
        self._missed, self._since, self._next = 0, 0.0, 0.0

    def note(self, status: int) -> None:
        """What a try came to."""
        now = time.monotonic()
        if status not in DEAD:
            self._missed, self.open = 0, False
            return
        if not self._missed:
            self._since = now
        self._missed += 1
        if self.open:
            self._next = now + REST
        elif self._missed >= self.most and now - self._since >= self.patience:
            self.open, self._next = True, now

    @property
    def resting(self) -> bool:
        """Whether nobody is to try just now."""
        return self.open and time.monotonic() < self._next
