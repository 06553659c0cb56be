"""Ways to credit steps, as they are trained with, tried on one and the same walks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign import config
from diffalign.bench.credit_oracle import Worth, redrawn
from diffalign.errors import ConfigError
from diffalign.train import credit, tree_credit
from diffalign.train.advantage import advantages
from diffalign.train.advantage_config import AdvantageConfig
from diffalign.train.job import Job
from diffalign.train.objective import make
from diffalign.train.objectives.dense_grpo import DenseGRPO
from diffalign.train.objectives.flow_grpo import FlowGRPO
from diffalign.train.objectives.tree_grpo import TreeGRPO
from diffalign.train.policy import PolicyGradient
from diffalign.train.rollout import Rollout
from diffalign.train.settings import named

PLAIN = "flow_grpo"  # the method that all others are compared with
ORACLE = "oracle"  # the measured truth as a method
COSTS = ("nfe", "decodes", "reward_calls")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to credit steps: an objective with its settings, as a training has them, or a null control of another."""

    objective: str | dict[str, Any] = "flow_grpo"  # tree_grpo judges every step against `branches` - 1 redraws of it
    advantage: dict[str, Any] = field(default_factory=dict)
    of: str = ""  # the method whose credit a control spoils
    control: Literal["none", "shuffled", "averaged"] = "none"  # dealt anew over steps, or its mean size as a schedule

    def __post_init__(self) -> None:
        if (self.control == "none") != (not self.of):
            raise ConfigError(
                f"control is {self.control} and of is '{self.of}', but a control belongs to another method: give both, "
                "such as {of: coca, control: averaged}, or none."
            )


@dataclass
class Credited:
    """What one method says of some walks."""

    A: Tensor  # (N, S)
    weighting: str  # of the steps' losses: a key of credit.STEP_WEIGHTS
    cost: dict[str, float]  # per walk, on top of the walk and its reward


class Known(DenseGRPO):
    """DenseGRPO that remembers completions, which several methods share; each is charged as if it were alone."""

    def __init__(self, told: Any, known: dict[Any, tuple[Tensor, dict[str, int]]]) -> None:
        super().__init__(told)
        self.known = known

    def values(self, job: Job, rollouts: Sequence[Rollout], places: Sequence[int]) -> Tensor:
        key = (self.config.completion, tuple(places))
        if key in self.known:
            job.budget.charge(**self.known[key][1])
        else:
            before = job.budget.totals()
            values, after = super().values(job, rollouts, places), job.budget.totals()
            self.known[key] = values, {name: after[name] - before[name] for name in COSTS}
        return self.known[key][0]


class Methods:
    """All methods of a comparison."""

    def __init__(self, told: Mapping[str, Method], noise: Mapping[str, Any]) -> None:
        self.told, self.known = dict(told), dict[Any, tuple[Tensor, dict[str, int]]]()
        if PLAIN not in told or told[PLAIN].objective != PLAIN or told[PLAIN].of:
            raise ConfigError(
                f"methods has no plain '{PLAIN}', which all others are compared with. Add `{PLAIN}: {{}}`."
            )
        if ORACLE in told:
            raise ConfigError(f"methods has a method called '{ORACLE}', the name of the measured truth. Rename it.")
        for name, method in told.items():
            if method.of and (method.of not in told or told[method.of].control != "none"):
                raise ConfigError(
                    f"methods.{name}.of is '{method.of}', which is none of the methods that credit steps."
                )
        self.objectives = {name: self._objective(name, m, noise) for name, m in told.items() if m.control == "none"}
        self.advantages = {
            name: config.build(AdvantageConfig, told[name].advantage, where=f"methods.{name}.advantage")
            for name in self.objectives
        }

    def _objective(self, name: str, method: Method, noise: Mapping[str, Any]) -> PolicyGradient:
        kind, given = named(method.objective)
        if "noise" in given:
            raise ConfigError(
                f"methods.{name} sets noise, but all methods are tried on the same walks. Set it for all."
            )
        made: Any = make(method.objective if kind == "tree_grpo" else {kind: {**given, "noise": dict(noise)}})
        if not isinstance(made, PolicyGradient):
            raise ConfigError(
                f"methods.{name} is {kind}, which credits no steps. Use flow_grpo, dense_grpo, tree_grpo."
            )
        made.config.credit.require_source(made.dense)
        return Known(made.config, self.known) if isinstance(made, DenseGRPO) else made

    @property
    def walker(self) -> FlowGRPO:
        """The objective that draws the walks."""
        walker = self.objectives[PLAIN]
        assert isinstance(walker, FlowGRPO)
        return walker

    def step_weights(self, rollout: Rollout, weighting: str) -> Tensor:
        """What a weighting multiplies each step's A grad log p with (S,), where every ratio is 1."""
        nu, h = self.walker.deviations(rollout), self.walker.sizes(rollout)
        weights = credit.STEP_WEIGHTS[weighting](nu, h, self.walker.spread or None)
        return weights * nu if weighting == "ratio_norm" else weights  # its log-ratio carries a factor nu

    def credited(
        self, job: Job, rollouts: Sequence[Rollout], rewards: Tensor, batch: int, only: str = ""
    ) -> dict[str, Credited]:
        """What every method, or one, makes of walks with rewards (N, K); averaged controls need all parts first."""
        self.known.clear()
        found = {}
        for name, objective in self.objectives.items():
            if only not in ("", name):
                continue
            with costs(job, len(rewards)) as cost:
                if isinstance(objective, TreeGRPO):
                    A = against_siblings(job, objective, rollouts, rewards, batch)
                else:
                    A = dealt(job, objective, self.advantages[name], rollouts, rewards)
            found[name] = Credited(A, objective.config.credit.weighting, cost)
        self.known.clear()
        for name, method in self.told.items():
            if method.control == "shuffled" and not only:
                drawn = torch.Generator().manual_seed(rollouts[0].cases[0].seed)
                found[name] = replace(found[method.of], A=credit.shuffled(found[method.of].A, drawn))
        return found


