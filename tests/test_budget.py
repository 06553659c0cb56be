"""One unit of cost: counted, limited, reported per prompt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.budget import Budget, Limits
from diffalign.errors import BudgetError, ConfigError


@given(st.integers(1, 8), st.lists(st.integers(0, 20), max_size=10))
def test_spending_is_reported_per_prompt(prompts, charges):
    budget = Budget(prompts=prompts)
    for cost in charges:
        budget.charge(nfe=cost, decodes=1)
    assert budget.spent()["nfe"] * prompts == pytest.approx(sum(charges))
    assert budget.spent()["decodes"] * prompts == pytest.approx(len(charges))


@given(st.integers(1, 50), st.integers(1, 9))
def test_a_budget_that_is_asked_first_is_never_exceeded(limit, cost):
    budget = Budget(limit, prompts=2)
    while budget.allows(nfe=cost):
        budget.charge(nfe=cost)
    assert budget.nfe <= 2 * limit < budget.nfe + cost


def test_a_budget_below_one_candidate_says_what_one_costs():
    with pytest.raises(BudgetError, match="one candidate costs 40"):
        Budget(20).require(nfe=40)


def test_no_limit_allows_everything():
    assert Budget().allows(nfe=10**9)
    assert not Budget().exhausted


def test_a_budget_of_zero_is_refused():
    with pytest.raises(ConfigError, match="above 0"):
        Limits(nfe=0)


def test_seconds_run_out_too():
    budget = Budget(Limits(seconds=1e-9))
    assert budget.exhausted
    assert not budget.allows()
