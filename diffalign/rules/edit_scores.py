"""EditScore's arithmetic: from the sub-scores of two questions, asked several times, to one number.

Xin Luo et al.: "EditScore: Unlocking Online RL for Image Editing via High-Fidelity Reward Modeling", 2025 (arXiv
2509.23909). A pass is one reply about the edit (prompt following, consistency) and one about the look (naturalness,
freedom from artefacts). SC and PQ are the smaller of each two, and the overall score is sqrt(SC * PQ), all on 0 to 10.

Where we differ:
- A pass that could not be read is left out; the published code puts half the scale or a random number in its place.
- `average_first` is as published: it takes the mean of prompt following in the place of SC, so that consistency does
  not count. `average_first_corrected` takes the mean of SC.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from diffalign.errors import ConfigError

TOP = 10.0  # of every score here
ACCEPTED = 0.5  # the share of TOP from which an edit counts as good
Reduction = Literal["average_last", "average_first", "average_first_corrected"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


@dataclass(frozen=True)
class Pass:
    """What one pass found, each from 0 to 10."""

    prompt_following: float
    consistency: float
    naturalness: float
    artefacts: float  # 10: free of them

    @classmethod
    def of(cls, semantics: Sequence[float], looks: Sequence[float], scale: float = 25.0) -> Pass:
        """From what a judge said on 0 to `scale`."""
        if not scale > 0:
            raise ConfigError(f"the scale of edit scores is {scale:g}, but scores lie between 0 and a positive number.")
        following, consistency = semantics
        naturalness, artefacts = looks
        return cls(*(said / (scale / TOP) for said in (following, consistency, naturalness, artefacts)))

    @property
    def semantic_consistency(self) -> float:
        return min(self.prompt_following, self.consistency)

    @property
    def perceptual_quality(self) -> float:
        return min(self.naturalness, self.artefacts)

    @property
    def overall(self) -> float:
        return geometric(self.semantic_consistency, self.perceptual_quality)


FIELDS = ("prompt_following", "consistency", "perceptual_quality", "overall", "naturalness", "artefacts")


def geometric(a: float, b: float) -> float:
    """The geometric mean of two scores."""
    return math.sqrt(a * b)


def ensemble(passes: Iterable[Pass | None], how: str = "average_last", least: int = 1) -> dict[str, float] | None:
    """The fields over the passes that could be read, None where those are fewer than `least`.

    `spread` is the standard deviation of the overall score over the passes, NaN for a lone one.
    """
    if how not in REDUCTIONS:
        raise ConfigError(f"the passes are reduced by '{how}', but that is one of {', '.join(REDUCTIONS)}.")
    valid = [each for each in passes if each is not None]
    if len(valid) < max(least, 1):
        return None
    found = {name: mean([getattr(each, name) for each in valid]) for name in FIELDS}
    if how == "average_first":
        found["overall"] = geometric(found["prompt_following"], found["perceptual_quality"])
    elif how == "average_first_corrected":
        semantics = mean([each.semantic_consistency for each in valid])
        found["overall"] = geometric(semantics, found["perceptual_quality"])
    return found | {"spread": spread([each.overall for each in valid]), "valid_passes": float(len(valid))}


def mean(values: Sequence[float]) -> float:
    """The mean, the same in every order: equal passes must tie."""
    return min(max(math.fsum(values) / len(values), min(values)), max(values))


def spread(values: Sequence[float]) -> float:
    """The population standard deviation, NaN of a lone value."""
    if len(values) < 2:
        return math.nan
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / len(values))


def accepted(overall: float) -> float:
    """1 for an edit that reaches half the scale, else 0; NaN where it has no score."""
    return math.nan if math.isnan(overall) else float(overall / TOP >= ACCEPTED)


def pair_right(better: float, worse: float) -> bool:
    """Whether a pair of a benchmark is judged right: strictly, so that a tie is wrong whichever is the better one."""
    return better > worse
