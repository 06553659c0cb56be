"""What people preferred: one prompt, two or more pictures, their ranks; `read_comparisons` is the door.

- `pickapic`: caption, jpg_0, jpg_1 (bytes), label_0, label_1 (0, 1/2 or 1), has_label, num_example_per_prompt. A pair;
  rows without a label are left out; the weight is 1 / rows of the prompt.
- `hpdv2`: prompt, image_path[], rank[] (1 is best), raw_annotations[]. A ranking; without `rank` the annotators' mean.
- `hpdv2_pairs`: prompt, file_path[2], human_preference[2]. A pair.
- `hpdv3`: prompt, path1 (preferred), path2, choice_dist[2] (votes), confidence. A pair, a tie where the votes are even;
  a missing confidence is the share of the votes.
- `imagereward`: image or image_path, prompt_id, prompt, rank, a picture a row; or prompt, generations[], ranking[]. A
  ranking of the pictures of one prompt_id.
- `imagereward_pairs`: prompt, img_better, img_worse. A pair.
- `editreward`: instruction, input_image, output_images[2] (preferred first), task_type, dimension. A pair with its
  source picture.
- `votes`: the votes of a gallery (docs/gallery.md): prompt, a_path, b_path, choice. A pair per blind vote; of several
  by one voter on the same pictures the latest.
- `plain`: prompt, images[], ranks[] (1 is best, ties allowed); optional source, weight, confidence, group, kind,
  aspect.

Pictures are bytes, `{bytes, path}`, or paths: below `images` where it is given, else beside the file, in a folder of
its name (test.json, test/), or from one of the folders above it.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cases import Case
from diffalign.data.pictures import Picture
from diffalign.errors import ConfigError, UnknownName

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Pictures of one prompt in the order people like them."""

    case: Case
    pictures: tuple[Picture, ...]  # decoded when asked for
    ranks: tuple[int, ...]  # 1 is best; equal ranks are a tie
    group: str  # the prompt: what an interval resamples
    weight: float = 1.0  # what the pair counts in training, 1 / pairs of the prompt
    confidence: float | None = None  # share of the voters behind the order
    source: Picture | None = None  # the picture that was edited
    aspect: str = ""  # what was judged: prompt_following, consistency, overall

    def __post_init__(self) -> None:
        if len(self.pictures) < 2 or len(self.pictures) != len(self.ranks):
            raise ConfigError(
                f"{len(self.pictures)} pictures with {len(self.ranks)} ranks are no comparison; it takes two or more."
            )

    @property
    def kind(self) -> str:
        """What the prompt tests."""
        return str(self.case.metadata.get("kind", ""))

    def asked(self) -> Case:
        """The case, with the picture to be edited."""
        return replace(self.case, source=self.source.open()) if self.source else self.case

    def images(self, source: Image.Image | None = None) -> list[Image.Image]:
        """The pictures as RGB, at the size of `source` where one is given."""
        found = [picture.open() for picture in self.pictures]
        return [image if source is None or image.size == source.size else image.resize(source.size) for image in found]


def read_comparisons(
    path: str | Path, format: str | None = None, *, images: str | Path | None = None
) -> Iterator[Comparison]:
    """The comparisons of a file, a folder of shards or a pattern, as they are read; `images` is where paths start."""
    from diffalign.data.preference_formats import FORMATS

    name = sniff(path) if format is None else format
    if name not in FORMATS:
        raise UnknownName.among("preference format", name, FORMATS, "python -m pydoc diffalign.data.preferences")
    return _any(FORMATS[name].read(path, Path(images) if images is not None else None), path)


def sniff(path: str | Path) -> str:
    """The format of a file by its first row; ConfigError lists the formats where nothing fits."""
    from diffalign.data.preference_formats import FORMATS
    from diffalign.data.tables import first_row

    row = first_row(path)
    for name, format in FORMATS.items():
        if any(row.has(*columns) for columns in format.columns) and format.fits(row):
            return name
    columns = ", ".join(map(str, row.values)) or "none"
    raise ConfigError(
        f"'{path}' has the columns {columns}, which no preference data has. "
        f"Say which format it is: {', '.join(FORMATS)}."
    )


def dense(ranks: Sequence[float]) -> tuple[int, ...]:
    """Ranks of any spacing as 1, 2, 3, ...; ties stay ties."""
    place = {rank: k for k, rank in enumerate(sorted(set(ranks)), 1)}
    return tuple(place[rank] for rank in ranks)


def prompt_key(prompt: str, *more: str) -> str:
    """One name for a prompt, however it is spaced, capitalised and ended, and for what else belongs to it."""
    text = "\n".join((plain(prompt), *more))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def plain(prompt: str) -> str:
    """A prompt without what makes no difference: forms of letters, case, spaces, the mark at its end."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split()).rstrip(" .,;!")


def overlap(train: Iterable[str], test: Iterable[str]) -> list[str]:
    """The prompts of `test` that `train` holds too, however they are spaced, capitalised and ended."""
    seen = {prompt_key(prompt) for prompt in train}
    return list(dict.fromkeys(prompt for prompt in test if prompt_key(prompt) in seen))


Reader = Callable[[str | Path, Path | None], Iterator[Comparison]]


def _any(found: Iterator[Comparison], path: str | Path) -> Iterator[Comparison]:
    count = 0
    for comparison in found:
        count += 1
        yield comparison
    if not count:
        raise ConfigError(f"'{path}' holds no comparison that counts: no labels, or no prompt with two pictures.")
