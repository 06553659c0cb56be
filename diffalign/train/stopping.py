"""When to stop: rules over the history of evaluations, each as how strongly it holds.

A rule maps a history (one number per evaluation, the first before training, NaN for one that is missing) to severities:
above 1 the rule holds at that evaluation, NaN says nothing. `first_held` waits for it to hold several times in a row;
a missing evaluation neither counts nor interrupts.

The rules are ours. Held-out rewards that may stop a run are selected against by doing so: final figures need other
ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffalign.train.overoptimisation import smooth


def gold_drop(
    gold: Sequence[float],
    se: Sequence[float] | None = None,
    *,
    weight: float = 0.5,
    least: float = 0.04,
    errors: float = 2.0,
) -> list[float]:
    """R1: how far the smoothed held-out gain lies below its highest so far, in units of max(least, errors * se)."""
    told, peak = [], -math.inf
    for k, (raw, level) in enumerate(zip(gold, smooth(gold, weight), strict=True)):
        if math.isnan(raw):
            told.append(math.nan)
            continue
        peak = max(peak, level)
        noise = se[k] if se is not None and not math.isnan(se[k]) else 0.0
        told.append((peak - level) / max(least, errors * noise))
    return told


def diversity_floor(ratio: Sequence[float], floor: float = 0.8) -> list[float]:
    """R2: the share of the base model's diversity that is lost, in units of the share that may be."""
    return [(1 - r) / (1 - floor) for r in ratio]


def kl_ceiling(kl: Sequence[float], ceiling: float) -> list[float]:
    """R3: the KL to the base model in units of what a pilot run found to be safe."""
    return [k / ceiling for k in kl]


def decorrelation(rho: Sequence[float], se: Sequence[float] | None = None, *, errors: float = 0.0) -> list[float]:
    """R4: the rank correlation of proxy and held-out reward within prompts is below 0 by `errors` standard errors."""
    told = []
    for k, value in enumerate(rho):
        margin = errors * se[k] if se is not None else 0.0
        told.append(-value / margin if margin > 0 else 1 - value)
    return told


def signature(z: Sequence[float], most: float = 3.0) -> list[float]:
    """R5: a statistic of the images has moved away from the base model's."""
    return [abs(value) / most for value in z]


def marginal_transfer(
    proxy: Sequence[float], gold: Sequence[float], *, least: float = 0.05, over: int = 3, rise: float = 0.1
) -> list[float]:
    """R6: over the last `over` evaluations the proxy gained, and held-out rewards less than `least` of it.

    A proxy that gained less than `rise` says nothing: the share would be a ratio of noises.
    """
    told: list[float] = []
    known: list[tuple[float, float]] = []
    for p, g in zip(proxy, gold, strict=True):
        if math.isnan(p) or math.isnan(g):
            told.append(math.nan)
            continue
        known.append((p, g))
        start = known[-over] if len(known) >= over else None
        grown = p - start[0] if start else 0.0
        told.append(1 + least - (g - start[1]) / grown if start and grown > rise else 0.0)
    return told


def first_held(severity: Sequence[float], patience: int = 2, at_once: float = math.inf) -> int | None:
    """The first evaluation at which a rule has held `patience` times in a row, or holds `at_once` times over."""
    row = 0
    for k, value in enumerate(severity):
        if math.isnan(value):
            continue
        row = row + 1 if value > 1 else 0
        if row >= patience or value > at_once:
            return k
    return None


def holds(severity: Sequence[float], patience: int = 2, at_once: float = math.inf) -> bool:
    """Whether a rule holds at the last evaluation and has done so long enough to act."""
    known = [value for value in severity if not math.isnan(value)]
    if not known or math.isnan(severity[-1]) or not known[-1] > 1:
        return False
    row = next((k for k, value in enumerate(reversed(known)) if not value > 1), len(known))
    return row >= patience or known[-1] > at_once
