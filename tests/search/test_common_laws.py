"""Laws that every search on the chain keeps alike, whatever it does inside."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffalign.budget import Limits
from diffalign.errors import BudgetError
from diffalign.search.beam import BeamConfig, search_beam
from diffalign.search.decisive import DecisiveConfig, search_decisive
from diffalign.search.judge import Judge
from diffalign.search.paths import PathConfig, search_paths
from diffalign.search.stepwise import StepwiseConfig, search_steps
from tests.search.common import rewards_of, total
from tests.search.toys import gaussian_chain, judge_of

METHODS: dict[str, tuple[Callable[..., Any], Any, int]] = {  # search, settings, steps of its chain
    "beam": (search_beam, BeamConfig(beams=2, children=2, every=2), 6),
    "paths": (search_paths, PathConfig(sigma=0.3, up=0.5, down=0.7), 10),
    "decisive": (search_decisive, DecisiveConfig(levels=3, children=2, expansions=6), 6),
    "stepwise": (search_steps, StepwiseConfig(candidates=3, rounds=2), 5),
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def outcome(method: str, rate: Any = total, **options: Any) -> tuple[Judge, Any]:
    search, config, steps = METHODS[method]
    judge = judge_of(gaussian_chain(width=8, steps=steps, **options), rate)
    return judge, search(judge.chain, judge, config)


@pytest.mark.parametrize(
    "limits",
    [Limits(decodes=1), Limits(decodes=3), Limits(decodes=30), Limits(reward_calls=9), Limits(reward_calls=12)],
)
def test_limits_on_decodes_and_rewards_hold(method: str, limits: Limits) -> None:
    judge, _ = outcome(method, cases=2, budget=limits)
    budget = judge.chain.budget
    assert max(budget.decodes, budget.reward_calls) <= 2 * (limits.decodes or limits.reward_calls or 0)
    assert all(judge.leaves)


def test_a_budget_below_one_walk_is_refused_before_anything_is_spent(method: str) -> None:
    search, config, steps = METHODS[method]
    judge = judge_of(gaussian_chain(width=8, steps=steps, budget=steps - 1), total)
    with pytest.raises(BudgetError, match=f"at least {steps}"):
        search(judge.chain, judge, config)
    assert judge.chain.budget.nfe == 0


def test_invalid_rewards_never_win(method: str) -> None:
    def patchy(media: torch.Tensor, rows: Any) -> torch.Tensor:
        rewards = media.sum(1)
        return rewards.where(rewards < 5.0, math.nan)

    judge, _ = outcome(method, patchy, cases=20)
    assert any(math.isnan(reward) for row in range(20) for reward in rewards_of(judge, row)) or method == "stepwise"
    assert all(kept[0].reward < 5.0 for kept in judge.best if kept)


def test_a_constant_added_to_the_reward_changes_nothing(method: str) -> None:
    def rounded(shift: float) -> Any:
        return lambda media, rows: (media.sum(1) * 64).round() / 64 + shift

    (first, before), (moved, after) = (outcome(method, rounded(shift)) for shift in (0.0, 8.0))
    assert torch.equal(first.best[0][0].x, moved.best[0][0].x)  # type: ignore[arg-type]
    assert getattr(before, "paths", None) == getattr(after, "paths", None)


def test_an_interrupt_passes_through(method: str) -> None:
    def impatient(media: torch.Tensor, rows: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outcome(method, impatient)
