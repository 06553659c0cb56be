"""Pictures that are there already, with what is known of their worth: search runs, votes, preference files."""

from __future__ import annotations

import functools
import hashlib
import io
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign import vision
from diffalign.cases import Case, derived_seed
from diffalign.data.pictures import Picture
from diffalign.data.preferences import Comparison, read_comparisons
from diffalign.errors import ConfigError
from diffalign.train.data import PromptSampler

if TYPE_CHECKING:
    from diffalign.train.job import Job

CHUNK = 1000  # entries that are looked at together
AGAIN = "Give a run folder of `diffalign generate`, such as one with --method tree --top-k 4."


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where pictures come from; several sources are put together."""

    from_search: tuple[str, ...] = ()  # run folders of `diffalign generate`: the images of a prompt by their reward
    against: str | None = None  # a run folder to compare them with, such as plain draws of the same prompts
    from_votes: tuple[str, ...] = ()  # votes that a gallery exported
    pairs: tuple[str, ...] = ()  # preference files: Pick-a-Pic, HPD, ImageReward, or lists of images and ranks
    images: str | None = None  # where paths in votes and preference files start
    limit: int | None = None  # use only so many prompts

    def __post_init__(self) -> None:
        if self.against is not None and not self.from_search:
            raise ConfigError("data has against, but no from_search that would win. Give both, or neither.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"data.limit is {self.limit}, but training needs at least 1 prompt.")

    @property
    def given(self) -> bool:
        return bool(self.from_search or self.from_votes or self.pairs)


@dataclass(frozen=True)
class Known:
    """Pictures of one prompt and their scores, higher is better."""

    case: Case
    pictures: tuple[Picture, ...]
    scores: tuple[float, ...]
    confidence: float | None = None  # share of the voters behind the order, where it was counted


def read(config: DataConfig, *, ties: bool = False) -> list[Known]:
    """Every prompt of the sources with its pictures; what says nothing is left out and told.

    With `ties`, pictures that are as good as each other say something too.
    """
    kept, seen = list[Known](), list[Known]()
    for each in _sources(config):  # as they are read: a large file is not held where a limit is given
        seen.append(each)
        if len(seen) >= CHUNK or (config.limit and len(kept) + len(seen) >= config.limit):
            kept += _telling(seen, ties=ties)
            seen = []
        if config.limit is not None and len(kept) >= config.limit:
            break
    kept += _telling(seen, ties=ties)
    if max((len(each.pictures) for each in kept), default=0) > 1:  # single pictures among groups teach no comparison
        several = [each for each in kept if len(each.pictures) > 1]
        if len(several) < len(kept):
            warnings.warn(f"{len(kept) - len(several)} prompts of the data have one picture; left out.", stacklevel=2)
        kept = several
    if not kept:
        raise ConfigError("the data holds no prompt with two different pictures, one of them better. " + AGAIN)
    return kept[: config.limit]


def _telling(found: Sequence[Known], *, ties: bool) -> list[Known]:
    """Those whose pictures are there and differ in worth."""
    _require_files(found)
    told = [_distinct(each, ties=ties) for each in found]
    if useless := sum(not each.pictures for each in told):
        warnings.warn(
            f"{useless} of {len(told)} entries of the data say nothing: their pictures are one and the same"
            f"{'' if ties else ', or all as good'}. They are left out.",
            stacklevel=3,
        )
    return [each for each in told if each.pictures]


def _sources(config: DataConfig) -> Iterator[Known]:
    others = _of_run(Path(config.against)) if config.against is not None else {}
    for folder in config.from_search:
        found = _of_run(Path(folder))
        alike = config.against is not None and _rewards_of(Path(config.against)) == _rewards_of(Path(folder))
        if config.against is not None and (lacking := len(found.keys() - others.keys())):
            warnings.warn(
                f"'{config.against}' has no images for {lacking} of the {len(found)} prompts of '{folder}'; they stay "
                "as they are.",
                stacklevel=4,
            )
        for index, known in found.items():
            yield _beaten(known, others.get(index), alike=alike)
    for name in (*config.from_votes, *config.pairs):
        format = "votes" if name in config.from_votes else None
        for comparison in read_comparisons(name, format, images=config.images):
            yield _of_comparison(comparison)


def _of_comparison(comparison: Comparison) -> Known:
    scores = tuple(-float(rank) for rank in comparison.ranks)
    return Known(comparison.asked(), comparison.pictures, scores, comparison.confidence)


def _of_run(folder: Path) -> dict[tuple[int, str], Known]:
    """The images of a run, by the number of their prompt and the prompt."""
    from diffalign.gallery.rows import number, read_lines

    found: dict[tuple[int, str], list[tuple[Picture, float]]] = {}
    for where, row in read_lines(folder / "results.jsonl", AGAIN):
        prompt, file, reward = row.get("prompt"), row.get("file"), number(row.get("reward"))
        if not isinstance(prompt, str) or not isinstance(file, str):
            raise ConfigError(f"{where} has no prompt or no file. {AGAIN}")
        if not (folder / file).resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{where} names '{file}', which lies outside the run folder. {AGAIN}")
        if reward is None:  # a plain draw without a reward, or one that could not be judged: below all that were
            reward = -math.inf
        picture = Picture(file, where, folder / "results.jsonl", folder)
        found.setdefault((int(row.get("index", 0)), prompt), []).append((picture, reward))
    return {
        key: Known(Case(prompt=key[1]), tuple(picture for picture, _ in rows), tuple(reward for _, reward in rows))
        for key, rows in found.items()
    }


def _rewards_of(folder: Path) -> Any:
    """What a run was scored by, as its card says; None where it has none."""
    from diffalign.gallery.rows import read_object

    return (read_object(folder / "card.json") or {}).get("rewards")


def _beaten(known: Known, other: Known | None, *, alike: bool) -> Known:
    """With another run's pictures: by their reward where that is the `alike`, else below all of these."""
    if other is None:
        return known
    low = min((score for score in known.scores if math.isfinite(score)), default=0.0) - 1.0
    scores = tuple(score if alike and math.isfinite(score) else low for score in other.scores)
    return Known(known.case, known.pictures + other.pictures, known.scores + scores)


