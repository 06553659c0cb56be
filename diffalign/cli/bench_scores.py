"""`diffalign bench scoring` and `bench mixing`: what scores cost, and whether calibration replaces tuned weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from diffalign.cli.verb import Opt, Verb
from diffalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Scoring(Verb):
    """How fast scores come: a batch over one image at a time, and the cache over a fresh pass, as ratios from one run.

    The scorer is a CLIP of realistic size with random weights.

    \b
    diffalign bench scoring
    diffalign bench scoring --architecture ViT-L-14 --images 8 --json scoring.json
    """

    NAME: ClassVar[str] = "scoring"
    architecture: Annotated[str, Opt("Architecture of open_clip.")] = "ViT-B-32"
    images: Annotated[int, Opt("Images in one batch.")] = 16
    side: Annotated[int, Opt("Pixels to a side, before the scorer's own resizing.")] = 512
    repeats: Annotated[int, Opt("Timed rounds; the median of their ratios counts.")] = 5

    def __post_init__(self) -> None:
        for name, value in (("images", self.images), ("side", self.side), ("repeats", self.repeats)):
            if not value > 0:
                raise ConfigError(f"{name} is {value}, but it must be above 0.")

    def run(self) -> dict[str, Any]:
        from diffalign.bench import scoring
        from diffalign.cli.bench_said import said

        told = {name: getattr(self, name) for name in ("architecture", "images", "side", "repeats", "seed")}
        with said() as on_step:
            found = scoring.measure(scoring.ScoringBench(**told), on_step=on_step)
        for name, what in (("batch", "a batch over one at a time"), ("cache", "the cache over a fresh pass")):
            least, most = found[f"{name}_ratio_range"]
            print(f"{what}: {found[f'{name}_ratio']:.3g} times as fast ({least:.3g} to {most:.3g})")
        print(f"{found['milliseconds_per_image']:.3g} ms an image, {found['threads']} threads")
        return found


@dataclass(frozen=True, kw_only=True)
class Mixing(Verb):
    """Does a calibrated mixture pick as well as the best hand-tuned weight? Judged by a column that is the truth.

    SCORES is scores.jsonl of `diffalign score`, with several images a prompt and a column for each name given here. Per
    prompt the best image by `first + w second` is picked for 163 weights, and the best by the mixture; and of every two
    images of which one is better, it is counted which one is preferred.

    \b
    diffalign score RUN --config mix.yaml --out out/mix
    diffalign bench mixing out/mix/scores.jsonl --first mixture/clip --second mixture/likelihood_ratio --truth shapes
    """

    NAME: ClassVar[str] = "mixing"
    scores: Annotated[str, Opt("scores.jsonl of `diffalign score`.", positional=True)]
    first: Annotated[str, Opt("Column of the first reward.")]
    second: Annotated[str, Opt("Column of the second reward.")]
    mixture: Annotated[str, Opt("Column of the mixture of both.")] = "mixture"
    truth: Annotated[str, Opt("Column that says which image is good.")] = "shapes"

    def run(self) -> dict[str, Any]:
        from pathlib import Path

        from diffalign.bench.mixing import Columns, compare
        from diffalign.cli.ls import print_table
        from diffalign.gallery.rows import read_lines

        columns = Columns(first=self.first, second=self.second, mixture=self.mixture, truth=self.truth)
        rows = [row for _, row in read_lines(Path(self.scores), "Score the images again.")]
        found = compare(rows, columns)
        for title, what in (("truth of the image picked", "best"), ("pairs told apart", "pairs")):
            lines, told = [], found[what]
            for name, interval in told["truth"].items():
                gain = told["mixture_minus"].get(name)
                lines.append({"by": name, title: _shown(interval), "mixture minus": _shown(gain) if gain else "-"})
            print_table(lines)
        first, second = found["scales"].values()
        print(f"{found['prompts']} prompts, {found['images']} images, {found['dropped']} left out as invalid")
        print(f"spread within a prompt: {first:.3g} and {second:.3g}")
        return found


def _shown(interval: dict[str, float]) -> str:
    return "{mean:.3f} [{lo:.3f}, {hi:.3f}]".format(**interval)
