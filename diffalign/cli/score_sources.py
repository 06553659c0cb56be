"""What `diffalign score` judges: files, folders, patterns, runs and tables, each image with what was asked of it."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffalign.cli import score_prompts, score_tables
from diffalign.cli.score_entry import Entry
from diffalign.cli.score_tables import Columns
from diffalign.data.named_pictures import IMAGES
from diffalign.errors import ConfigError, MediaError
from diffalign.gallery.pictures import VIDEOS

ROWS = (".jsonl", ".ndjson", ".parquet")  # files that name images


@dataclass(frozen=True)
class Found:
    """All images, in the order they were given, and the run folders among their sources."""

    entries: list[Entry]
    runs: list[Path] = field(default_factory=list)
    plain: bool = False  # whether some came from elsewhere than a run


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Where prompts come from, if not from where the images are."""

    prompt: str | None = None
    prompts: str | None = None

    def of(self, entries: list[Entry]) -> list[Entry]:
        """The same images, asked for what the options say; pictures that a row named stay with it."""
        if self.prompts is not None:
            return score_prompts.matched(entries, Path(self.prompts))
        if self.prompt is not None:
            return [replace(entry, prompt=self.prompt, metadata={}) for entry in entries]
        return entries


def find(images: Sequence[str], *, asked: Asked, columns: Columns, out: Path) -> Found:
    """Every image that `images` names, once each; what lies in `out` is ours and no input."""
    entries: list[Entry] = []
    runs: list[Path] = []
    plain = False
    for place in dict.fromkeys(place for word in images for place in _places(word, out)):
        if place.suffix.lower() in ROWS and place.is_file():
            entries += score_tables.read(place, columns)
            run = place.name == "results.jsonl"
            runs += [place.parent] if run else []
            plain |= not run
        else:
            entries.append(_alone(place))
            plain = True
    once = list({entry.key: entry for entry in entries}.values())
    if not once:
        raise ConfigError(f"there is no image to score: {', '.join(images)} names none.")
    return Found(asked.of(once), runs, plain)


def _alone(file: Path) -> Entry:
    """An image without a row; a text file of its name is its prompt."""
    if file.suffix.lower() in VIDEOS:
        raise MediaError(f"'{file}' is a video, and `diffalign score` judges images. Give it single frames.")
    text = file.with_suffix(".txt")
    prompt = text.read_text(encoding="utf-8-sig", errors="replace").strip() if text.is_file() else ""
    return Entry(name=str(file), picture=file, prompt=prompt)


def _places(word: str, out: Path) -> list[Path]:
    """The files that one argument stands for."""
    place = Path(word)
    if place.is_dir():
        return _inside(place, out)
    if os.path.lexists(place):
        return [place]
    if not glob.has_magic(word):
        raise MediaError(
            f"there is no image or folder '{word}'. Give files, folders, a quoted pattern such as 'photos/**/*.png', "
            "a run of `diffalign generate`, or a .jsonl or .parquet file."
        )
    hits = [hit for name in sorted(glob.glob(word, recursive=True)) if not _ours(hit := Path(name), out)]
    wanted = (*IMAGES, *(end for end in ROWS if word.endswith(end)))
    files = [hit for hit in hits if hit.suffix.lower() in wanted and not hit.is_dir()]
    found = files or [file for hit in hits if hit.is_dir() for file in _inside(hit, out)]
    if not found:
        raise MediaError(f"'{word}' matches no image ({', '.join(sorted(IMAGES))}). Is the pattern quoted?")
    return found


def _inside(folder: Path, out: Path) -> list[Path]:
    """The rows of a run, else the images of a folder and those below it, else its tables."""
    if (folder / "results.jsonl").is_file():
        return [folder / "results.jsonl"]
    files = sorted(_walk(folder, out))
    for ends in (IMAGES, (".parquet",)):
        if found := [file for file in files if file.suffix.lower() in ends]:
            return found
    raise MediaError(f"'{folder}' holds no image ({', '.join(sorted(IMAGES))}).")


def _walk(folder: Path, out: Path) -> Iterator[Path]:
    for at, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and not _ours(Path(at, name), out)]
        yield from (Path(at, name) for name in files if not name.startswith("."))


def _ours(path: Path, out: Path) -> bool:
    """Whether a path lies where scores are written, so that a second run does not judge our own figures."""
    return path.absolute().is_relative_to(out.absolute())
