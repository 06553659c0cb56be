"""The watch: at every evaluation it asks whether the model still improves or only its reward does.

watch = Watch(WatchConfig(action="rollback"))
watch.observe(before_training)                 # the base model, to which all later ones are compared
verdict = watch.observe(after_some_steps)      # metrics to log, alarms to show, what to do, where to go back to

Rules: held-out rewards fall or contradict the proxy, variety within or across prompts is lost, the look of the
pictures leaves that of the base model's (`signatures`), the KL passes a ceiling, the updates themselves go wrong. A
rule raises an alarm once it has held `patience` times in a row, or at once where it holds strongly, and again only
after it has been quiet. The truth is logged; nothing but `read_truth` lets it choose or raise anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.train import findings, stopping
from diffalign.train.findings import Finding, get
from diffalign.train.look import Look, number

Action = Literal["continue", "alarm", "stop", "rollback"]
READINGS = ("panel", "diversity", "signatures", "kl", "training", "invalid")
KEPT = ("proxy_gain", "heldout_gain", "heldout_gain_se", "truth_gain", "grad_norm")  # what later evaluations need
MOST = 1e6  # severity as told, so that it stays a number


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What may raise an alarm, when, and what follows; deviations are of the base model."""

    action: Literal["alarm", "stop", "rollback"] = "alarm"  # a rollback ends the run with the best weights
    read: tuple[str, ...] = READINGS  # rules that may raise an alarm; all of their metrics are logged either way
    read_truth: bool = False  # let the truth choose the best step; a run judged by it then needs another truth
    patience: int = 2  # evaluations in a row; more is slower and has fewer false alarms
    at_once: float = 2.0  # a rule that holds this many times over does not wait
    shift: float = 1.5  # of a look's mean, in deviations from image to image
    errors: float = 4.0  # standard errors that a change of look or variety must also have, so that it is no chance
    outside: float = 0.08  # share of images that look like none of the base model's
    outside_margin: float = 1.0  # how far beyond them is outside, in the least change of that look that shows
    panel_drop: float = 0.2  # of held-out rewards below their best, in deviations within a prompt
    panel_errors: float = 3.0  # standard errors that this or a contrary ranking must also have
    least_transfer: float | None = None  # share of the proxy's gain; None as a blind panel would raise it in any run
    most_gap: float | None = None  # deviations; None for the same reason
    diversity_warning: float = 0.9  # of the base model's variety; marked in the metrics only
    diversity_floor: float = 0.8  # below it the variety within or across prompts is lost
    prompt_effect: float = 0.25  # of the base model's share of variety that prompts explain
    kl_ceiling: float | None = None  # nats, from a pilot run
    invalid: float = 0.2  # share of images that the proxy cannot judge
    ratio: float = 0.1  # of the mean probability ratio from 1
    clipped: float = 0.6  # share of updates that are clipped
    zero_spread: float = 0.97  # share of groups whose images all have one reward
    gradient: float = 30.0  # times the median norm so far

    def __post_init__(self) -> None:
        for name in self.read:
            if name not in READINGS:
                raise ConfigError(f"watch.read has '{name}', but the watch reads {', '.join(READINGS)}.")
        if self.patience < 1:
            raise ConfigError(f"watch.patience is {self.patience}, but an alarm needs at least 1 evaluation.")
        if not 0 < self.diversity_floor < 1:
            raise ConfigError(f"watch.diversity_floor is {self.diversity_floor}, but it is a share between 0 and 1.")
        free = ("action", "read", "read_truth", "patience", "least_transfer", "most_gap", "diversity_floor")
        for name in (each.name for each in fields(self) if each.name not in free):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(
                    f"watch.{name} is {getattr(self, name)}, but a limit lies above 0. Leave rules out with watch.read."
                )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The same prompts and seeds drawn at some step, judged by everything that watches; NaN is an invalid reward."""

    step: int
    prompts: Tensor  # (N,) int64, which images share a prompt
    proxy: Tensor  # (N,) the reward that trains
    media: Tensor  # (N, 3, H, W) or (N, F, 3, H, W) in [0, 1]
    panel: Mapping[str, Tensor] = field(default_factory=dict)  # rewards that do not train, (N,) each
    truth: Tensor | None = None  # (N,)
    features: Tensor | None = None  # (N, D) of a tower; None takes `diversity.plain_features`
    prompt_margin: Tensor | None = None  # (N,) text-image reward with the own prompt minus with another image's
    kl: float = math.nan  # to the base model, of the stochastic path
    training: Mapping[str, float] = field(default_factory=dict)  # ratio_mean, clip_low, clip_high, frac_zero_std, ...


@dataclass(frozen=True)
class Alarm:
    """One rule that has begun to hold, said in one sentence, with the images that show it best."""

    signature: str
    step: int
    value: float
    threshold: float
    says: str
    images: tuple[int, ...] = ()

    def json(self) -> dict[str, Any]:
        numbers = {"value": number(self.value), "threshold": number(self.threshold)}
        return {"signature": self.signature, "step": self.step, **numbers, "says": self.says, "images": [*self.images]}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to log, what to show, what to do, and the step to go back to."""

    metrics: dict[str, float]  # only what is known
    alarms: tuple[Alarm, ...]
    action: Action
    best_step: int


