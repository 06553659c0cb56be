"""Search methods against best-of-N and the plain sampler at equal NFE: proxy, truth, diversity and cost per prompt.

Every batch of prompts is written as it ends, so an interrupted grid goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffalign import atomic, scoring
from diffalign.bench.card import EvaluationCard, card_of, require_alike
from diffalign.bench.sample import ALIKE, STOCK, sample, spread
from diffalign.cases import Case, batched
from diffalign.errors import ConfigError
from diffalign.intervals import bootstrap

BASELINE = "best_of_n"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One line of the comparison: a drop-in pipeline and what it is told."""

    pipeline: str = STOCK
    options: dict[str, Any] = field(default_factory=dict)
    wide: bool = False  # also run at the wide budgets


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method at one budget."""

    method: str
    times: int  # the budget in plain generations
    nfe: int


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is compared with what."""

    contenders: Mapping[str, Contender]
    budgets: Sequence[int]  # in plain generations
    wide_budgets: Sequence[int]
    plain_nfe: int  # what one plain image costs
    batch: int

    def cells(self) -> list[Cell]:
        """Cheap budgets first, so that a grid that stops early has whole columns."""
        found = []
        for times in sorted({*self.budgets, *self.wide_budgets}):
            for name, contender in self.contenders.items():
                asked = times in self.budgets or contender.wide
                if asked and (contender.pipeline != STOCK or times == min(self.budgets)):
                    found.append(Cell(method=name, times=times, nfe=times * self.plain_nfe))
        return found


def run(
    pipe: Any,
    cases: Sequence[Case],
    grid: Grid,
    *,
    reward: Any,
    call: Mapping[str, Any],
    model: str,
    folder: Path,
    advance: Callable[[str, int], None] = lambda what, prompts: None,
) -> EvaluationCard:
    """Fill `folder`/rows.jsonl with one row per method, budget and prompt that is not there yet."""
    contenders = {name: asdict(contender) for name, contender in grid.contenders.items()}
    card = card_of(pipe, model, cases, call, reward=reward, method=contenders)
    _require_same(card, folder / "card.json")
    found, file = read_rows(folder), folder / "rows.jsonl"
    if file.exists() and not file.read_bytes().endswith(b"\n"):
        atomic.write_jsonl(file, found)  # a kill cut the last line short
    done = {(row["method"], row["times"], row["index"]) for row in found}
    for cell in grid.cells():
        for first, some in zip(range(0, len(cases), grid.batch), batched(list(cases), grid.batch), strict=True):
            if not all((cell.method, cell.times, first + k) in done for k in range(len(some))):
                rows = _measure(pipe, some, first, cell, grid.contenders[cell.method], reward, call)
                with file.open("a", encoding="utf-8") as lines:
                    lines.writelines(json.dumps(row) + "\n" for row in rows)
            advance(f"{cell.method} at {cell.times}x", len(some))
    return card


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows so far; a line that a kill cut short is left out, and its batch runs again."""
    file = folder / "rows.jsonl"
    if not file.exists():
        return []
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["method"], row["times"], row["index"]] = row
    return list(rows.values())


def _require_same(card: EvaluationCard, file: Path) -> None:
    if file.exists():
        before = EvaluationCard.read(json.loads(file.read_text(encoding="utf-8")))
        require_alike(before, card)
        for name, told in before.method.items():
            if name in card.method and card.json()["method"][name] != told:
                raise ConfigError(
                    f"'{file.parent}' holds results of method '{name}' with other settings. Give another --out, or "
                    "delete that folder."
                )
        card = EvaluationCard.read(card.json() | {"method": {**before.method, **card.json()["method"]}})
    atomic.write_json(file, card.json())


def _measure(
    pipe: Any,
    cases: Sequence[Case],
    first: int,
    cell: Cell,
    contender: Contender,
    reward: Any,
    call: Mapping[str, Any],
) -> list[dict[str, Any]]:
    from diffalign import world

    options: dict[str, Any] = {} if contender.pipeline == STOCK else {"budget": cell.nfe, **contender.options}
    if contender.pipeline == BASELINE:
        options["top_k"] = min(ALIKE, cell.times)
    elif contender.pipeline != STOCK:
        options["keep"] = ALIKE
    done = sample(pipe, cases, method=contender.pipeline, reward=reward, call=call, options=options, batch=len(cases))
    best = torch.stack([pixels[0] for pixels in done.pixels])
    judged = scoring.score(reward, best, list(cases), all_invalid=True)
    rows = []
    for k, verdict in enumerate(world.verify(best, list(cases))):
        value = float(judged.total[k])
        rows.append(
            {
                "method": cell.method,
                "times": cell.times,
                "index": first + k,
                "prompt": cases[k].prompt,
                "seed": cases[k].seed,
                "nfe": done.spent["nfe"] / len(cases),
                "seconds": done.spent["seconds"] / len(cases),
                "proxy": value if value == value else None,
                "truth": float(verdict.strict),
                "soft": verdict.soft,
                "diversity": spread(done.several(k)),
            }
        )
    return rows


def summary(rows: Sequence[Mapping[str, Any]], *, seed: int = 0) -> list[dict[str, Any]]:
    """One row per method and budget: means with bootstrap intervals over prompts, and the paired gap to best-of-N."""
    cells: dict[tuple[str, int], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["times"]), {})[row["index"]] = row
    found = []
    for (method, times), by_prompt in sorted(cells.items(), key=lambda item: (item[0][1], item[0][0])):
        mine = list(by_prompt.values())
        gap = _gap(by_prompt, cells.get((BASELINE, times), {}), seed)
        found.append(
            {
                "method": method,
                "times": times,
                "prompts": len(mine),
                "nfe": _mean(mine, "nfe"),
                "seconds": _mean(mine, "seconds"),
                **{name: _interval(mine, name, seed) for name in ("proxy", "truth", "diversity")},
                "over_best_of_n": None if method in (BASELINE, STOCK) else gap,
                "beats_best_of_n": None if method in (BASELINE, STOCK) or gap is None else gap["lo"] > 0,
            }
        )
    return found


def _gap(
    mine: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]], seed: int
) -> dict[str, float] | None:
    """Truth minus best-of-N's truth on the same prompts."""
    both = sorted(mine.keys() & theirs.keys())
    return bootstrap([mine[k]["truth"] - theirs[k]["truth"] for k in both], seed=seed).json() if both else None


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(row[name] for row in rows) / len(rows))


