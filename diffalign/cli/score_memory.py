"""What rewards will want of a device, by their cards; nothing is loaded to find out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.errors import UnknownName

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(MB|GB)")


def memory_of(spec: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The memory that the cards name, added up for default settings, and what each card says."""
    from diffalign import registry

    cards = registry.cards()
    told = {name: cards[name].memory if name in cards else "not told by a card" for name in _names(spec)}
    return {"memory_gb": round(sum(map(_gigabytes, told.values())), 2), "memory": told}


def _gigabytes(text: str) -> float:
    """The first size a card names, which is that of the default settings."""
    found = _SIZE.search(text)
    return float(found[1]) / (1 if found[2] == "GB" else 1000) if found else 0.0


def _names(spec: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """The rewards of a spec, without their weights; an unknown one is an error here already."""
    from diffalign import registry

    if isinstance(spec, Mapping):
        names = [str(e.get("reward", name)) if isinstance(e, Mapping) else str(name) for name, e in spec.items()]
    else:
        names = [re.sub(r":\s*[-+.\deE]+$", "", word.strip()) for word in spec]
    known = registry.reward_names()
    for name in names:
        if ":" not in name and name not in known:
            raise UnknownName.among("reward", name, known, "diffalign ls rewards")
    return names
