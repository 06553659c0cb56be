"""`diffalign demo`: what search does, on the embedded models, in under two minutes."""

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

METHODS = ("stock", "best_of_n", "tree", "one step", "reno")
TEACHER = "shapes-sd3"  # of the student
TUNED = {"warm_start": 50, "learning_rate": 1.0}  # for the student's small latents; measured in docs/search.md
FEW = 4  # steps that a gradient goes through where there is no one-step student


@dataclass(frozen=True, kw_only=True)
class Demo(ModelVerb):
    """One plain draw, best-of-N, tree search and noise optimisation, side by side.

    A tiny model draws coloured shapes; a CLIP that was trained beside it steers and picks; an exact verifier then says
    which images are really right. The verifier never takes part in the choice. Every method has the budget of N plain
    images. ReNO climbs the start noise of the one-step student, whose plain image stands beside it; with another
    --model it climbs through few steps and then draws once with all of them. A small vision language model, which
    took no part either, rates every image for the page. No network is needed.

    Writes OUT/index.html (a page to compare them on, which opens from disk), OUT/sheet.png and OUT/card.json.

    \b
    diffalign demo
    diffalign demo --n 32 --seed 1
    diffalign demo --split hard --json demo.json
    """

    NAME: ClassVar[str] = "demo"
    out: Annotated[str | None, Opt("Folder for the page, sheet.png and card.json.")] = "out/demo"
    n: Annotated[int, Opt("Candidates per prompt, which is every method's budget.")] = 16
    prompts: Annotated[int, Opt("Prompts, every kind of task in turn.")] = 8
    split: Annotated[Split, Opt("Prompt set of the shapes world.")] = "heldout"
    reward: Annotated[tuple[str, ...] | dict[str, Any], Opt("What selects.", flag="-r")] = ("clip",)
    student: Annotated[str, Opt("One-step model for ReNO, where it is built.")] = "shapes-turbo"
    witness: Annotated[tuple[str, ...], Opt("Reward on the page that steers nothing; repeat it.")] = ("vqascore",)

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("prompts", self.prompts)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, but the demo needs at least 1.")

    def cost(self) -> dict[str, Any]:
        each = self.rows_per_image(self.pipeline_call())
        methods = [name for name in METHODS if name != "one step" or self.model == TEACHER]
        return {"prompts": self.prompts, "nfe_per_prompt": self.n * each, "methods": methods}

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
        from diffalign.cli.truth import verdicts

        out = atomic.require_folder(self.out or "out/demo")
        cases, reward = self.cases(), scoring.make_reward(self.reward)
        pipe, call = self.pipeline(), self.pipeline_call()
        sides = self.sides(pipe, cases, reward, call)
        truths = [[verdict.strict for verdict in verdicts(side.pixels, cases)] for side in sides.values()]
        rows = [side.row(truth) | {"method": name} for (name, side), truth in zip(sides.items(), truths, strict=True)]
        atomic.write_image(out / "sheet.png", _sheet(sides, truths))
        told = {"name": "demo", "n": self.n, "student": self.student}
        card = card_of(pipe, self.model, cases, call, reward=reward, method=told).json()
        atomic.write_json(out / "card.json", card)
        self.write_page(sides, truths, card, out)
        _print(rows, sides, truths, out)
        return {"rows": rows, "page": str(out / "index.html")}

    def write_page(self, sides: dict[str, Sampled], truths: list[list[bool]], card: dict[str, Any], out: Path) -> None:
        """The gallery of all methods, the plain draw as its baseline."""
        from diffalign.gallery import page, witnesses
        from diffalign.gallery.manifest import Heading
        from diffalign.gallery.sampled import side_of

        budget = int(sides[f"best of {self.n}"].spent["nfe"] / len(truths[0]))
        made = [
            side_of(name, done, truth=truth, card=self.card(name, card), commands=self.commands(name, done, budget))
            for (name, done), truth in zip(sides.items(), truths, strict=True)
        ]
        for reward in self.witness:
            made = witnesses.scored(made, reward)
        subtitle = "Steered by the reward alone. Truth is the exact verifier's word, which took no part in the choice."
        command = f"diffalign demo --n {self.n} --prompts {self.prompts} --split {self.split} --seed {self.seed}"
        heading = Heading(title="One draw, and what search makes of it", subtitle=subtitle, command=command)
        page.write(made, out, heading, seed=self.seed)

    def card(self, name: str, card: dict[str, Any]) -> dict[str, Any]:
        """The card of one method: noise optimisation runs on another model, or in fewer steps."""
        from dataclasses import replace

        own: dict[str, Any] = {"method": {"name": name}}
        if name in ("one step", "ReNO"):
            few = {"num_inference_steps": min(FEW, int(card["call"].get("num_inference_steps", 50)))}
            student = replace(self, model=self.student) if self.model == TEACHER else None
            own |= {"model": self.student, "call": student.pipeline_call()} if student else {"call": card["call"] | few}
        return card | own

    def commands(self, name: str, done: Sampled, budget: int) -> list[str]:
        """The command that makes each image of a method again; none where a method was told more than a command can."""
        from diffalign import config
        from diffalign.cli.generate import Generate

        own: dict[str, dict[str, Any]] = {
            f"best of {self.n}": {"method": "best_of_n", "n": self.n},
            "tree": {"method": "tree", "budget": budget},
            "ReNO": {"method": "reno", "budget": budget, "tune": TUNED},
        }
        student = name in ("one step", "ReNO")
        if student and self.model != TEACHER:
            return []
        told = {"model": self.student if student else self.model, "prompt": ("",), **own.get(name, {})}
        verb = config.build(Generate, told | ({"reward": self.reward} if name in own else {}))
        return [verb.again(case) for case in done.cases]

    def sides(self, pipe: Any, cases: list[Case], reward: Any, call: dict[str, Any]) -> dict[str, Sampled]:
        """What each method makes of the cases, the plain draw first."""
        from diffalign.bench.sample import sample

        def run(method: str, with_pipe: Any, with_call: dict[str, Any], **options: Any) -> Sampled:
            with_pipe.set_progress_bar_config(disable=None, desc=method)
            asked = {"reward": reward, "call": with_call, "options": options, "batch": len(cases)}
            return sample(with_pipe, cases, method=method, **asked)

        best = run("best_of_n", pipe, call, n=self.n, top_k=self.n)
        sides = {"stock": first_candidates(best), f"best of {self.n}": best}
        budget = int(best.spent["nfe"] / len(cases))
        sides["tree"] = run("tree", pipe, call, budget=budget)
        if reward.differentiable:
            student, its_call, settings = self.few_steps(pipe, call)
            if student is not pipe:  # what noise optimisation starts from is another model's image
                sides["one step"] = run("stock", student, its_call)
            sides["ReNO"] = run("reno", student, its_call, budget=budget, **settings)
        return sides

    def few_steps(self, pipe: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Pipeline, call and settings that noise optimisation can afford.

        The one-step student of the embedded model where it is here; else the model itself in few steps, and all its
        steps once from the best noise.
        """
        from dataclasses import replace

        from diffalign import zoo

        if self.model == TEACHER and self.student in zoo.names():
            verb = replace(self, model=self.student)
            return verb.pipeline(), verb.pipeline_call(), {"reno": TUNED}
        steps = int(call.get("num_inference_steps", 50))
        return pipe, call | {"num_inference_steps": min(FEW, steps)}, {"finish": {"num_inference_steps": steps}}


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


def _sheet(sides: dict[str, Sampled], truths: list[list[bool]]) -> Any:
    from diffalign import media
    from diffalign.bench.sheet import Entry, Picture, contact_sheet

    def picture(side: Sampled, passed: list[bool], i: int) -> Picture:
        score = side.scores[i]
        value = float(score.total[0]) if score is not None and bool(score.valid[0]) else None
        return Picture(image=media.to_pil(side.pixels[i][0]), passed=passed[i], score=value)

    cases = next(iter(sides.values())).cases
    entries = [
        Entry(
            prompt=case.prompt,
            pictures=[picture(side, truth, i) for side, truth in zip(sides.values(), truths, strict=True)],
        )
        for i, case in enumerate(cases)
    ]
    counts = ", ".join(f"{name} {sum(truth)} of {len(truth)}" for name, truth in zip(sides, truths, strict=True))
    subtitle = f"Steered by the reward alone (numbers). Right by the exact verifier (ticks): {counts}."
    return contact_sheet(entries, title="One draw, and what search makes of it", subtitle=subtitle, labels=list(sides))


def _print(rows: list[dict[str, Any]], sides: dict[str, Sampled], truths: list[list[bool]], out: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "proxy (reward)", "truth (verifier)", "NFE / prompt", "s / prompt", box=SIMPLE_HEAD)
    for row in rows:
        proxy, truth = (f"{row[k]['mean']:.3f} [{row[k]['lo']:.3f}, {row[k]['hi']:.3f}]" for k in ("proxy", "truth"))
        table.add_row(row["method"], proxy, truth, f"{row['nfe']:g}", f"{row['seconds']:.2f}")
    Console().print(table)
    report = list(sides.values())[1].reports[0]
    ns = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= len(report.expected)]
    print("expected reward of the best of n: " + ", ".join(f"{n}: {report.expected[n - 1]:.3f}" for n in ns))
    for name, found in list(zip(sides, truths, strict=True))[1:]:
        fixed = sum(after and not before for before, after in zip(truths[0], found, strict=True))
        broken = sum(before and not after for before, after in zip(truths[0], found, strict=True))
        print(f"{name}: {fixed} prompts turned right, {broken} turned wrong")
    print(f"Intervals are 95 %, over {len(truths[0])} prompts only. Look at {out / 'sheet.png'}")
    print(f"Compare them yourself: open {out / 'index.html'}")
