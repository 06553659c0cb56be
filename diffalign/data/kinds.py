"""One word for what a prompt tests, whatever a benchmark calls it, so that a reward can be chosen by it."""

from __future__ import annotations

import re

KINDS = {
    "single_object": "object",
    "two_object": "object",
    "two_objects": "object",
    "color": "colour",
    "colors": "colour",
    "colours": "colour",
    "color_attr": "colour",
    "numeracy": "counting",
    "position": "spatial",
    "positional": "spatial",
}


def kind_of(name: str) -> str:
    """`Positional` -> spatial, `color_attr` -> colour; a name of its own otherwise, as small letters and underlines."""
    plain = re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_")
    return KINDS.get(plain, plain)
