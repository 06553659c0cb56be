"""The truth of edits in the shapes world: whether the instruction was followed and everything else kept.

The two halves, and that the smaller one counts, are those of editing benchmarks such as VIEScore (Max Ku et al., 2023,
arXiv 2312.14867). Where we differ: both are exact, from the pixels of source and result; see diffalign/world/edits.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.registry import register_reward
from diffalign.scoring import Score
from diffalign.world.edit_sets import verify_edits


@register_reward("shapes_edit", version="1", modality="edit", range=(0.0, 1.0))
def shapes_edit(media: Tensor, cases: Sequence[Case]) -> Score:
    """The smaller of the parts `followed` and `kept` of pictures (B, 3, H, W); NaN outside the world."""
    verdicts = verify_edits(media.detach().cpu(), cases)
    columns = {"followed": [v.followed for v in verdicts], "kept": [v.kept for v in verdicts]}
    valid = torch.tensor([verdict.applies for verdict in verdicts], device=media.device)
    total = torch.tensor([verdict.quality for verdict in verdicts], device=media.device)
    return Score(total, {name: torch.tensor(values, device=media.device) for name, values in columns.items()}, valid)


shapes_edit.reads = ("edit", "instruction")  # type: ignore[attr-defined]
