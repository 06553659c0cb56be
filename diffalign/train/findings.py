"""What an evaluation shows beside the base model, and how strongly each rule of the watch holds on it.

A finding's severity is above 1 where its rule holds: the value in units of the threshold. Whether it is an alarm is
for the watch to say, which knows how often it has held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.train import signatures, stopping
from diffalign.train.look import NUMBERS, Look
from diffalign.train.overoptimisation import (
    hacking_gap,
    mean_change,
    panel_gain,
    spearman_within,
    standardised_gain,
    transfer,
)

if TYPE_CHECKING:
    from diffalign.train.watch import WatchConfig

FEWEST = 6  # images outside the base model's range that are not yet chance
EARLIER = 3  # gradient norms to compare with
SHOWN = 16  # images an alarm points at
LEAST_ERROR = 1e-4  # of distances between 0 and 2: the least standard error, for moves that are the same everywhere
WHY = "a reward is often raised this way without the prompt being followed any better"
DO = "look at the pictures, go back to step {best}, then add a reward that sees this, or a KL penalty"
SE = "heldout_gain_se"
PANEL = ("the proxy is likely being raised by what only it sees",)
RATIO = ("the policy has left the one that drew the images", "lower the learning rate or the updates per batch")
CLIP = ("most of the batch no longer teaches", "lower the learning rate or the updates per batch")
ZERO = ("groups of equal rewards teach nothing", "stop here, or take harder prompts or a finer reward")
GRADIENT = ("one such update can undo the run", "lower the learning rate or the gradient limit")
INVALID = ("a model that learns to break its judge is not judged", "look at these pictures and at the reward's errors")
FAR = (
    "the model is further from where it began than was found to be safe",
    "go back to step {best} or raise the KL weight",
)


@dataclass(frozen=True)
class Finding:
    """One rule on one evaluation."""

    name: str
    value: float
    threshold: float
    severity: float
    seen: str  # what was seen, as the start of a sentence
    why: str = WHY
    do: str = DO
    images: tuple[int, ...] = ()


def of_signatures(now: Look, base: Look, config: WatchConfig) -> tuple[dict[str, float], list[Finding]]:
    """R5 for every statistic of the pictures, in each direction that means something."""
    metrics: dict[str, float] = {}
    found = []
    for name, values in now.statistics.items():
        if name not in base.statistics:
            continue
        sign = signatures.SIGNATURES[name]
        moved = signatures.compare(
            values, base.statistics[name], now.prompts, least=sign.least, margin=config.outside_margin
        )
        metrics |= {f"{name}_shift": moved.shift, f"{name}_t": moved.t, f"{name}_outside": moved.above + moved.below}
        for word, says, direction in (("high", sign.up, 1), ("low", sign.down, -1)):
            if says:
                found.append(_of_shift(name, word, says, direction, moved, config))
    return metrics, found


def _of_shift(name: str, word: str, says: str, direction: int, moved: signatures.Shift, config: WatchConfig) -> Finding:
    mean, sure = direction * moved.shift / config.shift, direction * moved.t / config.errors
    share = moved.above if direction > 0 else moved.below
    limit = max(config.outside, FEWEST / max(len(moved.low), 1))
    worst = tuple(reversed(moved.low))[:SHOWN] if direction > 0 else moved.low[:SHOWN]
    where, plain = "above" if direction > 0 else "below", name.replace("_", " ")
    severity = max(min(mean, sure), share / limit)
    if share / limit > min(mean, sure):
        seen = f"{share:.0%} of the pictures are {says}, beyond any of the base model's ({plain}; limit {limit:.0%})"
        return Finding(f"{name}_{word}", share, limit, severity, seen, images=worst)
    seen = f"the pictures are {says}: their {plain} lies {abs(moved.shift):.1f} deviations {where} the base model's "
    seen += f"(limit {config.shift:g})"
    return Finding(f"{name}_{word}", moved.shift, direction * config.shift, severity, seen, images=worst)


def of_diversity(now: Look, base: Look, config: WatchConfig) -> tuple[dict[str, float], list[Finding]]:
    """R2 within prompts and across them, and how much of the variety the prompts explain."""
    ratios = {name: _ratio(getattr(now, name), getattr(base, name)) for name in NUMBERS}
    metrics = {"diversity": ratios["within"], "diversity_across": ratios["across"], "vendi": now.vendi}
    metrics |= {"vendi_ratio": ratios["vendi"], "diversity_warning": float(ratios["within"] < config.diversity_warning)}
    told = {
        "within": ("the pictures of a prompt have become alike", now.own, base.own),
        "across": ("the pictures of all prompts have become alike", now.others, base.others),
    }
    found = []
    for name, (seen, rows, before) in told.items():
        lost = stopping.diversity_floor([ratios[name]], config.diversity_floor)[0]
        severity = min(lost, -_t(rows, before, now.prompts) / config.errors)
        seen = f"{seen}: {ratios[name]:.0%} of the base model's variety is left (limit {config.diversity_floor:.0%})"
        floor = config.diversity_floor
        found.append(Finding(f"variety_{name}", ratios[name], floor, severity, seen, images=_lowest(rows)))
    effect, prompted = _of_prompts(now, base, config)
    return metrics | {"prompt_effect": effect}, [*found, prompted]


def _of_prompts(now: Look, base: Look, config: WatchConfig) -> tuple[float, Finding]:
    """What a prompt still does for its pictures, where it surely did something for the base model's.

    Each picture's margin is given by a text-image reward or else by how much nearer it is to its own prompt's pictures.
    """
    apart, once = (_margin(look) for look in (now, base))
    effect, before = float(apart.nanmean()), float(once.nanmean())
    limit, certain = config.prompt_effect * before, _t(once, torch.zeros_like(once), base.prompts) > config.errors
    severity = (before - effect) / (before - limit) if certain and before > 0 else math.nan
    severity = min(severity, -_t(apart, once, now.prompts) / config.errors) if severity == severity else math.nan
    seen = f"the pictures no longer follow their own prompt more than another one: the difference is {effect:.3f}, "
    seen += f"once {before:.3f} (limit {limit:.3f})"
    return effect, Finding("prompt_ignored", effect, limit, severity, seen, images=_lowest(apart))


def _margin(look: Look) -> Tensor:
    return look.others - look.own if look.prompt_margin is None else look.prompt_margin


def of_rewards(now: Look, base: Look) -> dict[str, float]:
    """Gains of proxy, held-out rewards and, where known, truth; what transfers, and how the rewards agree."""
    proxy, gold = standardised_gain(now.proxy, base.proxy, now.prompts), panel_gain(now.panel, base.panel, now.prompts)
    ranks = [spearman_within(now.proxy, values, now.prompts) for values in now.panel.values()]
    known = [rank for rank in ranks if rank.value == rank.value]
    metrics = {"proxy_gain": proxy.value, "heldout_gain": gold.value, "heldout_gain_se": gold.se}
    metrics |= {"hacking_gap": hacking_gap(proxy.value, gold.value), "transfer": transfer(proxy.value, gold.value)}
    metrics["spearman"] = fmean(rank.value for rank in known) if known else math.nan
    metrics["spearman_se"] = max((rank.se for rank in known), default=math.nan)
    for name in base.panel:
        metrics[f"heldout_gain/{name}"] = standardised_gain(now.panel[name], base.panel[name], now.prompts).value
    if now.truth is not None and base.truth is not None:
        metrics["truth_gain"] = standardised_gain(now.truth, base.truth, now.prompts).value
    return metrics


def of_panel(
    now: Look, base: Look, metrics: Mapping[str, float], history: Sequence[Mapping[str, Any]], config: WatchConfig
) -> Iterator[Finding]:
    """R1, R4, R6 and the gap, from the metrics of this evaluation and of those before."""
    if not base.panel:
        return
    rows, differ = [*history, metrics], _disagreement(now, base)
    proxies, golds, errors = ([get(row, name) for row in rows] for name in ("proxy_gain", "heldout_gain", SE))
    drop = stopping.gold_drop(golds, errors, least=config.panel_drop, errors=config.panel_errors)[-1]
    limit = max(config.panel_drop, config.panel_errors * (0.0 if math.isnan(errors[-1]) else errors[-1]))
    seen = f"held-out rewards lie {drop * limit:.2f} deviations below their best (limit {limit:.2f})"
    yield Finding("heldout_drop", drop * limit, limit, drop, seen, *PANEL, images=differ)
    rho, se = metrics["spearman"], metrics["spearman_se"]
    against = stopping.decorrelation([rho], [se], errors=config.panel_errors)[0]
    seen = f"within prompts the proxy prefers what held-out rewards reject (rank correlation {rho:.2f})"
    yield Finding("decorrelated", rho, -config.panel_errors * se, against, seen, *PANEL, images=differ)
    if config.least_transfer is not None:
        limit = config.least_transfer
        share = stopping.marginal_transfer(proxies, golds, least=limit)[-1]
        seen = f"of the proxy's gain over three evaluations held-out rewards saw less than {limit:.0%}"
        yield Finding("no_transfer", 1 + limit - share, limit, share, seen, *PANEL, images=differ)
    if config.most_gap is not None:
        gap, limit = metrics["hacking_gap"], config.most_gap
        seen = f"the proxy has gained {gap:.2f} deviations more than held-out rewards (limit {limit:g})"
        yield Finding("hacking_gap", gap, limit, gap / limit, seen, *PANEL, images=differ)


def of_training(
    training: Mapping[str, float], history: Sequence[Mapping[str, Any]], config: WatchConfig
) -> tuple[dict[str, float], list[Finding]]:
    """What the updates themselves show; `history` holds the earlier evaluations' gradient norms."""
    told = {name: float(value) for name, value in training.items()}
    found = list(_of_updates(told, config))
    norm, before = told.get("grad_norm", math.nan), [get(row, "grad_norm") for row in history]
    known = [value for value in before if value == value]
    if len(known) >= EARLIER and (usual := median(known)) > 0:
        seen = f"the gradient norm is {norm:.3g}, {norm / usual:.0f} times what it was"
        limit = config.gradient * usual
        found.append(Finding("gradient", norm, limit, norm / limit, seen, *GRADIENT))
    return told, found


