"""Keeps the keys of judges out of what is written and shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def without_secrets(value: Any) -> Any:
    """The same settings, nested as they are, but for every `key`; a judge's key is then read from the environment.

    A mapping under that name is no secret but settings of something that happens to be called so.
    """
    if isinstance(value, Mapping):
        kept = {name: part for name, part in value.items() if name != "key" or isinstance(part, Mapping)}
        return {name: without_secrets(part) for name, part in kept.items()}
    if isinstance(value, list | tuple):
        return type(value)([without_secrets(part) for part in value])
    return value
