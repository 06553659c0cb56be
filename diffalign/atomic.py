"""Files that are whole or absent: written beside their place, then renamed, so an interruption leaves the old file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from diffalign.errors import OutputError

if TYPE_CHECKING:
    from PIL import Image


def write_bytes(path: str | Path, content: bytes) -> Path:
    return _replace(Path(path), lambda file: file.write(content))


def write_text(path: str | Path, text: str) -> Path:
    return write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> Path:
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> Path:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    return write_text(path, "".join(f"{line}\n" for line in lines))


def finite(value: Any) -> Any:
    """A value as JSON has it: tensors and arrays as numbers or lists of them, null where a number is not finite."""
    if isinstance(value, Mapping):
        return {str(name): finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_image(path: str | Path, image: Image.Image) -> Path:
    """A PNG, whatever the name ends with."""
    return _replace(Path(path), lambda file: image.save(file, format="PNG"))


def require_folder(path: str | Path) -> Path:
    """Make the folder and try a file in it, so that a place that cannot be written is known before the work."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return folder
    except OSError as e:
        raise OutputError(f"cannot write into '{folder}': {e.strerror or e}. Choose another place with --out.") from e


def require_file(path: str | Path) -> Path:
    """The same for one file to come; a folder in its place is refused."""
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"cannot write '{path}': it is a folder. Give the name of a file.")
    require_folder(path.parent)
    return path


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as e:
        raise OutputError(f"cannot write '{path}': {e.strerror or e}. Choose another place with --out.") from e
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(e, OSError):
            raise OutputError(f"cannot write '{path}': {e.strerror or e}. The file is as it was.") from e
        raise
    return path


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
