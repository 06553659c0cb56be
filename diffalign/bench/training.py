"""What trainings came to, side by side: truth against cost, and how soon each reaches the truth of a reference.

Truth is compared picture by picture: runs of one seed evaluate the same prompts with the same noise. Intervals come
from resampling seeds and prompts together, each with replacement, the same draws for every run; of one seed they are
over prompts alone. Seconds and NFE are those of training, without the evaluations, which other runs may do more often.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import config
from diffalign.errors import ConfigError
from diffalign.train.interrupt import ASKED
from diffalign.train.run_folder import CONFIG, Metrics

AXES = ("step", "seconds", "nfe")
FIGURES = ("proxy", "truth", "heldout", "diversity", "diversity_across", "kl_base", "alarms")
NEIGHBOURS = 1  # evaluations on each side that smooth a curve before it is asked when it reaches a truth
DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The E evaluations of one run."""

    name: str
    seed: int
    cost: Mapping[str, Tensor]  # (E,) float64 of each of AXES
    truth: Tensor  # (E, P) float64: a column for each prompt, or one for their mean where pictures were not kept
    rows: Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl
    seconds: float = 0.0  # evaluations included
    alarms: Sequence[Mapping[str, Any]] = ()
    ended: str = ""  # empty while the run is not finished
    chosen: int = -1  # the evaluation whose weights were saved


def read(folder: Path, name: str, seed: int) -> Curve | None:
    """A run folder as a curve; None where no evaluation with a truth is there yet."""
    metrics = Metrics(folder)
    rows = [row for row in metrics.values.rows() if row.get("truth") is not None]
    timing = {row["step"]: row for row in metrics.timing.rows()}
    rows = [row for row in rows if row["step"] in timing]
    if not rows:
        return None
    told = config.parse((folder / CONFIG).read_text(encoding="utf-8"), f"'{folder / CONFIG}'")
    each = int(told.get("evaluate", {}).get("per_prompt", 1))
    prompts = [_by_prompt(folder, row, each) for row in rows]
    means = [torch.tensor([row["truth"]], dtype=torch.float64) for row in rows]
    known = [values for values in prompts if values is not None]
    whole = len(known) == len(rows) and len({len(values) for values in known}) == 1
    file = folder / "summary.json"
    summary = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    steps = [row["step"] for row in rows]
    return Curve(
        name=name,
        seed=seed,
        cost={axis: torch.tensor([_cost(timing[step], axis) for step in steps], dtype=torch.float64) for axis in AXES},
        truth=torch.stack(known if whole else means),
        rows=rows,
        seconds=float(timing[steps[-1]]["seconds"]),
        alarms=summary.get("alarms", ()),
        ended="" if summary.get("ended") == ASKED else summary.get("ended", ""),
        chosen=steps.index(summary["chosen"]) if summary.get("chosen") in steps else -1,
    )


def _cost(timing: Mapping[str, Any], axis: str) -> float:
    return float(timing[axis]) - float(timing.get(f"judging_{axis}", 0))


def _by_prompt(folder: Path, row: Mapping[str, Any], each: int) -> Tensor | None:
    """The truth (P,) of each prompt; None where only some of the pictures were kept."""
    file = folder / "samples" / f"step-{row['step']}" / "results.jsonl"
    if not file.exists():
        return None
    told = [json.loads(line).get("truth") for line in file.read_text(encoding="utf-8").splitlines()]
    if len(told) % each or not told:
        return None
    values = torch.tensor([math.nan if value is None else value for value in told], dtype=torch.float64)
    found = values.view(-1, each).nanmean(1)
    return found if abs(float(found.nanmean()) - row["truth"]) < 1e-4 else None


def aligned(curves: Sequence[Curve]) -> list[Curve]:
    """The curves with the prompts that all of them know; with means alone where some have nothing else."""
    if len({curve.truth.shape[1] for curve in curves}) > 1:
        return [replace(curve, truth=curve.truth.nanmean(1, keepdim=True)) for curve in curves]
    known = torch.stack([~curve.truth.isnan().any(0) for curve in curves]).all(0)
    if not known.any():
        raise ConfigError("no evaluation prompt has a truth in all of the runs, so they cannot be compared.")
    return [replace(curve, truth=curve.truth[:, known]) for curve in curves]


