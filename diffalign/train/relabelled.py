"""Reward-conditioned data: every pair twice, once with the better picture's score in the prompt, once with the worse's.

Paper: "Reward-Augmented Data Enhances Direct Preference Alignment of LLMs", Zhang et al., 2024 (arXiv 2410.08067),
whose scores come from a judge of texts. A model learns what a score looks like, and is then asked for the highest.

Where we differ: scores of any reward become 1 to 10 by their quantiles in the data, half ties from both sides; the tag
stands first in the prompt, as text encoders cut the end; a share of the pairs keeps its plain prompt, and then only in
its own order. Pairs whose tags coincide would contradict themselves and are left out.
"""

from __future__ import annotations

import bisect
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from diffalign.cases import Case, derived_seed
from diffalign.errors import ConfigError
from diffalign.train.known import Known

SCORE, PROMPT = "{score}", "{prompt}"


@dataclass(frozen=True, kw_only=True)
class RelabelConfig:
    """How a score gets into a prompt."""

    enabled: bool = False
    template: str = "quality {score} of 10, {prompt}"
    plain: float = 0.1  # share of the pairs whose prompt stays as it is, so that plain prompts go on working
    digits: int = 1  # of a score after the point; fewer leave out more pairs of like worth

    def __post_init__(self) -> None:
        if SCORE not in self.template or PROMPT not in self.template:
            raise ConfigError(f"relabel.template is '{self.template}', but it holds {SCORE} and {PROMPT}.")
        if not 0 <= self.plain < 1 or self.digits < 0:
            raise ConfigError(
                f"relabel has plain {self.plain} and digits {self.digits}: a share in [0, 1), and 0 or more."
            )

    def tagged(self, case: Case, score: str) -> Case:
        return replace(case, prompt=self.template.replace(SCORE, score).replace(PROMPT, case.prompt))


def relabelled(entries: Sequence[Known], config: RelabelConfig, seed: int) -> list[Known]:
    """Entries of two: the best and the worst picture of each, under both their scores; a single one under its own."""
    worths: defaultdict[str, list[float]] = defaultdict(list)
    for each in entries:
        worths[_source(each)] += each.scores
    ladders = {source: sorted(scores) for source, scores in worths.items()}
    found, alike = list[Known](), 0
    for k, known in enumerate(entries):
        every = ladders[_source(known)]
        order = sorted(range(len(known.scores)), key=lambda j: -known.scores[j])
        best, worst = order[0], order[-1]
        if len(order) == 1:
            plain = _plain(config, seed, k)
            own = known.case if plain else config.tagged(known.case, tag(known.scores[0], every, config.digits))
            found.append(replace(known, case=own))
            continue
        pair = replace(known, pictures=(known.pictures[best], known.pictures[worst]), scores=(1.0, 0.0))
        if _plain(config, seed, k):
            found.append(pair)
            continue
        tags = [tag(known.scores[j], every, config.digits) for j in (best, worst)]
        if tags[0] == tags[1]:
            alike += 1
            continue
        found.append(replace(pair, case=config.tagged(known.case, tags[0])))
        found.append(replace(pair, case=config.tagged(known.case, tags[1]), pictures=pair.pictures[::-1]))
    if alike:
        warnings.warn(f"{alike} of {len(entries)} pairs have the same tag twice and are left out.", stacklevel=2)
    if not found:
        raise ConfigError("no pair is left whose tags differ. Give relabel.digits more, or data of more worths.")
    return found


def _plain(config: RelabelConfig, seed: int, k: int) -> bool:
    """Whether an entry keeps its prompt."""
    draws = torch.Generator().manual_seed(derived_seed(seed, "relabel", k))
    return float(torch.rand((), generator=draws)) < config.plain


def _source(known: Known) -> str:
    """Where an entry comes from: scores of one file compare."""
    return str(known.pictures[0].file)


def highest(entries: Sequence[Known], config: RelabelConfig) -> str:
    """The best score that any prompt names, to be asked for."""
    around = re.escape(config.template).replace(re.escape(SCORE), r"([\d.]+)").replace(re.escape(PROMPT), "(?s:.*)")
    found = (re.fullmatch(around, each.case.prompt) for each in entries)
    return max((match[1] for match in found if match), key=float, default="")


def tag(score: float, every: Sequence[float], digits: int) -> str:
    """A score as 1 to 10 by how many of `every` (sorted) lie below it; ties count half."""
    below, upto = bisect.bisect_left(every, score), bisect.bisect_right(every, score)
    return f"{1 + 9 * (below + upto) / (2 * len(every)):.{digits}f}"
