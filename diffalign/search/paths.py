"""Search over paths: noise good unfinished images up again, come back down by several ways, and keep the best.

Paper: "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps", Ma et al., 2025 (arXiv 2501.09732),
search over paths: from sigma up by Df, down by Db > Df, keep the top N by the reward of the clean prediction.

Where we differ: a sampler has levels, not a continuous sigma, so each sigma stands for the nearest level; `sigmas` says
where the levels are, evenly spaced from 1 to 0 if left out. Images at the end are scored as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.noise import case_noise, forked
from diffalign.search.chain import Chain
from diffalign.search.judge import Judge
from diffalign.search.local import affordable, limited
from diffalign.search.stepwise import stepped
from diffalign.search.values import CleanPrediction, Value

END = 1e-9  # a sigma below this is rounding


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    starts: int = 2  # paths kept alive
    branches: int = 2  # ways down per path and round
    sigma: float = 0.11  # noise share at which the search begins; 0 is random search over `starts` images
    up: float = 0.78  # noise share added per round; more changes more of the image
    down: float = 0.81  # noise share removed per round; its lead over `up` is the progress
    stochastic: bool = False  # come down by the sampler's noisy steps instead of deterministic ones
    walks: int = 1  # without a budget; with one, as many as it affords

    def __post_init__(self) -> None:
        if self.starts < 1 or self.branches < 1 or self.walks < 1:
            raise ConfigError(
                f"paths got starts = {self.starts}, branches = {self.branches}, walks = {self.walks}, "
                "but needs at least 1 of each."
            )
        if not 0 <= self.sigma < 1:
            raise ConfigError(f"paths.sigma is {self.sigma}, but the search begins at a noise share in [0, 1).")
        if not 0 < self.up < self.down:
            raise ConfigError(
                f"paths goes up by {self.up} and down by {self.down}, and would never arrive. Use 0 < up < down."
            )


@dataclass(frozen=True, eq=False)
class PathResult:
    """How far the search came; the images themselves are the judge's best."""

    walks: int  # walks finished per case
    rounds: tuple[tuple[tuple[int, int, int, int], ...], ...]  # per walk: (from, up to, down to, branches) per round


def search_paths(
    chain: Chain,
    judge: Judge,
    config: PathConfig = PathConfig(),
    *,
    value: Value | None = None,
    sigmas: Sequence[float] | None = None,
) -> PathResult:
    """Search over paths with `value` (default: the reward of the clean prediction) to choose among the ways down.

    `sigmas` (T + 1) are the noise shares of the levels, 1 for pure noise. A round costs starts x branches times the
    levels it comes down, one more if it is valued there; fewer starts and branches are taken where a budget is short.
    """
    cases = len(chain.seeds)
    if sigmas is not None and len(sigmas) != chain.length + 1:
        raise ConfigError(f"{len(sigmas)} sigmas were given for a chain of {chain.length + 1} levels.")
    shares = [1 - i / chain.length for i in range(chain.length + 1)] if sigmas is None else list(sigmas)
    whole = cases * sum(chain.costs)
    judge.require(nfe=whole, scored=cases, what="one path")
    search = _Paths(chain, judge, config, value or CleanPrediction(judge), shares)
    walks: list[tuple[tuple[int, int, int, int], ...]] = []
    while judge.affords(nfe=whole, scored=cases) if limited(chain) else len(walks) < config.walks:
        walks.append(search.walk())
    return PathResult(len(walks), tuple(walks))


