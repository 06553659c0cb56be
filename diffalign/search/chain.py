"""Chain: what a search algorithm needs of a sampler, whether a pipeline or a closed-form toy stands behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from diffalign.budget import Budget
from diffalign.noise import Transition


@runtime_checkable
class Chain(Protocol):
    """A walk from noise to media in `length` steps; noise is passed in, so a further child costs no model call."""

    length: int
    budget: Budget

    def start(self, noise: Tensor, rows: Sequence[int]) -> Tensor:
        """Latents (K, ...) at level 0 for standard normal `noise` (K, ...); `rows` names the case of each."""
        ...

    def predict(self, x: Tensor, i: int, rows: Sequence[int]) -> Tensor:
        """The model's prediction (K, ...) at latents (K, ...) of level i."""
        ...

    def transition(self, x: Tensor, prediction: Tensor, i: int) -> Transition:
        """The Gaussian that leads from level i to level i + 1."""
        ...

    def denoised(self, x: Tensor, prediction: Tensor, i: int) -> Tensor:
        """The clean latent (K, ...) that the prediction points to."""
        ...

    def finish(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """Media (K, 3, H, W) or (K, F, 3, H, W) in [0, 1] for latents at the last level."""
        ...
