"""How colourful a picture is to human raters.

David Hasler, Sabine Suesstrunk: "Measuring colourfulness in natural images", Human Vision and Electronic Imaging VIII,
2003 (doi 10.1117/12.477378). Implements the metric M3 of its section 7, on 8-bit levels:
rg = R - G, yb = (R + G) / 2 - B, M3 = sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2).

Where we differ: a millionth of a squared level inside each root keeps the gradient finite on a grey picture.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffalign.cases import Case
from diffalign.registry import register_reward

EPSILON = 1e-6  # squared 8-bit levels


@register_reward("colourfulness", differentiable=True, version="1", range=(0.0, 298.0))
def colourfulness(media: Tensor, cases: Sequence[Case]) -> Tensor:
    """Colourfulness: media (B, 3, H, W) -> (B,), 0 for grey, 109 and more for extremely colourful."""
    red, green, blue = (media.float() * 255).flatten(2).unbind(1)  # each (B, H W)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = _root(rg.var(1, correction=0) + yb.var(1, correction=0))
    strength = _root(rg.mean(1) ** 2 + yb.mean(1) ** 2)
    return spread + 0.3 * strength


def _root(squared: Tensor) -> Tensor:
    shifted: Tensor = squared + EPSILON
    root: Tensor = shifted.sqrt() - EPSILON**0.5
    return root