@dataclass
class _Paths:
    chain: Chain
    judge: Judge
    config: PathConfig
    value: Value
    sigmas: list[float]
    drawn: int = 0  # seeds used per case

    def walk(self) -> tuple[tuple[int, int, int, int], ...]:
        """From fresh starts to leaves; returns the rounds."""
        chain, config, cases = self.chain, self.config, len(self.chain.seeds)
        starts = affordable(self.judge, nfe=cases * sum(chain.costs), scored=cases, at_most=config.starts)
        rows = [row for row in range(cases) for _ in range(starts)]
        seeds = self.fresh(starts)
        sigma, level = config.sigma, self.nearest(config.sigma)
        x = self.carried(chain.first(seeds, rows), None, 0, level, rows, seeds)
        prediction: Tensor | None = None
        judged, rounds = False, []
        while sigma > END:
            up = min(self.nearest(sigma + config.up), level - 1) if level else 0
            sigma += config.up - config.down
            down = max(self.nearest(sigma), up + 1)
            branches = self.branches(up, down, starts)
            if not branches:
                break
            x, prediction, seeds = self.round(x, level, up, down, branches, starts)
            rounds.append((level, up, down, branches))
            level, judged = down, down == chain.length
        if not judged:
            self.judge.leaf(self.carried(x, prediction, level, chain.length, rows, seeds), rows)
        return tuple(rounds)

    def round(
        self, x: Tensor, level: int, up: int, down: int, branches: int, starts: int
    ) -> tuple[Tensor, Tensor | None, list[int]]:
        """Survivors (B starts, ...) at level `down`, their predictions where known, and their seeds."""
        chain, count = self.chain, starts * branches
        rows = [row for row in range(len(chain.seeds)) for _ in range(count)]
        seeds = self.fresh(count)
        x = x.repeat_interleave(branches, 0)
        if up < level:
            x = chain.raised(x, case_noise(seeds, x, "raise"), level, up)
        x = self.carried(x, None, up, down, rows, seeds)
        if down == chain.length:
            values, prediction = self.judge.leaf(x, rows), None
        elif branches == 1:
            return x, None, seeds
        else:
            prediction = chain.predict(x, down, rows)
            values = self.value(x, prediction, down, rows, seeds)
        held = values.where(~values.isnan(), -math.inf).view(-1, count)
        order = held.argsort(dim=1, descending=True, stable=True)[:, :starts]
        kept = (torch.arange(len(held))[:, None] * count + order).flatten()  # (B starts,)
        at = kept.to(x.device)
        return x[at], None if prediction is None else prediction[at], [seeds[k] for k in kept.tolist()]

    def branches(self, up: int, down: int, starts: int) -> int:
        """The most branches whose round and the rest of the walk are affordable; 0 ends the rounds."""
        chain, cases, most = self.chain, len(self.chain.seeds), self.config.branches
        final, chosen = down == chain.length, most > 1
        extra, scored = (0, 1) if final else self.value.cost(down) if chosen else (0, 0)
        one = sum(chain.costs[up:down]) + (extra + chain.costs[down] if chosen and not final else 0)
        rest = sum(chain.costs[down + 1 if chosen else down :])
        for n in range(most, 1 if chosen else 0, -1):
            nfe, leaves = cases * starts * (n * one + rest), cases * starts * (n * scored + (not final))
            if self.judge.affords(nfe=nfe, scored=leaves):
                return n
        return 0

    def carried(
        self, x: Tensor, prediction: Tensor | None, i: int, j: int, rows: Sequence[int], seeds: Sequence[int]
    ) -> Tensor:
        """Latents (K, ...) brought down from level i to level j."""
        for level in range(i, j):
            known = self.chain.predict(x, level, rows) if prediction is None else prediction
            if self.config.stochastic:
                x = stepped(self.chain, x, known, level, seeds)
            else:
                x = self.chain.jump(x, known, level, level + 1)
            prediction = None
        return x

    def nearest(self, sigma: float) -> int:
        """The level whose noise share is nearest."""
        return min(range(len(self.sigmas)), key=lambda i: abs(self.sigmas[i] - sigma))

    def fresh(self, n: int) -> list[int]:
        """The next n seeds of each case."""
        cases = len(self.chain.seeds)
        rows = [row for row in range(cases) for _ in range(n)]
        numbers = list(range(self.drawn, self.drawn + n)) * cases
        self.drawn += n
        return forked(self.chain.seeds, rows, numbers)
