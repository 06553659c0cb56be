"""How long is Gaussian noise? The law of its length, and a penalty that keeps an optimised noise typical.

Paper: "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization", Eyring, Karthik, Roth,
Dosovitskiy, Akata, 2024 (arXiv 2406.04312): the regulariser. The length r of d standard normals follows the chi law, so

    log p(r) = (d - 1) log r - r^2 / 2 - (d/2 - 1) log 2 - log Gamma(d/2)

and the penalty r^2 / 2 - (d - 1) log r is -log p up to a constant: lowest at r = sqrt(d - 1), where it curves by 2.

Where we differ: the gradient is written out, so it needs no graph; `excess` counts the penalty from its lowest value,
since the constant (thousands for real latents) would swallow every reward in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lengths(noise: Tensor) -> Tensor:
    """Euclidean length (K,) of each row of noise (K, ...), float32 or wider."""
    wide = noise.to(torch.promote_types(noise.dtype, torch.float32))
    return torch.stack([torch.linalg.vector_norm(row) for row in wide])  # row by row: the same bits in any batch


def log_density(length: Tensor, d: int) -> Tensor:
    """log p(r) of the length (...) of d standard normals."""
    return (d - 1) * length.log() - length**2 / 2 - (d / 2 - 1) * math.log(2) - math.lgamma(d / 2)


def penalty(length: Tensor, d: int) -> Tensor:
    """r^2 / 2 - (d - 1) log r for lengths (...): the negative log density without its constant."""
    return length**2 / 2 - (d - 1) * length.log()


def excess(length: float, d: int) -> float:
    """How far the penalty stands above its lowest value."""
    if d == 1:
        return length**2 / 2
    ratio = length**2 / (d - 1)
    return (d - 1) / 2 * (ratio - 1 - math.log(ratio)) if 0 < ratio < math.inf else math.inf


def slope(noise: Tensor) -> Tensor:
    """Gradient (K, ...) of each row's penalty at noise (K, ...): (1 - (d - 1) / r^2) noise, along the noise itself."""
    d = noise[0].numel()
    scale = 1 - (d - 1) / lengths(noise) ** 2  # (K,)
    return scale.view(-1, *[1] * (noise.ndim - 1)) * noise


def typical_length(d: int) -> float:
    """The likeliest length of d standard normals."""
    return math.sqrt(d - 1)
