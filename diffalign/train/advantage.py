"""From the rewards of a step to its advantages, in an order that the config spells out.

The stages, first to last; each acts on what the one before it left:
1. combine: members (N, K) become one total (N,). A row without a total is invalid.
2. filter: groups whose rewards differ too little are taken out, before any statistic.
3. win_rate: rewards become shares of the group they beat.
4. renorm, or the step rewards as they are, or the total at every step (trees only); credit: returns, if asked for.
5. normalise, over the sets of step_norm.
6. hardness, adv_scale, clip; whatever is not kept gets 0.

With order normalise_combine (GDPO), 3 and 5 act on each member and the combination stands after them, followed by one
z-score over the batch.

Where we differ: groups that the filter takes out are not drawn again, as DAPO does; the step learns from fewer, and its
loss is the mean over those. The data hardness of a job has no demonstration to compare with and takes the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffalign import shaping
from diffalign.errors import ConfigError, InvalidReward
from diffalign.train.advantage_config import AdvantageConfig

__all__ = ["AdvantageConfig", "Advantages", "Hardness", "Tree", "advantages"]
Formula = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Tree:
    """Where the steps (N, T) of a tree's rollouts stand, by ids that are unique within a group."""

    ids: Tensor  # the node that a step starts from (siblings), or the step's depth (tree_depth)
    nodes: Tensor | None = None  # the node that it leads to, so that rollouts which share it count once


@dataclass(frozen=True, eq=False)
class Hardness:
    """What the hardness of samples (N,) is read from."""

    delta: Tensor | None = None  # 1 - similarity to what was wanted
    gap: Tensor | None = None  # reward of a demonstration minus reward of the sample


@dataclass(frozen=True, eq=False)
class Advantages:
    """Advantages with 0 for whatever is not kept, and what to log about them."""

    values: Tensor  # (N,) or (N, T)
    kept: Tensor  # (N,) valid rows of groups that pass the filter
    stats: dict[str, float]  # shares frac_zero_std, invalid, kept, clipped; within_std and advantage_std


def advantages(
    members: Tensor,
    weights: Tensor,
    gid: Tensor,
    config: AdvantageConfig,
    *,
    tid: Tensor | None = None,
    steps: Tensor | None = None,
    tree: Tree | None = None,
    hardness: Hardness | None = None,
) -> Advantages:
    """Advantages of the rewards (N, K) of all processes; weights (K,), groups and tasks (N,), step rewards (N, T)."""
    _check(members, weights, config, steps)
    used = weights.to(members.device) != 0
    members, weights = _filled(members[:, used], config), weights.to(members.device)[used]
    total = combined(members, weights, config)
    if steps is not None:
        total = torch.where(steps.isnan().all(-1), torch.nan, total)
    valid = ~total.isnan()
    compared = torch.where(valid.unsqueeze(-1), members if config.decoupled else total.unsqueeze(-1), torch.nan)
    kept = valid
    if config.filter is not None:
        kept = shaping.group_filter(compared, gid, _each(config.filter, used))
    compared_kept = torch.where(kept.unsqueeze(-1), compared, torch.nan)
    formula = _formula(config, _each(config.std_floor, used), tid)
    if config.decoupled:
        values = _decoupled(compared_kept, weights, gid, config, formula)
    else:
        values = _combined(compared_kept.squeeze(-1), gid, config, formula, steps, tree)
    if config.hardness != "off":
        values = _weighed(values, gid, config, hardness or Hardness())
    return _finished(values, kept, config, _stats(compared, gid, valid, kept))


def combined(members: Tensor, weights: Tensor, config: AdvantageConfig) -> Tensor:
    """The total (N,) of members (N, K), NaN where a row has none; a member of weight 0 does not count."""
    used = weights != 0
    members = _filled(members[:, used], config)
    return shaping.combine(members, weights[used], "renormalise" if config.on_missing == "renormalise" else "invalid")


def _filled(members: Tensor, config: AdvantageConfig) -> Tensor:
    """Members with 0 for what is missing where the config says so, but not in rows of which nothing is known."""
    if config.on_missing != "zero":
        return members
    return torch.where(members.isnan() & ~members.isnan().all(-1, keepdim=True), 0, members)


def _check(members: Tensor, weights: Tensor, config: AdvantageConfig, steps: Tensor | None) -> None:
    if members.dim() != 2 or weights.shape != members.shape[1:]:
        raise ConfigError(
            f"the rewards have the shape {tuple(members.shape)} and the weights {tuple(weights.shape)}, but they are "
            "(N, K) and (K,). A single reward is a column: give r.unsqueeze(-1) and one weight."
        )
    if not (weights.isfinite().all() and (weights != 0).any()):
        raise ConfigError(f"the weights are {weights.tolist()}. Give finite ones, at least one of them not 0.")
    for name, given in (("rewards", members), ("step rewards", steps)):
        if given is not None and given.isinf().any():
            raise InvalidReward(f"the {name} hold an infinite value. Return NaN for what cannot be judged.")
    for name in ("filter", "std_floor"):
        numbers = getattr(config, name)
        if isinstance(numbers, tuple) and len(numbers) != len(weights):
            raise ConfigError(f"advantage.{name} has {len(numbers)} numbers for {len(weights)} rewards. Give each one.")
    if steps is not None and (steps.dim() != 2 or len(steps) != len(members)):
        raise ConfigError(f"the step rewards have the shape {tuple(steps.shape)}. Give ({len(members)}, T).")


