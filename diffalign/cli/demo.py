"""`diffalign demo`: what best-of-N does, on the embedded models, in about a minute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from diffalign.cli.model import ModelVerb, Split
from diffalign.cli.verb import Opt
from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from diffalign.bench.sample import Sampled
    from diffalign.cases import Case


@dataclass(frozen=True, kw_only=True)
class Demo(ModelVerb):
    """Stock images against the best of N, side by side.

    A tiny model draws coloured shapes; a CLIP that was trained beside it picks the best of N; an exact verifier then
    says which images are really right. The verifier never takes part in the choice. No network is needed.

    Writes OUT/sheet.png (before and after) and OUT/card.json.

    \b
    diffalign demo
    diffalign demo --n 32 --seed 1
    diffalign demo --split hard --json demo.json
    """

    NAME: ClassVar[str] = "demo"
    out: Annotated[str | None, Opt("Folder for sheet.png and card.json.")] = "out/demo"
    n: Annotated[int, Opt("Candidates per prompt.")] = 16
    prompts: Annotated[int, Opt("Prompts, every kind of task in turn.")] = 8
    split: Annotated[Split, Opt("Prompt set of the shapes world.")] = "heldout"
    reward: Annotated[tuple[str, ...] | dict[str, Any], Opt("What selects.", flag="-r")] = ("clip",)

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("prompts", self.prompts)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, but the demo needs at least 1.")

    def cost(self) -> dict[str, Any]:
        each = self.rows_per_image(self.pipeline_call())
        images = self.prompts * self.n
        return {"prompts": self.prompts, "nfe_per_prompt": self.n * each, "decodes": images, "reward_calls": images}

    def cases(self) -> list[Case]:
        """Different prompts, every kind of task in turn."""
        import random

        from diffalign import world
        from diffalign.cases import derived_seed

        kinds: dict[str, dict[str, Case]] = {}
        every = list(world.prompts(self.split))
        random.Random(self.seed).shuffle(every)
        for case in every:
            kinds.setdefault(str(case.metadata.get("tag")), {})[case.prompt] = case
        piles = [list(kinds[tag].values()) for tag in sorted(kinds)]
        dealt = [pile[k] for k in range(max(map(len, piles))) for pile in piles if k < len(pile)]
        return [case.with_seed(derived_seed(self.seed, "prompt", i)) for i, case in enumerate(dealt[: self.prompts])]

    def run(self) -> dict[str, Any]:
        from diffalign import atomic, scoring
        from diffalign.bench.card import card_of
        from diffalign.bench.sample import sample
        from diffalign.cli.truth import verdicts

        out = atomic.require_folder(self.out or "out/demo")
        cases, reward = self.cases(), scoring.make_reward(self.reward)
        pipe, call = self.pipeline(), self.pipeline_call()
        pipe.set_progress_bar_config(disable=None, desc=f"best of {self.n}", unit="candidate")
        options = {"n": self.n, "top_k": self.n}
        done = sample(pipe, cases, method="best_of_n", reward=reward, call=call, options=options, batch=len(cases))
        base = first_candidates(done)
        truths = [[verdict.strict for verdict in verdicts(side.pixels, cases)] for side in (base, done)]
        rows = [base.row(truths[0]), done.row(truths[1]) | {"method": f"best of {self.n}"}]
        atomic.write_image(out / "sheet.png", _sheet(base, done, truths, self.n, rows))
        card = card_of(pipe, self.model, cases, call, reward=reward, method={"name": "best_of_n", "n": self.n})
        atomic.write_json(out / "card.json", card.json())
        _print(rows, done, truths, out)
        return {"rows": rows}


def first_candidates(done: Sampled) -> Sampled:
    """The stock images inside a best-of-N run: candidate 0 of each prompt, with one candidate's share of the cost."""
    from diffalign.bench.sample import Sampled

    report = done.reports[0]
    n = report.candidates
    at = [best.index(0) for best in report.best.tolist()]
    spent = {name: value / n for name, value in done.spent.items()}
    spent |= {"seconds": report.curve[0][1] * len(done.cases), "reward_calls": 0.0}
    return Sampled(
        "stock",
        done.cases,
        [pixels[[k]] for pixels, k in zip(done.pixels, at, strict=True)],
        [score.select([k]) if score else None for score, k in zip(done.scores, at, strict=True)],
        [[seeds[k]] for seeds, k in zip(done.seeds, at, strict=True)],
        spent=spent,
    )


def _sheet(base: Sampled, done: Sampled, truths: list[list[bool]], n: int, rows: list[dict[str, Any]]) -> Any:
    from diffalign import media
    from diffalign.bench.sheet import Pair, Picture, contact_sheet

    def picture(side: Sampled, passed: list[bool], i: int) -> Picture:
        score = side.scores[i]
        value = float(score.total[0]) if score is not None and bool(score.valid[0]) else None
        return Picture(image=media.to_pil(side.pixels[i][0]), passed=passed[i], score=value)

    pairs = [
        Pair(prompt=case.prompt, before=picture(base, truths[0], i), after=picture(done, truths[1], i))
        for i, case in enumerate(done.cases)
    ]
    counts = " and ".join(f"{sum(passed)} of {len(passed)}" for passed in truths)
    subtitle = f"Selected by reward alone (numbers); ticks and crosses are the exact verifier's: {counts} right."
    title = f"One draw, and the best of {n}"
    return contact_sheet(pairs, title=title, subtitle=subtitle, labels=("stock", f"best of {n}"))


def _print(rows: list[dict[str, Any]], done: Sampled, truths: list[list[bool]], out: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "proxy (reward)", "truth (verifier)", "NFE / prompt", "s / prompt", box=SIMPLE_HEAD)
    for row in rows:
        proxy, truth = (f"{row[k]['mean']:.3f} [{row[k]['lo']:.3f}, {row[k]['hi']:.3f}]" for k in ("proxy", "truth"))
        table.add_row(row["method"], proxy, truth, f"{row['nfe']:g}", f"{row['seconds']:.2f}")
    Console().print(table)
    report = done.reports[0]
    ns = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= len(report.expected)]
    print("expected reward of the best of n: " + ", ".join(f"{n}: {report.expected[n - 1]:.3f}" for n in ns))
    print(f"KL to the base at most {report.kl_bound:.2f} nats; beats one fresh draw {report.win_rate:.0%} of the time")
    fixed = sum(after and not before for before, after in zip(*truths, strict=True))
    broken = sum(before and not after for before, after in zip(*truths, strict=True))
    print(f"{fixed} prompts turned right, {broken} turned wrong. Intervals are 95 %. Look at {out / 'sheet.png'}")
