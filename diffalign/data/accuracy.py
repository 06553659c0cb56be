"""How often a reward agrees with people: the protocols that published numbers follow, as pure functions.

- `half`: of the pairs with unequal labels, 1 where the better one scores more, 1/2 where both score the same.
- `strict`: the same, but equal scores are wrong.
- `editreward` (EditScore, 2509.23909): as `strict`; the mean over task types of the mean of their pairs.
- `pickapic` (Pick-a-Pic, 2305.01569): label and prediction of a pair are 0, 1/2 or 1; right if equal, half right if
  just one of them is a tie. A prediction is a tie where the softmax shares of the two differ by at most `threshold`.
- `hpdv2` (HPS v2, 2306.09341): per prompt 1 - inversions / (n (n - 1) / 2); what people rank alike is no inversion.
- `imagereward` (ImageReward, 2304.05977): per prompt the share of its unequal pairs that is right; equal scores count
  as wrong.
- `rewardbench2` (RewardBench 2, 2506.01937): per prompt the share of the best pictures among those with the highest
  score; the mean over kinds of the mean of their prompts.

The numbers of two protocols on one reward differ and must not be compared. Intervals are bootstraps over prompts.

Where we differ: a pair with an invalid score is left out and counted, and so is a whole prompt in `rewardbench2`. In
`hpdv2` equal scores of unequal pictures are half an inversion, what a random order of them costs; the published code
takes the order in the file. `pickapic` takes the smallest of several equally good thresholds, and `scale` times the
score as its logit. `rewardbench2` allows several best pictures.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from diffalign.errors import ConfigError
from diffalign.intervals import Interval, bootstrap

PROTOCOLS = ("half", "strict", "editreward", "pickapic", "hpdv2", "imagereward", "rewardbench2")
THRESHOLDS = tuple(k / 10 for k in range(11))
BY_KIND = ("editreward", "rewardbench2")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Pictures of one prompt with people's ranks (1 is best) and a reward's scores (NaN is invalid)."""

    ranks: Sequence[float]
    scores: Sequence[float]
    group: str  # the prompt
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """An accuracy with what it was counted over."""

    protocol: str
    accuracy: Interval | None  # None where nothing could be judged
    prompts: int
    pairs: int  # pairs with two valid scores
    label_ties: int  # of those, which people like alike
    score_ties: int  # of those, which the reward likes alike
    invalid: int  # pairs left out
    by_kind: dict[str, float] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Pair:
    """Two pictures: the signs are 1 where the first is better, -1 where the second, 0 for a tie."""

    label: int
    gap: float  # score of the first minus score of the second; NaN is invalid

    @property
    def sign(self) -> int:
        return (self.gap > 0) - (self.gap < 0)


def measure(
    protocol: str, judged: Iterable[Judged], *, threshold: float = 0.0, scale: float = 1.0, seed: int = 0
) -> Accuracy:
    """The accuracy by one protocol; `threshold` and `scale` belong to `pickapic`."""
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol is '{protocol}', but it is one of {', '.join(PROTOCOLS)}.")
    counts: Counter[str] = Counter()
    credits: list[tuple[str, str, float]] = []  # group, kind, credit
    for one in judged:
        pairs = pairs_of(one)
        valid = [pair for pair in pairs if not math.isnan(pair.gap)]
        tied = [abs(_share_gap(pair.gap * scale)) <= threshold for pair in valid] if protocol == "pickapic" else None
        counts["pairs"] += len(valid)
        counts["invalid"] += len(pairs) - len(valid)
        counts["label_ties"] += sum(pair.label == 0 for pair in valid)
        counts["score_ties"] += sum(tied if tied is not None else (pair.sign == 0 for pair in valid))
        if protocol == "rewardbench2":
            found = item_credit(one.ranks, one.scores)
        elif protocol == "hpdv2":
            found = [inversion_credit(valid)] if valid else []
        elif protocol == "imagereward":
            told = [float(pair.sign == pair.label) for pair in valid if pair.label]
            found = [math.fsum(told) / len(told)] if told else []
        elif tied is not None:
            found = [tie_credit(pair.label, 0 if tie else pair.sign) for pair, tie in zip(valid, tied, strict=True)]
        else:
            even = 0.5 if protocol == "half" else 0.0
            found = [even if pair.sign == 0 else float(pair.sign == pair.label) for pair in valid if pair.label]
        credits += [(one.group, one.kind, credit) for credit in found]
    interval, kinds = _mean(credits, by_kind=protocol in BY_KIND, seed=seed)
    prompts = len({group for group, _, _ in credits})
    return Accuracy(protocol=protocol, accuracy=interval, prompts=prompts, by_kind=kinds, **_counts(counts))