def _of_updates(told: Mapping[str, float], config: WatchConfig) -> Iterator[Finding]:
    ratio = told.get("ratio_mean", math.nan)
    seen = f"the mean probability ratio is {ratio:.3f}, more than {config.ratio:g} from 1"
    yield Finding("ratio", ratio, 1 + config.ratio, abs(ratio - 1) / config.ratio, seen, *RATIO)
    for side in ("low", "high"):
        share = told.get(f"clip_{side}", math.nan)
        seen = f"{share:.0%} of the updates are clipped at the {'lower' if side == 'low' else 'upper'} end"
        yield Finding(f"clip_{side}", share, config.clipped, share / config.clipped, seen, *CLIP)
    share = told.get("frac_zero_std", math.nan)
    seen = f"{share:.0%} of the groups have one reward for all their images"
    yield Finding("zero_spread", share, config.zero_spread, share / config.zero_spread, seen, *ZERO)


def of_invalid(now: Look, config: WatchConfig) -> tuple[dict[str, float], list[Finding]]:
    """Images that the proxy could not judge."""
    broken = now.proxy.isnan()
    share = float(broken.double().mean())
    seen = f"the proxy could not judge {share:.0%} of the pictures (limit {config.invalid:.0%})"
    rows = tuple(broken.nonzero()[:SHOWN, 0].tolist())
    return {"invalid_judged": share}, [
        Finding("invalid", share, config.invalid, share / config.invalid, seen, *INVALID, images=rows)
    ]


