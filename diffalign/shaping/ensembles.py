"""Several judges of one image as one number, and how far they disagree.

Papers: "Reward Model Ensembles Help Mitigate Overoptimization", Coste et al., 2023 (arXiv 2310.02743): `mean`, `worst`,
`uwo`; "GARDO: Reinforcing Diffusion Models without Reward Hacking", He et al., 2025 (arXiv 2512.24138): `disagreement`.

Members z are (B, N), on one scale; a member that is NaN makes its row NaN, unless its weight is 0.

Where we differ: members may have weights; `lcb`, `softmin`, `median` and `trimmed` are ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.shaping.references import real

_EXACT = 1e-12  # share of a product of floats by which it may miss the whole number that it stands for
_ROUNDING = 1e-6  # how far a float32 sum of weights may lie from the one half it stands for


def mean(z: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean of members (B, N); here and below a member of weight 0 does not count, NaN or not."""
    z, share = _members(z, weights)
    return (share * z).sum(-1)


def worst(z: Tensor, weights: Tensor | None = None) -> Tensor:
    """The lowest member: no single hacked one lifts it, and its gradient comes from one."""
    z, share = _members(z, weights)
    return torch.where(share > 0, z, torch.inf).amin(-1)


def uwo(z: Tensor, penalty: float = 0.5, weights: Tensor | None = None) -> Tensor:
    """Mean minus `penalty` times variance; raising a member more than 1 / (2 penalty) above the mean lowers it."""
    z, share = _members(z, weights)
    return (share * z).sum(-1) - penalty * _variance(z, share)


def lcb(z: Tensor, k: float = 1.0, weights: Tensor | None = None) -> Tensor:
    """Mean minus k deviations; raising the top of N equal weights can lower it once k exceeds 1 / sqrt(N - 1)."""
    z, share = _members(z, weights)
    variance = _variance(z, share)
    std = torch.where(variance > 0, variance, 1).sqrt().where(variance > 0, variance)  # sqrt has no slope at 0
    return (share * z).sum(-1) - k * std


def softmin(z: Tensor, b: float = 1.0, weights: Tensor | None = None) -> Tensor:
    """-(1/b) log mean e^{-b z}, between the mean (b -> 0) and the lowest member (b -> infinity)."""
    z, share = _members(z, weights)
    return -(share.log() - b * z).logsumexp(-1) / b


def median(z: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted median, the middle of the two members where half the weight ends between them."""
    z, share, unknown = _ascending(*_members(z, weights))
    reached = share.cumsum(-1)
    ends = [(reached < 0.5 + side).sum(-1, keepdim=True).clamp(max=z.shape[-1] - 1) for side in (-_ROUNDING, _ROUNDING)]
    return torch.where(unknown, torch.nan, torch.cat([z.gather(-1, end) for end in ends], -1).mean(-1))


def trimmed(z: Tensor, drop: int = 1, weights: Tensor | None = None) -> Tensor:
    """Mean without the `drop` lowest and the `drop` highest members; NaN where that leaves none."""
    z, share, unknown = _ascending(*_members(z, weights))
    rank = torch.arange(z.shape[-1], device=z.device)
    kept = (rank >= drop) & (rank < (share > 0).sum(-1, keepdim=True) - drop)
    return torch.where(unknown, torch.nan, mean(torch.where(kept, z, 0), torch.where(kept, share, 0)))


def disagreement(proxy: Tensor, aux: Tensor) -> Tensor:
    """Win rate within the batch by the optimised reward (B,) minus the mean of those by others (B, N), in [-1, 1].

    A row that one of them cannot judge is compared with nobody.
    """
    columns = torch.cat([real(proxy).unsqueeze(-1), aux.to(real(proxy))], -1)
    columns = torch.where(columns.isnan().any(-1, keepdim=True), torch.nan, columns)
    rates = torch.stack([_win_rate(column) for column in columns.unbind(-1)], -1)
    return rates[..., 0] - rates[..., 1:].mean(-1)


def gate(disagreement: Tensor, share: float = 0.1) -> Tensor:
    """Mask (B,) of the `share` of valid rows that disagree most, rounded up: those that deserve a KL penalty."""
    if not 0 <= share <= 1:
        raise ConfigError(f"share is {share}, but a share of rows lies in [0, 1].")
    known = ~disagreement.isnan()
    order = torch.where(known, disagreement, -torch.inf).argsort(descending=True, stable=True)
    return order.argsort() < math.ceil(share * int(known.sum()) * (1 - _EXACT))


def _members(z: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Members with 0 for those of weight 0, NaN if that is all of them, and shares that add up to 1; both (B, N)."""
    z = real(z)
    w = torch.ones_like(z) if weights is None else weights.to(z).expand_as(z)
    if (w < 0).any():
        raise ConfigError(f"a weight is {float(w.min()):g}, but only a sum can have negative ones.")
    some = (w > 0).any(-1, keepdim=True)
    z, w = torch.where(some, z, torch.nan), torch.where(some, w, 1)
    return torch.where(w > 0, z, 0), w / w.sum(-1, keepdim=True)


def _variance(z: Tensor, share: Tensor) -> Tensor:
    return (share * (z - (share * z).sum(-1, keepdim=True)).square()).sum(-1)


def _ascending(z: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Members in ascending order, those that do not count last, their shares, and which rows hold a NaN."""
    order = torch.where(share > 0, z, torch.inf).argsort(dim=-1, stable=True)
    return z.gather(-1, order), share.gather(-1, order), z.isnan().any(-1)


def _win_rate(r: Tensor) -> Tensor:
    """Share of the other valid rows (B,) that each beats, ties one half; a lone row has 1/2."""
    known = ~r.isnan()
    others = int(known.sum()) - 1
    beaten = (r.unsqueeze(-1) > r).to(r).sum(-1) + ((r.unsqueeze(-1) == r).to(r).sum(-1) - 1) / 2
    return torch.where(known, beaten / others if others > 0 else 0.5, torch.nan)
