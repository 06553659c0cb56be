"""Particles for any stock pipeline: a population is weighted by what it promises and resampled on the way.

Papers: "A General Framework for Inference-time Scaling and Steering of Diffusion Models", Singhal et al., 2025 (arXiv
2501.06848); "Test-time Alignment of Diffusion Models without Reward Over-optimization", Kim et al., 2025 (arXiv
2501.05803); the algorithms and where they differ stand in `diffalign/search/smc.py`, `das.py` and `moves.py`.

Where we differ: a pipeline whose own sampler draws no noise gets a stochastic step of ours, named in the report's card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from diffalign import scoring
from diffalign.budget import Limits
from diffalign.config import settings
from diffalign.noise import forked
from diffalign.registry import register_pipeline
from diffalign.search import smc as core
from diffalign.search.smc import SMCConfig, SMCResult
from diffalign.search.values import value_of
from diffalign.search_shell import SearchShell
from diffalign.searching import Found, Improvement, Method, Session


@register_pipeline("smc")
class SMCPipeline(SearchShell):
    """Steers a population of denoising walks towards high reward and returns its best images."""

    METHOD = "smc"

    def __call__(
        self,
        *args: Any,
        reward: Any = None,
        smc: SMCConfig | Mapping[str, Any] | None = None,
        budget: Limits | int | float | str | None = None,
        top_k: int | None = None,
        on_improve: Callable[[Improvement], None] | None = None,
        value: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The stock call; with `reward` the best `top_k` particles per prompt, best first, and a `.report`.

        `value` judges unfinished particles: "clean" (the clean prediction, the default), a number of completion steps,
        ("rollouts", n), or an object with the protocol of `diffalign.search.values.Value`.
        """
        asked = {"reward": reward, "budget": budget, "top_k": top_k, "on_improve": on_improve}
        return self.search(args, kwargs, self.method(smc, value=value), **asked)

    @classmethod
    def method(cls, given: Any = None, *, value: Any = None) -> Method:
        config = settings(SMCConfig, given, "smc")

        def run(session: Session, noise: Tensor | None) -> Found:
            if config.proposal == "gradient":
                scoring.require_gradient(session.reward, "the gradient proposal of smc")
            chosen = None if value is None else value_of(value, session.judge, config.strength)
            names = ("log_z", "strength", "ancestors", "levels", "ess", "resampled", "invalid", "stalled")

            def once() -> Found:
                with session.gradients() if config.proposal == "gradient" else nullcontext():
                    found = core.run(session.chain, session.judge, config, value=chosen, noise=noise)
                told = {name: getattr(found, name) for name in names}
                return Found(_noise_of_best(session, found, noise), {"smc": told})

            return session.while_time_lasts(once)

        return Method(run)


def _noise_of_best(session: Session, found: SMCResult, given: Tensor | None) -> Tensor | None:
    """The start noise (B, ...) behind each case's best particle; None where a move drew that start anew."""
    chain = session.chain
    best = found.rewards.nan_to_num(nan=-torch.inf).argmax(1)
    numbers = found.starts.gather(1, best[:, None])[:, 0].tolist()
    if min(numbers) < 0:
        return None
    rows = list(range(len(chain.seeds)))
    noise = chain.unscaled(chain.first(forked(chain.seeds, rows, numbers), rows))
    if noise is not None and given is not None:  # particle 0 started there
        noise = torch.stack([given[row].to(noise) if numbers[row] == 0 else noise[row] for row in rows])
    return noise
