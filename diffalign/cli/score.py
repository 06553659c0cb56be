"""`diffalign score`: what rewards say about images that already exist."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from diffalign.cli import score_calibrate, score_output, score_shown, score_sources
from diffalign.cli.score_tables import Columns
from diffalign.cli.verb import Opt, Verb
from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from diffalign.cli.score_pass import Column, Pass


@dataclass(frozen=True, kw_only=True)
class ScoreImages(Verb):
    """Score images: files, folders, patterns, runs of `diffalign generate`, JSONL or parquet.

    Prompts come from the rows that name the images, else from --prompt (one for all), --prompts (line k belongs to
    image k, or a .jsonl or .csv file with `file` and `prompt`), or a .txt file beside each image. An image that cannot
    be read is one invalid row. Scores are kept in OUT/scores.sqlite: a second run asks no reward again, and one that
    was stopped goes on where it was. Writes OUT/scores.jsonl, scores.csv, summary.json and histogram.png.

    \b
    diffalign score out/generate -r clip
    diffalign score photos/ -p "a red circle" -r clip -r jpeg_size --top 5
    diffalign score 'photos/**/*.png' --prompts captions.csv -r clip:1.0 -r mine.py:sharp:0.5 --total
    diffalign score shard-*.parquet --prompt-column caption -r clip --device cuda --batch 64
    diffalign score edits.jsonl -r mine.py:kept --parts
    diffalign score out/generate -r clip --calibrate clip.json
    diffalign score photos/ -p "a cat" -r clip --calibrate clip.json --base model=my-model --base steps=28
    """

    NAME: ClassVar[str] = "score"
    images: Annotated[
        tuple[str, ...],
        Opt("Files, folders, quoted patterns, runs, .jsonl or .parquet files.", positional=True),
    ] = ()
    reward: Annotated[tuple[str, ...] | dict[str, Any], Opt("Reward; repeat for more columns.", flag="-r")] = ("clip",)
    prompt: Annotated[str | None, Opt("One prompt for every image.", flag="-p")] = None
    prompts: Annotated[str | None, Opt("Prompts by line (.txt, .jsonl) or by image name (.jsonl, .csv).")] = None
    image_column: Annotated[str | None, Opt("What names the image in .jsonl and .parquet; guessed if left out.")] = None
    prompt_column: Annotated[str | None, Opt("What holds the prompt there; guessed if left out.")] = None
    out: Annotated[str | None, Opt("Folder for scores, summary and histogram.")] = "out/score"
    batch: Annotated[int, Opt("Images scored at once.")] = 16
    device: Annotated[str, Opt("Where rewards run: cpu, cuda, cuda:1, mps; auto takes the fastest here.")] = "cpu"
    cache: Annotated[str | None, Opt("SQLite file of scores, if not OUT/scores.sqlite.")] = None
    no_cache: Annotated[bool, Opt("Ask every reward again and keep nothing.")] = False
    strict: Annotated[bool, Opt("Stop at an image that cannot be read or judged.")] = False
    parts: Annotated[bool | None, Opt("Parts of rewards as columns; left out, only scores.jsonl has them.")] = None
    total: Annotated[bool, Opt("Add the weighted sum of the rewards as a column.")] = False
    top: Annotated[int, Opt("Show and write the K best and the K worst by each reward.")] = 0
    per_prompt: Annotated[bool, Opt("With --top: of each prompt by itself.")] = False
    calibrate: Annotated[str | None, Opt("Also add these images, as references of a base model, to this table.")] = None
    base: Annotated[tuple[str, ...] | dict[str, Any], Opt("What drew those, as key=value; repeat.")] = ()

    def __post_init__(self) -> None:
        if not self.images:
            raise ConfigError("IMAGES is missing: files, folders, quoted patterns, runs, .jsonl or .parquet files.")
        for name, least in (("batch", 1), ("top", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, but it must be at least {least}.")
        for one, other in (("prompt", "prompts"), ("cache", "no_cache")):
            if getattr(self, one) is not None and getattr(self, other):
                raise ConfigError(f"give --{one} or --{other.replace('_', '-')}, not both.")
        if self.per_prompt and not self.top:
            raise ConfigError("per_prompt chooses from each prompt, but not how many. Add --top K.")

    @property
    def folder(self) -> Path:
        return Path(self.out or "out/score")

    def found(self) -> score_sources.Found:
        """Every image with what it was asked to show."""
        return score_sources.find(
            self.images,
            asked=score_sources.Asked(prompt=self.prompt, prompts=self.prompts),
            columns=Columns(image=self.image_column, prompt=self.prompt_column),
            out=self.folder,
        )

    def cost(self) -> dict[str, Any]:
        from diffalign.cli.score_memory import memory_of

        images = len(self.found().entries)
        return {"images": images, "reward_calls": images * len(self.reward), **memory_of(self.reward)}

    def run(self) -> dict[str, Any]:
        from diffalign import atomic, scoring
        from diffalign.cli.model import quiet_libraries
        from diffalign.cli.score_device import require_device
        from diffalign.cli.score_pass import Pass, require_usable

        device = require_device(self.device)
        out, found = atomic.require_folder(self.folder), self.found()
        base = score_calibrate.base_of(found, self.base, self.calibrate) if self.calibrate else {}
        quiet_libraries()
        columns = self.columns(len(found.entries))
        require_usable(columns, found.entries)
        cache = scoring.ScoreCache(None if self.no_cache else self.cache or out / "scores.sqlite")
        start = time.perf_counter()
        with _bar(len(found.entries)) as advance:
            done = Pass(
                columns=columns, cache=cache, batch=self.batch, device=device, strict=self.strict, advance=advance
            )
            done.run(found.entries)
        result = self.tell(found, done, time.perf_counter() - start)
        _require_scores(columns, done.unreadable, [entry.name for entry in found.entries])
        if self.calibrate:
            result["calibration"] = score_calibrate.add(self.calibrate, base, found.entries, columns)
        return result

    def columns(self, images: int) -> list[Column]:
        """One column per reward; their weights count in the total only."""
        from diffalign.cli.score_pass import Column
        from diffalign.reward_kinds import Composite
        from diffalign.reward_specs import parse_spec

        weighted = parse_spec(self.reward)
        Composite.require_names([reward for reward, _ in weighted])
        return [Column(reward=reward, weight=weight, values=[None] * images) for reward, weight in weighted]

    def tell(self, found: score_sources.Found, done: Pass, seconds: float) -> dict[str, Any]:
        """Write what was found, show it, and give it back."""
        from diffalign import atomic

        totals = _totals(done.columns) if self.total else None
        rows = score_output.scored_rows(found.entries, done.columns, totals, done.unreadable)
        score_output.write(self.folder, rows, done.columns, self.parts)
        keeps = done.cache.keeps
        table = [score_output.summary(c, score_output.whether_cached(c.reward, keeps)) for c in done.columns]
        table += [score_output.figures("total", totals)] if totals is not None else []
        result: dict[str, Any] = {"rows": table, "images": len(rows), "unreadable": len(done.unreadable)}
        score_shown.draw(self.folder / "histogram.png", table, rows)
        score_shown.show(table)
        if self.top:
            names = [told["reward"] for told in table]
            picked = [row for name in names for row in score_output.top(rows, name, self.top, self.per_prompt)]
            atomic.write_jsonl(self.folder / "top.jsonl", picked)
            score_shown.show_top(picked, self.per_prompt)
            result["top"] = picked
        atomic.write_json(self.folder / "summary.json", result)
        lost = f", {len(done.unreadable)} of them could not be read" if done.unreadable else ""
        print(f"{len(rows)} images{lost}, in {seconds:.1f} s: {len(rows) / max(seconds, 1e-9):.1f} images/s")
        print(f"each image: {self.folder}/scores.jsonl and scores.csv")
        return result


def _totals(columns: list[Column]) -> list[float | None]:
    """The weighted sum for each image; one invalid score with a weight makes it invalid."""
    counted = [column for column in columns if column.weight != 0]
    totals: list[float | None] = []
    for k in range(len(columns[0].values)):
        weighted = [column.weight * value for column in counted if (value := column.values[k]) is not None]
        totals.append(sum(weighted) if len(weighted) == len(counted) else None)
    return totals


def _require_scores(columns: list[Column], unreadable: dict[int, str], names: list[str]) -> None:
    """Refuse a result without any score, after it was written for people to look at."""
    from diffalign.errors import InvalidReward, MediaError

    images = len(names)
    if len(unreadable) == images:
        raise MediaError(f"none of the {images} images can be read; the first, '{names[0]}': {unreadable[0]}.")
    for column in columns:
        column.require_answer()
        if all(value is None for value in column.values):
            why = next(iter(column.reasons.values()), "it gives no reason")
            raise InvalidReward(
                f"reward '{column.name}' could not score any of the {images} images ({why}). Are they what it expects?"
            )


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar with images per second on stderr; silent where nobody watches."""
    from tqdm.auto import tqdm

    quiet = not sys.stderr.isatty()
    with tqdm(total=total, desc="scoring", unit=" images", smoothing=0.1, disable=quiet, leave=False) as bar:
        yield lambda n: bar.update(n) and None
