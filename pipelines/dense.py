"""Dense step rewards for any stock pipeline: what each step of one generation adds to the image it is heading for.

Paper: "DenseGRPO: From Sparse to Dense Reward for Flow Matching Model Alignment", Deng et al., 2026 (arXiv
2601.20218), its dense reward; the definition and where it differs stand in `diffalign/search/dense.py`.

Where we differ: used at inference, to see which steps made or broke an image. The walk is stochastic by default: every
completion of a deterministic walk ends at the same image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from diffalign.budget import Limits
from diffalign.config import settings
from diffalign.registry import register_pipeline
from diffalign.search import dense as core
from diffalign.search.dense import DenseConfig
from diffalign.search_shell import SearchShell
from diffalign.searching import Found, Improvement, Method, Session


@register_pipeline("dense")
class DensePipeline(SearchShell):
    """Makes one image per prompt and says what every step did to its reward."""

    METHOD = "dense"

    def __call__(
        self,
        *args: Any,
        reward: Any = None,
        dense: DenseConfig | Mapping[str, Any] | None = None,
        budget: Limits | int | float | str | None = None,
        top_k: int | None = None,
        on_improve: Callable[[Improvement], None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock call; with `reward` an image and a `.report` whose `extras["dense"]` holds rewards and gains.

        `diffalign.bench.curves.draw_steps(report, "steps.png")` draws them.
        """
        asked = {"reward": reward, "budget": budget, "top_k": top_k, "on_improve": on_improve}
        return self.search(args, kwargs, self.method(dense), **asked)

    @classmethod
    def method(cls, given: Any = None) -> Method:
        config = settings(DenseConfig, given, "dense")

        def run(session: Session, noise: Tensor | None) -> Found:
            found = core.dense(session.chain, session.judge, config)
            return Found(None, {"dense": {"levels": found.levels, "rewards": found.rewards, "gains": found.gains}})

        return Method(run, starts_from_noise=False)
