"""Which steps of which images carry influence on the images that did well: a diagnostic, not a training default.

Paper: THR, "Token Hidden Reward: Steering Exploration-Exploitation in Group Relative Deep RL", 2025 (arXiv 2510.03669).

Where we differ: a token's prediction error becomes the noise of a step, averaged over blocks of 8 x 8 (without that,
random noises of many dimensions are all but orthogonal), and hidden states become features of the denoiser at the same
step, pooled by the caller. Signs come from advantages, since rewards are not right or wrong.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.errors import ConfigError

BLOCK = 8


def projected(noise: Tensor) -> Tensor:
    """Noise (N, ..., H, W) averaged over blocks of 8 x 8, as vectors (N, P); smaller ones become their mean."""
    if noise.ndim < 4:
        raise ConfigError(
            f"noise of shape {tuple(noise.shape)} has no height and width to average over. Unpack it to (N, C, H, W)."
        )
    height, width = noise.shape[-2:]
    flat = noise.float().reshape(-1, 1, height, width)
    return F.avg_pool2d(flat, (min(BLOCK, height), min(BLOCK, width))).reshape(len(noise), -1)


def kernel(noise: Tensor, features: Tensor) -> Tensor:
    """K (N, N) of one step: inner products of projected noise (N, ..., H, W) times those of features (N, ...)."""
    errors, f = projected(noise), features.float().flatten(1)
    return (errors @ errors.T) * (f @ f.T)


def thr(K: Tensor, A: Tensor, gid: Tensor | None = None) -> Tensor:
    """THR (N,) of one step: sign(A_j) times the sum of K_ij over images i of j's group with A_i > 0."""
    same = torch.ones_like(K, dtype=torch.bool) if gid is None else gid.unsqueeze(0) == gid.unsqueeze(1)
    helped = same & (A > 0).unsqueeze(1)
    return A.sign() * torch.where(helped, K, 0).sum(0)


def reweighted(A: Tensor, influence: Tensor, p: float = 0.0, tau: float = 0.0) -> Tensor:
    """The paper's advantages: those with |THR| above tau, times 1 + p sign(THR); p > 0 exploits, p < 0 explores."""
    return torch.where(influence.abs() > tau, (1 + p * influence.sign()) * A, 0)


def step_influence(influence: Tensor) -> Tensor:
    """The mean of |THR| (N, T) over the images, as each step's share of all (T,)."""
    size = influence.abs().mean(0)
    return size / size.sum().clamp(min=1e-30)


def plot(influence: Tensor, path: str | os.PathLike[str]) -> None:
    """Draw THR (N, T): each step's share of the influence, and the part of it that works for the good images."""
    from matplotlib.figure import Figure  # no pyplot: it keeps figures and picks a display

    size = influence.abs().sum()
    helping = (influence.clamp(min=0).sum(0) / size.clamp(min=1e-30)).cpu()
    steps = range(influence.shape[1])
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(steps, step_influence(influence).cpu().numpy(), color="#b8c4d0", label="all")
    axes.bar(steps, helping.numpy(), color="#2f6f9f", label="for images with A > 0")
    axes.set(xlabel="step (0 = noisiest)", ylabel="share of |THR|", xticks=list(steps))
    axes.legend(frameon=False)
    figure.savefig(os.fspath(path), dpi=150)
