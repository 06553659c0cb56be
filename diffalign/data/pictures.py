"""Pictures of published data: bytes in the row, `{bytes, path}` as datasets store them, or paths near the file."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from diffalign import vision
from diffalign.data.row import Row
from diffalign.errors import MediaError

if TYPE_CHECKING:
    from PIL import Image

DEPTH = 4  # folders above the file that a path may start from


@dataclass(frozen=True)
class Picture:
    """A picture that is decoded when it is asked for, and not before."""

    content: bytes | str  # what is in the row: an encoded picture, or a path
    where: str
    file: Path
    root: Path | None = None  # where paths start; None looks around the file

    @classmethod
    def of(cls, row: Row, name: str, value: Any = None, root: Path | None = None) -> Picture:
        """The picture in a column, or `value` of a list in it."""
        found = row.values.get(name) if value is None else value
        if isinstance(found, dict):
            found = found.get("bytes") or found.get("path")
        if isinstance(found, bytearray | memoryview):
            found = bytes(found)
        if not isinstance(found, bytes | str) or not found:
            raise row.error(
                f"has no picture under '{name}': neither bytes nor a path. Take the data set that has its images."
            )
        return cls(found, f"{row.where}, '{name}'", row.file, root)

    @property
    def key(self) -> str:
        """One name for one content, or for one path."""
        content = (
            self.content
            if isinstance(self.content, bytes)
            else str(self.path(self.content)).encode("utf-8", "surrogatepass")
        )
        return hashlib.sha256(content).hexdigest()[:16]

    @property
    def missing(self) -> bool:
        """Whether it is named by a path that leads nowhere."""
        return isinstance(self.content, str) and not self.path(self.content).is_file()

    def open(self) -> Image.Image:
        """The picture as RGB; MediaError says which row it belongs to."""
        if isinstance(self.content, str) and self.content.lower().startswith(("http://", "https://")):
            raise MediaError(
                f"{self.where} is an address on the web, '{self.content[:120]}'. Download the pictures first."
            )
        try:
            if isinstance(self.content, str):
                return vision.read_image(self.path(self.content))
            return vision.read_image(cast(Any, io.BytesIO(self.content)))  # PIL opens files as well as names
        except MediaError as e:
            cause = e.__cause__ if isinstance(self.content, bytes) and e.__cause__ else e
            raise MediaError(f"{self.where} cannot be read as a picture: {cause}") from e

    def path(self, path: str) -> Path:
        """Where a path leads: below the root; else beside the file, in a folder of its name, or below one above it."""
        if self.root is not None:
            return self.root / path
        folder = self.file.resolve().parent
        starts = [folder, folder / self.file.stem, *folder.parents[:DEPTH]]
        places = [start / path for start in starts]
        return next((place for place in places if os.path.isfile(place)), places[0])