def pairs_of(judged: Judged) -> list[Pair]:
    """Every two pictures of a prompt."""
    if len(judged.ranks) != len(judged.scores):
        raise ConfigError(f"{len(judged.scores)} scores do not fit {len(judged.ranks)} ranks.")
    both = zip(judged.ranks, judged.scores, strict=True)
    return [Pair((a[0] < b[0]) - (a[0] > b[0]), a[1] - b[1]) for a, b in combinations(both, 2)]


def tie_credit(label: int, said: int) -> float:
    """1 if both say the same, 1/2 if just one says tie, else 0."""
    return 1.0 if label == said else 0.5 if 0 in (label, said) else 0.0


def inversion_credit(pairs: Sequence[Pair]) -> float:
    """1 minus the share of pairs in the wrong order."""
    wrong = math.fsum(0.5 if pair.sign == 0 else float(pair.sign != pair.label) for pair in pairs if pair.label)
    return 1 - wrong / len(pairs)


def item_credit(ranks: Sequence[float], scores: Sequence[float]) -> list[float]:
    """The share of the best pictures among those that score highest; nothing where all are alike or one is invalid."""
    if any(math.isnan(score) for score in scores) or len(set(ranks)) < 2:
        return []
    first = [rank == min(ranks) for rank, score in zip(ranks, scores, strict=True) if score == max(scores)]
    return [sum(first) / len(first)]


def pick_threshold(
    validation: Iterable[Judged], *, scale: float = 1.0, thresholds: Sequence[float] = THRESHOLDS
) -> float:
    """The tie threshold of `pickapic` that is most accurate on validation data, the smallest of equals."""
    pairs = [pair for one in validation for pair in pairs_of(one) if not math.isnan(pair.gap)]
    if not pairs:
        raise ConfigError("no pair of the validation data has two valid scores, so no threshold can be picked.")

    def right(threshold: float) -> float:
        ties = [abs(_share_gap(pair.gap * scale)) <= threshold for pair in pairs]
        return math.fsum(tie_credit(p.label, 0 if tie else p.sign) for p, tie in zip(pairs, ties, strict=True))

    return max(sorted(thresholds), key=right)


Answers = tuple[Sequence[float], Sequence[float]]  # scores of the right answers, of the wrong ones


def ties_score(tied: Sequence[Answers], reference: Sequence[Answers]) -> float:
    """RewardBench 2's score for prompts with several right answers, each beside a prompt with one.

    0.3 for accuracy on either set (every right answer above every wrong one), 0.2 for margins above the spread of the
    right answers, 0.2 for the smaller of both margins above it, 0.01 for how far: a perfect reward gets 1.01.
    """
    if len(tied) != len(reference) or not tied:
        raise ConfigError(f"{len(tied)} prompts with ties and {len(reference)} references are not pairs of the two.")
    margins = [min(right) - max(wrong) for right, wrong in tied]
    others = [min(right) - max(wrong) for right, wrong in reference]
    spreads = [max(right) - min(right) for right, _ in tied]
    least = [min(a, b) for a, b in zip(margins, others, strict=True)]
    terms = (
        (0.30, [margin > 0 for margin in margins]),
        (0.30, [margin > 0 for margin in others]),
        (0.20, [margin > spread for margin, spread in zip(margins, spreads, strict=True)]),
        (0.20, [margin > spread for margin, spread in zip(least, spreads, strict=True)]),
        (0.01, [_surplus(margin, spread) for margin, spread in zip(least, spreads, strict=True)]),
    )
    return math.fsum(weight * math.fsum(map(float, values)) / len(tied) for weight, values in terms)


def _surplus(margin: float, spread: float) -> float:
    """tanh(margin / spread - 1), with its limits where the right answers score the same."""
    if spread == 0:
        return float((margin > 0) - (margin < 0))
    return math.tanh(margin / spread - 1)


def _share_gap(gap: float) -> float:
    """Difference of the softmax shares of two scores that are `gap` apart."""
    return math.tanh(gap / 2)


def _counts(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in ("pairs", "label_ties", "score_ties", "invalid")}


def _mean(
    credits: Sequence[tuple[str, str, float]], *, by_kind: bool, seed: int
) -> tuple[Interval | None, dict[str, float]]:
    """The mean of all credits, or of the means of each kind, resampled by prompt; and the mean of each kind."""
    each: dict[str, list[float]] = defaultdict(list)
    for _, kind, credit in credits:
        each[kind].append(credit)
    kinds = {kind: math.fsum(found) / len(found) for kind, found in sorted(each.items()) if kind}
    total: dict[str, float] = defaultdict(float)
    mass: dict[str, float] = defaultdict(float)
    for group, kind, credit in credits:
        weight = 1 / len(each[kind]) if by_kind else 1.0
        total[group] += weight * credit
        mass[group] += weight
    if not mass:
        return None, kinds
    return bootstrap([total[g] / mass[g] for g in mass], weights=list(mass.values()), seed=seed), kinds
