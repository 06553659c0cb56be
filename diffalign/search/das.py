"""DAS: particles that follow the reward's gradient, with weights that pay for it, under a rising strength.

Paper: "Test-time Alignment of Diffusion Models without Reward Over-optimization", Kim, Kim and Park, 2025
(arXiv 2501.05803). Implemented here: the shifted proposal, its weight and the tempering; `smc.run` does the rest with
`SMCConfig(**DAS, strength=1 / alpha)`.

Where we differ: after resampling every quantity of a particle follows its ancestor (the published code leaves the last
value behind); the result is the whole weighted set, not its heaviest particle alone; a step without noise has no
room for a shift, so no gradient is computed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.search.chain import Chain
from diffalign.search.judge import Judge

DAS: dict[str, Any] = {  # the published image setting, for 100 steps; 8 steps take tempering=0.1
    "proposal": "gradient",
    "potential": "diff",
    "start": 0.0,
    "stop": 1.0,
    "every": 0.0,
    "resampling": "ssp",
    "tempering": 0.008,
}


def tempered(gamma: float, i: int, length: int) -> float:
    """The share of the strength in force at level i: min((1 + gamma)^i - 1, 1), all of it at the end; gamma 0: 1."""
    return 1.0 if gamma == 0 or i >= length else min((1 + gamma) ** i - 1, 1.0)


def slope(chain: Chain, judge: Judge, x: Tensor, i: int, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction (K, ...), reward of the clean prediction (K,) on the CPU, and its gradient in x (K, ...), float32.

    Rows share no gradient. A row whose reward or gradient is not a number gets a gradient of 0.
    """

    def some(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            start = x[part].detach().requires_grad_()
            prediction = chain.predict(start, i, rows[part], grad=True)
            media = chain.finish(chain.denoised(start, prediction, i), rows[part], grad=True)
            rewards = judge.slopes(media, rows[part])
            found = judge.climb(rewards, start, "the gradient proposal")
        sound = found.flatten(1).isfinite().all(1) & rewards.isfinite().to(found.device)
        gradient = torch.where(sound.view(-1, *[1] * (x.ndim - 1)), found.float(), 0.0)
        return prediction.detach(), rewards.detach().float().cpu(), gradient

    predictions, rewards, gradients = zip(*judge.backward.over(len(rows), some), strict=True)
    return torch.cat(predictions), torch.cat(rewards), torch.cat(gradients)


def log_ratio(noise: Tensor, shift: Tensor) -> Tensor:
    """log p - log q (K,) of steps with total noise (K, ...) of which `shift` is the proposal's, both in stds."""
    noise, shift = noise.float().flatten(1), shift.float().flatten(1)
    return (shift * (0.5 * shift - noise)).sum(1)
