"""`diffalign bench search`: search methods, best-of-N and the plain sampler at equal NFE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from diffalign.cli.model import ModelVerb, Split
from diffalign.cli.verb import Opt
from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from diffalign.bench.search import Grid

METHODS: dict[str, dict[str, Any]] = {
    "stock": {"pipeline": "stock"},
    "best_of_n": {"pipeline": "best_of_n", "wide": True},
    "tree": {"pipeline": "tree"},
    "smc": {"pipeline": "smc"},
    "search": {"pipeline": "search"},
}


@dataclass(frozen=True, kw_only=True)
class Search(ModelVerb):
    """Compare search methods at equal NFE: proxy reward, truth, diversity and seconds, with intervals over prompts.

    A budget of 4 is what four plain images cost. The verifier's truth is reported beside the reward that steers, and a
    method that does not beat best-of-N at a budget is marked so. Run the same command again to go on after a stop.

    Writes OUT/rows.jsonl (a line per method, budget and prompt), table.md, plot.png and card.json.

    \b
    diffalign bench search --config shapes_search
    diffalign bench search --config shapes_search --prompts 8 --budgets 1,4
    diffalign bench search --config shapes_search --split heldout --reward clip --out out/bench_clip
    """

    NAME: ClassVar[str] = "search"
    out: Annotated[str | None, Opt("Folder for rows, table, plot and card.")] = "out/bench_search"
    split: Annotated[Split, Opt("Prompt set of the shapes world.")] = "hard"
    prompts: Annotated[int, Opt("How many of its prompts.")] = 100
    budgets: Annotated[str, Opt("Budgets in plain images, for every method.")] = "1,4,16"
    wide: Annotated[str, Opt("Further budgets, for methods that say `wide: true`; none by default.")] = ""
    reward: Annotated[tuple[str, ...] | dict[str, Any], Opt("What steers and selects.", flag="-r")] = ("shapes_soft",)
    batch: Annotated[int, Opt("Prompts in lock-step.")] = 10
    only: Annotated[tuple[str, ...], Opt("Only these methods; repeat it.")] = ()
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: METHODS)

    def __post_init__(self) -> None:
        for name, value in (("prompts", self.prompts), ("batch", self.batch)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, but the comparison needs at least 1.")
        if unknown := [name for name in self.only if name not in self.methods]:
            raise ConfigError(f"no method called '{unknown[0]}' here. Known: {', '.join(self.methods)}.")
        if not multiples(self.budgets, "budgets"):
            raise ConfigError("budgets is empty. Name at least one, such as --budgets 1,4.")
        multiples(self.wide, "wide")

    def grid(self, plain_nfe: int) -> Grid:
        from diffalign import config
        from diffalign.bench.search import Contender, Grid

        chosen = {name: told for name, told in self.methods.items() if not self.only or name in self.only}
        contenders: Mapping[str, Contender] = {
            name: config.build(Contender, told, where=f"methods.{name}") for name, told in chosen.items()
        }
        return Grid(
            contenders=contenders,
            budgets=multiples(self.budgets, "budgets"),
            wide_budgets=multiples(self.wide, "wide"),
            plain_nfe=plain_nfe,
            batch=self.batch,
        )

    def cost(self) -> dict[str, Any]:
        grid = self.grid(self.rows_per_image(self.pipeline_call()))
        cells = grid.cells()
        return {"cells": len(cells), "prompts": self.prompts, "nfe": sum(c.nfe for c in cells) * self.prompts}

    def run(self) -> dict[str, Any]:
        from diffalign import atomic, scoring, world
        from diffalign.bench import search
        from diffalign.cli.truth import progress
        from diffalign.drive import Driver

        folder = atomic.require_folder(self.out or "out/bench_search")
        cases = search.seeded(world.prompts(self.split)[: self.prompts], self.seed)
        reward, pipe, call = scoring.make_reward(self.reward), self.pipeline(), self.pipeline_call()
        plain = sum(Driver(pipe, cases[:1], **call).costs)
        grid = self.grid(plain)
        with progress(len(grid.cells()) * len(cases), "prompts") as advance:
            card = search.run(
                pipe,
                cases,
                grid,
                reward=reward,
                call=call,
                model=self.model,
                folder=folder,
                advance=lambda what, count: advance(count),
            )
        rows = search.summary(search.read_rows(folder), seed=self.seed)
        text = search.table(rows)
        atomic.write_text(folder / "table.md", text)
        search.draw(rows, folder / "plot.png", title=f"{self.model}, {self.split} prompts, {len(cases)} of them")
        print(text, end="")
        print(f"rows, table and plot are in {folder}; truth is the exact verifier's, which only 'proxy' may see")
        return {"rows": rows, "card": card.json()}


def multiples(text: str, name: str) -> list[int]:
    """Budgets written as 1,4,16."""
    try:
        found = sorted({int(part) for part in str(text).split(",") if part.strip()})
    except ValueError:
        raise ConfigError(f"{name} is '{text}', but it must be whole numbers such as 1,4,16.") from None
    if found and found[0] < 1:
        raise ConfigError(f"{name} holds {found[0]}, but the smallest budget is one plain image.")
    return found