@dataclass(frozen=True)
class Group:
    """The seeds of one line of the plan."""

    curves: Sequence[Curve]

    @property
    def first(self) -> Tensor:
        """Truth (S, P) before training."""
        return torch.stack([curve.truth[0] for curve in self.curves])

    @property
    def last(self) -> Tensor:
        """Truth (S, P) of what was saved."""
        return torch.stack([curve.truth[curve.chosen] for curve in self.curves])

    @property
    def seeds(self) -> list[int]:
        return [curve.seed for curve in self.curves]

    def of(self, seeds: Sequence[int]) -> Group | None:
        """These seeds alone, as far as they are here."""
        some = [curve for curve in self.curves if curve.seed in seeds]
        return Group(some) if some else None

    def along(self, axis: str, *, smoothed: bool = False) -> tuple[Tensor, Tensor]:
        """The mean cost (G,) and the truths (G, S, P) at every step that a seed evaluated and all of them reached."""
        steps, values = between([(c.cost["step"], smooth(c.truth) if smoothed else c.truth) for c in self.curves])
        return self.cost_at(steps, axis), values

    def cost_at(self, steps: Tensor, axis: str) -> Tensor:
        """The mean over seeds of what was spent (G,) up to some steps."""
        spent = [_at(steps, curve.cost["step"], curve.cost[axis][:, None]) for curve in self.curves]
        return torch.cat(spent, 1).mean(1)

    def total(self, axis: str) -> float:
        """The mean over seeds of what was spent."""
        return sum(float(curve.cost[axis][-1]) for curve in self.curves) / len(self.curves)

    def mean(self, figure: str) -> float | None:
        """The mean over seeds of a figure of the saved evaluation."""
        values = [curve.rows[curve.chosen].get(figure) for curve in self.curves]
        known = [float(value) for value in values if value is not None]
        return sum(known) / len(known) if known else None


