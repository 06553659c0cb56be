"""`diffalign generate`: images from prompts, by the stock pipeline or a drop-in method."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from diffalign.cli.model import PromptVerb
from diffalign.cli.verb import Opt, words
from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from diffalign.bench.sample import Sampled
    from diffalign.cases import Case

# What decides an image beside its prompt and seed; reward only where it steers.
SETTLED = ("model", "lora", "device", "dtype", "attention", "call")
STEERS = ("method", "reward", "n", "budget", "seconds", "tune")


@dataclass(frozen=True, kw_only=True)
class Generate(PromptVerb):
    """Make images, with or without a reward.

    Writes OUT/images/*.png, OUT/results.jsonl (one line per image), OUT/summary.json and OUT/card.json: a run folder,
    which `diffalign gallery` shows beside others.

    \b
    diffalign generate -p "two red circles"
    diffalign generate -p "a blue square left of a green triangle" --method best_of_n --n 16 --reward clip
    diffalign generate --split hard --limit 32 --method best_of_n --budget 320 --reward clip
    diffalign generate -p "two red circles" --method tree --budget 640 --reward clip tune.width=3
    diffalign generate -p "two red circles" --method search --seconds 20 --reward clip tune.method=beam
    diffalign generate -p "two red circles" -m shapes-turbo --method reno --reward clip
    diffalign generate --prompts my.txt -m stabilityai/stable-diffusion-3-medium-diffusers --reward mine.py:sharp:2.0
    diffalign generate -p "make it winter" --image street.png -m timbrooks/instruct-pix2pix
    diffalign generate --config best_of_n_shapes n=8 call.guidance_scale=4
    """

    NAME: ClassVar[str] = "generate"
    out: Annotated[str | None, Opt("Folder for images, results.jsonl and card.json.")] = "out/generate"
    image: Annotated[
        str | None, Opt("Picture to edit, or a folder: one for all prompts, one prompt for all, or one each.")
    ] = None
    method: Annotated[str, Opt("stock, or a drop-in pipeline: see `diffalign ls pipelines`.")] = "stock"
    reward: Annotated[
        tuple[str, ...] | dict[str, Any],
        Opt("What to select by or just measure: clip, clip:2.0, file.py:name; repeat to add up.", flag="-r"),
    ] = ()
    n: Annotated[int | None, Opt("Candidates per prompt, for best_of_n.")] = None
    budget: Annotated[int | None, Opt("Most NFE per prompt; never exceeded.")] = None
    seconds: Annotated[float | None, Opt("Most seconds per prompt.")] = None
    tune: dict[str, Any] = field(default_factory=dict)  # the method's own settings, such as tune.width=3 for tree
    top_k: Annotated[int, Opt("Images to keep per prompt, best first.")] = 1
    batch: Annotated[int, Opt("Prompts in one pipeline call.")] = 8
    cache: Annotated[str | None, Opt("SQLite file of scores, so that a repeated run does not score twice.")] = None

    def __post_init__(self) -> None:
        if self.method != "stock" and not self.reward:
            raise ConfigError(f"method '{self.method}' selects by a reward. Add one, for instance --reward clip.")
        if self.method == "stock" and (self.n or self.budget or self.seconds or self.tune or self.top_k != 1):
            raise ConfigError(
                "n, budget, seconds, tune and top_k belong to a search; with method 'stock' add --method best_of_n."
            )
        if self.method == "best_of_n" and self.tune:
            raise ConfigError(f"tune is {self.tune}, but best_of_n has only --n, --budget and --top-k.")
        if self.method not in ("stock", "best_of_n") and self.n:
            raise ConfigError(f"n is {self.n}, but '{self.method}' draws as many as its budget allows. Use --budget.")
        for name, value in (("batch", self.batch), ("top_k", self.top_k), ("n", self.n), ("limit", self.limit)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but it must be at least 1.")

    def cases(self) -> list[Case]:
        """What is asked, each case with its seed and, where it is an edit, its picture."""
        from diffalign.cli import edits
        from diffalign.data import named_pictures

        cases = super().cases()
        if self.prompts is not None:
            cases = named_pictures.with_named(cases, Path(self.prompts))
        if self.image is None:
            return cases
        cases = edits.with_image(cases, self.image, self.limit)
        if self.image_seed is not None and len(cases) > 1:
            raise ConfigError(f"image_seed is one image's own seed, but '{self.image}' has {len(cases)} pictures.")
        return cases

    def options(self) -> dict[str, Any]:
        """What the method is told beyond the stock arguments."""
        from diffalign.budget import Limits

        if self.method == "stock":
            return {}
        from diffalign.bench.sample import ALIKE

        told: dict[str, Any] = {"top_k": self.top_k}
        if self.method != "best_of_n":
            told["keep"] = ALIKE  # to say how much a prompt's images differ
        elif self.n is not None:
            told["top_k"] = max(self.top_k, min(ALIKE, self.n))
        if self.n is not None:
            told["n"] = self.n
        if self.budget is not None or self.seconds is not None:
            told["budget"] = Limits(nfe=self.budget, seconds=self.seconds)
        return told | ({self.method: self.tune} if self.tune else {})

    def told(self) -> dict[str, Any]:
        """The method and its settings, in plain values."""
        own = {"n": self.n, "budget": self.budget, "seconds": self.seconds, "top_k": self.top_k, "tune": self.tune}
        told: dict[str, Any] = (own if self.method != "stock" else {}) | {"lora": self.lora}
        return {"name": self.method, **{name: value for name, value in told.items() if value}}

    def again(self, case: Case, image: str | None = None) -> str:
        """The command that makes this one image again; `image` is the file of the picture that is edited."""
        names = SETTLED if self.method == "stock" else SETTLED + STEERS
        settled = {name: getattr(self, name) for name in names}
        return words(Generate, {"prompt": (case.prompt,), "image_seed": case.seed, "image": image, **settled})

    def cost(self) -> dict[str, Any]:
        prompts, each = len(self.cases()), self.rows_per_image(self.pipeline_call())
        if self.method not in ("stock", "best_of_n"):  # how a search divides its budget is its own business
            told = {"prompts": prompts, "plain_nfe": each, "nfe_per_prompt_at_most": self.budget}
            return {**told, "seconds_per_prompt": self.seconds, "images_written": prompts * self.top_k}
        searching = self.method == "best_of_n"
        counts = [n for n in (self.n, self.budget and max(self.budget // each, 1)) if n]
        if searching and self.seconds is not None and not counts:  # as many as the time allows
            return {"prompts": prompts, "plain_nfe": each, "seconds_per_prompt": self.seconds}
        candidates = min(counts, default=8) if searching else 1
        return {
            "prompts": prompts,
            "candidates_per_prompt": candidates,
            "nfe_per_prompt": candidates * each,
            "decodes": prompts * candidates,
            "reward_calls": prompts * candidates * len(self.reward),
            "images_written": prompts * (self.top_k if searching else 1),
        }

    def run(self) -> dict[str, Any]:
        from diffalign import atomic, registry, scoring
        from diffalign.bench.card import card_of
        from diffalign.bench.sample import sample
        from diffalign.cli import edits
        from diffalign.cli.truth import passes, progress

        cases, out = self.cases(), atomic.require_folder(self.out or "out/generate")
        if self.method != "stock":
            registry.make_pipeline_class(self.method)  # an unknown name is known before a model loads
        reward = scoring.make_reward(self.reward) if self.reward else None
        pipe, call = self.pipeline(), self.pipeline_call()
        options = self.options() | ({"score_cache": scoring.ScoreCache(self.cache)} if self.cache else {})
        rows: list[dict[str, Any]] = []
        with progress(len(cases), "prompts") as advance:

            def write(done: Sampled, new: list[int]) -> None:
                for i in new:
                    given = edits.inputs_of(cases[i], f"{i:05d}", out)
                    picture = given.get("inputs", {}).get("source")
                    told = given | {"command": self.again(cases[i], picture and str(out / picture))}
                    rows.extend(row | told for row in _write(done, i, out, self.top_k))
                advance(len(new))

            done = sample(
                pipe, cases, method=self.method, reward=reward, call=call, options=options, batch=self.batch, each=write
            )
        passed = passes(done.pixels, cases) if self.split or self.embedded else None
        _mark(rows, passed)
        row = done.row(passed)
        card = card_of(pipe, self.model, cases, call, reward=reward, method=self.told())
        atomic.write_jsonl(out / "results.jsonl", rows)
        atomic.write_json(out / "summary.json", row | {"diversity": done.diversity})
        atomic.write_json(out / "card.json", card.json())
        print(f"{len(rows)} images in {out}  " + describe(row))
        _warn(rows, reward, cases)
        return {"rows": [row]}


def describe(row: dict[str, Any]) -> str:
    """One row of costs and means, for people."""
    parts = [f"NFE {row['nfe']:g}/prompt", f"{row['seconds']:.2f} s/prompt"]
    for name in ("proxy", "truth"):
        if row[name]:
            parts.append(f"{name} {row[name]['mean']:.3f} [{row[name]['lo']:.3f}, {row[name]['hi']:.3f}]")
    return ", ".join(parts)


def _write(done: Sampled, i: int, out: Path, most: int) -> list[dict[str, Any]]:
    """Write the best images of case i; one result row for each."""
    from diffalign import atomic, media

    rows = []
    shown = done.pixels[i][:most]
    for rank, pixels in enumerate(shown):
        name = f"images/{i:05d}.png" if len(shown) == 1 else f"images/{i:05d}-{rank}.png"
        if pixels.ndim == 4:  # a video: its frames side by side
            pixels = pixels.permute(1, 2, 0, 3).flatten(2)
        atomic.write_image(out / name, media.to_pil(pixels))
        case = done.cases[i]
        row = {"index": i, "rank": rank, "prompt": case.prompt, "seed": done.seeds[i][rank], "file": name}
        rows.append(row | _about(done, i, rank) | _scores(done, i, rank))
    return rows


def _about(done: Sampled, i: int, rank: int) -> dict[str, Any]:
    """What a page can say of an image beside its scores."""
    from diffalign.bench.sample import dense_steps

    told: dict[str, Any] = {}
    if metadata := dict(done.cases[i].metadata):  # what verifiable rewards read when the run is scored again
        told["metadata"] = json.loads(json.dumps(metadata, default=str), parse_constant=lambda _: None)
    if tag := metadata.get("tag"):
        told["tags"] = [str(tag)]
    if done.reports:
        report, row = done.report_of(i)
        told["candidates"] = int(report.scores.total[row].isfinite().sum())
        if rank == 0 and (steps := dense_steps(report, row)):
            told["steps"] = steps
    return told


def _scores(done: Sampled, i: int, rank: int) -> dict[str, Any]:
    found = done.scores[i]
    if found is None:
        return {}
    from diffalign.cli.edits import checks_of

    parts = found.parts_at(rank)
    told = {"reward": float(found.total[rank]) if bool(found.valid[rank]) else None, "parts": parts}
    return told | ({"checks": checks} if (checks := checks_of(parts)) else {})


def _warn(rows: list[dict[str, Any]], reward: Any, cases: list[Case]) -> None:
    """Say how many images could not be scored, and what the judges among the rewards said of that."""
    from diffalign import scoring

    if lost := sum("reward" in row and row["reward"] is None for row in rows):
        told = "; ".join(f"{name}: {said}" for name, said in scoring.problems_of(reward, cases).items())
        print(f"warning: {lost} of {len(rows)} images could not be scored{f' ({told})' if told else ''}")


def _mark(rows: list[dict[str, Any]], passed: list[bool] | None) -> None:
    """Add the verifier's word to the best image of each prompt."""
    if passed is not None:
        for row in rows:
            if row["rank"] == 0:
                row["truth"] = passed[row["index"]]
