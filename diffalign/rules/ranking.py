"""Rankings: rewards that train a judge, and rewards made of comparisons.

Zhuohao Yu et al.: "RewardAnything: Generalizable Principle-Following Reward Models", 2025 (arXiv 2506.03637), its
accuracy and format rewards; "Leveraging Verifier-Based Reinforcement Learning in Image Editing" (Edit-R1), 2026 (arXiv
2604.27505), its GCPO rewards r_j = mean over the other picture's traces of 1[right order], A_j = r_j - mean r.

Where we differ:
- The weights of accuracy and format in one reward are not published; both are given by themselves.
- Traces that could not be read are NaN in GCPO: they have no reward and count in no mean.
- Verdicts, flips and win rates are ours: a comparison is asked in both orders, and where they disagree it is a tie.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.cases import derived_seed

LONG = 50  # letters from which thinking counts as such
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def accuracy(predicted: Mapping[str, float], truth: Mapping[str, float]) -> float:
    """1 - lost weight / weight over the pairs both name; a pair weighs 1 + the gap of its true scores."""
    shared = [name for name in truth if name in predicted]
    if len(shared) < 2:
        return 1.0
    lost = weight = 0.0
    for a, b in itertools.combinations(shared, 2):
        gap, said = truth[a] - truth[b], predicted[a] - predicted[b]
        weight += 1 + abs(gap)
        if gap:
            lost += (1 + abs(gap)) * (0.5 if said == 0 else float((said > 0) != (gap > 0)))
    return max(0.0, 1 - lost / weight)


def format_reward(text: str, names: Sequence[str]) -> float:
    """How far a reply keeps to the form: thinking in tags, JSON with `scores` and `best-to-worst`, every name."""
    thought = _THOUGHT.search(text)
    if thought:
        worth = 0.15 + (0.05 if len(thought[1].strip()) > LONG else 0.0)
    else:
        worth = 0.05 if ("<think>" in text) != ("</think>" in text) else 0.0
    found, clean = _object(text.rpartition("</think>")[2].strip())
    if found is None:
        return worth
    worth += 0.20 if clean else 0.15
    given, order = found.get("scores"), found.get("best-to-worst")
    worth += 0.10 * ("scores" in found) + 0.10 * ("best-to-worst" in found)
    told = given if isinstance(given, Mapping) else {}
    scores = {name: float(told[name]) for name in names if _is_number(told.get(name))}
    worth += 0.20 * len(scores) / max(len(names), 1)
    return worth + (0.20 if scores and is_ranked(scores, order) else 0.0)


def is_ranked(scores: Mapping[str, float], order: Any) -> bool:
    """Whether `order` lists exactly the names that have a score, from the highest to the lowest."""
    if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
        return False
    if sorted(order) != sorted(scores):
        return False
    return all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))


def arrangement(count: int, turn: int, *about: str) -> list[int]:
    """The order in which `count` candidates are shown at a turn: a shuffle, then its rotations.

    It depends on `about` and the turn only. In `count` turns each candidate takes each place once.
    """
    order = list(range(count))
    random.Random(derived_seed(turn // max(count, 1), "arrangement", *about)).shuffle(order)
    shift = turn % max(count, 1)
    return order[shift:] + order[:shift]


def orders(count: int) -> list[tuple[int, int]]:
    """Every comparison of a round robin in both orders: (shown first, shown second)."""
    return list(itertools.permutations(range(count), 2))


def symmetrised(first: float, swapped: float) -> float:
    """What A gets against B, 1, 1/2 or 0: `first` is what A gets shown first, `swapped` what B gets shown first.

    Above one half is a win. Orders that disagree are a tie; NaN where either is.
    """
    if math.isnan(first) or math.isnan(swapped):
        return math.nan
    one, other = _verdict(first), _verdict(1 - swapped)
    return one if one == other else 0.5


def flip_rate(pairs: Sequence[tuple[float, float]]) -> float:
    """Share of comparisons whose verdict changes under the swap, over those read in both orders; NaN without any."""
    read = [(a, b) for a, b in pairs if not (math.isnan(a) or math.isnan(b))]
    return sum(_verdict(a) != _verdict(1 - b) for a, b in read) / len(read) if read else math.nan


def win_rates(shown: Mapping[tuple[int, int], float], count: int) -> list[float]:
    """(wins + ties / 2) / comparisons of each candidate; `shown[i, j]` is what i gets against j when shown first.

    A comparison that lacks an order counts for neither side; a candidate without any is NaN.
    """
    points: list[list[float]] = [[] for _ in range(count)]
    for a, b in itertools.combinations(range(count), 2):
        verdict = symmetrised(shown.get((a, b), math.nan), shown.get((b, a), math.nan))
        if not math.isnan(verdict):
            points[a].append(verdict)
            points[b].append(1 - verdict)
    return [sum(own) / len(own) if own else math.nan for own in points]


def gcpo_rewards(winner: Tensor, loser: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the traces of both pictures (N,) and (M,) -> how often each stands in the right order, strictly."""
    right = (winner[:, None] > loser[None, :]).float()  # (N, M)
    read = (~winner.isnan())[:, None] & (~loser.isnan())[None, :]
    right = right.where(read, torch.nan)
    return right.nanmean(1), right.nanmean(0)


def gcpo_advantages(winner: Tensor, loser: Tensor) -> tuple[Tensor, Tensor]:
    """Each reward minus the mean of its own picture's; no division by a spread."""
    own, other = gcpo_rewards(winner, loser)
    return own - own.nanmean(), other - other.nanmean()


def _verdict(value: float) -> float:
    return 1.0 if value > 0.5 else 0.0 if value < 0.5 else 0.5


def _object(text: str) -> tuple[Mapping[str, Any] | None, bool]:
    """The JSON object of a text, and whether it stands there alone."""
    for piece, clean in ((text, True), (text[text.find("{") : text.rfind("}") + 1], False)):
        try:
            found = json.loads(piece)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found, clean
    return None, False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
