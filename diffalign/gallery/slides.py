"""Pictures for slides: a contact sheet of all systems side by side, and an animation that flips between them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign import atomic

if TYPE_CHECKING:
    from PIL import Image

MOST = 48  # entries on one sheet
FLIPPED = 12  # entries of an animation
HOLD = 1200  # milliseconds a system is shown


def write_sheet(manifest: Mapping[str, Any], folder: Path, file: Path) -> None:
    """A PNG of the first entries, every system beside the others."""
    names = [system["name"] for system in manifest["systems"]]
    atomic.write_image(file, _sheet(manifest, folder, range(len(names)), names, MOST))


def write_animation(manifest: Mapping[str, Any], folder: Path, file: Path) -> None:
    """A GIF of the first entries that shows one system after the other in the same places."""
    names = [system["name"] for system in manifest["systems"]]
    frames = [_sheet(manifest, folder, [k], [name], FLIPPED) for k, name in enumerate(names)]
    held = io.BytesIO()
    palettes = [frame.quantize(256) for frame in frames]
    palettes[0].save(held, format="GIF", save_all=True, append_images=palettes[1:], duration=HOLD, loop=0)
    atomic.write_bytes(file, held.getvalue())


def _sheet(
    manifest: Mapping[str, Any], folder: Path, systems: Sequence[int], names: Sequence[str], most: int
) -> Image.Image:
    from diffalign.bench.sheet import Entry, contact_sheet

    shown = manifest["entries"][:most]
    column = _column(manifest)
    entries = [
        Entry(prompt=entry["prompt"], pictures=[_picture(entry["shots"][k], folder, column) for k in systems])
        for entry in shown
    ]
    left_out = len(manifest["entries"]) - len(shown)
    told = f"{len(shown)} entries" + (f", {left_out} more on the page" if left_out else "")
    about = f"{told}. Numbers: {column}. Ticks: the exact verifier." if column else f"{told}."
    title = manifest["title"] if len(names) > 1 else f"{manifest['title']}: {names[0]}"
    return contact_sheet(entries, title=title, subtitle=about, labels=names)


def _column(manifest: Mapping[str, Any]) -> str | None:
    """The reward whose numbers stand below the pictures: what steered, else what did not."""
    for role in ("proxy", "heldout"):
        for reward in manifest["rewards"]:
            if reward["role"] == role:
                return str(reward["name"])
    return None


def _picture(shot: Mapping[str, Any] | None, folder: Path, column: str | None) -> Any:
    from PIL import Image

    from diffalign.bench.sheet import PAPER, Picture

    media = (shot or {}).get("media")
    if not shot or not media or media["kind"] == "video":
        return Picture(image=Image.new("RGB", (64, 64), PAPER))
    with Image.open(folder / media["shown"]) as opened:
        image = opened.convert("RGB")
    if media["kind"] == "film":  # its first frame
        columns = media.get("columns") or media["frames"]
        image = image.crop((0, 0, image.width // columns, image.height // -(-media["frames"] // columns)))
    truth = shot["scores"].get("truth") if "scores" in shot else None
    score = shot.get("scores", {}).get(column) if column else None
    return Picture(image=image, passed=None if truth is None else truth > 0.5, score=score)
