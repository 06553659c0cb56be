"""Text against text: the OCR rule, shares of distinct n-grams, and matching of two sets of embeddings.

Jie Liu et al.: "Flow-GRPO: Training Flow Matching Models via Online RL", 2025 (arXiv 2505.05470), its OCR reward;
R3 (arXiv 2402.03469), its repetition factor; Mixed-R1 (arXiv 2505.24164), its BMAS. The distance is computed by the
bit-parallel algorithm of Myers (1999) in the form of Hyyrö (2003).

Where we differ:
- A prompt without quotes, or with empty ones, is NaN; the published code fails on both.
- Typographic quotes (“…”, „…“, «…») count as quotes; several quoted strings may all count (`which="all"`: their mean).
- All white space is removed, not blanks alone; case folds; compatibility forms, curly quotes and dashes are unified.
- `precision` multiplies by len(target) / len(read), at most 1: without it a wall of text that holds the target is 1.
- BMAS: whether the mean is arithmetic or harmonic is open in what we could read; ours is arithmetic unless told.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Hashable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Which = Literal["first", "all"]
_QUOTED = re.compile('"([^"]*+)"|“([^“”]*+)”|„([^„“”]*+)[“”]|«([^«»]*+)»')
_PLAIN = str.maketrans("\u2018\u2019\u201a\u201b\u201c\u201d\u201e\xab\xbb\u2013\u2014\u2212", '\'\'\'\'"""""---')


def quoted(prompt: str) -> list[str]:
    """What stands between pairs of double quotes, in order."""
    return ["".join(part or "" for part in found.groups()) for found in _QUOTED.finditer(prompt)]


def normal(text: str) -> str:
    """Text as it is compared: no white space, one case, one form of each character."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(folded.translate(_PLAIN).split())


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements that turn `a` into `b`."""
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for k, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << k
    every, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = every, 0, len(a)  # bits where the column of the table steps up, and down, by one
    for letter in b:
        match = places.get(letter, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        rises, falls = down | (every & ~(diagonal | up)), up & diagonal
        distance += bool(rises & last) - bool(falls & last)
        rises, falls = (rises << 1 | 1) & every, (falls << 1) & every
        up, down = falls | (every & ~(diagonal | rises)), rises & diagonal
    return distance


def ocr_score(read: str, target: str, *, precision: bool = False) -> float:
    """1 where `read` holds `target`, else 1 - distance / len(target), not below 0; NaN where the target is empty."""
    return targets_score(read, [target], precision=precision)


def prompt_score(read: str, prompt: str, *, which: Which = "first", precision: bool = False) -> float:
    """The OCR score of the strings quoted in `prompt`: of the first, or the mean over all that are not empty."""
    return targets_score(read, quoted(prompt)[: 1 if which == "first" else None], precision=precision)


def targets_score(read: str, targets: Sequence[str], *, precision: bool = False) -> float:
    """Mean OCR score over the targets that are not empty; `precision` counts the letters of all of them."""
    wanted = [len(target) for target in map(normal, targets) if target]
    if not wanted:
        return math.nan
    distances = [distance for target in targets if not math.isnan(distance := ocr_distance(read, target))]
    mean = sum(1 - distance / length for distance, length in zip(distances, wanted, strict=True)) / len(wanted)
    length = len(normal(read))
    return mean * min(1.0, sum(wanted) / length) if precision and length else mean


def ocr_distance(read: str, target: str) -> float:
    """Edits between the two as compared: 0 where `read` holds `target`, at most len(target), NaN without a target."""
    read, target = normal(read), normal(target)
    if not target:
        return math.nan
    if target in read:
        return 0.0
    if len(read) >= 2 * len(target):  # at least len(target) letters are too many
        return float(len(target))
    return float(min(levenshtein(read, target), len(target)))


def distinct_share(tokens: Sequence[Hashable], n: int = 3) -> float:
    """Distinct n-grams / n-grams, 1 where nothing repeats; NaN where there is no n-gram."""
    grams = [tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def bmas(a: Tensor, b: Tensor, mean: Literal["arithmetic", "harmonic"] = "arithmetic") -> Tensor:
    """Bidirectional max-average similarity: a (..., N, D), b (..., M, D) -> (...), NaN where a set is empty.

    P is the mean over `a` of the best cosine in `b`, R that over `b`; the harmonic mean takes negative ones as 0.
    """
    if a.shape[-2] == 0 or b.shape[-2] == 0:
        return (a.sum((-2, -1)) + b.sum((-2, -1))) * math.nan
    cosines = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(-2, -1)  # (..., N, M)
    p, r = cosines.amax(-1).mean(-1), cosines.amax(-2).mean(-1)
    if mean == "arithmetic":
        return (p + r) / 2
    p, r = p.clamp(min=0), r.clamp(min=0)
    return 2 * p * r / (p + r).clamp(min=1e-12)
