"""One budget unit for every method: denoiser rows, decodes, reward calls and seconds, per prompt, counted and
limited.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from typing import Any

from diffalign.errors import BudgetError, ConfigError

BACKWARD_COST = 2  # a backward pass through the denoiser costs two more forward passes


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one prompt may cost; None leaves that resource free."""

    nfe: int | None = None  # latent rows through the denoiser; each guidance branch counts
    decodes: int | None = None  # latents turned into pixels
    reward_calls: int | None = None  # images scored, counted once per reward
    seconds: float | None = None  # wall clock

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and not value > 0:
                raise ConfigError(
                    f"budget.{f.name} is {value}, but a budget must be above 0. Leave it out for no limit."
                )

    def part(self, share: float) -> Limits:
        """The limits of a share of the work, at least 1 of whatever is counted."""
        if share >= 1:
            return self
        counted = {name: getattr(self, name) for name in ("nfe", "decodes", "reward_calls")}
        parts = {name: None if value is None else max(int(value * share), 1) for name, value in counted.items()}
        return replace(self, **parts, seconds=None if self.seconds is None else self.seconds * share)


def limits_of(budget: Limits | int | float | str | None) -> Limits:
    """A budget as people say it: an int is NFE per prompt, '20s' or a float is seconds per prompt, Limits are both."""
    if isinstance(budget, Limits) or budget is None:
        return budget or Limits()
    if isinstance(budget, str):
        text = budget.strip().lower()
        try:
            return Limits(seconds=float(text[:-1])) if text.endswith("s") else Limits(nfe=int(text.removesuffix("nfe")))
        except ValueError:
            raise ConfigError(f"budget '{budget}' is neither a number of NFE (400) nor seconds ('20s').") from None
    return Limits(nfe=budget) if isinstance(budget, int) else Limits(seconds=budget)


class Budget:
    """Spending of `prompts` prompts so far, against limits that hold for each of them on average."""

    def __init__(self, limits: Limits | int | None = None, *, prompts: int = 1) -> None:
        self.limits = Limits(nfe=limits) if isinstance(limits, int) else limits or Limits()
        self.prompts = max(prompts, 1)
        self.nfe = 0
        self.decodes = 0
        self.reward_calls = 0
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def charge(self, *, nfe: int = 0, decodes: int = 0, reward_calls: int = 0) -> None:
        """Record what was spent, summed over all prompts."""
        self.nfe += nfe
        self.decodes += decodes
        self.reward_calls += reward_calls

    def allows(self, *, nfe: int = 0, decodes: int = 0, reward_calls: int = 0, seconds: float = 0.0) -> bool:
        """Whether that much more, summed over all prompts, still fits every limit."""
        more = {"nfe": nfe, "decodes": decodes, "reward_calls": reward_calls, "seconds": seconds}
        return all(
            limit is None or getattr(self, name) + more[name] <= limit * self.prompts for name, limit in self._limits()
        )

    def require(self, **cost: int) -> None:
        """Raise unless `cost` fits, naming the limit that is too small."""
        for name, limit in self._limits():
            if limit is not None and cost.get(name, 0) > limit * self.prompts:
                each = cost[name] / self.prompts
                raise BudgetError(
                    f"the budget allows {name} = {limit} per prompt, but one candidate costs {each:g}. "
                    f"Raise the budget to at least {each:g}, or lower num_inference_steps."
                )

    @property
    def exhausted(self) -> bool:
        """Whether some limit is already reached."""
        return any(limit is not None and getattr(self, name) >= limit * self.prompts for name, limit in self._limits())

    def totals(self) -> dict[str, Any]:
        """What was spent so far, summed over prompts."""
        return {f.name: getattr(self, f.name) for f in fields(self.limits)}

    def spent(self) -> dict[str, float]:
        """Cost per prompt, with the stable keys every report uses."""
        return {name: value / self.prompts for name, value in self.totals().items()}

    def _limits(self) -> list[tuple[str, float | None]]:
        return [(f.name, getattr(self.limits, f.name)) for f in fields(self.limits)]
