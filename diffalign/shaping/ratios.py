"""A likelihood ratio of the same size at every step of a flow.

Paper: "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping", 2025 (arXiv
2510.22319): RatioNorm.

Where we differ: the mean over elements is taken for each sample; the official code takes it over the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.shaping.references import real


def ratio_norm(logp: Tensor, logp_old: Tensor, shift: Tensor, std: Tensor | float) -> Tensor:
    """exp(std (logp - logp_old) + mean(shift^2) / (2 std)): exp(mean(noise shift)) for x = mean_old + std noise.

    Log-densities (B,) are means over elements; shift (B, ...) is the step's mean now minus the one it was drawn with,
    with its gradient; std (B,) or a number above 0 is the deviation of the step. The loss that uses it is divided by
    the size of the step.
    """
    shift = real(shift)
    std = torch.as_tensor(std).to(shift)
    return (std * (logp - logp_old) + shift.square().flatten(1).mean(1) / (2 * std)).exp()
