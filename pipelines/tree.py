"""Diffusion tree sampling and search for any stock pipeline: past walks are kept and the promising ones are branched.

Paper: "Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models", Jain et al., 2025 (arXiv
2506.20701); the algorithm and where it differs stand in `diffalign/search/tree.py`.

Where we differ: a pipeline whose own sampler draws no noise gets a stochastic step of ours, named in the report's card.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.budget import Limits
from diffalign.config import settings
from diffalign.errors import ConfigError
from diffalign.registry import register_pipeline
from diffalign.search import tree as core
from diffalign.search.tree import Tree, TreeConfig
from diffalign.search.values import value_of
from diffalign.search_shell import SearchShell
from diffalign.searching import Found, Improvement, Method, Session
from diffalign.trees import OPEN, origin_of, read_tree, require_same_origin


@register_pipeline("tree")
class TreePipeline(SearchShell):
    """Grows a tree of denoising walks and returns its best leaves; more budget later grows the same tree on."""

    METHOD = "tree"

    def __call__(
        self,
        *args: Any,
        reward: Any = None,
        tree: TreeConfig | Mapping[str, Any] | None = None,
        budget: Limits | int | float | str | None = None,
        top_k: int | None = None,
        on_improve: Callable[[Improvement], None] | None = None,
        grown: Tree | str | os.PathLike[str] | None = None,
        value: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The stock call; with `reward` the best `top_k` leaves per prompt, best first, and a `.report`.

        `report.tree` goes on growing when the same call gets it as `grown`, also from a file that `save_tree` wrote.
        `value` judges the unfinished nodes of a walk too, so that a choice need not rest on single leaves: "clean" (the
        clean prediction, no model call), a number of completion steps (the dense step rewards), ("rollouts", n), or an
        object with the protocol of `diffalign.search.values.Value`. Left out, only finished images count.
        """
        asked = {"reward": reward, "budget": budget, "top_k": top_k, "on_improve": on_improve}
        return self.search(args, kwargs, self.method(tree, grown=grown, value=value), **asked)

    @classmethod
    def method(
        cls, given: Any = None, *, grown: Tree | str | os.PathLike[str] | None = None, value: Any = None
    ) -> Method:
        config = settings(TreeConfig, given, "tree")

        def run(session: Session, noise: Tensor | None) -> Found:
            before = grown if isinstance(grown, Tree) or grown is None else read_tree(grown)
            seeds = None if noise is None or grown is not None else noise[:, None]
            if before is None:
                before, seeds = Tree(session.chain.seeds, session.chain.length, seeds), None
            if grown is not None and noise is not None:
                session.notes.append("the tree goes on as it was; the noise found before starts none of its walks")
            if len(before.cases) != len(session.chain.seeds):
                raise ConfigError(
                    f"the tree was grown for {len(before.cases)} prompts, but this call has {len(session.chain.seeds)}."
                    " Repeat the call that began it."
                )
            asked = origin_of(session)
            core.require_fits(session.chain, before)
            require_same_origin(before, asked)
            before.origin = asked | {name: before.origin[name] for name in OPEN if name in before.origin}
            session.tree = before
            _show_best(session, before)
            # A strength per deviation is no strength per unit of reward; rollouts then take the plain mean.
            strength = config.strength if config.scale == "given" else 0.0
            chosen = None if value is None else value_of(value, session.judge, strength)
            _judge_anew(before, value)
            core.grow(session.chain, session.judge, config, before, noise=seeds, value=chosen)
            told = before.result()
            names = ("leaves", "nodes", "depth", "value", "descent")
            return Found(_noise_of_best(session, before), {"tree": {name: getattr(told, name) for name in names}})

        return Method(run)


def _judge_anew(tree: Tree, value: Any) -> None:
    """Forget what another value said of the nodes: opinions on two scales must not be compared."""
    told = repr(value) if isinstance(value, str | int | tuple | list) else type(value).__name__
    if value is not None and tree.origin.get("value") != told:
        for nodes in tree.cases:
            nodes.opinion = [math.nan] * len(nodes.opinion)
        tree.origin["value"] = told


def _show_best(session: Session, tree: Tree) -> None:
    """The best leaves that an earlier call found in each tree are candidates of this one too."""
    for row, nodes in enumerate(tree.cases):
        found = [nodes.x[leaf] for leaf in nodes.ranked()[: session.judge.top_k]]
        while found and not session.judge.affords(scored=len(found) * len(tree.cases)):
            found.pop()
        if found:
            x = torch.stack(found).to(session.chain.driver.start())  # type: ignore[arg-type]
            session.judge.leaf(x, [row] * len(found))


def _noise_of_best(session: Session, tree: Tree) -> Tensor | None:
    """The start noise (B, ...) behind each case's best leaf; None where a pipeline does not start from noise."""
    best = [nodes.ranked()[:1] for nodes in tree.cases]
    if not all(best):
        return None
    starts = [nodes.x[nodes.start(leaf)] for nodes, (leaf,) in zip(tree.cases, best, strict=True)]
    return session.chain.unscaled(torch.stack(starts))  # type: ignore[arg-type]
