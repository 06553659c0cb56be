"""Pictures that the rows of a prompt file name, by a path from the file: into cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.cases import Case

IMAGES = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff")
INPUTS = {
    "source": ("source", "source_image", "input_image"),
    "control": ("control", "control_image"),
    "reference": ("reference", "reference_image"),
}


def named_inputs(row: Mapping[str, Any]) -> dict[str, str]:
    """Files of the pictures that a request came with, under `inputs` or by themselves."""
    given = row.get("inputs")
    inside = given if isinstance(given, Mapping) else {}
    found: dict[str, str] = {}
    for slot, names in INPUTS.items():
        for name in (inside.get(slot), *(row.get(name) for name in names)):
            if isinstance(name, str) and name:
                found.setdefault(slot, name)
    return found


def with_named(cases: Sequence[Case], prompts: Path, slots: Sequence[str] = ("source",)) -> list[Case]:
    """Each case with the pictures of these slots that its row names."""
    beside = prompts if prompts.is_dir() else prompts.parent
    return [_with_own(case, beside, slots) for case in cases]


def _with_own(case: Case, beside: Path, slots: Sequence[str]) -> Case:
    from diffalign import vision

    names = named_inputs(case.metadata)
    for slot in slots:
        name = names.get(slot, "")
        if getattr(case, slot) is None and name.lower().endswith(IMAGES):  # else it is the name of a data set, say
            rest = {key: value for key, value in case.metadata.items() if key not in INPUTS[slot]}
            changed: dict[str, Any] = {slot: vision.read_image(beside / name), "metadata": rest}
            case = replace(case, **changed)
    return case