def between(lines: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Lines ((E,), (E, P)) at all places (G,) of any of them that every one covers: (G,), (G, S, P)."""
    end = min(float(xs[-1]) for xs, _ in lines)
    begin = max(float(xs[0]) for xs, _ in lines)
    places = torch.cat([xs for xs, _ in lines])
    places = torch.unique(places[(places >= begin) & (places <= end)])
    return places, torch.stack([_at(places, xs, ys) for xs, ys in lines], 1)


def _at(places: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    if len(xs) == 1:
        return ys.expand(len(places), -1)
    right = torch.searchsorted(xs, places).clamp(1, len(xs) - 1)
    share = (places - xs[right - 1]) / (xs[right] - xs[right - 1]).clamp(min=1e-12)
    return ys[right - 1] + share[:, None] * (ys[right] - ys[right - 1])


def smooth(values: Tensor) -> Tensor:
    """Each row (E, P) averaged with its neighbours."""
    return torch.stack([values[max(k - NEIGHBOURS, 0) : k + NEIGHBOURS + 1].mean(0) for k in range(len(values))])


def resampled(values: Tensor, *, seed: int = 0) -> Tensor:
    """Means (D, ...) of values (..., S, P), whose seeds and prompts are drawn anew in each of D draws."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for count in (values.shape[-1], values.shape[-2]):  # prompts first: they are shared by groups of other seed counts
        picks = torch.randint(count, (DRAWS, count), generator=generator)
        weights.append(
            torch.zeros(DRAWS, count, dtype=torch.float64).scatter_add_(
                1, picks, torch.ones(1, 1).double().expand(DRAWS, count)
            )
            / count
        )
    return torch.einsum("dp,...sp,ds->d...", weights[0], values, weights[1])


def interval(values: Tensor, *, seed: int = 0) -> dict[str, float]:
    """The mean of values (S, P) with the ends of its interval."""
    return {"mean": float(values.mean()), **ends(resampled(values, seed=seed))}


def ends(draws: Tensor) -> dict[str, float]:
    """The ends of the draws (D,); infinite where too many draws are."""
    ordered = draws.sort().values
    low, high = (0.5 - LEVEL / 2) * (len(draws) - 1), (0.5 + LEVEL / 2) * (len(draws) - 1)
    return {"lo": float(ordered[round(low)]), "hi": float(ordered[round(high)])}


def crossing(places: Tensor, truth: Tensor, target: Tensor) -> Tensor:
    """Where each line (D, G) over the places (G,) first reaches its target (D,): (D,), infinite where it never does."""
    above = truth >= target[:, None]
    first = above.double().argmax(1)
    left, rows = (first - 1).clamp(min=0), torch.arange(len(truth))
    low, high = truth[rows, left], truth[rows, first]
    share = torch.where(first > 0, (target - low) / (high - low).clamp(min=1e-12), 0.0)
    found = places[left] + share * (places[first] - places[left])
    return torch.where(above.any(1), found, math.inf)


def reach(group: Group, reference: Group, axis: str, *, seed: int = 0) -> dict[str, float | None]:
    """Where the mean curve gets as high as the end of the reference's, both smoothed, and in how many draws."""
    same = reference.of(group.seeds) or reference  # the noise of an evaluation is its seed's
    (places, truth), (spent, theirs) = (each.along(axis, smoothed=True) for each in (group, same))
    goal, total = theirs[-1], float(spent[-1])
    found = float(crossing(places, truth.mean((1, 2))[None], goal.mean()[None]))
    draws = crossing(places, resampled(truth, seed=seed), resampled(goal, seed=seed))
    told = {"mean": found, **ends(draws), "of_reference": found / total if total else math.nan}
    finite = {name: value if math.isfinite(value) else None for name, value in told.items()}
    return finite | {"reached": float(draws.isfinite().double().mean())}


def groups_of(curves: Sequence[Curve]) -> dict[str, Group]:
    """The curves by name, in their order."""
    found: dict[str, list[Curve]] = {}
    for curve in aligned(curves) if curves else []:
        found.setdefault(curve.name, []).append(curve)
    return {name: Group(some) for name, some in found.items()}


def summary(groups: Mapping[str, Group], *, reference: str | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """A row for each line of the plan."""
    return [_row(name, group, groups.get(reference or ""), seed) for name, group in groups.items()]


def _row(name: str, group: Group, reference: Group | None, seed: int) -> dict[str, Any]:
    gain = interval(group.last - group.first, seed=seed)
    millions = group.total("nfe") / 1e6
    row: dict[str, Any] = {
        "name": name,
        "seeds": group.seeds,
        "prompts": group.last.shape[1],
        "finished": sum(bool(curve.ended) for curve in group.curves),
        "before": interval(group.first, seed=seed),
        "after": interval(group.last, seed=seed),
        "gain": gain,
        "points_per_million": {key: 100 * value / millions for key, value in gain.items()} if millions else None,
        **{axis: group.total(axis) for axis in AXES},
        "wall_seconds": sum(curve.seconds for curve in group.curves) / len(group.curves),
        **{figure: group.mean(figure) for figure in ("proxy", "diversity", "diversity_across", "kl_base")},
        "alarms": [{"seed": curve.seed, **alarm} for curve in group.curves for alarm in curve.alarms],
    }
    if reference is not None:
        row["reach"] = {axis: reach(group, reference, axis, seed=seed) for axis in AXES}
        row["over_reference"] = None if reference is group else _gap(group, reference, seed)
    return row


def _gap(group: Group, reference: Group, seed: int) -> dict[str, float] | None:
    """The last truth minus the reference's, on the seeds that both have."""
    mine, theirs = group.of(reference.seeds), reference.of(group.seeds)
    if mine is None or theirs is None:
        return None
    order = [theirs.seeds.index(s) for s in mine.seeds]
    return interval(mine.last - theirs.last[order], seed=seed)


def lines(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """A row for every evaluation of every run."""
    found = []
    for curve in curves:
        for k, row in enumerate(curve.rows):
            cost = {axis: float(curve.cost[axis][k]) for axis in AXES}
            told = {name: row[name] for name in FIGURES if row.get(name) is not None}
            found.append({"run": curve.name, "seed": curve.seed, **cost, **told})
    return found
