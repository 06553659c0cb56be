"""A rule as far as it can be trusted, a model for the rest.

HARMO, "Beyond Monolithic Rewards" (arXiv 2510.05283): verifiable items are scored by rules, open ones by a model.

Where we differ: the switch is a blend, k * rule + (1 - k) * model, with k the rule's own confidence or a number. Where
the rule does not apply, or k is NaN, the model decides alone. Both should be on one scale first: the wider one
dominates a blend. The paper's length and format terms are rewards of their own here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.registry import register_reward
from diffalign.rules import partial as rules
from diffalign.scoring import Ask, Composite, Score, make_reward


@register_reward("hybrid")
class Hybrid(Composite):
    """`confidence` is a part of the rule's score, such as `confidence` of `ocr`, or a number; both lie in [0, 1]."""

    def __init__(self, rule: Any, model: Any, confidence: float | str = 1.0) -> None:
        if not isinstance(confidence, str) and not 0 <= confidence <= 1:
            raise ConfigError(f"hybrid.confidence is {confidence:g}, but trust goes from 0 (model) to 1 (rule).")
        self.rule, self.model, self.confidence = make_reward(rule), make_reward(model), confidence
        self.rewards = [self.rule, self.model]
        self.options = {"confidence": confidence}
        self.modality = self.shared_modality(self.rewards)
        self.differentiable = self.rule.differentiable and self.model.differentiable
        a, b = self.rule.range, self.model.range
        self.range = (min(a[0], b[0]), max(a[1], b[1])) if a and b else None

    def through(self, media: Tensor, cases: Sequence[Case], ask: Ask) -> Score:
        rule = ask(self.rule, media, cases)
        sure = self._confidence(rule)  # (B,)
        open_rows = ~((sure >= 1) & rule.valid)  # where the model has a say
        if open_rows.any():
            asked = [case for case, is_open in zip(cases, open_rows.tolist(), strict=True) if is_open]
            model = ask(self.model, media[open_rows.to(media.device)], asked).spread(open_rows)
        else:
            model = Score(torch.full_like(rule.total, torch.nan))
        total = rules.hybrid(rule.total, model.total.to(rule.total.device), sure)
        parts = {"rule": rule.total, "model": model.total, "confidence": sure}
        for label, reward, found in (("rule", self.rule, rule), ("model", self.model, model)):
            parts |= {f"{label}/{name}": part for name, part in found.parts.items() if name != reward.name}
        return Score(total, parts)

    def _confidence(self, rule: Score) -> Tensor:
        if not isinstance(self.confidence, str):
            return torch.full_like(rule.total.detach(), self.confidence)
        if self.confidence not in rule.parts:
            raise ConfigError(
                f"hybrid.confidence is '{self.confidence}', but the rule '{self.rule.name}' shows only "
                f"{', '.join(rule.parts) or 'no parts'}. Name one of them, or give a number."
            )
        found = rule.parts[self.confidence].detach()  # trust is no way to a higher score
        if ((found < 0) | (found > 1)).any():
            raise ConfigError(
                f"the part '{self.confidence}' of '{self.rule.name}' reaches from {found.min():g} to {found.max():g}, "
                "but a confidence lies in [0, 1]. Name another part, or give a number."
            )
        return found
