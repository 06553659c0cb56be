"""Several rewards on one scale: each compared with what a base model's images get, then combined.

Papers: "InfAlign: Inference-aware language model alignment", Balashankar et al., 2024 (arXiv 2412.19792): the share of
base images that an image beats takes the place of hand-tuned weights. The formulas are those of diffalign/shaping.

Where we differ: the order of the stages is written out, and only orders that mean something are taken; `clip` before a
calibration clips the references too, and a second `clip` is shown as `clip_2`; a weight is a member's share in whatever
rule combines them; an invalid member makes the row invalid, unless it is to be left out and the other weights take its
share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.calibration import Table, Unseen, key_of, read_tables, table_of
from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.registry import register_reward
from diffalign.scoring import Ask, Composite, Reward, Score, WeightedReward, make_reward
from diffalign.shaping.stages import Range, Stage, plan


@dataclass(frozen=True)
class Member:
    """One reward, its references, and the stages before the combination."""

    reward: Reward
    stages: Sequence[Stage]
    table: Table | None
    unseen: Unseen

    def through(self, raw: Score, cases: Sequence[Case]) -> dict[str, Tensor]:
        """The values (B,) after each stage; an invalid row stays NaN and takes no part, not in the gradient either."""
        valid = raw.valid.tolist()
        r = raw.total[raw.valid]
        refs = r.new_empty(len(r), 0)
        if self.table:
            keys = [key_of(self.reward, case) for case, judged in zip(cases, valid, strict=True) if judged]
            refs = self.table.rows(keys, self.unseen).to(r)
        found: dict[str, Tensor] = {}
        for stage in self.stages:
            if stage.calibrates:
                known = ~refs.isnan().all(-1)  # zscore needs none of its own
                r = torch.where(known, stage.calibrate(r, refs, lambda: self.scale), torch.nan)
            else:
                r, refs = stage.shape(r), stage.shape(refs)
            found[f"{stage.name}_2" if stage.name in found else stage.name] = Score(r).spread(raw.valid).total
        return found

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Mean and deviation of all references, clipped where a clip stands before the calibration."""
        assert self.table is not None
        mean, std = self.table.mean, self.table.std0
        if self.stages[0].name == "clip":
            values = self.stages[0].shape(self.table.values)
            mean, std = float(values.mean()), float(values.std(correction=0)) if values[0] < values[-1] else 0.0
        if std == 0:
            raise ConfigError(
                f"all {self.table.count} references of reward '{self.reward.name}' are {mean:g}, so they give no "
                "scale for zscore or par. Use cdf or par: {k: ...}, or leave this reward out."
            )
        return mean, std

    def range(self) -> Range:
        """What the values can be after all stages."""
        low, high = self.reward.range or (-math.inf, math.inf)
        for stage in self.stages:
            low, high = stage.bound(low, high)
        return low, high


@register_reward("mixture")
class Mixture(Composite):
    """Rewards with weights, put through `stages`; `table` is the file of references that calibrations read."""

    differentiable = False  # a mixture knows better once it has its members and stages

    def __init__(
        self,
        rewards: Any,
        table: str | None = None,
        stages: Sequence[str | dict[str, Any]] = ("cdf", "mean"),
        missing: Literal["invalid", "renormalise"] = "invalid",
        unseen: Literal["pooled", "invalid", "error"] = "pooled",
    ) -> None:
        made = make_reward(rewards)
        self.rewards = made.rewards if isinstance(made, WeightedReward) else [made]
        self.weights = made.weights if isinstance(made, WeightedReward) else [1.0]
        self.plan, self.missing = plan(stages), missing
        self._check_weights()
        self.modality = self.shared_modality(self.rewards)
        calibration = next((stage for stage in self.plan.before if stage.calibrates), None)
        tables = self._tables(calibration.name, table) if calibration else [None] * len(self.rewards)
        self.options = {
            "stages": [[s.name, s.options] for s in (*self.plan.before, self.plan.rule, *self.plan.after)],
            "weights": self.weights,
            "tables": [table.hash for table in tables if table],
            "missing": missing,
            "unseen": unseen,
        }
        self.members = [Member(r, self.plan.before, t, unseen) for r, t in zip(self.rewards, tables, strict=True)]
        if calibration and calibration.scaled:
            _ = [member.scale for member in self.members]  # references without a scale: say so before the work
        self.range = self._range()
        self.reads_prompt = calibration is not None or any(getattr(r, "reads_prompt", False) for r in self.rewards)
        smooth = all(stage.smooth for stage in self.plan.before)
        self.no_gradient = "" if smooth else "its stage cdf counts references; write {cdf: smooth}"
        self.differentiable = smooth and all(reward.differentiable for reward in self.rewards)

    def through(self, media: Tensor, cases: Sequence[Case], ask: Ask) -> Score:
        columns, parts = [], dict[str, Tensor]()
        for member in self.members:
            raw, name = ask(member.reward, media, cases), member.reward.name
            own = member.through(raw, cases)
            columns.append([raw.total, *own.values()][-1].to(media.device))
            parts[name] = raw.total
            parts |= {f"{name}/{k}": v for k, v in raw.parts.items() if k != name}
            parts |= {f"{name}/{stage}": value for stage, value in own.items()}
        z = torch.stack(columns, -1)  # (B, N)
        total = self.plan.rule.combine(z, self._shares(z))
        for stage in self.plan.after:
            total = stage.shape(total)
        return Score(total, parts)

    def _shares(self, z: Tensor) -> Tensor:
        """The weights (N,), or (B, N) where the members that judged a row take over from those that did not."""
        given = torch.tensor(self.weights).to(z)
        if self.missing == "invalid":
            return given
        left = torch.where(z.isnan(), 0, given)
        judged = left.abs().sum(-1, keepdim=True)
        return torch.where(judged > 0, left * given.abs().sum() / judged, given)

    def _range(self) -> Range | None:
        pairs = [(member.range(), w) for member, w in zip(self.members, self.weights, strict=True) if w != 0]
        rule = self.plan.rule.name
        low, high = min(low for (low, _), _ in pairs), max(high for (_, high), _ in pairs)
        if rule == "sum":
            ends = [sorted((low * w, high * w)) for (low, high), w in pairs]
            low, high = sum(e[0] for e in ends), sum(e[1] for e in ends)
            if self.missing == "renormalise":
                low, high = -math.inf, math.inf
        elif rule in ("uncertainty", "lcb"):
            low = -math.inf
        for stage in self.plan.after:
            low, high = stage.bound(low, high)
        return (low, high) if math.isfinite(low) and math.isfinite(high) else None

    def _check_weights(self) -> None:
        least = min(self.weights)
        if self.plan.rule.name != "sum" and least < 0:
            raise ConfigError(
                f"the weight of '{self.rewards[self.weights.index(least)].name}' is {least:g}, but under "
                f"'{self.plan.rule.name}' a weight is a share. Only sum can subtract a reward."
            )
        if not any(self.weights):
            raise ConfigError("every reward of the mixture has weight 0, so nothing counts. Give one a weight.")

    def _tables(self, stage: str, path: str | None) -> list[Table]:
        if path is None:
            names = " ".join(f"--reward {reward.name}" for reward in self.rewards)
            raise ConfigError(
                f"the stage {stage} compares with images of a base model, but the mixture has no table of references. "
                f"Make one: diffalign score RUN {names} --calibrate TABLE.json, then give the mixture table: TABLE.json"
            )
        tables = read_tables(path)
        return [table_of(reward, tables, path) for reward in self.rewards]
