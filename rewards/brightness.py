"""How bright a picture is: the simplest differentiable reward, for examples and tests.

Luminance weights of ITU-R BT.709, applied to the stored (gamma-encoded) values.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffalign.cases import Case
from diffalign.registry import register_reward


@register_reward("brightness", differentiable=True, version="1", range=(0.0, 1.0))
def brightness(media: Tensor, cases: Sequence[Case]) -> Tensor:
    """Mean luminance: media (B, 3, H, W) -> (B,) in [0, 1]."""
    weights = media.new_tensor([0.2126, 0.7152, 0.0722]).float()
    return (media.float().mean((-2, -1)) * weights).sum(-1)  # (B,)
