"""A stock pipeline as a search chain: rows of several cases, noise from named seeds, chunks that fit the memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign import media, noise
from diffalign.budget import Budget
from diffalign.cases import Case
from diffalign.drive import Driver
from diffalign.errors import ConfigError, SeamError
from diffalign.noise import Kernel, Transition
from diffalign.search.chunks import Chunks

KERNELS = ("auto", *noise.KERNELS)
TYPICAL = {"ddim": 1.0, "cps": 0.8, "flow_sde": 0.7}  # noise of each kernel where the caller names none


class PipelineChain:
    """`search.Chain` over a pipeline: every family, one budget, and our own stochastic step where a method branches."""

    def __init__(
        self,
        pipe: Any,
        cases: Sequence[Case],
        call: dict[str, Any],
        *,
        budget: Budget | None = None,
        kernel: str = "auto",
        noise_level: float | None = None,
        most: int | None = None,
        latents: Tensor | None = None,
    ) -> None:
        self.driver = Driver(pipe, list(cases), budget=budget, **call)
        self.budget = self.driver.budget
        self.seeds = [case.seed for case in cases]
        self.chunks = Chunks(self.budget, most)
        self.stepped = False  # whether a step of ours was taken, so that its kernel is worth telling
        self.given = latents  # the caller's own start noise (B, ...), which belongs to the cases' own seeds
        eta = call.get("eta")
        self._still = eta is not None and not eta > 0  # the caller asked for a sampler without noise
        self._asked = ("ddim", float(eta)) if eta and (kernel, noise_level) == ("auto", None) else (kernel, noise_level)
        check_kernel(kernel, noise_level)

    @property
    def length(self) -> int:
        return self.driver.length

    @property
    def costs(self) -> list[int]:
        return self.driver.costs

    @functools.cached_property
    def kernel_name(self) -> str:
        """Which stochastic step branching methods use.

        `auto` takes DDIM with eta 1, the ancestral sampler, but for flow models the coefficient-preserving step: it
        leaves no noise in the image (docs/search.md has what each costs in quality).
        """
        if self._asked[0] != "auto":
            return self._asked[0]
        return "cps" if self.driver.levels.prediction == "flow" else "ddim"

    @functools.cached_property
    def noise_level(self) -> float:
        return TYPICAL[self.kernel_name] if self._asked[1] is None else self._asked[1]

    @functools.cached_property
    def _kernel(self) -> Kernel:
        if self._still:
            raise ConfigError(
                "eta is 0, so every branch of this search would be the same image. Leave eta out or set it above 0 (1 "
                "is the ancestral sampler), or use a method that varies the start noise: best_of_n, random, reno."
            )
        return noise.KERNELS[self.kernel_name](self.noise_level)

    @functools.cached_property
    def _unit(self) -> float:
        return float(getattr(self.driver.native_scheduler(), "init_noise_sigma", 1.0))

    @property
    def noise_shares(self) -> list[float]:
        """sigma / (alpha + sigma) of every level, the end included."""
        levels = self.driver.levels
        return [float(s / (a + s)) for a, s in zip(levels.alpha / 1.0, levels.sigma / levels.unit, strict=True)]

    def noise(self, seeds: Sequence[int], rows: Sequence[int]) -> Tensor:
        like = self.first(seeds, rows)
        self.start(like, rows)  # says so where a pipeline does not start from noise
        return like / self._unit

    def first(self, seeds: Sequence[int], rows: Sequence[int]) -> Tensor:
        drawn = self._in_chunks(rows, lambda part: self._at(rows[part]).reseeded(seeds[part]).start())
        if self.given is not None:
            own = [k for k, (seed, row) in enumerate(zip(seeds, rows, strict=True)) if seed == self.seeds[row]]
            for k in own:
                drawn[k] = self.given[rows[k]].to(drawn) * self._unit
        return drawn

    def start(self, noise: Tensor, rows: Sequence[int]) -> Tensor:
        return self.driver.from_noise(noise)

    def unscaled(self, x: Tensor) -> Tensor | None:
        return x / self._unit if starts_from_noise(self) else None

    def predict(self, x: Tensor, i: int, rows: Sequence[int], *, grad: bool = False) -> Tensor:
        if grad:
            return self._at(rows).predict(x, i, grad=True)
        return self._in_chunks(rows, lambda part: self._at(rows[part]).predict(x[part], i))

    def transition(self, x: Tensor, prediction: Tensor, i: int) -> Transition:
        self.stepped = True
        return self._kernel(self.driver.levels, x, prediction, i)

    def denoised(self, x: Tensor, prediction: Tensor, i: int) -> Tensor:
        return self.driver.levels.denoised(x, prediction, i).to(x.dtype)

    def jump(self, x: Tensor, prediction: Tensor, i: int, j: int) -> Tensor:
        return self.driver.levels.jump(x, prediction, i, j)

    def raised(self, x: Tensor, noise: Tensor, i: int, j: int) -> Tensor:
        return self.driver.levels.raised(x, noise, i, j)

    def finish(self, x: Tensor, rows: Sequence[int], *, grad: bool = False) -> Tensor:
        if grad:
            return media.to_tensor(self._at(rows).decode(x, grad=True))
        return self._in_chunks(rows, lambda part: media.to_tensor(self._at(rows[part]).decode(x[part])))

    def generate(
        self, x: Tensor, rows: Sequence[int], *, seeds: Sequence[int] | None = None, grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        def run(part: slice) -> tuple[Tensor, Tensor]:
            driver = self._at(rows[part]) if seeds is None else self._at(rows[part]).reseeded(seeds[part])
            walk = driver.rollout(x=x[part], grad=grad, quiet=True)
            return walk.latents[-1], media.to_tensor(walk.media)

        if grad:
            return run(slice(None))
        found = self.chunks.over(len(rows), run)
        return torch.cat([final for final, _ in found]), torch.cat([pixels for _, pixels in found])

    def close(self) -> None:
        self.driver.close()

    def _at(self, rows: Sequence[int]) -> Driver:
        return self.driver.select(tuple(rows))

    def _in_chunks(self, rows: Sequence[int], run: Callable[[slice], Tensor]) -> Tensor:
        return torch.cat(self.chunks.over(len(rows), run))


def check_kernel(kernel: str, noise_level: float | None) -> None:
    """Refuse an unknown kernel, and one without noise: its branches would all be the same."""
    if kernel not in KERNELS:
        raise ConfigError(f"kernel is '{kernel}', but the stochastic steps are: {', '.join(KERNELS)}.")
    if noise_level is not None and not noise_level > 0:
        raise ConfigError(
            f"noise_level is {noise_level:g}, so every branch of this search would be the same image. Set it above 0 "
            "(1 for ddim, 0.8 for cps, 0.7 for flow_sde), or use a method that varies the start noise: best_of_n, "
            "local, reno."
        )


def starts_from_noise(chain: PipelineChain) -> bool:
    """Whether the pipeline's chain begins at pure noise, which methods over the start noise need."""
    try:
        chain.start(chain.driver.start(), [0])
    except SeamError:
        return False
    return True
