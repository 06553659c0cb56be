"""How well a denoiser takes off noise that was put on and is known: pure arithmetic over any denoiser.

A clean latent is noised to some levels of a schedule, once per draw; each branch predicts it under its own condition,
on the same noise; what the squared errors of a level are worth is added up over levels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.noise import Convention, Levels, case_generator

Denoise = Callable[[Tensor, int, Sequence[Any]], Tensor]  # (x_t (R, ...), index, condition of each row) -> prediction
Value = Callable[[Tensor], Tensor]  # errors of one level (C, M, B) -> what they are worth (B,)
Target = Literal["noise", "velocity", "clean"]
Weighting = Literal["uniform", "velocity", "clean", "min_snr", "likelihood"]
MIN_SNR = 5.0  # gamma of Min-SNR weighting (Hang et al., 2023, arXiv 2303.09556)


@dataclass(frozen=True, kw_only=True)
class Probes:
    """The noise that is put on: the same for every picture, so that no score depends on the batch."""

    levels: tuple[float, ...]  # shares of the schedule already walked: 0 is pure noise, towards 1 almost none
    draws: int  # per level
    antithetic: bool = True  # draws come in pairs, noise and minus noise
    seed: int = 0
    target: Target = "noise"  # what is predicted and compared: noise, velocity (noise - clean), or the clean latent
    convention: Convention = "mean"  # squared errors per element, or their sum

    def __post_init__(self) -> None:
        if not self.levels or not all(0 <= level < 1 for level in self.levels):
            raise ConfigError(
                f"levels is {list(self.levels)}, but a level is a share of the schedule, from 0 (pure noise) to below "
                "1. Give at least one, such as [0.3, 0.6]."
            )
        if self.draws < 1 or (self.antithetic and self.draws % 2):
            raise ConfigError(
                f"there are {self.draws} draws per level, but antithetic noise comes in pairs and at least one draw is "
                "needed. Give an even number, or antithetic=false."
            )

    def steps(self, length: int) -> list[int]:
        """The loop indices of the levels in a schedule of that length."""
        found = sorted({min(int(level * length + 1e-9), length - 1) for level in self.levels})
        if len(found) < len(self.levels):
            raise ConfigError(
                f"levels {list(self.levels)} are {len(self.levels)}, but only {len(found)} differ in a schedule of "
                f"{length} steps. Give fewer levels, or more num_inference_steps."
            )
        return found

    def noise(self, i: int, like: Tensor) -> Tensor:
        """Standard normals (M, ...) of level i for latents like (B, ...)."""
        drawn = self.draws // 2 if self.antithetic else self.draws
        named = [case_generator(self.seed, "endogenous", i, draw) for draw in range(drawn)]
        noise = torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in named]).to(like.device)
        return torch.cat([noise, -noise]) if self.antithetic else noise


def probe(
    denoise: Denoise,
    levels: Levels,
    x0: Tensor,
    branches: Sequence[Sequence[Any]],
    probes: Probes,
    value: Value,
    *,
    weighting: Weighting = "uniform",
    most: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores (B,), the weighted sum of `value` over levels, and errors (L, C, M, B) of clean latents x0 (B, ...).

    Each of the C branches names a condition for every picture; at most `most` rows go through the denoiser at once.
    The gradient is taken level by level, so that only one level's activations are alive; it has no second derivative.
    """
    each = probes.draws * len(branches)
    together = max(most // each, 1) if most else len(x0)
    if len(x0) > together:  # pictures outside, levels inside: prompts are encoded once
        run = functools.partial(probe, denoise, levels, probes=probes, value=value, weighting=weighting, most=most)
        parts = [slice(a, a + together) for a in range(0, len(x0), together)]
        found = [run(x0[part], [branch[part] for branch in branches]) for part in parts]
        return torch.cat([score for score, _ in found]), torch.cat([errors for _, errors in found], -1)
    graded = x0.requires_grad and torch.is_grad_enabled()
    leaf = x0.detach().requires_grad_(graded)
    score, slope, seen = x0.new_zeros(len(x0)), torch.zeros_like(leaf), list[Tensor]()
    steps = probes.steps(len(levels))
    for i, weight in zip(steps, weights_of(levels, steps, weighting), strict=True):
        errors = _errors(denoise, levels, leaf, branches, probes, i, most)
        part = weight * value(errors)
        if graded:
            slope = slope + torch.autograd.grad(part.sum(), leaf)[0]
        score = score + part.detach()
        seen.append(errors.detach())
    if graded:
        score = score + (slope * (x0 - x0.detach())).flatten(1).sum(1)  # adds 0, with the gradient found above
    return score, torch.stack(seen)


def weights_of(levels: Levels, steps: Sequence[int], weighting: Weighting) -> list[float]:
    """What each level's squared error counts; `likelihood` makes their sum an integral over half the log-SNR."""
    ratios = [(alpha * levels.unit / sigma) ** 2 if sigma else torch.inf for alpha, sigma in map(levels.at, steps)]
    if weighting == "min_snr":
        return [min(1.0, MIN_SNR / ratio if ratio else 1.0) / len(steps) for ratio in ratios]
    if weighting != "likelihood":
        return [1 / len(steps)] * len(steps)
    if len(steps) < 2 or not all(0 < ratio < torch.inf for ratio in ratios):
        raise ConfigError(
            "the weighting 'likelihood' is an integral over noise levels, so it needs at least two, and none of pure "
            "noise. Leave level 0 out, or use 'uniform'."
        )
    at = torch.tensor(ratios, dtype=torch.float64).log()
    gaps = torch.nn.functional.pad(at.diff() / 4, (1, 1))  # a half for the integral, a half for the trapezoid
    return [float(gap) for gap in gaps[1:] + gaps[:-1]]


def target_of(weighting: Weighting) -> Target:
    """Which error a weighting speaks of."""
    named: dict[str, Target] = {"velocity": "velocity", "clean": "clean"}
    return named.get(weighting, "noise")


def _errors(
    denoise: Denoise,
    levels: Levels,
    x0: Tensor,
    branches: Sequence[Sequence[Any]],
    probes: Probes,
    i: int,
    most: int | None,
) -> Tensor:
    """Squared errors (C, M, B) at level i, float32; all branches see the same noise."""
    rows, draws = len(x0), probes.draws
    noise = probes.noise(i, x0)[:, None].expand(draws, rows, *x0.shape[1:]).flatten(0, 1)  # (M B, ...)
    clean = x0.repeat(draws, *[1] * (x0.ndim - 1))
    noise, clean = (t.repeat(len(branches), *[1] * (t.ndim - 1)) for t in (noise, clean))  # (C M B, ...)
    x_t = levels.noised(clean, noise, i)
    asked = [condition for branch in branches for _ in range(draws) for condition in branch]
    size = most or len(x_t)
    parts = [denoise(x_t[a : a + size], i, asked[a : a + size]) for a in range(0, len(x_t), size)]
    prediction = torch.cat(parts).to(x_t)
    if probes.target == "noise":
        wrong = levels.epsilon(x_t, prediction, i) - noise
    elif probes.target == "velocity":
        wrong = levels.velocity(x_t, prediction, i) - (noise - clean)
    else:
        wrong = levels.denoised(x_t, prediction, i) - clean
    squared = wrong.square().flatten(1)
    found = squared.mean(1) if probes.convention == "mean" else squared.sum(1)
    return found.view(len(branches), draws, rows)