@contextmanager
def costs(job: Job, walks: int) -> Iterator[dict[str, float]]:
    """What the block spends per walk, filled in at its end."""
    before, told = job.budget.totals(), dict[str, float]()
    yield told
    after = job.budget.totals()
    told.update({name: (after[name] - before[name]) / walks for name in COSTS})


def dealt(
    job: Job, objective: PolicyGradient, told: AdvantageConfig, rollouts: Sequence[Rollout], rewards: Tensor
) -> Tensor:
    """Advantages (N, S) as a training step with this objective deals them."""
    steps = objective.step_rewards(job, rollouts, rewards)
    found = advantages(rewards, job.weights, job.group_ids, told, steps=steps)
    mine = [replace(rollout, walk=copy.copy(rollout.walk)) for rollout in rollouts]  # dealing drops the predictions
    objective.deal(job, mine, found)
    return torch.cat([rollout.advantages for rollout in mine]).float()


def against_siblings(job: Job, objective: TreeGRPO, rollouts: Sequence[Rollout], rewards: Tensor, batch: int) -> Tensor:
    """Advantages (N, S) of each step taken over redraws of it, all of them completed once."""
    told, total = objective.config, job.total(rewards)
    family = torch.arange(len(total)).repeat_interleave(told.branches)
    parent = torch.cat([torch.full((len(total),), -1), family])
    columns = []
    for i in rollouts[0].trained:
        others = [redrawn(job, r, i, told.branches - 1, 1, batch, "sibling")[..., 0] for r in rollouts]
        value = torch.cat(
            [torch.full_like(total, torch.nan), torch.cat([total[:, None], torch.cat(others)], 1).flatten()]
        )
        found = tree_credit.sibling_advantages(parent, value, scale=told.scale)
        columns.append(found[len(total) :].view(len(total), told.branches)[:, 0])
    A = torch.stack(columns, 1)
    return (A if told.scale else A / _deviation(job, total)[:, None]).float()


def of_truth(job: Job, worth: Worth, rewards: Tensor) -> Tensor:
    """The measured true advantages (N, S) in units of their group's deviation, as plain advantages are."""
    total = job.total(rewards)
    return (worth.advantage / _deviation(job, total)[:, None]).nan_to_num().float()


def _deviation(job: Job, total: Tensor) -> Tensor:
    """What plain advantages divide the rewards (N,) by: the deviation within each one's group."""
    rows = total.double().view(-1, job.config.group_size)
    found = (rows - rows.nanmean(1, keepdim=True)).square().nanmean(1).sqrt().nan_to_num()
    return (found + 1e-4)[job.group_ids]


def schedule(A: Tensor, plain: Tensor) -> Tensor:
    """The mean size of advantages A (N, S) at each step over that of plain ones (N, S): weights (S,)."""
    return credit.averaged(A.abs())[0] / plain.abs().mean().clamp(min=1e-12)
