"""Pictures as the page needs them: a small WebP to show, the lossless original beside it, named by their content."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign import atomic
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from PIL import Image

    from diffalign.gallery.sides import Picture

VIDEOS = (".mp4", ".webm", ".mov")
KEPT = {"PNG": ".png", "WEBP": ".webp", "JPEG": ".jpg", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tiff"}
FILMED = {b"ftyp": 4, b"\x1a\x45\xdf\xa3": 0}  # how videos begin, and where
WIDEST = 16383  # pixels of a WebP's side
SHOWN = 1600  # longer side of what the page shows
TINY = 256  # up to here the shown picture is lossless too
FPS = 8.0


class Unreadable(DiffalignError):
    """A picture that cannot be shown; the message says why."""


def store(picture: Picture, folder: Path) -> dict[str, Any]:
    """Write a picture into `folder`/media; what the manifest says of it, sizes included."""
    if isinstance(picture, Path):
        return _stored_file(picture, folder)
    from PIL import Image

    if isinstance(picture, Image.Image):
        return _stored_image(picture, folder)
    from diffalign import media

    pixels = picture.detach().float().cpu()
    if pixels.ndim == 3:
        return _stored_image(media.to_pil(pixels), folder)
    return _stored_film([media.to_pil(frame) for frame in pixels], folder)


def _stored_file(path: Path, folder: Path) -> dict[str, Any]:
    content = _bytes(path)
    if path.suffix.lower() in VIDEOS:
        if not any(content[at : at + len(mark)] == mark for mark, at in FILMED.items()):
            raise Unreadable(f"{path.name} is not a video")
        name = _write(folder, content, path.suffix.lower())
        return {"kind": "video", "shown": name, "original": name, "width": None, "height": None}
    image, kind = _opened(path.name, content)
    if kind not in KEPT:
        return _stored_image(image, folder)
    return _told(image, folder, _write(folder, content, KEPT[kind]))  # its name says what it is, whatever it was called


def read_image(path: Path) -> Image.Image:
    """A picture file as the page shows it, in RGB or RGBA."""
    return _opened(path.name, _bytes(path))[0]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise Unreadable(f"{path.name}: {e.strerror or e}") from e


def _opened(name: str, content: bytes) -> tuple[Image.Image, str]:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            image.load()
            return _plain(image), str(opened.format)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise Unreadable(f"{name} cannot be read: {_short(e)}") from e


def _plain(image: Image.Image) -> Image.Image:
    """Eight bits a channel, in RGB or RGBA."""
    import numpy as np
    from PIL import Image

    if image.mode in ("RGB", "RGBA"):
        return image
    if image.mode.startswith("I") or image.mode == "F":  # whole numbers of 16 bits, or shares of white
        values = np.asarray(image, dtype=np.float64)
        white = 65535.0
        if image.mode == "F":
            white = 1.0 if values.max(initial=0.0) <= 1 else 255.0
        return Image.fromarray((255 * (values / white).clip(0, 1)).round().astype(np.uint8)).convert("RGB")
    clear = image.mode in ("LA", "PA", "La") or "transparency" in image.info
    return image.convert("RGBA" if clear else "RGB")


def _stored_image(image: Image.Image, folder: Path) -> dict[str, Any]:
    return _told(image, folder, _write(folder, _encoded(image, "PNG"), ".png"))


def _told(image: Image.Image, folder: Path, original: str) -> dict[str, Any]:
    width, height = image.size
    image = _plain(image)
    if max(width, height) > SHOWN:
        image = image.copy()
        image.thumbnail((SHOWN, SHOWN))
    quality: dict[str, Any] = {"lossless": True} if max(image.size) <= TINY else {"quality": 90}
    shown = _write(folder, _encoded(image, "WEBP", **quality), ".webp")
    return {"kind": "image", "shown": shown, "original": original, "width": width, "height": height}


def _stored_film(frames: list[Image.Image], folder: Path) -> dict[str, Any]:
    """Frames in rows on one picture: the page plays several films on one clock."""
    width, height = frames[0].size
    columns = max(1, min(len(frames), WIDEST // width))
    rows = -(-len(frames) // columns)
    sheet = _sheet(frames, columns, rows)
    original = _write(folder, _encoded(sheet, "PNG"), ".png")
    scale = min(1.0, WIDEST / sheet.height, SHOWN / max(width, height))
    if scale < 1:
        small = max(1, int(width * scale)), max(1, int(height * scale))
        sheet = _sheet([frame.resize(small) for frame in frames], columns, rows)
    quality: dict[str, Any] = {"lossless": True} if max(width, height) <= TINY else {"quality": 85}
    shown = _write(folder, _encoded(sheet, "WEBP", **quality), ".webp")
    told = {"kind": "film", "shown": shown, "original": original, "width": width, "height": height}
    return {**told, "frames": len(frames), "columns": columns, "fps": FPS}


def _sheet(frames: list[Image.Image], columns: int, rows: int) -> Image.Image:
    from PIL import Image

    width, height = frames[0].size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for k, frame in enumerate(frames):
        sheet.paste(frame, (k % columns * width, k // columns * height))
    return sheet


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def _write(folder: Path, content: bytes, suffix: str) -> str:
    """The path from the page; equal content is written once, and a name says nothing about its system."""
    name = f"media/{hashlib.sha256(content).hexdigest()[:20]}{suffix}"
    if not (folder / name).exists():
        atomic.write_bytes(folder / name, content)
    return name


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
