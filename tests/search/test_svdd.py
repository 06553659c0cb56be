from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diffalign.budget import Limits
from diffalign.errors import BudgetError, ConfigError
from diffalign.noise import case_noise
from diffalign.search.svdd import SVDDConfig, search
from tests.search.toys import ToyChain, exact, gaussian_chain, judge_of, linear


class Exact:
    """The exact soft value of r = c x on the Gaussian chain; costs nothing."""

    def __init__(self, chain: ToyChain, c: float) -> None:
        self.affine, self.c = exact(chain), c

    def cost(self, i: int) -> tuple[int, int]:
        return 0, 0

    def __call__(self, x: Tensor, prediction: Tensor, i: int, rows: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return self.affine.value(x, i, self.c)


def plain(chain: ToyChain) -> Tensor:
    rows = list(range(len(chain.seeds)))
    x = chain.first(chain.seeds, rows)
    for i in range(chain.length):
        step = chain.transition(x, chain.denoise(x, *chain.levels.at(i)), i)
        x = step.sample(case_noise(chain.seeds, x, "step", i))
    return x


def test_one_candidate_is_the_plain_sampler() -> None:
    chain = gaussian_chain(cases=3)
    found = search(chain, judge_of(chain, linear(1.0)), SVDDConfig(candidates=1))
    assert torch.equal(found.latents, plain(gaussian_chain(cases=3)))
    assert chain.budget.nfe == 3 * 10


def test_constant_rewards_take_the_first_candidate_and_so_the_plain_sample() -> None:
    chain = gaussian_chain(cases=2)
    found = search(chain, judge_of(chain, lambda media, rows: torch.ones(len(rows))), SVDDConfig(candidates=4))
    assert torch.equal(found.latents, plain(gaussian_chain(cases=2)))


def test_greedy_choices_raise_the_reward() -> None:
    chain = gaussian_chain(cases=40)
    found = search(chain, judge_of(chain, linear(1.0)), SVDDConfig(candidates=8))
    assert found.rewards.mean() > plain(gaussian_chain(cases=40)).mean() + 1


def test_soft_choices_by_the_exact_value_walk_the_tilted_transition() -> None:
    c, cases = 2.0, 200
    chain = gaussian_chain(cases=cases, steps=5)
    found = search(chain, judge_of(chain, linear(c)), SVDDConfig(candidates=40, temperature=1.0), value=Exact(chain, c))
    affine = exact(chain)
    start, tail = c * affine.slope[0], affine.variance[0]  # nothing selects the start: its share of the tilt is absent
    mean = affine.prior[0] + c * tail
    deviation = math.sqrt(affine.prior[1])
    assert start > 0
    assert float(found.latents.mean()) == pytest.approx(mean, abs=3 * deviation / math.sqrt(cases) + 0.01)
    assert float(found.latents.std()) == pytest.approx(deviation, abs=3 * deviation / math.sqrt(2 * cases) + 0.01)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_batch_gives_each_case_what_it_gets_alone(temperature: float) -> None:
    config = SVDDConfig(candidates=3, temperature=temperature)
    chain = gaussian_chain(cases=3)
    together = search(chain, judge_of(chain, linear(1.0)), config)
    for k, seed in enumerate(chain.seeds):
        single = gaussian_chain(seed=seed)
        alone = search(single, judge_of(single, linear(1.0)), config)
        assert torch.equal(alone.latents[0], together.latents[k])


def test_a_constant_added_to_the_reward_changes_nothing() -> None:
    config = SVDDConfig(candidates=4, temperature=0.3)
    chain, other = gaussian_chain(cases=5), gaussian_chain(cases=5)
    a = search(chain, judge_of(chain, linear(1.0)), config)
    b = search(other, judge_of(other, lambda media, rows: media[:, 0] + 4), config)
    assert torch.equal(a.chosen, b.chosen)
    assert torch.equal(a.latents, b.latents)


def test_the_budget_sets_the_candidates_and_is_never_exceeded() -> None:
    for limits in (Limits(nfe=100), Limits(decodes=30), Limits(reward_calls=77)):
        chain = gaussian_chain(cases=3, budget=limits)
        found = search(chain, judge_of(chain, linear(1.0)))
        assert chain.budget.nfe == sum(rows for _, rows in chain.calls) == 3 * (1 + 9 * found.candidates)
        assert chain.budget.allows()
        assert found.candidates > 1


def test_too_small_a_budget_raises_before_anything_is_spent() -> None:
    chain = gaussian_chain(budget=9)
    with pytest.raises(BudgetError):
        search(chain, judge_of(chain, linear(1.0)))
    assert chain.calls == []


def test_invalid_candidates_are_counted_and_never_win() -> None:
    def rate(media: Tensor, rows: Sequence[int]) -> Tensor:
        return torch.where(media[:, 0] > 0.8, torch.nan, media[:, 0])

    chain = gaussian_chain(cases=20)
    found = search(chain, judge_of(chain, rate), SVDDConfig(candidates=6))
    assert found.invalid.sum() > 0
    assert found.latents.median() <= 0.8


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="candidates"):
        SVDDConfig(candidates=-1)
    with pytest.raises(ConfigError, match="temperature"):
        SVDDConfig(temperature=-0.1)