def _each(numbers: float | tuple[float, ...], used: Tensor) -> Tensor:
    """One number, or those of the members that count."""
    return torch.tensor(numbers) if isinstance(numbers, float | int) else torch.tensor(numbers)[used.cpu()]


def _formula(config: AdvantageConfig, floor: Tensor, tid: Tensor | None) -> Formula:
    """What turns rewards and the ids of their sets into advantages."""
    ddof, eps, trim = config.ddof, config.eps, (config.trim_low, config.trim_high)
    if config.normalise == "dr":
        return partial(shaping.adv_dr, trim=trim)
    if config.normalise == "rloo":
        return shaping.adv_rloo
    if config.normalise == "batch":
        return lambda r, _: shaping.adv_batch(r, ddof=ddof, eps=eps, floor=floor)
    if config.normalise == "grpo":
        return partial(shaping.adv_grpo, ddof=ddof, eps=eps, floor=floor, trim=trim)
    if config.normalise != "tmn":
        pooled = config.normalise == "pooled_std"
        return partial(shaping.adv_global_std, pooled=pooled, ddof=ddof, eps=eps, floor=floor)
    if tid is None:
        raise ConfigError("advantage.normalise is tmn, which needs the task of every prompt. Give tid, or use grpo.")
    tasks, alpha, gamma = tid, config.tmn_alpha, config.tmn_gamma
    return lambda r, gid: shaping.tmn(r, gid, tasks, reweight=gamma > 0, alpha=alpha, gamma=gamma, eps=eps, floor=floor)


def _decoupled(members: Tensor, weights: Tensor, gid: Tensor, config: AdvantageConfig, formula: Formula) -> Tensor:
    """Advantages (N,) by normalising each member, combining, and one z-score over the batch."""
    rewards = shaping.win_rate(members, gid) if config.win_rate else members
    each = torch.where(members.isnan(), torch.nan, formula(rewards, gid))
    total = shaping.combine(each, weights)
    return shaping.adv_batch(total, ddof=1, eps=config.eps) if config.batch_norm else total


def _combined(
    total: Tensor, gid: Tensor, config: AdvantageConfig, formula: Formula, steps: Tensor | None, tree: Tree | None
) -> Tensor:
    """Advantages of totals (N,), or (N, T) of the rewards of steps."""
    outcome = shaping.win_rate(total, gid) if config.win_rate else total
    over = config.step_norm
    if over == "none":
        if steps is not None:
            raise ConfigError("there are step rewards, but advantage.step_norm is none. Set it to group_step.")
        return formula(outcome, gid)
    if steps is None and (config.renorm or tree is None):
        raise ConfigError(
            f"advantage.step_norm is {over}, but there are no step rewards. Set it to none, or give steps."
        )
    if steps is None and tree is not None:
        rewards = outcome.unsqueeze(-1).expand(tree.ids.shape)
    elif config.renorm:
        rewards = shaping.renorm(torch.as_tensor(steps), outcome, config.mu)
    elif config.win_rate:
        raise ConfigError("advantage.win_rate ranks outcomes, which the step rewards replace. Set it to false.")
    else:
        rewards = torch.where(total.isnan().unsqueeze(-1), torch.nan, torch.as_tensor(steps))
    rewards = shaping.return_to_go(rewards) if config.credit == "return" else rewards
    ids, nodes = (tree.ids, tree.nodes) if tree is not None else (None, None)
    return shaping.step_norm(rewards, gid, over, formula, ids=ids, nodes=nodes)


def _weighed(values: Tensor, gid: Tensor, config: AdvantageConfig, given: Hardness) -> Tensor:
    """Advantages times the hardness that the config names."""
    delta = given.delta if config.hardness in ("data", "both") else None
    gap = given.gap if config.hardness in ("responsiveness", "both") else None
    for kind, name, found in (("data", "delta", delta), ("responsiveness", "gap", gap)):
        if config.hardness in (kind, "both") and found is None:
            raise ConfigError(
                f"advantage.hardness is {config.hardness}, which needs {name}. Give it, or set it to off."
            )
    denominator, tau = config.hardness_denominator, config.hardness_tau
    return shaping.hardness_scale(values, gid, delta=delta, gap=gap, denominator=denominator, tau=tau)


def _finished(values: Tensor, kept: Tensor, config: AdvantageConfig, stats: dict[str, float]) -> Advantages:
    """Scale and clip, and 0 for what is not kept."""
    mask = kept.reshape(-1, *[1] * (values.dim() - 1)).expand_as(values)
    values = torch.where(mask, values * config.adv_scale, 0)
    clipped = values.clamp(-config.clip, config.clip)
    some = bool(mask.any())
    stats["advantage_std"] = float(clipped[mask].double().std(correction=0)) if some else 0.0
    stats["clipped"] = float((clipped != values)[mask].double().mean()) if some else 0.0
    return Advantages(clipped, kept, stats)


def _stats(compared: Tensor, gid: Tensor, valid: Tensor, kept: Tensor) -> dict[str, float]:
    """What the rewards (N, C) that are normalised look like before the filter."""
    found = shaping.statistics(compared, gid)
    std = found.std[found.count > 1]
    return {
        "frac_zero_std": shaping.frac_zero_std(compared, gid),
        "within_std": float(std.mean()) if len(std) else 0.0,
        "invalid": float((~valid).double().mean()),
        "kept": float(kept.double().mean()),
    }
