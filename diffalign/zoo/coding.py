"""Noise that carries a layout: where things are becomes a part of the Gaussian noise that a one-step model can read.

A scene's free choices (positions, sizes, free colours, ground) are whitened and made normal within each form of prompt.
They replace the noise along a few local directions, so coded noise is standard normal and the way back is one function.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.world.grammar import Clauses
from diffalign.world.scenes import COLOURS, GROUNDS, Scene, Shape

SLOTS = 4  # objects
TRAITS = 4  # x, y, radius, colour: one latent channel each
LEAST = 80  # scenes of one form below which whitening is not worth trusting


def directions(side: int = 16) -> Tensor:
    """Orthonormal directions (17, 4, side, side): object k's traits are the channels of one 2 x 2 patch in quadrant k.

    A transformer embeds such a patch as one token, so each trait can be read from a single place.
    """
    half = side // 2
    found = torch.zeros(SLOTS * TRAITS + 1, TRAITS, side, side)
    for k in range(SLOTS):
        row, column = half * (k // 2) + half // 2, half * (k % 2) + half // 2
        for trait in range(TRAITS):
            found[k * TRAITS + trait, trait, row : row + 2, column : column + 2] = 0.5
    found[-1, -1, half : half + 2, half : half + 2] = 0.5
    return found


def encode_layout(noise: Tensor, codes: Tensor) -> Tensor:
    """Noise (B, 4, H, W) whose components along the directions are `codes` (B, 17) where those are not NaN."""
    basis = directions(noise.shape[-1])
    now = torch.einsum("bchw,kchw->bk", noise, basis)
    change = torch.where(codes.isnan(), torch.zeros_like(now), codes - now)
    return noise + torch.einsum("bk,kchw->bchw", change, basis)


def codes_of(scenes: Sequence[Scene], clauses: Sequence[Clauses], generator: torch.Generator) -> Tensor:
    """Standard normal codes (B, 17) of scenes; NaN where a scene has no such object, all NaN for rare forms."""
    raw = torch.stack([_traits(scene, asked, generator) for scene, asked in zip(scenes, clauses, strict=True)])
    groups: dict[object, list[int]] = defaultdict(list)
    for i, asked in enumerate(clauses):
        groups[_form(asked)].append(i)
    codes = torch.full_like(raw, torch.nan)
    for rows in groups.values():
        used = ~raw[rows[0]].isnan()
        if len(rows) >= LEAST:
            codes[torch.tensor(rows)[:, None], used.nonzero()[:, 0][None]] = _normal(raw[rows][:, used])
    return codes


def _form(asked: Clauses) -> object:
    """What decides how a layout is distributed: counts, sizes, places, relations, whether colours are free."""
    wants = tuple((w.count, w.size, w.place, w.colour is None) for w in asked.wants)
    return wants, tuple(relation.kind for relation in asked.relations)


def _traits(scene: Scene, asked: Clauses, generator: torch.Generator) -> Tensor:
    """Raw numbers (17,); colours and grounds become uniform numbers within their share of [0, 1]."""
    spread = torch.rand(SLOTS + 1, generator=generator).tolist()
    traits = torch.full((SLOTS * TRAITS + 1,), torch.nan)
    for k, (shape, free) in enumerate(_in_order(scene, asked)):
        colour = (list(COLOURS).index(shape.colour) + spread[k]) / len(COLOURS) if free else torch.nan
        traits[k * TRAITS : (k + 1) * TRAITS] = torch.tensor([shape.x, shape.y, shape.radius, colour])
    traits[-1] = (GROUNDS.index(scene.ground) + spread[-1]) / len(GROUNDS)
    return traits


def _in_order(scene: Scene, asked: Clauses) -> list[tuple[Shape, bool]]:
    """Objects in the order of the prompt, equal ones from left to right, with whether their colour is free."""
    found: list[tuple[Shape, bool]] = []
    for want in asked.wants:
        start = len(found)
        group = sorted(scene.shapes[start : start + want.count], key=lambda shape: shape.x)
        found += [(shape, want.colour is None) for shape in group]
    return found


def _normal(raw: Tensor) -> Tensor:
    """Whiten (N, D), then make every column standard normal by its ranks."""
    centred = raw - raw.mean(0)
    factor = torch.linalg.cholesky(centred.T @ centred / len(raw) + 1e-4 * torch.eye(raw.shape[1]))
    white = torch.linalg.solve_triangular(factor, centred.T, upper=False).T
    ranks = white.argsort(0).argsort(0)
    normal: Tensor = torch.special.ndtri((ranks + 0.5) / len(raw))
    return normal
