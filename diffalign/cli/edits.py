"""Pictures to edit: from `--image` or beside the prompts, into cases, and what a run folder says of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from diffalign.cases import Case

CHECK = re.compile(r"(?:^|/)(?:check|item)/(.+)$")  # a part that is one question's answer, in a sum of rewards too
INPUTS = ("source", "control", "reference")


def with_image(cases: Sequence[Case], place: str, limit: int | None) -> list[Case]:
    """Each case with its picture of a file or folder: one for all prompts, or one prompt for all, or one each."""
    from diffalign.cases import derived_seed

    if any(case.source is not None for case in cases):
        raise ConfigError(
            f"--image is '{place}', but the prompts name pictures of their own. Leave one of the two out."
        )
    files = _files(Path(place))[:limit]
    pictures = [_read(file) for file in files]
    if len(pictures) == 1:
        return [replace(case, source=pictures[0]) for case in cases]
    if len(cases) == 1:
        seeds = [derived_seed(cases[0].seed, "picture", k) if k else cases[0].seed for k in range(len(pictures))]
        return [replace(cases[0], source=picture, seed=seed) for picture, seed in zip(pictures, seeds, strict=True)]
    if len(pictures) != len(cases):
        raise ConfigError(
            f"'{place}' has {len(pictures)} pictures for {len(cases)} prompts. Give one picture, one prompt, or as "
            "many of one as of the other; they are matched in the order of the names."
        )
    return [replace(case, source=picture) for case, picture in zip(cases, pictures, strict=True)]


def inputs_of(case: Case, stem: str, out: Path) -> dict[str, Any]:
    """Write the pictures a case came with; what its row says of them, and what was to be done."""
    from diffalign import atomic
    from diffalign.judges.rewarding import instruction_of

    given: dict[str, Image.Image] = {name: picture for name in INPUTS if (picture := getattr(case, name)) is not None}
    named = {name: f"inputs/{stem}-{name}.png" for name in given}
    for name, picture in given.items():
        plain = picture if picture.mode in ("RGB", "RGBA", "L") else picture.convert("RGB")
        atomic.write_image(out / named[name], plain)
    told: dict[str, Any] = {"inputs": named} if named else {}
    return told | ({"instruction": instruction_of(case)} if "source" in given else {})


def checks_of(parts: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """The questions a judge answered, in the form the gallery shows; those of other prompts have no value here."""
    found: list[dict[str, Any]] = []
    for name, value in parts.items():
        asked = CHECK.search(name)
        if asked and value is not None:
            check: dict[str, Any] = {"name": asked[1], "passed": value >= 1}
            found.append(check | ({"note": f"partly: {value:g}"} if 0 < value < 1 else {}))
    return found


def _files(place: Path) -> list[Path]:
    """A picture, or those of a folder in the order of their names."""
    from diffalign.data.named_pictures import IMAGES

    if not place.is_dir():
        return [place]
    found = sorted(file for file in place.iterdir() if file.suffix.lower() in IMAGES)
    if not found:
        raise ConfigError(f"--image is '{place}', a folder without pictures ({', '.join(IMAGES)}).")
    return found


def _read(file: Path) -> Image.Image:
    from diffalign import vision

    return vision.read_image(file)
