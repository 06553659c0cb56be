"""Ordered key facts and style checks: a reward chain.

Yuxin Jiang et al.: "From Verifiable Dot to Reward Chain: Harnessing Verifiable Reference-based Rewards for
Reinforcement Learning of Open-ended Generation" (RLVRR), 2026 (arXiv 2601.18533).

content = mean over key facts of max over references of LCS(K_z, K_y) / max(|K_z|, |K_y|), where K_z are the keywords of
a reference in order and K_y their hits in the answer; style = sum of w_n check_n.

Where we differ:
- Style checks are programs there, run with exec. Here they are bounds on measures from a fixed list, of the picture.
- style is divided by the sum of the weights, so that it lies in [0, 1] as content does.
- Hits do not overlap, and of two keywords at one place the longer one counts; the paper leaves it open.
- Whether the total is the mean or the sum of the two differs between paper and code: `total` chooses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign import config
from diffalign.errors import ConfigError, UnknownName
from diffalign.rules.text import normal
from diffalign.vision import LUMA

Fact = tuple[tuple[str, ...], ...]  # references, each a list of keywords in order
Reader = Callable[[Tensor], str]  # the text in a picture (3, H, W)
LONGEST = 1000  # hits that are compared; an answer that repeats itself beyond that is cut


def common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for one in a:
        before = row
        row = [0]
        for k, other in enumerate(b):
            row.append(before[k] + 1 if one == other else max(before[k + 1], row[k]))
    return row[-1]


def chain_score(reference: Sequence[Hashable], found: Sequence[Hashable]) -> float:
    """LCS / the longer length, 0 where nothing was found."""
    return common(reference, found) / max(len(reference), len(found)) if reference and found else 0.0


def hits(text: str, keywords: Sequence[str]) -> list[str]:
    """Where the keywords stand in a text, as whole words of any case, in order of their places."""
    wanted = sorted({_plain(word) for word in keywords} - {""}, key=lambda word: (-len(word), word))
    if not wanted:
        return []
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in wanted))
    return [found[0] for found in pattern.finditer(_plain(text))][:LONGEST]


def fact_score(text: str, fact: Fact) -> float:
    """How well a text tells one key fact: by the reference that fits best."""
    return max(chain_score([_plain(word) for word in words], hits(text, words)) for words in fact)


def content(text: str, facts: Sequence[Fact]) -> float:
    """The mean over the key facts, NaN without any."""
    return math.fsum(fact_score(text, fact) for fact in facts) / len(facts) if facts else math.nan


def combined(content: float, style: float | None, total: Literal["mean", "sum"]) -> float:
    """Content and style as one number; content alone where there is no style."""
    if style is None:
        return content
    return (content + style) / 2 if total == "mean" else content + style


@dataclass(frozen=True, kw_only=True)
class Check:
    """A measure of the picture and the bounds it must keep."""

    measure: str  # one of MEASURES, or `text`: whether `says` can be read in the picture
    at_least: float | None = None
    at_most: float | None = None
    says: str = ""
    weight: float = 1.0  # share in the style, relative to the other checks

    def __post_init__(self) -> None:
        if self.measure not in (*MEASURES, "text"):
            raise UnknownName.among("style check", self.measure, (*MEASURES, "text"), "diffalign ls rewards key_facts")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(f"the check '{self.measure}' has the weight {self.weight}, but a weight is above 0.")
        if self.measure == "text" and not normal(self.says):
            raise ConfigError("the check 'text' does not say what to read. Give `says`: the words.")
        if self.measure != "text" and self.at_least is None and self.at_most is None:
            raise ConfigError(f"the check '{self.measure}' has no bound. Give at_least, at_most or both.")
        low, high = self.bounds
        if not low <= high:  # NaN is in no order
            raise ConfigError(f"the check '{self.measure}' asks for {low} to {high}, which no picture can meet.")

    @property
    def bounds(self) -> tuple[float, float]:
        low = -math.inf if self.at_least is None else self.at_least
        return low, math.inf if self.at_most is None else self.at_most

    def holds(self, picture: Tensor, read: Reader | None = None) -> bool:
        """Whether a picture (3, H, W) in [0, 1] meets it; `read` is what reads text."""
        if self.measure == "text":
            if read is None:
                raise ConfigError("the check 'text' needs something that reads pictures, and none was given.")
            return normal(self.says) in normal(read(picture))
        low, high = self.bounds
        return low <= MEASURES[self.measure](picture.detach().float()) <= high


def read_checks(rows: Any, where: str) -> tuple[Check, ...]:
    """Checks from a list of mappings; `where` is what errors start with."""
    if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence):
        raise ConfigError(
            f"{where} is {rows!r}, but it is a list of checks such as {{measure: aspect, at_least: 1.5}}."
        )
    return tuple(config.convert(row, Check, f"{where}[{k}]") for k, row in enumerate(rows))


def style(held: Sequence[bool], checks: Sequence[Check]) -> float | None:
    """The weighted share of the checks that hold, None without any."""
    if not checks:
        return None
    met = math.fsum(check.weight for check, yes in zip(checks, held, strict=True) if yes)
    return met / math.fsum(check.weight for check in checks)


def _aspect(picture: Tensor) -> float:
    return picture.shape[-1] / picture.shape[-2]


def _width(picture: Tensor) -> float:
    return float(picture.shape[-1])


def _height(picture: Tensor) -> float:
    return float(picture.shape[-2])


def _short_side(picture: Tensor) -> float:
    return float(min(picture.shape[-2:]))


def _brightness(picture: Tensor) -> float:
    return float(_luminance(picture).mean())


def _contrast(picture: Tensor) -> float:
    return float(_luminance(picture).std(correction=0))


def _saturation(picture: Tensor) -> float:
    """Mean of (max - min) / max over the pixels, 0 for grey."""
    high, low = picture.amax(0), picture.amin(0)
    return float(((high - low) / high.clamp(min=1e-6)).mean())


def _colourfulness(picture: Tensor) -> float:
    """Hasler and Suesstrunk's measure: 0 grey, 59 quite, 109 extremely colourful."""
    red, green, blue = picture.flatten(1) * 255
    rg, yb = red - green, (red + green) / 2 - blue
    spread = (rg.var(correction=0) + yb.var(correction=0)).sqrt()
    return float(spread + 0.3 * (rg.mean() ** 2 + yb.mean() ** 2).sqrt())


def _palette(picture: Tensor) -> float:
    """Colours of 8 levels a channel that each cover a two-hundredth of the picture."""
    levels = (picture.clamp(0, 1) * 7).round().long().flatten(1)
    counts = torch.bincount(levels[0] * 64 + levels[1] * 8 + levels[2])
    return float((counts * 200 >= levels.shape[1]).sum())


def _luminance(picture: Tensor) -> Tensor:
    return (picture * picture.new_tensor(LUMA)[:, None, None]).sum(0)


MEASURES: dict[str, Callable[[Tensor], float]] = {
    "aspect": _aspect,  # width / height
    "width": _width,  # pixels
    "height": _height,
    "short_side": _short_side,
    "brightness": _brightness,  # mean luminance in [0, 1]
    "contrast": _contrast,  # spread of the luminance, at most 1/2
    "saturation": _saturation,  # [0, 1]
    "colourfulness": _colourfulness,
    "palette": _palette,
}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