def _interval(rows: Sequence[Mapping[str, Any]], name: str, seed: int) -> dict[str, float] | None:
    values = [row[name] for row in rows if row[name] is not None]
    return bootstrap(values, seed=seed).json() if values else None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The summary as markdown."""
    lines = [
        "| budget | method | NFE | s | proxy | truth | diversity | truth over best-of-N |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['times']}x | {row['method']} | {row['nfe']:.0f} | {row['seconds']:.2f} | {_shown(row['proxy'])} "
        f"| {_shown(row['truth'])} | {_shown(row['diversity'])} | {_verdict(row)} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _shown(interval: Mapping[str, float] | None) -> str:
    return "" if interval is None else f"{interval['mean']:.3f} [{interval['lo']:.3f}, {interval['hi']:.3f}]"


def _verdict(row: Mapping[str, Any]) -> str:
    gap = row["over_best_of_n"]
    if gap is None:
        return ""
    words = "better" if gap["lo"] > 0 else "worse" if gap["hi"] < 0 else "not beaten"
    return f"{gap['mean']:+.3f} [{gap['lo']:+.3f}, {gap['hi']:+.3f}] {words}"


def draw(rows: Sequence[Mapping[str, Any]], file: Path, *, title: str) -> None:
    """Proxy and truth against NFE, a line per method, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = plt.get_cmap("tab20")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axis, name in zip(axes, ("proxy", "truth"), strict=True):
        for k, method in enumerate(methods):
            _draw_line(axis, [row for row in rows if row["method"] == method and row[name]], name, colours(k % 20))
        axis.set_xscale("log")
        ticks = {row["times"]: max(other["nfe"] for other in rows if other["times"] == row["times"]) for row in rows}
        axis.set_xticks(list(ticks.values()), [f"{nfe:.0f}\n{times}x" for times, nfe in ticks.items()])
        axis.minorticks_off()
        axis.set_xlabel("NFE per prompt, and in plain images")
        axis.set_ylabel(f"{name} (95 % interval over prompts)")
        axis.grid(alpha=0.25)
    axes[1].legend(fontsize=8, frameon=False, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _draw_line(axis: Any, rows: Sequence[Mapping[str, Any]], name: str, colour: Any) -> None:
    if not rows:
        return
    x, y = [row["nfe"] for row in rows], [row[name]["mean"] for row in rows]
    ends = [
        [row[name]["mean"] - row[name]["lo"] for row in rows],
        [row[name]["hi"] - row[name]["mean"] for row in rows],
    ]
    thick = rows[0]["method"] == BASELINE
    axis.errorbar(
        x, y, yerr=ends, label=rows[0]["method"], color="black" if thick else colour, marker="o", capsize=2,
        linewidth=2.4 if thick else 1.3, markersize=4,
    )  # fmt: skip


def seeded(cases: Iterator[Case] | Sequence[Case], seed: int) -> list[Case]:
    """Cases whose noise follows from `seed` and their place."""
    from diffalign.cases import derived_seed

    return [case.with_seed(derived_seed(seed, "prompt", i)) for i, case in enumerate(cases)]
