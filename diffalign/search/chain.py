"""Chain: what a search algorithm needs of a sampler, whether a pipeline or a closed-form toy stands behind it.

Rows are latents in one call; `rows[k]` names the case that row k belongs to. All rows of a call stand at one level.
Level 0 is pure noise, level `length` the end. Noise is passed in, so a further child of a node costs no model call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from diffalign.budget import Budget
from diffalign.noise import Transition


@runtime_checkable
class Chain(Protocol):
    """A walk from noise to media in `length` steps for `len(seeds)` cases."""

    budget: Budget  # charged by the chain for model calls and decodes, by the judge for rewards

    @property
    def length(self) -> int: ...

    @property
    def seeds(self) -> Sequence[int]:
        """One per case."""
        ...

    @property
    def costs(self) -> Sequence[int]:
        """NFE of one row's prediction at each of the `length` levels."""
        ...

    def noise(self, seeds: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Standard normal noise (K, ...), row k drawn from seeds[k] alone, as the plain sampler draws it."""
        ...

    def first(self, seeds: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Latents (K, ...) at level 0, row k drawn from seeds[k] alone, as the plain sampler draws them."""
        ...

    def start(self, noise: Tensor, rows: Sequence[int]) -> Tensor:
        """Latents (K, ...) at level 0 for standard normal `noise` (K, ...)."""
        ...

    def unscaled(self, x: Tensor) -> Tensor | None:
        """The standard normal noise (K, ...) behind latents of level 0; None where they are not noise alone."""
        ...

    def predict(self, x: Tensor, i: int, rows: Sequence[int], *, grad: bool = False) -> Tensor:
        """The model's prediction (K, ...) at latents (K, ...) of level i; charges costs[i] a row."""
        ...

    def transition(self, x: Tensor, prediction: Tensor, i: int) -> Transition:
        """The Gaussian that leads from level i to level i + 1; its std is 0 where the step draws nothing."""
        ...

    def denoised(self, x: Tensor, prediction: Tensor, i: int) -> Tensor:
        """The clean latent (K, ...) that the prediction points to."""
        ...

    def jump(self, x: Tensor, prediction: Tensor, i: int, j: int) -> Tensor:
        """Latents (K, ...) carried from level i to a later level j by one deterministic step."""
        ...

    def raised(self, x: Tensor, noise: Tensor, i: int, j: int) -> Tensor:
        """Latents (K, ...) of level i noised up to an earlier level j by the forward process."""
        ...

    def finish(self, x: Tensor, rows: Sequence[int], *, grad: bool = False) -> Tensor:
        """Media (K, 3, H, W) or (K, F, 3, H, W) in [0, 1] for clean latents (K, ...); charges a decode a row."""
        ...

    def generate(
        self, x: Tensor, rows: Sequence[int], *, seeds: Sequence[int] | None = None, grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The plain sampler from latents x (K, ...) of level 0 to (final latents, media); `grad` keeps the graph to x.

        Where the plain sampler draws on its way, row k does so from seeds[k], by default from its case's seed.
        """
        ...
