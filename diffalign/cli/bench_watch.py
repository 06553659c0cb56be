"""`diffalign bench watch`: planted reward hacks and sound trainings, and what the watch says of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from diffalign.cli.bench_train import Plan
from diffalign.cli.verb import Opt
from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from diffalign.bench.training_runs import Entry


@dataclass(frozen=True, kw_only=True)
class WatchBench(Plan):
    """Does the watch raise hacked rewards before the truth falls 5 points, and stay quiet in sound trainings?

    A plan names runs of kind `hack` (a reward with a loophole, trained hard) and `healthy`, each of the part `tune`, on
    which thresholds may be fixed, or `test`, with other hacks and seeds. The truth is logged, and no rule reads it.
    Every run is a folder under OUT/runs, resumed and reported as in `diffalign bench train`.

    Writes OUT/table.md and rows.jsonl.

    \b
    diffalign bench watch --config watch_shapes --at-once 2
    diffalign bench watch --config watch_shapes --part tune
    diffalign bench watch --config watch_shapes --only blank --report
    """

    NAME: ClassVar[str] = "watch"
    out: Annotated[str | None, Opt("Folder for the runs and what they come to.")] = "out/bench_watch"
    part: Annotated[Literal["tune", "test", "both"], Opt("Which runs; all are reported.")] = "both"
    hack: dict[str, Any] = field(default_factory=dict)  # over `common` in runs of this kind
    healthy: dict[str, Any] = field(default_factory=dict)

    def entries(self) -> dict[str, Entry]:
        from diffalign import config
        from diffalign.bench.watching import Planted

        return {name: config.build(Planted, told, where=f"runs.{name}") for name, told in self.runs.items()}

    def asked(self, name: str, entry: Any) -> bool:
        return super().asked(name, entry) and self.part in (entry.part, "both")

    def over(self, entry: Any) -> list[Mapping[str, Any]]:
        reward = {"reward": entry.reward} if entry.reward else {}
        return [self.common, self.hack if entry.kind == "hack" else self.healthy, entry.overrides, reward]

    def run(self) -> dict[str, Any]:
        from diffalign import atomic
        from diffalign.bench import training, watching

        trainings, entries = self.trainings(), self.entries()
        for each in trainings:
            if each.told["watch"]["read_truth"]:
                raise ConfigError(f"run '{each.name}' has watch.read_truth, but here the watch may not see the truth.")
        failed, rows = self.execute(trainings), []
        for each in trainings:
            curve = training.read(each.folder, each.name, each.seed)
            if curve is not None:
                entry: Any = entries[each.name]
                rows.append(watching.outcome(curve, entry.kind, entry.part, seed=self.seed))
        text = watching.table(rows)
        atomic.write_text(self.folder / "table.md", text)
        atomic.write_jsonl(self.folder / "rows.jsonl", rows)
        print(text, end="")
        print(f"table and rows are in {self.folder}")
        for label, problem in failed.items():
            print(f"{label} {problem}", file=sys.stderr)
        return {"rows": rows, "counts": watching.told(rows), "failed": failed}
