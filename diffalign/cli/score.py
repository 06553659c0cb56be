"""`diffalign score`: what rewards say about images that already exist."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from diffalign.cli.verb import Opt, Verb
from diffalign.errors import ConfigError, MediaError
from diffalign.gallery import rows
from diffalign.gallery.pictures import IMAGES

if TYPE_CHECKING:
    from diffalign.cases import Case


@dataclass(frozen=True, kw_only=True)
class ScoreImages(Verb):
    """Score images: a file, a folder, or the output of `diffalign generate`.

    Prompts come from IMAGES/results.jsonl where `generate` left one, else from --prompt (one for all), --prompts
    (line k belongs to the k-th image by name), or a .txt file beside each image. Writes OUT/scores.jsonl.

    \b
    diffalign score out/generate --reward clip
    diffalign score photos/ --prompt "a red circle" --reward clip --reward jpeg_size
    diffalign score photos/ --prompts captions.txt --reward mine.py:sharp --cache scores.sqlite
    """

    NAME: ClassVar[str] = "score"
    images: Annotated[str, Opt("File or folder of images.", positional=True)]
    reward: Annotated[tuple[str, ...] | dict[str, Any], Opt("Reward; repeat for more columns.", flag="-r")] = ("clip",)
    prompt: Annotated[str | None, Opt("One prompt for every image.", flag="-p")] = None
    prompts: Annotated[str | None, Opt("File with one prompt per image, in the order of their names.")] = None
    out: Annotated[str | None, Opt("Folder for scores.jsonl.")] = "out/score"
    batch: Annotated[int, Opt("Images scored at once.")] = 16
    device: Annotated[str, Opt("Where rewards run.")] = "cpu"
    cache: Annotated[str | None, Opt("SQLite file of scores; a run that was stopped continues where it was.")] = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"batch is {self.batch}, but at least 1 image is scored at a time.")
        if self.prompt is not None and self.prompts is not None:
            raise ConfigError("give --prompt for all images or --prompts for each, not both.")

    def cost(self) -> dict[str, Any]:
        pairs = self.pairs()
        return {"images": len(pairs), "reward_calls": len(pairs) * len(self.reward)}

    def run(self) -> dict[str, Any]:
        from diffalign import atomic, scoring
        from diffalign.cli.model import quiet_libraries
        from diffalign.cli.truth import progress

        out = atomic.require_folder(self.out or "out/score")
        pairs = self.pairs()
        quiet_libraries()
        rewards = _each(self.reward)
        cache = scoring.ScoreCache(self.cache) if self.cache else None
        rows: list[dict[str, Any]] = [{"file": str(path), "prompt": case.prompt} for path, case in pairs]
        with progress(len(pairs), "images") as advance:
            for start in range(0, len(pairs), self.batch):
                some = pairs[start : start + self.batch]
                _score_batch(rewards, some, rows[start : start + self.batch], cache, self.device)
                advance(len(some))
        table = [_summary(reward.name, rows) for reward in rewards]
        atomic.write_jsonl(out / "scores.jsonl", rows)
        _print(table, out)
        return {"rows": table}

    def pairs(self) -> list[tuple[Path, Case]]:
        """Each image with what it was asked to show."""
        from diffalign.cases import Case, read_cases

        place = Path(self.images)
        if (place / "results.jsonl").is_file() and self.prompt is None and self.prompts is None:
            return _from_results(place)
        files = _find(place)
        if self.prompts is not None:
            cases = read_cases(self.prompts)
            if len(cases) != len(files):
                raise ConfigError(
                    f"'{self.prompts}' has {len(cases)} prompts for {len(files)} images; give one for each."
                )
            return list(zip(files, cases, strict=True))
        return [(file, Case(prompt=self.prompt if self.prompt is not None else _beside(file))) for file in files]


def _find(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.exists():
        raise MediaError(f"there is no image or folder '{place}'.")
    files = sorted(path for path in place.rglob("*") if path.suffix.lower() in IMAGES)
    if not files:
        raise MediaError(f"'{place}' holds no image ({', '.join(sorted(IMAGES))}).")
    return files


def _from_results(place: Path) -> list[tuple[Path, Case]]:
    from diffalign.cases import Case

    pairs = []
    for where, row in rows.read_lines(place / "results.jsonl", "Make the run again."):
        try:
            pairs.append((place / row["file"], Case(prompt=row["prompt"], seed=int(row.get("seed", 0)))))
        except (KeyError, TypeError) as e:
            raise ConfigError(f"{where} has no 'file' and 'prompt': {json.dumps(row)[:80]}") from e
    return pairs


def _beside(file: Path) -> str:
    """The prompt in a text file of the image's name, or none."""
    text = file.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else ""


def _each(spec: Any) -> list[Any]:
    """One reward per column; their weights play no part here."""
    from diffalign.scoring import make_reward

    made = make_reward(spec)
    return list(getattr(made, "rewards", [made]))


def _score_batch(
    rewards: list[Any], pairs: list[tuple[Path, Case]], rows: list[dict[str, Any]], cache: Any, device: str
) -> None:
    """Fill in `rows` for these images; sizes may differ, so each size is scored on its own."""
    import torch

    from diffalign import scoring, vision

    pictures = [tensor[0] for tensor in vision.read_images(path for path, _ in pairs)]
    for size in dict.fromkeys(tuple(p.shape) for p in pictures):
        at = [i for i, p in enumerate(pictures) if tuple(p.shape) == size]
        batch, cases = torch.stack([pictures[i] for i in at]).to(device), [pairs[i][1] for i in at]
        for reward in rewards:
            with torch.no_grad():
                found = scoring.score(reward, batch, cases, cache=cache, all_invalid=True)
            for k, i in enumerate(at):
                rows[i][reward.name] = float(found.total[k]) if bool(found.valid[k]) else None


def _summary(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from diffalign.errors import InvalidReward
    from diffalign.intervals import bootstrap

    values = [row[name] for row in rows if row[name] is not None]
    if not values:
        raise InvalidReward(f"reward '{name}' could not score any of the {len(rows)} images. Are they what it expects?")
    return {"reward": name, **bootstrap(values).json(), "n": len(values), "invalid": len(rows) - len(values)}


def _print(table: list[dict[str, Any]], out: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = Table("reward", "mean", "95 % interval", "images", "invalid", box=SIMPLE_HEAD)
    for row in table:
        interval = f"{row['lo']:.4f} to {row['hi']:.4f}"
        shown.add_row(row["reward"], f"{row['mean']:.4f}", interval, str(row["n"]), str(row["invalid"]))
    Console().print(shown)
    print(f"each image: {out}/scores.jsonl")
