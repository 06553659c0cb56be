"""A reward that counts only while a monitored scalar stays near its reference.

BalCapRL (arXiv 2605.07394): the linguistic reward counts only if the length is 0.5 to 2 times that of the reference,
bounds included, and is 0 otherwise; the other rewards are untouched.

Where we differ: the length of a picture is whatever reward, or part of one, is monitored: JPEG size, colourfulness, the
area of text. Its reference is a number, or a metadata key. A row that lacks one of them is NaN, and a masked row is not
scored at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.registry import register_reward
from diffalign.rules.partial import length_mask
from diffalign.scoring import Ask, Composite, Score, make_reward


@register_reward("masked")
class Masked(Composite):
    """`inner` where low <= monitor / target <= high, else 0; parts: inner, monitor, ratio, kept (1 or 0).

    `part` picks a part of the monitor's score, and `target` is what it is compared with: a number or a metadata key.
    """

    def __init__(
        self,
        inner: Any,
        monitor: Any,
        target: float | str,
        part: str | None = None,
        low: float = 0.5,
        high: float = 2.0,
    ) -> None:
        if low > high or target == 0:
            raise ConfigError(
                f"masked has the window {low:g} to {high:g} around {target!r}; low is at most high, and a ratio to 0 "
                "means nothing."
            )
        self.inner, self.monitor = make_reward(inner), make_reward(monitor)
        self.part, self.target, self.low, self.high = part, target, low, high
        self.rewards = [self.inner, self.monitor]
        self.options = {"target": target, "part": part, "low": low, "high": high}
        self.reads = (target,) if isinstance(target, str) else ()
        self.modality = self.shared_modality(self.rewards)
        self.differentiable = self.inner.differentiable  # inside the window; at its edge the score jumps
        ends = self.inner.range
        self.range = (min(ends[0], 0.0), max(ends[1], 0.0)) if ends else None

    def through(self, media: Tensor, cases: Sequence[Case], ask: Ask) -> Score:
        monitor = ask(self.monitor, media.detach(), cases)
        value = self._value(monitor)
        ratio = value / value.new_tensor([self._target(case) for case in cases])  # (B,)
        ratio = ratio.where(ratio.isfinite(), torch.nan)
        kept = (ratio >= self.low) & (ratio <= self.high)
        found = Score(torch.full_like(value, torch.nan))
        if kept.any():
            asked = [case for case, keep in zip(cases, kept.tolist(), strict=True) if keep]
            found = ask(self.inner, media[kept.to(media.device)], asked).spread(kept)
        total = length_mask(found.total, ratio.to(found.total.device), low=self.low, high=self.high)
        parts = {"inner": found.total, "monitor": value, "ratio": ratio}
        parts["kept"] = torch.where(ratio.isnan(), torch.nan, kept.float())
        parts |= {f"inner/{name}": part for name, part in found.parts.items() if name != self.inner.name}
        return Score(total, parts)

    def _value(self, monitor: Score) -> Tensor:
        if self.part is None:
            return monitor.total
        if self.part not in monitor.parts:
            raise ConfigError(
                f"masked.part is '{self.part}', but the monitor '{self.monitor.name}' shows only "
                f"{', '.join(monitor.parts) or 'no parts'}. Name one of them, or leave it out."
            )
        return monitor.parts[self.part].where(monitor.valid, torch.nan)

    def _target(self, case: Case) -> float:
        found = case.metadata.get(self.target) if isinstance(self.target, str) else self.target
        if found is None:
            return torch.nan
        if isinstance(found, Real) and not isinstance(found, bool):
            with suppress(OverflowError):
                return float(found)
        raise ConfigError(
            f"the metadata '{self.target}' of '{case.prompt[:60]}' is {repr(found)[:60]}, not a number, or too large a "
            "one. Write it without quotes."
        )
