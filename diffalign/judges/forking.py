"""What becomes of a judge in other processes; a fork may copy a lock that a thread of the parent held."""

from __future__ import annotations

import os
from functools import partial
from typing import Any, Self
from weakref import WeakValueDictionary

_renewed: WeakValueDictionary[int, Any] = WeakValueDictionary()


def renewed_in_forks(thing: Any) -> None:
    """Call the object's `_renew` in every child that is forked while it lives."""
    _renewed[id(thing)] = thing


def _renew_all() -> None:
    for thing in list(_renewed.values()):
        thing._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)


class Shared:
    """One in a process, however often it is copied; another process makes it again from its settings."""

    _settings: dict[str, Any]

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> Any:
        return partial(type(self), **self._settings), ()
