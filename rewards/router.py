"""The reward that fits the kind of a case: rules where they apply, models elsewhere.

Mixed-R1 (arXiv 2505.24164) gives every sample the reward of its type; HARMO (arXiv 2510.05283) verifies what can be
verified and asks a model about the rest.

Where we differ: the kind is named by the case's metadata, not classified. Rewards of different ranges share one column,
so compare rows of one kind only, or bring the routes to one scale first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.registry import register_reward
from diffalign.scoring import Ask, Composite, Score, make_reward

DEFAULT = "default"


@register_reward("router")
class Router(Composite):
    """Asks `routes[kind]` with the kind under `by` in the metadata, else `default`; NaN where neither is there."""

    def __init__(self, routes: dict[str, Any], by: str = "kind", default: Any = None) -> None:
        if not routes or (default is not None and DEFAULT in routes):
            raise ConfigError(
                f"router.routes is {routes}; it maps each kind to a reward, and a kind called '{DEFAULT}' leaves no "
                "room for the option default."
            )
        specs = routes if default is None else {**routes, DEFAULT: default}
        self.by, self.routes = by, {kind: make_reward(spec) for kind, spec in specs.items()}
        self.fallback = DEFAULT if default is not None else None
        self.rewards = list(self.routes.values())
        self.options = {"by": by, "routes": list(self.routes), "default": default is not None}
        self.reads = (by,)
        modality = self.shared_modality(self.rewards)
        shared = all(reward.modality == modality for reward in self.rewards)
        self.modality = modality if shared else "image"  # one route of edits asks a source of its own rows only
        self.differentiable = all(reward.differentiable for reward in self.rewards)
        ends = [reward.range for reward in self.rewards if reward.range]
        known = len(ends) == len(self.rewards)
        self.range = (min(e[0] for e in ends), max(e[1] for e in ends)) if known else None

    def through(self, media: Tensor, cases: Sequence[Case], ask: Ask) -> Score:
        kinds = [self._kind(case) for case in cases]
        total = torch.full((len(cases),), torch.nan, device=media.device)
        parts: dict[str, Tensor] = {}
        for kind in dict.fromkeys(kind for kind in kinds if kind is not None):
            chosen = torch.tensor([other == kind for other in kinds], device=media.device)
            asked = [case for case, other in zip(cases, kinds, strict=True) if other == kind]
            found = ask(self.routes[kind], media[chosen], asked).spread(chosen)
            total = torch.where(chosen, found.total.to(total.device), total)
            parts |= {f"{kind}/{name}": part for name, part in found.parts.items() if name != self.routes[kind].name}
            parts[kind] = found.total
        return Score(total, parts)

    def _kind(self, case: Case) -> str | None:
        kind = str(case.metadata.get(self.by))  # a kind may be a number in JSON
        return kind if self.by in case.metadata and kind in self.routes else self.fallback