def of_kl(kl: float, config: WatchConfig) -> tuple[dict[str, float], list[Finding]]:
    """R3, where a ceiling is known."""
    if config.kl_ceiling is None:
        return {"kl_base": kl}, []
    severity = stopping.kl_ceiling([kl], config.kl_ceiling)[0]
    seen = f"the KL to the base model is {kl:.3g} (limit {config.kl_ceiling:g})"
    return {"kl_base": kl}, [Finding("kl", kl, config.kl_ceiling, severity, seen, *FAR)]


def _disagreement(now: Look, base: Look) -> tuple[int, ...]:
    """The images on which the proxy gained most and held-out rewards least."""
    moves = []
    for after, before in ((now.proxy, base.proxy), *((now.panel[name], base.panel[name]) for name in base.panel)):
        moved = after - before
        moves.append(moved / max(float(moved[~moved.isnan()].std(correction=0)) if (~moved.isnan()).any() else 0, 1e-9))
    gap = (moves[0] - torch.stack(moves[1:]).nanmean(0)).nan_to_num(-math.inf)
    return tuple(torch.argsort(gap, descending=True, stable=True).tolist()[:SHOWN])


def _lowest(rows: Tensor) -> tuple[int, ...]:
    return tuple(torch.argsort(rows.nan_to_num(math.inf), stable=True).tolist()[:SHOWN])


def _t(now: Tensor, base: Tensor, prompts: Tensor) -> float:
    change = mean_change(now, base, prompts)
    return change.value / max(change.se, LEAST_ERROR)


def _ratio(now: float, base: float) -> float:
    return now / base if base > 0 else math.nan


def get(row: Mapping[str, Any], name: str) -> float:
    """A number of a row as JSON holds it; NaN where it is not there."""
    value = row.get(name)
    return math.nan if value is None else float(value)