class Watch:
    """The rules with their memory: the base model's look and a row of numbers per evaluation."""

    def __init__(self, config: WatchConfig = WatchConfig()) -> None:
        self.config = config
        self._base: Look | None = None
        self._rows: list[dict[str, Any]] = []
        self._best: int | None = None

    def observe(self, seen: Evaluation) -> Verdict:
        """Judge an evaluation; an earlier step than the last one forgets all from that step on, as after a rollback."""
        _check(seen, self._base)
        now = Look.at(seen)
        self._base = base = self._base or now
        self._rows = [row for row in self._rows if row["step"] < seen.step]
        metrics, found = self._findings(seen, now, base)
        row: dict[str, Any] = {"step": seen.step, **{name: number(metrics[name]) for name in KEPT if name in metrics}}
        row["severity"] = {f.name: _told(f.severity) for f in found}
        before = self._rows[-1]["holding"] if self._rows else []
        self._rows.append(row)
        row["holding"] = [f.name for f in found if self._holds(f.name)]
        raised = [f for f in found if f.name in row["holding"] and f.name not in before]
        raised.sort(key=lambda f: -f.severity)
        self._best = best = self._best_step()
        metrics |= {"alarms": float(len(row["holding"]))}
        return Verdict(
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
            alarms=tuple(self._alarm(f, seen.step, best, metrics) for f in raised),
            action=self.config.action if raised else "continue",
            best_step=best,
        )

    @property
    def best_step(self) -> int:
        """The step to go back to."""
        return self._best or 0

    def forget_best(self) -> None:
        """Choose the best step anew from the next evaluation on, as its checkpoint is not here."""
        self._best = None

    @property
    def base(self) -> Look:
        """The base model's look, to which all later ones are compared."""
        if self._base is None:
            raise ConfigError("the watch has seen no evaluation, so it has no base. Let it observe the base model.")
        return self._base

    def state_dict(self) -> dict[str, Any]:
        """All of its memory as JSON holds it."""
        base = None if self._base is None else self._base.json()
        rows = [{**row, "severity": {**row["severity"]}, "holding": [*row["holding"]]} for row in self._rows]
        return {"base": base, "rows": rows, "best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._base = None if state["base"] is None else Look.of_json(state["base"])
        rows = state["rows"]
        self._rows = [{**row, "severity": {**row["severity"]}, "holding": [*row["holding"]]} for row in rows]
        self._best = state.get("best", rows[-1]["step"] if rows else None)

    def _findings(self, seen: Evaluation, now: Look, base: Look) -> tuple[dict[str, float], list[Finding]]:
        """Metrics of every rule, and what those rules found that may raise an alarm."""
        metrics = findings.of_rewards(now, base)
        told: dict[str, list[Finding]] = {
            "panel": list(findings.of_panel(now, base, metrics, self._rows, self.config)),
        }
        for name, (more, found) in {
            "diversity": findings.of_diversity(now, base, self.config),
            "signatures": findings.of_signatures(now, base, self.config),
            "kl": findings.of_kl(seen.kl, self.config),
            "training": findings.of_training(seen.training, self._rows, self.config),
            "invalid": findings.of_invalid(now, self.config),
        }.items():
            metrics |= more
            told[name] = found
        return metrics, [finding for name in READINGS if name in self.config.read for finding in told[name]]

    def _holds(self, name: str) -> bool:
        severities = [get(row["severity"], name) for row in self._rows]
        return stopping.holds(severities, self.config.patience, self.config.at_once)

    def _best_step(self) -> int:
        """The best so far or this evaluation, whichever has the higher proxy; a rule that holds excludes it.

        So do held-out rewards below their highest; a chance maximum of them would else be preferred to all that was
        learned since. Evaluations between the two are no choice, as their checkpoints may be gone.
        """
        now = self._rows[-1]
        best = next((row for row in self._rows if row["step"] == self._best), now)
        sound = [row for row in (best, now) if _sound(row)] or [best]
        if self.config.read_truth and any(row.get("truth_gain") is not None for row in sound):
            return int(max(sound, key=lambda row: (_known(row, "truth_gain"), -row["step"]))["step"])
        top = max(filter(_sound, self._rows), key=lambda row: _known(row, "heldout_gain"), default=best)
        slack = max(self.config.panel_drop, self.config.panel_errors * max(get(top, findings.SE), 0.0))
        near = [row for row in sound if not get(row, "heldout_gain") < get(top, "heldout_gain") - slack] or [best]
        return int(max(near, key=lambda row: (_known(row, "proxy_gain"), -row["step"]))["step"])

    @staticmethod
    def _alarm(found: Finding, step: int, best: int, metrics: Mapping[str, float]) -> Alarm:
        gains = [f"the proxy gained {metrics['proxy_gain']:+.2f} deviations"] if _finite(metrics, "proxy_gain") else []
        gains += [f"held-out rewards {metrics['heldout_gain']:+.2f}"] if _finite(metrics, "heldout_gain") else []
        since = f" while {' and '.join(gains)}" if gains else ""
        says = f"{found.seen[:1].upper()}{found.seen[1:]}{since}; {found.why}: {found.do.format(best=best)}."
        return Alarm(found.name, step, found.value, found.threshold, says, found.images)


def _sound(row: Mapping[str, Any]) -> bool:
    """Whether no rule holds on an evaluation."""
    return not any(get(row["severity"], name) > 1 for name in row["severity"])


def _told(severity: float) -> float | None:
    return None if math.isnan(severity) else max(-MOST, min(MOST, severity))


def _known(row: Mapping[str, Any], name: str) -> float:
    value = get(row, name)
    return -math.inf if math.isnan(value) else value


def _finite(metrics: Mapping[str, float], name: str) -> bool:
    return math.isfinite(metrics.get(name, math.nan))


def _check(seen: Evaluation, base: Look | None) -> None:
    count = len(seen.prompts)
    rows = {"proxy": seen.proxy, "media": seen.media, "truth": seen.truth, "features": seen.features}
    rows |= {"prompt_margin": seen.prompt_margin, **{f"panel.{name}": values for name, values in seen.panel.items()}}
    for name, values in rows.items():
        if values is not None and len(values) != count:
            raise ConfigError(f"evaluation.{name} has {len(values)} rows, but there are {count} images in its prompts.")
    if count < 2:
        raise ConfigError(f"an evaluation of {count} images tells nothing. Take 4 seeds of at least 8 prompts.")
    if base is None:
        return
    if not torch.equal(seen.prompts.cpu(), base.prompts):
        raise ConfigError(
            "this evaluation has other prompts than the first, and changes are measured image by image. "
            "Draw the same prompts and seeds in the same order every time."
        )
    for name, given, once in (
        ("features", seen.features is not None, base.tower),
        ("prompt_margin", seen.prompt_margin is not None, base.prompt_margin is not None),
    ):
        if given != once:
            raise ConfigError(
                f"evaluation.{name} is {'given' if given else 'left out'}, but the first evaluation had it "
                f"{'given' if once else 'left out'}. Give it every time or never."
            )
    if set(seen.panel) != set(base.panel):
        raise ConfigError(
            f"the panel is {sorted(seen.panel)}, but it was {sorted(base.panel)} at first. Keep it the same."
        )
