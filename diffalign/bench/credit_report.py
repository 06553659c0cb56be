"""What the parts of a credit comparison say: figures with intervals, a table, a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.bench import credit, credit_gradients
from diffalign.bench.credit_gradients import jackknife
from diffalign.bench.credit_methods import ORACLE, PLAIN, Method
from diffalign.bench.credit_oracle import Worth, ceiling, pearson, spearman, variances
from diffalign.intervals import bootstrap

UNIT = 1000  # NFE and reward calls, over all walks, that signal is told for


def summary(found: credit.Found, methods: Mapping[str, Method], groups: int, seed: int = 0) -> dict[str, Any]:
    """Everything the table shows; `ranks` and `variance` are None where no noise was drawn again."""
    A, g = credit.completed(found, methods)
    rows = [row for row in found.rows if "A" in row]
    told = [Worth.read(row["worth"]) for row in rows if "worth" in row]
    order = [*methods, *([ORACLE] if ORACLE in A else [])]
    return {
        "parts": len(rows),
        "reference": len(found.rows) - len(rows),
        "walks": A[PLAIN].shape[0] * A[PLAIN].shape[1],
        "trained": rows[0]["trained"],
        "variance": _variance(rows, told, groups, seed) if told else None,
        "ceiling": _ceilings(told) if told else None,
        "ranks": {name: _ranks(A[name], told) for name in order if name != ORACLE} if told else None,
        "gradients": _gradients(found, methods, g, order),
    }


def _variance(rows: Sequence[Mapping[str, Any]], told: Sequence[Worth], groups: int, seed: int) -> dict[str, Any]:
    """Parts of the reward's variance with intervals over prompts."""
    gid = torch.arange(groups).repeat_interleave(len(rows[0]["rewards"]) // groups)
    each = [variances(w, credit.tensor(row["rewards"]), gid) for row, w in zip(rows, told, strict=True)]
    columns = {name: torch.cat([part[name] for part in each]) for name in each[0]}
    steps = columns.pop("steps")

    def over_prompts(values: Tensor) -> dict[str, float] | None:
        kept = values[~values.isnan()].tolist()
        return bootstrap(kept, seed=seed).json() if kept else None

    found: dict[str, Any] = {name: over_prompts(values) for name, values in columns.items()}
    return found | {"steps": [over_prompts(steps[:, k]) for k in range(steps.shape[1])]}


def _ceilings(told: Sequence[Worth]) -> dict[str, Any]:
    """The rank correlation that perfect credit would have with the measured truth, at each step and over all."""
    a, b = (torch.cat([w.halves[half].diff(dim=1) for w in told]) for half in (0, 1))
    steps = [ceiling(spearman(a[:, k], b[:, k])) for k in range(a.shape[1])]
    return {"steps": steps, "mean": sum(steps) / len(steps), "all": ceiling(spearman(a.flatten(), b.flatten()))}


def _ranks(A: Tensor, told: Sequence[Worth]) -> dict[str, Any]:
    """Correlations of a credit (K, N, S) with the truth: at each step, their mean, and over all walks and steps."""
    truth = torch.stack([w.advantage for w in told])

    def at_steps(which: Callable[[Tensor, Tensor], float], parts: Tensor) -> list[float]:
        return [which(A[parts][..., k].flatten(), truth[parts][..., k].flatten()) for k in range(A.shape[2])]

    def mean(parts: Tensor) -> float:
        steps = at_steps(spearman, parts)
        return sum(steps) / len(steps)

    whole = torch.arange(len(A))
    return {
        "spearman": at_steps(spearman, whole),
        "pearson": at_steps(pearson, whole),
        "mean": jackknife(mean, len(A)),
        "all": jackknife(lambda parts: spearman(A[parts].flatten(), truth[parts].flatten()), len(A)),
        "all_pearson": pearson(A.flatten(), truth.flatten()),
    }


def _gradients(
    found: credit.Found, methods: Mapping[str, Method], g: Mapping[str, Tensor], order: Sequence[str]
) -> dict[str, Any]:
    """Signal, price and bias of every method's gradient."""
    extra = [found.gradients(row["part"])[PLAIN] for row in found.rows if "A" not in row]
    plain = torch.cat([g[PLAIN], *(each[None] for each in extra)]).double()
    grams = {name: g[name].double() @ g[name].double().T for name in order}
    prices = {name: credit.price(found, methods, name) for name in order}
    walks = len(found.rows[0]["rewards"])
    size = {name: walks * (price["nfe"] + price["reward_calls"]) / UNIT for name, price in prices.items()}
    rest, count = torch.arange(len(g[PLAIN]), len(plain)), len(g[PLAIN])
    own = plain @ plain.T
    told = {}
    for name in order:
        gram, cross = grams[name], g[name].double() @ plain.T

        def signal(parts: Tensor, gram: Tensor = gram) -> float:
            return credit_gradients.signal(gram[parts][:, parts])

        def gain(parts: Tensor, gram: Tensor = gram, name: str = name) -> float:
            base = credit_gradients.signal(grams[PLAIN][parts][:, parts]) / size[PLAIN]
            return credit_gradients.signal(gram[parts][:, parts]) / size[name] - base

        def bias(parts: Tensor, gram: Tensor = gram, cross: Tensor = cross) -> float:
            known = torch.cat([parts, rest])
            return credit_gradients.cosine(cross[parts][:, known], gram[parts][:, parts], own[known][:, known])

        found_signal = jackknife(signal, count)
        told[name] = {
            **prices[name],
            "ratio": credit_gradients.ratio(g[name]),
            "signal": found_signal,
            "per_cost": {end: value / size[name] for end, value in found_signal.items()},
            "over_plain": None if name in (PLAIN, ORACLE) else jackknife(gain, count),
            "cosine": jackknife(bias, count),
            "raw_cosine": float(torch.cosine_similarity(g[name].double().mean(0), plain.mean(0), dim=0)),
        }
    return told


def table(told: Mapping[str, Any]) -> str:
    """The summary as markdown."""
    steps = [str(i) for i in told["trained"]]
    lines = [
        f"{told['walks']} walks in {told['parts']} parts, {told['reference']} more parts for the plain gradient.",
        "",
    ]
    if told["variance"]:
        lines += [*_variance_lines(told["variance"], steps), "", *_rank_lines(told, steps), ""]
    lines += [
        "Gradients at the frozen policy. Signal is 0 for pure noise, and grows with the walks of a part; the column",
        f"per {UNIT} is what {UNIT} NFE and reward calls buy. NFE of an image are those of its walk, its credit and",
        "learning from it. The cosine is that with the plain gradient as if noise were averaged out, so that it may",
        "pass 1; raw is as measured.",
        "",
        f"| method | SNR | signal over noise | NFE | calls | per {UNIT} | over flow_grpo | cosine | raw |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['ratio']:.3f} | {_shown(row['signal'])} | {row['nfe']:.0f} | {row['reward_calls']:.1f} "
        f"| {_shown(row['per_cost'])} | {_verdict(row['over_plain'])} | {_shown(row['cosine'], 2)} "
        f"| {row['raw_cosine']:.2f} |"
        for name, row in told["gradients"].items()
    ]
    none = 1 / (told["parts"] - 1)
    lines += [
        "",
        f"Pure noise has an SNR of {none:.3f} and a signal of 0. Intervals leave out one part after the other.",
    ]
    return "\n".join(lines) + "\n"


def _variance_lines(told: Mapping[str, Any], steps: Sequence[str]) -> list[str]:
    total = told["total"]["mean"]
    rows = [
        ("start noise", told["start"]),
        *((f"step {i}", each) for i, each in zip(steps, told["steps"], strict=True)),
    ]
    rows += [("residual", told["residual"]), ("total", told["total"])]
    lines = ["Where the reward's variance within a prompt arises; the residual's expectation is 0.", ""]
    lines += ["| where | variance | share |", "|---|---|---|"]
    return lines + [
        f"| {name} | {_shown(each, 4)} | {each['mean'] / total if total else math.nan:.0%} |"
        for name, each in rows
        if each
    ]


def _rank_lines(told: Mapping[str, Any], steps: Sequence[str]) -> list[str]:
    lines = [
        "Spearman correlation of credit with the true advantage of each step.",
        "",
        f"| method | {' | '.join(steps)} | mean of steps | all steps | all, Pearson |",
        f"|---|{'---|' * len(steps)}---|---|---|",
    ]
    top = told["ceiling"]
    cells = " | ".join(f"{value:.2f}" for value in top["steps"])
    lines.append(f"| perfect credit | {cells} | {top['mean']:.2f} | {top['all']:.2f} | |")
    for name, row in told["ranks"].items():
        cells = " | ".join(f"{value:.2f}" for value in row["spearman"])
        ends = f"{_shown(row['mean'], 2)} | {_shown(row['all'], 2)} | {row['all_pearson']:.2f}"
        lines.append(f"| {name} | {cells} | {ends} |")
    return lines


def _shown(interval: Mapping[str, float] | None, digits: int = 3) -> str:
    if interval is None or interval["mean"] != interval["mean"]:
        return "hidden by noise"
    if interval["lo"] != interval["lo"]:
        return f"{interval['mean']:.{digits}f}, interval unknown"
    return f"{interval['mean']:.{digits}f} [{interval['lo']:.{digits}f}, {interval['hi']:.{digits}f}]"


def _verdict(gap: Mapping[str, float] | None) -> str:
    if gap is None:
        return ""
    words = "better" if gap["lo"] > 0 else "worse" if gap["hi"] < 0 else "not told apart"
    return f"{gap['mean']:+.3f} [{gap['lo']:+.3f}, {gap['hi']:+.3f}] {words}"


def draw(told: Mapping[str, Any], file: Path, *, title: str) -> None:
    """Variance and rank correlation by step, and signal by price, as far as they were measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16 if told["variance"] else 6, 5.2), layout="constrained")
    axes = figure.subplots(1, 3 if told["variance"] else 1, squeeze=False)[0]
    colours = _colours(told["gradients"])
    if told["variance"]:
        _draw_variance(axes[0], told["variance"], told["trained"])
        _draw_ranks(axes[1], told, colours)
    _draw_signal(axes[-1], told["gradients"], colours)
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def _colours(methods: Mapping[str, Any]) -> dict[str, Any]:
    from matplotlib import colormaps

    wheel = colormaps["tab20"]
    return {name: "black" if name == PLAIN else wheel(k % 20) for k, name in enumerate(methods)}


def _draw_variance(axis: Any, told: Mapping[str, Any], trained: Sequence[int]) -> None:
    rows = [("start", told["start"]), *((str(i), each) for i, each in zip(trained, told["steps"], strict=True))]
    rows.append(("residual", told["residual"]))
    means = [each["mean"] if each else math.nan for _, each in rows]
    ends = [[each["mean"] - each["lo"], each["hi"] - each["mean"]] if each else [0, 0] for _, each in rows]
    paint = ["#b8c4d0", *["#2f6f9f"] * len(trained), "#c2382c"]
    axis.bar(range(len(rows)), means, yerr=torch.tensor(ends).T.numpy(), color=paint, capsize=3)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xticks(range(len(rows)), [name for name, _ in rows])
    axis.set(xlabel="step (0 = noisiest)", ylabel="variance of the reward that arises there")


def _draw_ranks(axis: Any, told: Mapping[str, Any], colours: Mapping[str, Any]) -> None:
    axis.plot(told["trained"], told["ceiling"]["steps"], color="grey", linestyle="--", label="perfect credit")
    plain = told["ranks"][PLAIN]["spearman"]
    for name, row in told["ranks"].items():
        if name == PLAIN or row["spearman"] != plain:  # a fixed schedule ranks walks as the plain credit does
            told_by = {"color": colours[name], "linewidth": 2.4 if name == PLAIN else 1.2, "label": name}
            axis.plot(told["trained"], row["spearman"], marker="o", markersize=3, **told_by)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(
        xlabel="step (0 = noisiest)", ylabel="Spearman correlation with the true advantage", xticks=told["trained"]
    )
    axis.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def _draw_signal(axis: Any, told: Mapping[str, Any], colours: Mapping[str, Any]) -> None:
    names = list(told)[::-1]
    for k, name in enumerate(names):
        each = told[name]["per_cost"]
        axis.errorbar(
            each["mean"], k, xerr=[[each["mean"] - each["lo"]], [each["hi"] - each["mean"]]], color=colours[name],
            marker="o", capsize=3,
        )  # fmt: skip
    axis.axvline(0, color="black", linewidth=0.6)
    axis.axvline(told[PLAIN]["per_cost"]["mean"], color="black", linewidth=0.6, linestyle=":")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel=f"signal over noise that {UNIT} NFE and reward calls buy")
