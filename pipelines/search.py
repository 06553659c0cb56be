"""Local and path search for any stock pipeline: fresh draws, neighbours, paths, single steps, beams, gated trees.

Papers: Ma et al., 2025 (arXiv 2501.09732): random, zero_order, paths. Noise-trajectory search, 2025 (arXiv 2506.03164):
stepwise. DeAL, 2024 (arXiv 2402.06147): beam. V-STAR, 2026 (arXiv 2602.10699): decisive. Li et al., 2024 (arXiv
2408.08252): svdd. Each algorithm and where it differs stand in a file of `diffalign/search/`.

Where we differ: a pipeline whose own sampler draws no noise gets a stochastic step of ours, named in the report's card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffalign.budget import Limits
from diffalign.cases import Case
from diffalign.config import settings
from diffalign.errors import ConfigError, UnknownName
from diffalign.registry import register_pipeline
from diffalign.search.beam import BeamConfig, search_beam
from diffalign.search.decisive import DecisiveConfig, search_decisive
from diffalign.search.local import LocalConfig, random_search, zero_order
from diffalign.search.paths import PathConfig, search_paths
from diffalign.search.stepwise import StepwiseConfig, search_steps
from diffalign.search.svdd import SVDDConfig
from diffalign.search.svdd import search as search_svdd
from diffalign.search.values import value_of
from diffalign.search_shell import SearchShell
from diffalign.searching import Found, Improvement, Method, Session


@dataclass(frozen=True)
class Kind:
    """One method: its config, its algorithm, and how it looks and ends."""

    config: type
    run: Callable[..., Any]
    values: bool = True  # whether it looks at unfinished latents
    once: bool = False  # whether a run ends by itself, whatever time is left


KINDS = {
    "random": Kind(LocalConfig, random_search, values=False),
    "zero_order": Kind(LocalConfig, zero_order, values=False),
    "paths": Kind(PathConfig, search_paths),
    "stepwise": Kind(StepwiseConfig, search_steps),
    "beam": Kind(BeamConfig, search_beam),
    "decisive": Kind(DecisiveConfig, search_decisive),
    "svdd": Kind(SVDDConfig, search_svdd, once=True),
}
DEFAULT = "zero_order"
Veto = Callable[[Tensor, list[Case]], Tensor]  # (media, cases) -> (K,) bool, true where an image must not be shown


@register_pipeline("search")
class SearchPipeline(SearchShell):
    """Searches the start noise, the path or the single steps; `search={"method": ...}` says which."""

    METHOD = "search"
    KINDS = tuple(KINDS)

    def __call__(
        self,
        *args: Any,
        reward: Any = None,
        search: Mapping[str, Any] | None = None,
        budget: Limits | int | float | str | None = None,
        top_k: int | None = None,
        on_improve: Callable[[Improvement], None] | None = None,
        value: Any = None,
        veto: Veto | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock call; with `reward` the best `top_k` images per prompt, best first, and a `.report`.

        `search` names the method (zero_order by default) and its settings: {"method": "beam", "beams": 3}.
        `value` judges unfinished latents: "clean", a number of completion steps, ("rollouts", n), or an object of ours.
        `veto` is for beam: branches it marks are cut off, and never returned.
        """
        asked = {"reward": reward, "budget": budget, "top_k": top_k, "on_improve": on_improve}
        return self.search(args, kwargs, self.method(search, value=value, veto=veto), **asked)

    @classmethod
    def knows(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        name = settings.get("method", DEFAULT)
        values = name in KINDS and KINDS[name].values
        return (("value",) if values else ()) + (("veto",) if name == "beam" else ())

    @classmethod
    def method(cls, given: Mapping[str, Any] | None = None, *, value: Any = None, veto: Veto | None = None) -> Method:
        told = dict(given or {})
        name = told.pop("method", DEFAULT)
        if name not in KINDS:
            raise UnknownName.among("search method", name, KINDS, "diffalign ls pipelines")
        kind = KINDS[name]
        config: Any = settings(kind.config, told, f"search ({name})")
        if veto is not None and name != "beam":
            raise ConfigError(f"veto cuts branches off, and '{name}' cannot go back. Use method 'beam' with it.")
        if value is not None and not kind.values:
            raise ConfigError(f"value judges unfinished latents, and '{name}' only looks at finished ones.")

        def run(session: Session, noise: Tensor | None) -> Found:
            extra: dict[str, Any] = {}
            if kind.values and value is not None:
                extra["value"] = value_of(value, session.judge, 1.0)
            if name == "paths":
                extra["sigmas"] = session.chain.noise_shares
            if name == "zero_order":
                extra["noise"] = noise
            if veto is not None:
                cases = session.request.cases
                extra["veto"] = lambda media, rows: veto(media, [cases[row] for row in rows])

            def once() -> Found:
                found = kind.run(session.chain, session.judge, config, **extra)
                return Found(getattr(found, "noise", None), {"search": {"method": name}})

            return session.while_time_lasts(once) if kind.once else once()

        return Method(run, starts_from_noise=name == "zero_order")