def _require_files(found: Sequence[Known]) -> None:
    """Refuse data whose pictures are not there, before any of it is used."""
    pictures = [picture for each in found for picture in each.pictures]
    missing = [picture for picture in pictures if picture.missing]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(pictures)} pictures of the data are missing, first '{missing[0].content!s:.120}' "
            f"({missing[0].where}). Set data.images to the folder where their paths start."
        )


def _distinct(known: Known, *, ties: bool) -> Known:
    """Each picture once, with its best score; none where nothing is better than anything, unless `ties` count."""
    best: dict[str, tuple[Picture, float]] = {}
    for picture, score in zip(known.pictures, known.scores, strict=True):
        key = content(picture)
        if key not in best or best[key][1] < score:
            best[key] = picture, score
    scores = [score for _, score in best.values() if math.isfinite(score)]
    if len(known.pictures) > 1 and (len(best) < 2 or len(set(scores)) < (1 if ties else 2)):
        return replace(known, pictures=(), scores=())
    rows = sorted((row for row in best.values() if math.isfinite(row[1])), key=lambda row: -row[1])
    return replace(known, pictures=tuple(p for p, _ in rows), scores=tuple(s for _, s in rows))


def content(picture: Picture) -> str:
    """One name for what is in a picture's file; ConfigError where that is no picture."""
    found = picture.content
    try:
        if isinstance(found, bytes):
            return _checked(found)
        path = picture.path(found)
        told = path.stat()
        return _of_file(path, told.st_size, told.st_mtime_ns)
    except Exception as e:
        raise ConfigError(f"{picture.where} cannot be read as a picture ({e}). Mend it, or leave the row out.") from e


@functools.lru_cache(maxsize=1_000_000)
def _of_file(path: Path, size: int, changed: int) -> str:
    return _checked(path.read_bytes())


def _checked(data: bytes) -> str:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as file:
        file.verify()
    return hashlib.sha256(data).hexdigest()


class Stock:
    """The pictures of a job: which of them a step learns from, and their latents."""

    def __init__(self, entries: Sequence[Known], seed: int) -> None:
        self.entries = list(entries)
        self.seed = seed
        self._sampler = PromptSampler([each.case for each in entries], seed)

    @functools.cached_property
    def least(self) -> int:
        """Pictures of the prompt that has the fewest."""
        return min(len(each.pictures) for each in self.entries)

    def of(self, step: int, groups: int, size: int) -> list[list[tuple[Case, Picture, float]]]:
        """`size` pictures of each of the step's prompts, the best of them always; every group with seeds of its own."""
        found = []
        for group, index in enumerate(self._sampler.at(step, groups)):
            known = self.entries[index]
            order = torch.randperm(
                len(known.pictures) - 1,
                generator=torch.Generator().manual_seed(derived_seed(self.seed, "pictures", step, group)),
            )
            chosen = [0, *(order[: size - 1] + 1).tolist()]
            found.append([
                (
                    known.case.with_seed(derived_seed(self.seed, "train", step, group, member)),
                    known.pictures[k],
                    known.scores[k],
                )
                for member, k in enumerate(chosen)
            ])  # fmt: skip
        return found


def latents(job: Job, cases: Sequence[Case], pictures: Sequence[Picture]) -> Tensor:
    """The clean latents (B, ...) of pictures, at the size that the pipeline draws."""
    height, width = job.drawn[-2:]
    if len(job.drawn) == 5 and job.drawn[1] > 1:
        raise ConfigError(
            f"the data holds pictures, but {type(job.pipe).__name__} draws films of {job.drawn[1]} frames, which would "
            "learn to stand still. Use an objective that draws, without data."
        )
    pixels = torch.stack([_fitted(vision.to_tensor([picture.open()])[0], height, width) for picture in pictures])
    with torch.no_grad():
        return job.encoder.latents(pixels.to(job.device), job.driver(cases[:1])).float()


def _fitted(image: Tensor, height: int, width: int) -> Tensor:
    """A picture (3, H, W) at another size: scaled to cover it, and cropped around its middle."""
    if image.shape[-2:] == (height, width):
        return image
    scale = max(height / image.shape[-2], width / image.shape[-1])
    size = (max(height, round(image.shape[-2] * scale)), max(width, round(image.shape[-1] * scale)))
    large = torch.nn.functional.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[:, top : top + height, left : left + width]


def require_unseen(entries: Iterable[Known], monitor: Sequence[Case]) -> None:
    """Refuse data whose prompts are evaluated on too: what it teaches by heart would count as learnt."""
    from diffalign.data.preferences import overlap

    shared = overlap([each.case.prompt for each in entries], [case.prompt for case in monitor])
    if shared:
        raise ConfigError(
            f"{len(shared)} evaluation prompts stand in the data too, such as '{shared[0][:60]}', so what it shows by "
            "heart would count as learnt. Evaluate on other prompts (evaluate.prompts, evaluate.split), or take these "
            "out of the data."
        )
