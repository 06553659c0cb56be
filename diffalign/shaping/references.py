"""Rewards against the rewards of base samples: preference, win rate, and the bend for best-of-N.

Papers: "Reward Shaping to Mitigate Reward Hacking in RLHF", Fu et al., 2025 (arXiv 2502.18770): `par` and its rivals;
"InfAlign: Inference-aware language model alignment", Balashankar et al., 2024 (arXiv 2412.19792): `calibrate_cdf` and
`tilt`.

Where we differ: a CDF is smoothed at its ends by default, (less + equal / 2 + 1/2) / (K + 1), which is the mean of a
win rate under Jeffreys' prior; `smooth_cdf` joins its values by lines, so that a gradient passes; `tilt` is scaled to
[0, 1].
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor


def par(r: Tensor, refs: Tensor, k: float = 1.0) -> Tensor:
    """Preference as reward: the mean over references of sigmoid(k (r - ref)), the chance to beat a base sample."""
    r, refs, known = _against(r, refs)
    return _average((k * (r - refs)).sigmoid(), known)


def centred(r: Tensor, refs: Tensor) -> Tensor:
    """How far a reward lies above the mean of its references."""
    r, refs, known = _against(r, refs)
    return _average(r - refs, known)


def lsc(r: Tensor, refs: Tensor, q: float = 0.85) -> Tensor:
    """Log-sigmoid of the distance to the q-quantile of the normal distribution that fits the references."""
    r, refs, known = _against(r, refs)
    mean = _average(refs, known)
    squares = torch.where(known, refs - mean.unsqueeze(-1), 0).square().sum(-1)
    std1 = (squares / (known.sum(-1) - 1).clamp(min=1)).sqrt()  # a lone reference has no spread
    point = (mean + NormalDist().inv_cdf(q) * (std1 + 1e-5)).nan_to_num()
    return torch.where(known.any(-1), F.logsigmoid(r.squeeze(-1) - point), torch.nan)


def calibrate_cdf(r: Tensor, refs: Tensor, smoothing: bool = True) -> Tensor:
    """Share of its references that a reward beats, ties one half: a step function, so it has no gradient.

    With `smoothing` it stays inside (0, 1). Either way its mean over the references themselves is exactly 1/2.
    """
    r, refs, known = _against(r, refs)
    beaten = torch.where(known, (refs < r).to(r) + (refs == r).to(r) / 2, 0).sum(-1)  # (B,)
    count = known.sum(-1)
    share = (beaten + 0.5) / (count + 1) if smoothing else beaten / count.clamp(min=1)
    return torch.where((count > 0) & ~r.squeeze(-1).isnan(), share, torch.nan)


def smooth_cdf(r: Tensor, refs: Tensor) -> Tensor:
    """The smoothed `calibrate_cdf` at each reference, lines between them, exponential tails beyond: it has a slope."""
    r, refs, known = _against(r, refs)
    x = torch.where(known, refs, torch.nan).sort(-1).values  # (B, M), the unknown last
    u = calibrate_cdf(x, x.unsqueeze(-2)).nan_to_num()
    count, passed = known.sum(-1, keepdim=True), (x <= r).sum(-1, keepdim=True)  # (B, 1)
    x = x.nan_to_num()
    left, right = (passed - 1).clamp(min=0), torch.minimum(passed, (count - 1).clamp(min=0))
    (x0, u0), (x1, u1) = [(x.gather(-1, at), u.gather(-1, at)) for at in (left, right)]
    line = u0 + (u1 - u0) * (r - x0) / torch.where(x1 > x0, x1 - x0, 1)
    reach = (r - x0) / _deviation(refs, known).unsqueeze(-1)
    below, above = u0 * reach.clamp(max=0).exp(), 1 - (1 - u0) * (-reach.clamp(min=0)).exp()
    found = torch.where(passed == 0, below, torch.where(passed == count, above, line))
    return torch.where((count > 0) & ~r.isnan(), found, torch.nan).squeeze(-1)


def tilt(u: Tensor, t: float, *, normalise: bool = True) -> Tensor:
    """A win rate in [0, 1] bent for best-of-N (t > 0) or worst-of-N (t < 0); beyond its ends it counts as the end.

    (e^{tu} - 1) / (e^t - 1), which is u itself at t = 0; without `normalise` the paper's sign(t) e^{tu}.
    """
    u = real(u)
    if t == 0:
        return u
    u = u.clamp(0, 1)
    if not normalise:
        return math.copysign(1.0, t) * (t * u).exp()
    if t < 0:
        return torch.expm1(t * u) / math.expm1(t)
    return (torch.expm1(t * (u - 1)) - math.expm1(-t)) / -math.expm1(-t)  # e^t itself may be too large


def real(r: Tensor) -> Tensor:
    """float32 or float64 as it is, anything else as float32."""
    return r if r.dtype in (torch.float32, torch.float64) else r.float()


def _against(r: Tensor, refs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r (B, 1), references (B, M) with 0 for the unknown, so that no gradient becomes NaN, and which are known."""
    r = real(r)
    wide = refs.to(r).expand(*r.shape, refs.shape[-1])
    wide = F.pad(wide, (0, 1), value=torch.nan) if not wide.shape[-1] else wide
    known = ~wide.isnan()
    return r.unsqueeze(-1), torch.where(known, wide, 0), known


def _average(x: Tensor, known: Tensor) -> Tensor:
    """Mean (B,) of the known entries of (B, M), NaN where there is none."""
    count = known.sum(-1)
    return torch.where(count > 0, torch.where(known, x, 0).sum(-1) / count.clamp(min=1), torch.nan)


def _deviation(refs: Tensor, known: Tensor) -> Tensor:
    """Population deviation (B,) of references (B, M), 1 where they are one value or none."""
    low = torch.where(known, refs, torch.inf).amin(-1)
    high = torch.where(known, refs, -torch.inf).amax(-1)
    gaps = torch.where(known, refs - _average(refs, known).unsqueeze(-1), 0)
    return torch.where(high > low, (gaps.square().sum(-1) / known.sum(-1).clamp(min=1)).sqrt(), 1)
