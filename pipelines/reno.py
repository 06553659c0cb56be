"""ReNO for any stock pipeline: climb a differentiable reward on the start noise, keep the best image on the way.

Paper: "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization", Eyring et al., 2024
(arXiv 2406.04312); the algorithm and where it differs stand in `diffalign/search/reno.py`.

Where we differ: any number of steps, not one; weights are frozen for the call, whatever they were before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from diffalign import scoring
from diffalign.budget import Limits
from diffalign.config import settings
from diffalign.registry import register_pipeline
from diffalign.search import reno as core
from diffalign.search.reno import RenoConfig
from diffalign.search_shell import SearchShell
from diffalign.searching import Found, Improvement, Method, Session


@register_pipeline("reno")
class ReNOPipeline(SearchShell):
    """Optimises the start noise against a differentiable reward; made for pipelines of one or few steps."""

    METHOD = "reno"

    def __call__(
        self,
        *args: Any,
        reward: Any = None,
        reno: RenoConfig | Mapping[str, Any] | None = None,
        budget: Limits | int | float | str | None = None,
        top_k: int | None = None,
        on_improve: Callable[[Improvement], None] | None = None,
        finish: Mapping[str, Any] | None = None,
        checkpointing: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The stock call; with `reward` the best image that noise optimisation found, and a `.report`.

        `finish` changes the stock call for one last image from the best noise, such as {"num_inference_steps": 4}; that
        image is then the result. `checkpointing` trades a second forward pass for memory.
        """
        method = self.method(reno, finish=finish, checkpointing=checkpointing)
        asked = {"reward": reward, "budget": budget, "top_k": top_k, "on_improve": on_improve}
        return self.search(args, kwargs, method, **asked)

    @classmethod
    def method(
        cls, given: Any = None, *, finish: Mapping[str, Any] | None = None, checkpointing: bool = False
    ) -> Method:
        config = settings(RenoConfig, given, "reno")

        def run(session: Session, noise: Tensor | None) -> Found:
            scoring.require_gradient(session.reward, "noise optimisation")
            last = session.another(finish) if finish else None
            with session.gradients(checkpointing=checkpointing):
                found = core.optimise(session.chain, session.judge, config, noise=noise, finish=last)
            if last is not None:
                session.present(last)
            told = {"first": found.first, "best": found.best, "ended": found.ended, "final": found.final}
            table = {"rewards": found.rewards, "norms": found.norms}
            return Found(found.noise, {"reno": told | table})

        return Method(run)
