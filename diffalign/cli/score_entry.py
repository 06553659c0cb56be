"""One image to score: where its pixels are, and what it was asked to show."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from diffalign.errors import MediaError

if TYPE_CHECKING:
    from PIL import Image

    from diffalign.cases import Case


class Cell(Protocol):
    """A picture that lies in a table."""

    def read(self) -> Path | bytes | None: ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An image and its request; pixels stay where they are until they are needed."""

    name: str  # what the output calls it
    picture: Path | Cell
    prompt: str = ""
    seed: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Path | Cell] = field(default_factory=dict)  # source, control, reference

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two entries the same image of the same request."""
        where = str(self.picture.absolute()) if isinstance(self.picture, Path) else self.name
        return where, self.prompt, json.dumps(self.metadata, sort_keys=True, default=str), repr(self.inputs)

    def load(self) -> tuple[Image.Image, Case]:
        """The image and its case; MediaError where a picture cannot be read."""
        from diffalign.cases import Case

        found: dict[str, Any] = {slot: _read(place, slot) for slot, place in self.inputs.items()}
        picture = _read(self.picture, "image")
        if picture is None:
            raise MediaError("the image cannot be read: its cell is empty")
        return picture, Case(prompt=self.prompt, seed=self.seed, metadata=self.metadata, **found)


def _read(place: Path | Cell, what: str) -> Image.Image | None:
    """Pixels as RGB, or None where a cell is empty."""
    from diffalign import vision

    try:
        held = place if isinstance(place, Path) else place.read()
        if held is None:
            return None
        return vision.read_image(cast(Any, io.BytesIO(held)) if isinstance(held, bytes) else held)
    except Exception as e:  # decoders throw anything at broken files
        raise MediaError(f"the {what} cannot be read: {_reason(e)}") from e


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    if type(cause).__name__ == "UnidentifiedImageError":
        return "it is not an image"
    if isinstance(cause, FileNotFoundError):
        return f"there is no file '{cause.filename}'"
    return " ".join(str(cause).split())[:200] or type(cause).__name__
