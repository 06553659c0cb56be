"""Walks of a micro-batch, kept as the replay needs them: latents, moves and log-densities of the trained steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffalign import media
from diffalign.cases import Case
from diffalign.drive import Driver, Trajectory
from diffalign.noise import Convention, Kernel, Transition

OnStep = Callable[[int, Tensor, Transition, Tensor], None]


@dataclass
class Rollout:
    """One micro-batch: its driver, its walk and what was made of it."""

    driver: Driver
    kernel: Kernel
    trained: range  # steps whose log-densities count
    walk: Trajectory  # all of it: latents of every level
    media: Tensor  # (B, [F,] 3, H, W) in [0, 1]
    means: dict[int, Tensor] = field(default_factory=dict)  # of the trained steps, where the objective asks for them
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))  # (B, S) of the trained steps
    weight: float = 1.0  # of its policy loss: images over kept images, where a filter takes groups out
    notes: dict[str, Tensor] = field(default_factory=dict)  # (B,) or (S, B): whatever else the objective knows of it

    def __len__(self) -> int:
        return len(self.walk.cases)

    @property
    def cases(self) -> Sequence[Case]:
        return self.walk.cases

    @property
    def part(self) -> Trajectory:
        """The trained steps alone."""
        a, b = self.trained.start, self.trained.stop
        walk = self.walk
        return Trajectory(walk.latents[a : b + 1], walk.timesteps[a:b], a, moves=walk.moves[a:b], cases=walk.cases)

    @property
    def log_probs(self) -> Tensor:
        """(S, B) of the trained steps, under the weights that sampled."""
        assert self.walk.log_probs is not None
        return self.walk.log_probs[self.trained.start : self.trained.stop]

    @property
    def elements(self) -> int:
        """Numbers in one latent."""
        return self.walk.latents[0][0].numel()

    def replay(self, convention: Convention, on_step: OnStep | None = None, *, grad: bool = True) -> Tensor:
        """Log-densities (S, B) of the trained steps under the present weights."""
        return self.driver.replay(self.part, self.kernel, grad=grad, convention=convention, on_step=on_step)


def sample(
    driver: Driver,
    kernel: Kernel,
    trained: range,
    *,
    convention: Convention,
    keep_means: bool = False,
    noise: Callable[[int, Tensor], Tensor] | None = None,
    x: Tensor | None = None,
) -> Rollout:
    """Walk a micro-batch from its own start to its media, without gradients but with the kernels a replay will use."""
    with torch.no_grad():
        walk = driver.rollout(
            kernel,
            x=x,
            convention=convention,
            noise=noise,
            keep_predictions=True,
            quiet=True,
            tracked=trained,
            dtype=torch.float32,
        )
    levels, means = driver.levels, dict[int, Tensor]()
    if keep_means:
        means = {i: kernel(levels, walk.latents[i], walk.predictions[i], i).mean for i in trained}
    made, walk.media = media.to_tensor(walk.media), None
    return Rollout(driver, kernel, trained, walk, made.float(), means)


def similarities(rollout: Rollout) -> Tensor:
    """Cosine (B, T + 1) of the clean latent each step points to with the final latent; the last is 1."""
    walk, levels = rollout.walk, rollout.driver.levels
    final = walk.latents[-1].float().flatten(1)
    points = [
        levels.denoised(x, p, i).flatten(1)
        for i, (x, p) in enumerate(zip(walk.latents, walk.predictions, strict=False))
    ]
    columns = [torch.nn.functional.cosine_similarity(point, final, dim=1) for point in points]
    return torch.stack([*columns, torch.ones_like(columns[0])], dim=1)
