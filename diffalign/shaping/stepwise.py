"""Rewards of single steps: joined with the outcome, and normalised over a named set of steps.

Papers: "Hybrid Reward Normalization for Process-supervised Non-verifiable Agentic Tasks", 2025 (arXiv 2509.25598):
`renorm`; for the sets of `step_norm`: DenseGRPO (`group_step`), Stepwise-Flow-GRPO (`group_all`), "BranchGRPO", 2025
(arXiv 2509.06040; `tree_depth`), V-STAR (arXiv 2602.10699) and TempFlow-GRPO (`siblings`), TDPO-R (`batch_step`).

Where we differ: `renorm` has the one constant mu; the official configuration names a second one whose meaning we do not
know. Which formula runs within a set is free; the default is `adv_grpo` with its population deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.shaping.advantages import adv_grpo
from diffalign.shaping.groups import joint_ids, restored, statistics
from diffalign.shaping.references import real

StepNorm = Literal["group_step", "group_all", "batch_step", "siblings", "tree_depth"]
TREES = ("siblings", "tree_depth")  # the sets that need the ids of a tree


def renorm(process: Tensor, outcome: Tensor, mu: float = 1.0) -> Tensor:
    """Step rewards (N, T) plus the outcome (N,) minus mu.

    With both in [0, 1] and mu = 1, no step of a failure (outcome 0) is rewarded and none of a success is punished.
    """
    return real(process) + outcome.to(real(process)).unsqueeze(-1) - mu


def return_to_go(r: Tensor) -> Tensor:
    """Sum of the rewards (N, T) from each step to the last."""
    return real(r).flip(-1).cumsum(-1).flip(-1)


def step_norm(
    r: Tensor,
    gid: Tensor,
    over: StepNorm = "group_step",
    formula: Callable[[Tensor, Tensor], Tensor] = adv_grpo,
    *,
    ids: Tensor | None = None,
    nodes: Tensor | None = None,
) -> Tensor:
    """Advantages (N, T) of step rewards (N, T) by `formula(rewards, ids of their sets)`, each set on its own.

    `group_step`: the samples of a prompt at one step; `group_all`: all steps of a prompt; `batch_step`: all samples at
    one step; `siblings`: the children of one parent, `ids` (N, T) naming the node a step starts from; `tree_depth`: the
    nodes of equal depth, `ids` (N, T) giving the depth. An id needs to be unique in its group only. `nodes` (N, T) says
    which node a step leads to: rows through one node count once, with the mean of their rewards.
    """
    if over not in get_args(StepNorm):
        raise ConfigError(f"step_norm is {over!r}, but the sets are {', '.join(get_args(StepNorm))}.")
    if over in TREES and ids is None:
        wanted = "node that each step starts from" if over == "siblings" else "depth of each step in its tree"
        raise ConfigError(f"step_norm '{over}' needs ids, the {wanted}. Give them, or use 'group_step'.")
    if nodes is None and over in ("group_step", "batch_step"):  # columns: a formula may look at all rows of a step
        return formula(r, gid if over == "group_step" else torch.zeros_like(gid))
    rows = gid.cpu().reshape(-1, *[1] * (r.dim() - 1)).expand(r.shape)
    step = torch.arange(r.shape[-1]).expand(r.shape) if r.dim() > 1 else torch.zeros_like(rows)
    within = {"group_step": [rows, step], "batch_step": [step], "group_all": [rows]}.get(over)
    sets = joint_ids(*(within or [rows, torch.as_tensor(ids)]))
    if nodes is None:
        return formula(r.reshape(-1), sets.reshape(-1)).reshape(r.shape)
    return _once(r, sets, joint_ids(sets, nodes), formula)


def _once(r: Tensor, sets: Tensor, nodes: Tensor, formula: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Advantages of the nodes, each taken once, handed to all rows that pass through them."""
    place = nodes.reshape(-1)
    value = statistics(r.reshape(-1), place).mean.squeeze(-1)
    owner = place.new_zeros(len(value)).scatter(0, place, sets.reshape(-1))
    found = formula(value, owner)[place].reshape(r.shape)
    return restored(torch.where(r.detach().cpu().isnan(), 0, found), r)
