"""What happens to a picture on its way to a judge: softness and dirt, each known exactly."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

MILD = 0.15  # wear up to here is what a small autoencoder does, and costs nothing


@dataclass(frozen=True)
class Wear:
    """How soft and how dirty a picture is, each from 0 to 1, and the seed of its dirt."""

    soft: float = 0.0
    dirt: float = 0.0
    seed: int = 0

    @property
    def naturalness(self) -> float:
        """In [0, 1]: falls with softness."""
        return 1.0 - max(self.soft - MILD, 0.0) / (1 - MILD)

    @property
    def cleanness(self) -> float:
        """In [0, 1]: falls with dirt."""
        return 1.0 - max(self.dirt - MILD, 0.0) / (1 - MILD)


def some_wear(rng: random.Random, strong: float) -> Wear:
    """Mild wear as a rule; with the chance `strong` anything up to the worst."""
    soft = rng.random() if rng.random() < strong else MILD * rng.random()
    dirt = rng.random() if rng.random() < strong else MILD * rng.random()
    return Wear(soft, dirt, rng.getrandbits(31))


def worn(image: Tensor, wear: Wear) -> Tensor:
    """(3, H, W) in [0, 1] with that wear: blur, then noise and blotches."""
    out = image
    whole, part = divmod(wear.soft * 5, 1.0)
    for k in range(int(whole) + 1):
        padded = functional.pad(out[None], (1, 1, 1, 1), mode="replicate")
        blurred = functional.avg_pool2d(padded, 3, stride=1)[0]
        out = blurred if k < int(whole) else out + part * (blurred - out)
    generator = torch.Generator().manual_seed(wear.seed)
    out = out + 0.3 * wear.dirt * torch.randn(out.shape, generator=generator)
    for _ in range(int(max(wear.dirt - MILD, 0.0) * 7)):
        y, x = (int(torch.randint(0, n - 4, (1,), generator=generator)) for n in out.shape[1:])
        h, w = (int(torch.randint(2, 7, (1,), generator=generator)) for _ in range(2))
        out[:, y : y + h, x : x + w] = torch.rand(3, 1, 1, generator=generator)
    return out.clamp(0, 1)
