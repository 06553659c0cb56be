"""`diffalign bench train`: trainings side by side, from one plan that is resumed until all of it is done."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from diffalign.cli.verb import Opt, Verb, read_config
from diffalign.errors import ConfigError, UnknownName

if TYPE_CHECKING:
    from diffalign.bench.training_runs import Entry, Training


@dataclass(frozen=True, kw_only=True)
class Plan(Verb):
    """What the verbs that run many trainings share."""

    at_once: Annotated[int, Opt("Runs side by side, each in a process of its own.")] = 1
    threads: Annotated[int, Opt("Threads of each run.")] = 1
    only: Annotated[tuple[str, ...], Opt("Run only these; repeat it. All are reported.")] = ()
    report: Annotated[bool, Opt("Run nothing; tell what there is.")] = False
    common: dict[str, Any] = field(default_factory=dict)  # over the config of every run
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> config, overrides, seeds

    def __post_init__(self) -> None:
        for name in ("at_once", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but it must be at least 1.")
        if not self.runs:
            raise ConfigError(f"no runs are named. Take a plan, such as diffalign bench {self.NAME} --config FILE.")
        for name in self.only:
            if name not in self.runs:
                raise UnknownName.among("run", name, self.runs, f"diffalign bench {self.NAME} --dry-run")
        for name in self.runs:
            if not name or set(name) & set("/\\ ") or name.startswith("."):
                raise ConfigError(f"a run is called '{name}', but its name is that of a folder too.")

    @property
    def folder(self) -> Path:
        return Path(self.out or f"out/bench_{self.NAME}")

    def entries(self) -> dict[str, Entry]:
        """The lines of the plan."""
        from diffalign import config
        from diffalign.bench.training_runs import Entry

        return {name: config.build(Entry, told, where=f"runs.{name}") for name, told in self.runs.items()}

    def asked(self, name: str, entry: Any) -> bool:
        """Whether this line is to run; all of them are reported."""
        return not self.only or name in self.only

    def over(self, entry: Entry) -> list[Mapping[str, Any]]:
        """What goes over the config of a run, in order."""
        return [self.common, entry.overrides]

    def trainings(self) -> list[Training]:
        """Every run with its settings checked; the first seed of all runs comes before the second of any."""
        entries = self.entries()
        most = max(len(entry.seeds) for entry in entries.values())
        order = [(name, k) for k in range(most) for name, entry in entries.items() if k < len(entry.seeds)]
        return [self._training(name, entries[name], entries[name].seeds[k]) for name, k in order]

    def _training(self, name: str, entry: Entry, seed: int) -> Training:
        from diffalign import config
        from diffalign.bench.training_runs import Training, merged
        from diffalign.cli.train import Train
        from diffalign.judges.secrets import without_secrets

        folder = self.folder / "runs" / f"{name}-{seed}"
        base = read_config(entry.config) if entry.config else {}
        settings = merged(base, *self.over(entry), {"seed": seed, "out": str(folder)})
        if settings.get("objective") == "reward":
            raise ConfigError(
                f"run '{name}' teaches a reward model, which no curve of truth is drawn for. Leave it out."
            )
        try:
            built: Any = config.build(Train.whole(settings), settings)
        except ConfigError as e:
            raise ConfigError(f"run '{name}': {e}") from e
        told = without_secrets(config.plain(built) | {"call": built.pipeline_call()})
        return Training(name=name, seed=seed, settings=settings, told=told, folder=folder)

    def cost(self) -> dict[str, Any]:
        from diffalign.bench.training_runs import finished

        entries = self.entries()
        trainings = [each for each in self.trainings() if self.asked(each.name, entries[each.name])]
        left = [training for training in trainings if not finished(training)]
        minutes = [training.told["minutes"] for training in left]
        whole = sum(minutes) / self.at_once if all(minutes) else None
        return {"runs": len(trainings), "to do": [training.label for training in left], "minutes": whole}

    def execute(self, trainings: list[Training]) -> dict[str, str]:
        """Run what is asked for and not done; what failed, by label."""
        from diffalign import atomic
        from diffalign.bench.training_runs import run_all

        atomic.require_folder(self.folder)
        if self.report:
            return {}
        entries = self.entries()
        chosen = [each for each in trainings if self.asked(each.name, entries[each.name])]
        return run_all(chosen, folder=self.folder, at_once=self.at_once, threads=self.threads, say=_say)

    def status(self, result: Any) -> int:
        return 1 if result["failed"] else 0


@dataclass(frozen=True, kw_only=True)
class TrainBench(Plan):
    """Compare trainings: truth against seconds and against model calls, with intervals over seeds and prompts.

    A plan names runs, each a shipped config with overrides and seeds. Every seed is a run folder of its own under
    OUT/runs, trained in its own process; what is done is skipped, what was stopped goes on, and a run that fails is
    told at the end. Ctrl-C lets every run finish its step and keep a checkpoint. Same command to go on.

    Writes OUT/table.md, rows.jsonl (a line per evaluation) and plot.png; logs are in OUT/logs.

    \b
    diffalign bench train --config train_shapes --at-once 2
    diffalign bench train --config train_shapes --only flow_grpo --only dense_grpo
    diffalign bench train --config train_shapes --report
    diffalign bench train --config recipe_shapes --out out/recipe common.minutes=5
    """

    NAME: ClassVar[str] = "train"
    out: Annotated[str | None, Opt("Folder for the runs and what they come to.")] = "out/bench_train"
    reference: Annotated[str | None, Opt("Run whose final truth the others are to reach.")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference is not None and self.reference not in self.runs:
            raise UnknownName.among("run", self.reference, self.runs, "diffalign bench train --dry-run")

    def run(self) -> dict[str, Any]:
        from diffalign import atomic
        from diffalign.bench import training, training_plot
        from diffalign.bench.training_runs import require_paired
        from diffalign.bench.training_table import table

        trainings = self.trainings()
        require_paired(trainings)
        failed = self.execute(trainings)
        found = [training.read(each.folder, each.name, each.seed) for each in trainings]
        curves = [curve for curve in found if curve is not None]
        groups = training.groups_of(sorted(curves, key=lambda curve: list(self.runs).index(curve.name)))
        rows = training.summary(groups, reference=self.reference, seed=self.seed)
        if rows:
            text = table(rows, reference=self.reference)
            atomic.write_text(self.folder / "table.md", text)
            atomic.write_jsonl(self.folder / "rows.jsonl", training.lines(curves))
            title = f"{trainings[0].told['model']}: truth on {rows[0]['prompts']} evaluation prompts"
            training_plot.draw(groups, self.folder / "plot.png", title=title, reference=self.reference)
            print(text, end="")
            print(f"table, rows and plot are in {self.folder}")
        else:
            print("no run has an evaluation with a truth yet")
        for label, problem in failed.items():
            print(f"{label} {problem}", file=sys.stderr)
        return {"rows": rows, "failed": failed}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
