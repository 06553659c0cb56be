"""Small files in the formats that data is published in."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def encoded(colour: str | tuple[int, int, int] = "red", size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
    """A real picture as bytes."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format=format)
    return file.getvalue()


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def listed(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return path


def parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def picture(folder: Path, name: str, colour: str = "red", size: tuple[int, int] = (8, 8)) -> str:
    """A picture file; its name comes back."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(colour, size, "JPEG" if path.suffix == ".jpg" else "PNG"))
    return name
