"""Shaping as a list of named stages: what each takes, in which order they may stand, and what they do.

For each member an optional `clip`, an optional calibration, and then `tilt` and `clip`; exactly one rule that combines
the members; `tilt` and `clip` for the total.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.shaping import ensembles, references

Range = tuple[float, float]
LEGAL = (
    "A legal order is, for each member: clip, then one of cdf, zscore, par, centred or lsc, then tilt and clip in "
    "either order, each of them optional and once; then exactly one of sum, mean, min, uncertainty, lcb, softmin or "
    "median; then tilt and clip for the total, again as you like. For instance [cdf, mean]."
)


@dataclass(frozen=True)
class Option:
    """What a stage can be told; without a default it must be."""

    words: str
    accepts: Callable[[Any], bool]
    default: Any = None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _above(value: Any, least: float) -> bool:
    return _number(value) and least < value < math.inf


CALIBRATIONS: dict[str, dict[str, Option]] = {
    "cdf": {"kind": Option("empirical or smooth", lambda v: v in ("empirical", "smooth"), "empirical")},
    "zscore": {},
    "par": {"k": Option("auto or a number above 0", lambda v: v == "auto" or _above(v, 0), "auto")},
    "centred": {},
    "lsc": {"q": Option("a number between 0 and 1", lambda v: _above(v, 0) and v < 1, 0.85)},
}
SHAPES: dict[str, dict[str, Option]] = {
    "tilt": {"t": Option("a finite number", lambda v: _above(v, -math.inf))},
    "clip": {"low": Option("a number", _number, -math.inf), "high": Option("a number", _number, math.inf)},
}
RULES: dict[str, dict[str, Option]] = {
    "sum": {},
    "mean": {},
    "min": {},
    "uncertainty": {"lambda": Option("a number above 0", lambda v: _above(v, 0), 0.5)},
    "lcb": {"k": Option("a number above 0", lambda v: _above(v, 0), 1.0)},
    "softmin": {"b": Option("a number above 0", lambda v: _above(v, 0), 1.0)},
    "median": {},
}


@dataclass(frozen=True)
class Stage:
    """One step by name, with its options."""

    name: str
    options: Mapping[str, Any]

    @property
    def calibrates(self) -> bool:
        """Whether it compares with references."""
        return self.name in CALIBRATIONS

    @property
    def scaled(self) -> bool:
        """Whether it divides by the deviation of all references."""
        return self.name == "zscore" or (self.name == "par" and self.options["k"] == "auto")

    @property
    def smooth(self) -> bool:
        """Whether a gradient passes."""
        return self.options.get("kind") != "empirical"

    def shape(self, r: Tensor) -> Tensor:
        """Values of any shape after `tilt` or `clip`."""
        if self.name == "tilt":
            return references.tilt(r, self.options["t"])
        return r.clamp(self.options["low"], self.options["high"])

    def calibrate(self, r: Tensor, refs: Tensor, scale: Callable[[], tuple[float, float]]) -> Tensor:
        """Rewards (B,) against references (B, M); `scale` gives mean and deviation of all references."""
        if self.name == "cdf":
            return (references.smooth_cdf if self.smooth else references.calibrate_cdf)(r, refs)
        if self.name == "lsc":
            return references.lsc(r, refs, self.options["q"])
        if self.name == "par":
            return references.par(r, refs, 1 / scale()[1] if self.scaled else self.options["k"])
        if self.name == "centred":
            return references.centred(r, refs)
        mean, std = scale()
        return (r - mean) / std

    def combine(self, z: Tensor, weights: Tensor) -> Tensor:
        """Members (B, N) with weights (N,) or (B, N) as one (B,); a member of weight 0 does not count."""
        options = self.options
        if self.name == "sum":
            return torch.where(weights != 0, weights * z, 0).sum(-1)
        if self.name == "uncertainty":
            return ensembles.uwo(z, options["lambda"], weights)
        if self.name == "lcb":
            return ensembles.lcb(z, options["k"], weights)
        if self.name == "softmin":
            return ensembles.softmin(z, options["b"], weights)
        return {"mean": ensembles.mean, "min": ensembles.worst, "median": ensembles.median}[self.name](z, weights)

    def bound(self, low: float, high: float) -> Range:
        """What becomes of a range before or after the combination; ConfigError where `tilt` cannot read it."""
        if self.name == "clip":
            low, high = (min(max(end, self.options["low"]), self.options["high"]) for end in (low, high))
            return low, high
        if self.name in ("zscore", "centred", "lsc"):
            return -math.inf, 0.0 if self.name == "lsc" else math.inf
        if self.name == "tilt" and (low < 0 or high > 1):
            raise ConfigError(
                f"the stage tilt reads win rates, in [0, 1], but gets values in [{low:g}, {high:g}]. Put cdf or par "
                "before it, or clip: {low: 0, high: 1}."
            )
        return 0.0, 1.0


@dataclass(frozen=True)
class Plan:
    """Stages in a legal order: those of each member, the rule that combines, and those of the total."""

    before: tuple[Stage, ...]
    rule: Stage
    after: tuple[Stage, ...]


def plan(stages: Sequence[str | Mapping[str, Any]]) -> Plan:
    """The plan of stages such as `cdf`, `{cdf: smooth}` or `{clip: {low: 0}}`; ConfigError where it has no meaning."""
    found = [_stage(entry) for entry in stages]
    names = [stage.name for stage in found]
    rules = [k for k, name in enumerate(names) if name in RULES]
    cut = rules[0] if rules else len(names)
    before, after = names[:cut], names[cut + 1 :]
    calibrations, late = ([name for name in side if name in CALIBRATIONS] for side in (before, after))
    turn = before.index(calibrations[0]) if calibrations else 0
    first, second = before[:turn], before[turn:]
    why = ""
    if len(rules) != 1:
        why = f"combine {len(rules)} times, but members become one total exactly once"
    elif late:
        why = f"have {late[0]} after {names[cut]}, but a total has no references: calibrate the members"
    elif len(calibrations) > 1:
        why = f"calibrate twice ({', '.join(calibrations)}), but the first puts the members on one scale already"
    elif "tilt" in first:
        why = f"tilt before {calibrations[0]}, but tilt reads calibrated values"
    elif any(len(set(part)) < len(part) for part in (first, second, after)):
        why = "repeat a stage with no calibration or combination between, where one of them would do"
    if why:
        raise ConfigError(f"the stages [{', '.join(names)}] {why}. {LEGAL}")
    return Plan(tuple(found[:cut]), found[cut], tuple(found[cut + 1 :]))


def _stage(entry: Any) -> Stage:
    """One entry with its options checked and its defaults filled in."""
    if isinstance(entry, Mapping) and len(entry) != 1:
        raise ConfigError(f"a stage is a name, or one name with its options, but got {dict(entry)}. {LEGAL}")
    name, given = next(iter(entry.items())) if isinstance(entry, Mapping) else (entry, None)
    known = {**CALIBRATIONS, **SHAPES, **RULES}.get(name)
    if known is None:
        raise ConfigError(f"no stage is called {name!r}. {LEGAL}")
    if given is not None and not isinstance(given, Mapping):
        given = {next(iter(known), name): given}
    options = {key: option.default for key, option in known.items()} | dict(given or {})
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"the stage {name} has no option '{key}'. Options: {', '.join(known) or 'none'}.")
        if not known[key].accepts(value):
            raise ConfigError(f"{key} of the stage {name} is {value!r}, but it takes {known[key].words}.")
    if name == "clip" and not options["low"] < options["high"]:
        raise ConfigError(f"the stage clip holds values in [{options['low']:g}, {options['high']:g}], which is empty.")
    return Stage(name, options)
