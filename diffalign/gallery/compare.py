"""Comparisons between systems: paired differences over prompts, wins and losses, and what chance would make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.intervals import Interval, bootstrap, wilson

Scores = Sequence[float | None]  # one per entry, None where there is none


def paired(a: Scores, b: Scores, *, seed: int = 0) -> dict[str, Any] | None:
    """How b stands against a over the entries where both are valid; None if there is no such entry."""
    gaps = [y - x for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not gaps:
        return None
    wins, losses = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    delta, rate = bootstrap(gaps, seed=seed), bootstrap([(_sign(gap) + 1) / 2 for gap in gaps], seed=seed)
    return {
        "n": len(gaps),
        "delta": delta.mean,
        "lo": delta.lo,
        "hi": delta.hi,
        "wins": wins,
        "losses": losses,
        "ties": len(gaps) - wins - losses,
        "win_rate": rate.mean,
        "win_lo": rate.lo,
        "win_hi": rate.hi,
        "sign_p": sign_test(wins, losses),
    }


def sign_test(wins: int, losses: int) -> float:
    """Two-sided probability of a split at least this uneven if each decided pair were a fair coin; 1 without any."""
    n, fewer = wins + losses, min(wins, losses)
    tail = term = 1
    for k in range(1, fewer + 1):
        term = term * (n - k + 1) // k  # n choose k
        tail += term
    return float(min(1.0, 2 * tail / 2**n))


def share(wins: int, losses: int) -> Interval | None:
    """Wilson interval of the share of decided pairs that were won."""
    return wilson(wins, wins + losses) if wins + losses else None


def agreement(choices: Sequence[int], gaps: Scores) -> dict[str, Any]:
    """How often a reward's difference b - a points where people did: choices are +1 for b, -1 for a, 0 for a tie.

    Ties of either side are left out and counted.
    """
    pairs = [(c, _sign(g)) for c, g in zip(choices, gaps, strict=True) if g is not None]
    decided = [(c, g) for c, g in pairs if c and g]
    same = sum(c == g for c, g in decided)
    found = wilson(same, len(decided)).json() if decided else {"mean": None, "lo": None, "hi": None}
    return {**found, "n": len(decided), "ties": len(pairs) - len(decided)}


def summaries(scores: Sequence[Mapping[str, Scores]], names: Sequence[str], *, seed: int = 0) -> list[dict[str, Any]]:
    """Every pair of systems, the baseline's first; `scores[k][name]` are system k's over the entries."""
    pairs = [(a, b) for a in range(len(scores)) for b in range(a + 1, len(scores))]
    found = []
    for a, b in pairs:
        rows = {name: paired(scores[a][name], scores[b][name], seed=seed) for name in names}
        found.append({"a": a, "b": b, "rewards": {name: row for name, row in rows.items() if row}})
    return found


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
