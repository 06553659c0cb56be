"""`diffalign zoo`: the tiny models that ship with diffalign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from diffalign.cli.verb import Opt, Verb
from diffalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ZooList(Verb):
    """List the embedded models with size and measured accuracy.

    \b
    diffalign zoo list
    diffalign zoo list --json models.json
    """

    NAME: ClassVar[str] = "list"

    def run(self) -> list[dict[str, Any]]:
        from diffalign.cli.ls import print_table

        rows = model_rows()
        print_table(rows)
        return rows


@dataclass(frozen=True, kw_only=True)
class ZooShow(Verb):
    """Show one model's card: data, cost, measured accuracy, and the call every verb makes.

    \b
    diffalign zoo show shapes-sd3
    """

    NAME: ClassVar[str] = "show"
    name: Annotated[str, Opt("An embedded model.", positional=True)]

    def run(self) -> dict[str, Any]:
        import yaml

        from diffalign import zoo

        require_model(self.name)
        card = dict(zoo.card(self.name))
        print(yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=100), end="")
        return card


@dataclass(frozen=True, kw_only=True)
class ZooMeasure(Verb):
    """Measure a model's accuracy again on held-out prompts, judged by the exact verifier.

    A picture-text model is measured as a judge: the area under its ROC curve within prompts.

    \b
    diffalign zoo measure shapes-sd3 --n 200
    diffalign zoo measure shapes-turbo --seed 1 --json measured.json
    """

    NAME: ClassVar[str] = "measure"
    name: Annotated[str, Opt("An embedded model.", positional=True)]
    n: Annotated[int, Opt("Prompts to draw.")] = 200

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"n is {self.n}, but at least 1 prompt is needed.")

    def cost(self) -> dict[str, Any]:
        return {"images": self.n}

    def run(self) -> dict[str, Any]:
        from diffalign import zoo
        from diffalign.cli.model import quiet_libraries

        require_model(self.name)
        quiet_libraries()
        found = dict(zoo.measure(self.name, seed=self.seed, n=self.n))
        print(
            ", ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
            )
        )
        return found


@dataclass(frozen=True, kw_only=True)
class ZooBuild(Verb):
    """Rebuild an embedded model from nothing, by its own recipe, on a CPU.

    Resumes where it was stopped. Writes OUT (default: a folder `out/zoo/NAME`).

    \b
    diffalign zoo build shapes-sd3
    diffalign zoo build shapes-clip --out my-clip --dry-run
    """

    NAME: ClassVar[str] = "build"
    name: Annotated[str, Opt("An embedded model.", positional=True)]

    def folder(self) -> str:
        return self.out or f"out/zoo/{self.name}"

    def cost(self) -> dict[str, Any]:
        from diffalign import zoo

        require_recipe(self.name)
        card = zoo.card(self.name) if self.name in zoo.names() else {}
        return {"writes": self.folder(), "cost": card.get("cost", "not yet measured")}

    def run(self) -> dict[str, Any]:
        from diffalign import atomic, zoo
        from diffalign.cli.model import quiet_libraries

        require_recipe(self.name)
        atomic.require_folder(self.folder())
        quiet_libraries()
        built = str(zoo.build(self.name, out=self.folder(), seed=self.seed))
        print(f"built {self.name} in {built}")
        return {"name": self.name, "folder": built}


def require_model(name: str) -> None:
    """Refuse a name the zoo does not know, offering the nearest."""
    from diffalign import zoo
    from diffalign.errors import UnknownName

    if name not in zoo.names():
        raise UnknownName.among("embedded model", name, zoo.names(), "diffalign zoo list")


def require_recipe(name: str) -> None:
    """The same for what can be rebuilt, which includes models that are not here yet."""
    from diffalign.errors import UnknownName
    from diffalign.zoo.recipes import RECIPES

    if name not in RECIPES:
        raise UnknownName.among("recipe", name, RECIPES, "diffalign zoo list")


def model_rows() -> list[dict[str, Any]]:
    """One row per embedded model, with the keys of `zoo list --json`."""
    from diffalign import zoo

    rows = []
    for name in zoo.names():
        card, folder = zoo.card(name), zoo.folder(name)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        row = {"name": name, "class": card.get("class"), "bytes": size, "strict": card.get("strict")}
        rows.append(row | {"seed": card.get("seed")})
    return rows


VERBS: tuple[type[Verb], ...] = (ZooList, ZooShow, ZooMeasure, ZooBuild)
