"""The truth of the shapes world as two rewards: `shapes` passes or fails, `shapes_soft` counts the clauses that hold.

The rules are those of GenEval (Ghosh et al., 2023, arXiv 2310.11513). Where we differ: see diffalign/world/verifier.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.registry import register_reward
from diffalign.scoring import Score
from diffalign.world.verifier import Verdict, verify


@register_reward("shapes", version="1", range=(0.0, 1.0))
def shapes(media: Tensor, cases: Sequence[Case]) -> Score:
    """1 where the image (B, 3, H, W) shows exactly what the prompt asks, else 0; NaN outside the grammar."""
    verdicts = verify(media, cases)
    return _score([float(v.strict) for v in verdicts], verdicts, media.device)


@register_reward("shapes_soft", version="1", range=(0.0, 1.0))
def shapes_soft(media: Tensor, cases: Sequence[Case]) -> Score:
    """Mean of the clause terms, each in [0, 1]; NaN outside the grammar."""
    verdicts = verify(media, cases)
    return _score([v.soft for v in verdicts], verdicts, media.device)


def _score(totals: list[float], verdicts: Sequence[Verdict], device: torch.device) -> Score:
    """Totals with one part per kind of clause: the mean of its terms, NaN where the prompt has none."""
    rows = [_by_kind(verdict) for verdict in verdicts]
    kinds = dict.fromkeys(kind for row in rows for kind in row)
    parts = {kind: torch.tensor([row.get(kind, torch.nan) for row in rows], device=device) for kind in kinds}
    valid = torch.tensor([verdict.applies for verdict in verdicts], device=device)
    return Score(total=torch.tensor(totals, device=device), parts=parts, valid=valid)


def _by_kind(verdict: Verdict) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for name, value in verdict.terms.items():
        groups.setdefault(name.partition(":")[0], []).append(value)
    return {kind: sum(values) / len(values) for kind, values in groups.items()}
