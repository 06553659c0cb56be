"""Which of two pictures shows the prompt better: asked in both orders, against a reference or against the group.

Asking a judge for the better of two is the pair mode of UnifiedReward (Yibin Wang et al., 2025, arXiv 2503.05236); a
round robin whose win rate is the reward stands in for the listwise call of RewardAnything (Zhuohao Yu et al., 2025,
arXiv 2506.03637), which a judge of few pictures cannot take.

Where we differ:
- Every pair is asked in both orders. Where the orders disagree it is a tie; `ties: mean` takes the mean of the
  probabilities in place of the verdicts. Both are 1/2 for a judge that always prefers the first picture.
- A pair without both answers counts for neither side, and a picture without any pair is invalid.
- What the judge's bias is, is measured on the way: parts of every row, and `bias` over all that was asked.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from diffalign import vision
from diffalign.cases import Case
from diffalign.judges import wording as words
from diffalign.judges.asking import Backend, Decision, Judgement
from diffalign.judges.finding import EMBEDDED
from diffalign.judges.protocols import OURS, read_wording, require_images
from diffalign.judges.rewarding import JudgeReward
from diffalign.registry import register_reward
from diffalign.rules.ranking import flip_rate, symmetrised

LABELS, EVEN = ("A", "B"), 0.5


@dataclass
class Bias:
    """How far the place of a picture decides, over everything asked so far."""

    pairs: int = 0  # with both answers
    flips: float = 0.0  # of those, whose verdict changed under the swap
    answers: int = 0
    first: float = 0.0  # answers for the picture shown first

    @property
    def flip_rate(self) -> float:
        return self.flips / self.pairs if self.pairs else math.nan

    @property
    def first_share(self) -> float:
        """One half where the place does not matter."""
        return self.first / self.answers if self.answers else math.nan


@dataclass(frozen=True)
class Match:
    """What the judge gave a picture against another: shown first, and the other when that was shown first."""

    first: float  # probability of the picture, which is shown first
    swapped: float  # probability of the other one, which is shown first

    @property
    def flips(self) -> float:
        return flip_rate([(self.first, self.swapped)])

    def turned(self) -> Match:
        """The same from the other's side."""
        return Match(self.swapped, self.first)

    def worth(self, ties: str) -> float:
        """What the picture gets of this pair, NaN without both answers."""
        if ties == "mean":
            return (self.first + 1 - self.swapped) / 2
        return symmetrised(self.first, self.swapped)

    @property
    def answers(self) -> list[float]:
        """For each answer whether it was for the first place, one half where the judge was even."""
        return [_side(p) for p in (self.first, self.swapped) if not math.isnan(p)]


@register_reward("pairwise", range=(0.0, 1.0))
class Pairwise(JudgeReward):
    """`against: group` compares the rows of one prompt in a call, so it needs several of them and no small chunks.

    Parts: `flipped`, the share of a row's pairs that the swap turned, and `first`, that of answers for the first place.
    """

    def __init__(
        self,
        judge: str | Mapping[str, Any] | Backend = EMBEDDED,
        log: str | None = None,
        *,
        against: Literal["reference", "group"] = "reference",
        ties: Literal["agree", "mean"] = "agree",
        wording: str = OURS,
    ) -> None:
        super().__init__(judge, log)
        self.against, self.ties, self.bias, self._counting = against, ties, Bias(), threading.Lock()
        self.listwise = against == "group"  # whether a row's score depends on the others of its prompt
        self.reads = ("reference",) if against == "reference" else ("source",)
        self.wording = read_wording(wording, {"better": words.BETTER}, self.name)
        self.revision = f"1 {self.wording.mark}"
        self.options = self.judge_options | {"against": against, "ties": ties, "wording": wording}

    @property
    def version(self) -> str | None:
        """None against a group: a row's score is that of its company."""
        return super().version if self.against == "reference" else None

    def judge(self, media: Tensor, cases: Sequence[Case]) -> list[Judgement]:
        require_images(self.backend, 2, self.name)
        shown = list(vision.quantise(media))
        pairs: list[tuple[int, int | None]] = []
        if self.against == "group":
            pairs += _round_robin(cases)
        else:
            pairs += [(k, None) for k, case in enumerate(cases) if case.reference is not None]
        matches = self._matches(pairs, shown, cases)
        self._count(matches)
        mine: dict[int, list[Match]] = defaultdict(list)
        for (k, other), match in zip(pairs, matches, strict=True):
            mine[k].append(match)
            if other is not None:
                mine[other].append(match.turned())
        return [self._judged(mine[k]) for k in range(len(cases))]

    def _matches(
        self, pairs: Sequence[tuple[int, int | None]], shown: Sequence[Tensor], cases: Sequence[Case]
    ) -> list[Match]:
        """Both answers about each pair of rows; None is the reference of the row."""
        asked = []
        for k, other in pairs:
            against = _reference(cases[k]).to(shown[k].device) if other is None else shown[other]
            text = self.wording.say("better", prompt=cases[k].prompt)
            for images in ((shown[k], against), (against, shown[k])):
                asked.append(Decision(text=text, images=images, labels=LABELS, described=(words.FIRST, words.SECOND)))
        found = self.backend.decide(asked) if asked else []
        first = [math.nan if each is None else each[0] for each in found]
        return [Match(a, b) for a, b in zip(first[::2], first[1::2], strict=True)]

    def _count(self, matches: Sequence[Match]) -> None:
        flips = [match.flips for match in matches if not math.isnan(match.flips)]
        answers = [side for match in matches for side in match.answers]
        with self._counting:
            self.bias.pairs += len(flips)
            self.bias.flips += math.fsum(flips)
            self.bias.answers += len(answers)
            self.bias.first += math.fsum(answers)

    def _judged(self, matches: Sequence[Match]) -> Judgement:
        worths = [worth for match in matches if not math.isnan(worth := match.worth(self.ties))]
        raw = tuple(f"{match.first:.3f} shown first, {1 - match.swapped:.3f} shown second" for match in matches)
        if not worths:
            lacking = "no pair of it was answered" if matches else f"there is no {self._missing} to compare with"
            return Judgement(raw=raw, problem=lacking)
        flips = [match.flips for match in matches if not math.isnan(match.flips)]
        answers = [side for match in matches for side in match.answers]
        parts = {"flipped": math.fsum(flips) / len(flips), "first": math.fsum(answers) / len(answers)}
        return Judgement(math.fsum(worths) / len(worths), parts, raw)

    @property
    def _missing(self) -> str:
        return "reference picture" if self.against == "reference" else "other picture of the prompt in the call"


def _round_robin(cases: Sequence[Case]) -> list[tuple[int, int]]:
    """Every two rows of one prompt and source."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for k, case in enumerate(cases):
        source = None if case.source is None else (case.source.size, case.source.mode, case.source.tobytes())
        groups[case.prompt, source].append(k)
    if all(len(rows) == 1 for rows in groups.values()):
        warnings.warn(
            "pairwise compares the pictures of one prompt with each other, and this call has one of each, so all are "
            "invalid. Score several in one call, or give each case a reference picture and use against: reference.",
            stacklevel=4,
        )
    return [(a, b) for rows in groups.values() for n, a in enumerate(rows) for b in rows[n + 1 :]]


def _reference(case: Case) -> Tensor:
    assert case.reference is not None
    return vision.to_tensor(case.reference)[0]


def _side(first: float) -> float:
    return 1.0 if first > EVEN else 0.0 if first < EVEN else EVEN
