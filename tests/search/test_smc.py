from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.budget import Limits
from diffalign.errors import BudgetError, ConfigError
from diffalign.noise import case_noise, forked
from diffalign.search.das import DAS
from diffalign.search.moves import MovesConfig
from diffalign.search.population import Cloud, _repeats
from diffalign.search.smc import SMCConfig, run
from diffalign.search.values import Completion, Rollouts
from tests.search.test_svdd import Exact
from tests.search.toys import FiniteChain, ToyChain, exact, gaussian_chain, judge_of, linear

EVERY = {"start": 0.0, "stop": 1.0, "every": 0.0}
MIDWAY = MovesConfig(kind="suffix", count=1, midway=True)


def plain(chain: ToyChain, count: int) -> Tensor:
    """The plain stochastic sampler's candidates (B, K, ...)."""
    rows = [row for row in range(len(chain.seeds)) for _ in range(count)]
    seeds = forked(chain.seeds, rows, list(range(count)) * len(chain.seeds))
    x = chain.first(seeds, rows)
    for i in range(chain.length):
        step = chain.transition(x, chain.denoise(x, *chain.levels.at(i)), i)
        x = step.sample(case_noise(seeds, x, "step", i) if step.std else None)
    return x.view(len(chain.seeds), count, -1)


def unbiased(found: Any, chain: ToyChain, c: float) -> None:
    """Z and the tilted mean times Z, averaged over the cases, lie within 3 standard errors of the truth."""
    cases = len(chain.seeds)
    z = (found.log_z - exact(chain).log_z(c)).exp()
    assert abs(z.mean() - 1) < 3 * z.std() / math.sqrt(cases) + 1e-6
    off = z * ((found.log_weights.exp() * found.latents[..., 0]).sum(1) - exact(chain).tilted(c)[0])
    assert abs(off.mean()) < 3 * off.std() / math.sqrt(cases)


def test_a_constant_reward_samples_like_the_plain_sampler() -> None:
    for potential in ("diff", "max", "add", "rt"):
        chain = gaussian_chain(cases=2)
        config = SMCConfig(particles=5, potential=potential, strength=3.0, resample_below=1.0)
        found = run(chain, judge_of(chain, lambda media, rows: torch.full((len(rows),), 0.7)), config)
        assert not found.resampled.any()
        assert torch.equal(found.latents, plain(gaussian_chain(cases=2), 5))
        torch.testing.assert_close(found.log_weights.exp(), torch.full((2, 5), 0.2, dtype=torch.float64))
        assert (found.ancestors == 5).all()


def test_a_lone_particle_is_the_plain_sampler_and_costs_one_decode() -> None:
    chain = gaussian_chain(cases=3)
    found = run(chain, judge_of(chain, linear(2.0)), SMCConfig(particles=1, scale="std"))
    assert torch.equal(found.latents, plain(gaussian_chain(cases=3), 1))
    assert (chain.budget.nfe, chain.budget.decodes) == (30, 3)


@pytest.mark.parametrize("potential", ["diff", "max", "add", "rt"])
@pytest.mark.parametrize("times", [{}, EVERY, {"start": 0.1, "stop": 0.7, "every": 0.3, "tempering": 0.2}])
def test_potentials_multiply_up_to_the_final_reward(potential: Any, times: dict[str, float]) -> None:
    chain = gaussian_chain(cases=2)
    config = SMCConfig(particles=6, potential=potential, strength=1.7, resample_below=0.0, **times)
    found = run(chain, judge_of(chain, linear(2.0)), config)
    product = found.log_weights + found.log_z[:, None] + math.log(6)
    torch.testing.assert_close(product, 1.7 * found.rewards.double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resample_below": 1.0, "resampling": "ssp"},
        {"resampling": "multinomial", "tempering": 0.1},
        {"potential": "max"},
        {"potential": "add", "strength": 0.5},
        {"potential": "rt", "start": 0.5},
        {"moves": MIDWAY},
        {"potential": "add", "strength": 0.5, "resample_below": 1.0, "moves": MIDWAY},
    ],
)
def test_small_populations_of_a_thousand_seeds_have_the_right_evidence_and_mean(settings: dict[str, Any]) -> None:
    chain = gaussian_chain(cases=400 if "moves" in settings else 1000)
    found = run(chain, judge_of(chain, linear(2.0)), SMCConfig(particles=4, **settings))
    assert found.resampled.any()
    unbiased(found, chain, 2.0 * settings.get("strength", 1.0))


@pytest.mark.parametrize("below", [0.5, 1.0])
def test_a_large_population_finds_the_tilted_law_adaptive_or_not(below: float) -> None:
    chain = gaussian_chain(cases=4)
    found = run(chain, judge_of(chain, linear(2.0)), SMCConfig(particles=1000, resample_below=below, **EVERY))
    w, x = found.log_weights.exp(), found.latents[..., 0]
    mean = (w * x).sum(1)
    spread = ((w * x**2).sum(1) - mean**2).sqrt()
    assert float(mean.mean()) == pytest.approx(1.116, abs=0.05)
    assert float(spread.mean()) == pytest.approx(0.555, abs=0.05)
    assert float(found.log_z.mean()) == pytest.approx(1.616, abs=0.08)


def test_the_exact_value_leaves_nothing_to_weigh_at_the_end() -> None:
    chain = gaussian_chain(cases=4)
    config = SMCConfig(particles=512, resample_below=1.0, **EVERY)
    found = run(chain, judge_of(chain, linear(2.0)), config, value=Exact(chain, 2.0))
    torch.testing.assert_close(found.ess[-1], torch.full((4,), 512.0, dtype=torch.float64), rtol=1e-5, atol=0)
    assert float(found.latents.mean()) == pytest.approx(1.116, abs=3 * 0.03)
    assert (found.ancestors < 512).all()


def test_rollouts_as_values_keep_the_evidence() -> None:
    chain = gaussian_chain(cases=400)
    judge = judge_of(chain, linear(2.0))
    config = SMCConfig(particles=4, start=0.3, stop=0.8, every=0.5, resample_below=1.0)
    unbiased(run(chain, judge, config, value=Rollouts(judge, count=2)), chain, 2.0)


def test_a_finite_chain_has_the_evidence_of_its_dynamic_programme() -> None:
    chain = FiniteChain(cases=800)
    rewards = torch.tensor([0.0, 1.0, 2.0, -1.0])

    def rate(media: Tensor, rows: Sequence[int]) -> Tensor:
        return rewards[media[:, 0].long()]

    class Programme:
        def cost(self, i: int) -> tuple[int, int]:
            return 0, 0

        def __call__(self, x: Tensor, prediction: Tensor, i: int, rows: Sequence[int], seeds: Sequence[int]) -> Tensor:
            return chain.values(rewards, 1.0)[i][x[:, 0].long()]

    found = run(chain, judge_of(chain, rate), SMCConfig(particles=4, **EVERY), value=Programme())
    z = (found.log_z - chain.values(rewards, 1.0)[-1]).exp()
    assert abs(z.mean() - 1) < 3 * z.std() / math.sqrt(800)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"potential": "max", "resampling": "ssp", "scale": "std", "strength": 3.0},
        {**DAS, "tempering": 0.1},
        {"moves": MIDWAY, "resample_below": 1.0},
        {"moves": MovesConfig(kind="pcn"), "resampling": "multinomial"},
        {"moves": MovesConfig(kind="renoise", selective=True)},
    ],
)
def test_a_batch_gives_each_case_what_it_gets_alone_and_seeds_repeat(settings: dict[str, Any]) -> None:
    config = SMCConfig(**{"particles": 5, "strength": 6.0, **settings})
    chain, again = gaussian_chain(cases=3), gaussian_chain(cases=3)
    together = run(chain, judge_of(chain, linear(1.0)), config)
    repeated = run(again, judge_of(again, linear(1.0)), config)
    assert together.resampled.any()
    for name in ("latents", "rewards", "log_weights", "log_z", "ancestors"):
        assert torch.equal(getattr(together, name), getattr(repeated, name))
        for k, seed in enumerate(chain.seeds):
            single = gaussian_chain(seed=seed)
            alone = run(single, judge_of(single, linear(1.0)), config)
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[k])


@pytest.mark.parametrize("potential", ["diff", "max", "add", "rt"])
def test_a_constant_added_to_the_reward_moves_the_evidence_alone(potential: Any) -> None:
    config = SMCConfig(particles=6, strength=2.0, potential=potential)
    chain, other = gaussian_chain(cases=4), gaussian_chain(cases=4)
    a = run(chain, judge_of(chain, linear(1.0)), config)
    b = run(other, judge_of(other, lambda media, rows: media[:, 0] + 4), config)
    assert torch.equal(a.resampled, b.resampled)
    assert torch.equal(a.latents, b.latents)
    torch.testing.assert_close(b.log_z - a.log_z, torch.full((4,), 8.0, dtype=torch.float64), atol=1e-4, rtol=0)


def test_scaled_strength_ignores_the_unit_of_the_reward() -> None:
    config = SMCConfig(particles=6, strength=2.0, scale="std")
    chain, other = gaussian_chain(cases=3), gaussian_chain(cases=3)
    a, b = (run(c, judge_of(c, linear(s)), config) for c, s in ((chain, 1.0), (other, 64.0)))
    assert torch.equal(a.latents, b.latents)
    torch.testing.assert_close(a.strength, 64 * b.strength)


def test_every_tensor_of_a_particle_follows_its_ancestor() -> None:
    numbers = torch.arange(6.0)
    held = {f.name: numbers.clone() for f in fields(Cloud)}
    nested = {"anchor": {"x": numbers.clone()}, "path": {2: numbers.clone()}, "noises": {0: numbers.clone()}}
    cloud = Cloud(**{**held, **nested})  # type: ignore[arg-type]
    index = torch.tensor([3, 3, 0, 5, 5, 5])
    cloud.take(index)
    for f in fields(Cloud):
        found = getattr(cloud, f.name)
        for tensor in found.values() if isinstance(found, dict) else [found]:
            assert torch.equal(tensor, index.float()), f.name


def test_repeats_are_the_slots_behind_the_first_holder() -> None:
    assert _repeats(torch.tensor([[2, 0, 2, 2], [0, 1, 2, 3]])).tolist() == [[False, False, True, True], [False] * 4]


def test_copies_part_ways_after_resampling() -> None:
    chain = gaussian_chain()
    found = run(chain, judge_of(chain, linear(5.0)), SMCConfig(particles=8, stop=0.6))
    assert found.resampled.any()
    assert found.ancestors[0] < 8
    assert len(found.latents.unique()) == 8


def test_the_budget_sets_the_particles_and_is_never_exceeded() -> None:
    moves = [MovesConfig(), MIDWAY, MovesConfig(kind="renoise", count=3), MovesConfig(kind="pcn", count=1)]
    for limits in (Limits(nfe=55), Limits(decodes=41), Limits(reward_calls=40), Limits(nfe=10)):
        for move in moves:
            chain = gaussian_chain(cases=3, budget=limits)
            found = run(chain, judge_of(chain, linear(2.0)), SMCConfig(moves=move))
            assert chain.budget.nfe == sum(rows for _, rows in chain.calls)
            assert chain.budget.allows()
            assert found.rewards.shape[1] > 1 or limits.nfe is not None
    assert run(gaussian_chain(), judge_of(free := gaussian_chain(), linear(1.0))).rewards.shape[1] == 8
    assert free.calls == []


def test_moves_stop_where_an_asked_for_population_leaves_no_budget() -> None:
    chain = gaussian_chain(cases=2, budget=55)
    moves = MovesConfig(kind="suffix", count=3, midway=True)
    found = run(chain, judge_of(chain, linear(3.0)), SMCConfig(particles=5, moves=moves))
    assert chain.budget.nfe <= 110
    assert found.latents.shape == (2, 5, 1)


def test_too_small_a_budget_raises_before_anything_is_spent() -> None:
    for config, limit in ((SMCConfig(), 9), (SMCConfig(particles=4), 39)):
        chain = gaussian_chain(budget=limit)
        with pytest.raises(BudgetError, match="smc with"):
            run(chain, judge_of(chain, linear(1.0)), config)
        assert chain.calls == []


def test_invalid_rewards_lose_their_weight_and_are_counted() -> None:
    def rate(media: Tensor, rows: Sequence[int]) -> Tensor:
        return torch.where(media[:, 0] > 0.9, torch.nan, media[:, 0])

    for potential in ("diff", "max", "add", "rt"):
        chain = gaussian_chain(cases=30)
        found = run(chain, judge_of(chain, rate), SMCConfig(particles=8, potential=potential, strength=2.0))
        bad = found.rewards.isnan()
        assert bad.any()
        assert found.invalid.sum() >= bad.sum()
        told = ~found.log_z.isnan()
        assert (found.log_weights[told][bad[told]] == -math.inf).all()
        assert not found.log_weights.isnan().any()


def test_values_that_are_all_invalid_are_passed_over_and_the_evidence_stays_right() -> None:
    chain = gaussian_chain(cases=800)

    class Silent(Exact):
        def __call__(self, *args: Any) -> Tensor:
            return super().__call__(*args) if args[2] > 5 else torch.full((len(args[0]),), torch.nan)

    found = run(chain, judge_of(chain, linear(2.0)), SMCConfig(particles=4), value=Silent(chain, 2.0))
    assert (found.stalled == 2).all()  # levels 2 and 4
    assert (found.invalid == 8).all()
    unbiased(found, chain, 2.0)


def test_wholly_invalid_rewards_leave_the_evidence_untold() -> None:
    chain = gaussian_chain(cases=2)
    found = run(chain, judge_of(chain, lambda media, rows: torch.full((len(rows),), torch.nan)))
    assert found.log_z.isnan().all()
    assert not found.resampled.any()
    assert torch.equal(found.latents, plain(gaussian_chain(cases=2), 8))


def test_noise_replaces_the_start_of_the_first_particle_alone() -> None:
    chain, other = gaussian_chain(cases=2), gaussian_chain(cases=2)
    config = SMCConfig(particles=3, resample_below=0.0)
    usual = run(chain, judge_of(chain, linear(1.0)), config)
    given = run(other, judge_of(other, linear(1.0)), config, noise=torch.full((2, 1), 2.0))
    assert torch.equal(usual.latents[:, 1:], given.latents[:, 1:])
    assert not torch.equal(usual.latents[:, 0], given.latents[:, 0])


def test_draws_from_the_result_follow_the_weights_and_repeat() -> None:
    chain = gaussian_chain()
    found = run(chain, judge_of(chain, linear(2.0)), SMCConfig(particles=16, resample_below=0.0))
    drawn = found.sample(0, 20000)
    mean = float((found.log_weights[0].exp() * found.latents[0, :, 0]).sum())
    assert float(drawn.mean()) == pytest.approx(mean, abs=3 * float(drawn.std()) / math.sqrt(20000))
    assert torch.equal(found.sample(0, 5, "a"), found.sample(0, 5, "a"))
    assert not torch.equal(found.sample(0, 5, "a"), found.sample(0, 5, "b"))


def test_closing_moves_keep_the_evidence_and_the_mean() -> None:
    chain = gaussian_chain(cases=500)
    config = SMCConfig(particles=4, moves=MovesConfig(kind="pcn", count=2))
    found = run(chain, judge_of(chain, linear(2.0)), config)
    assert found.moves is not None
    assert found.moves.accepted.sum() > 0
    unbiased(found, chain, 2.0)
    torch.testing.assert_close(found.rewards, 2 * found.latents[..., 0])


def test_completions_serve_as_values_at_their_stated_cost() -> None:
    chain = gaussian_chain(cases=2)
    judge = judge_of(chain, linear(2.0))
    value = Completion(judge, steps=2)
    run(chain, judge, SMCConfig(particles=3), value=value)
    assert chain.budget.nfe == 6 * (10 + sum(value.cost(i)[0] for i in (2, 4, 6, 8)))
    assert chain.budget.decodes == 6 * 5


def test_scoring_times_are_shares_of_the_chain() -> None:
    assert SMCConfig().times(20) == [4, 8, 12, 16]
    assert SMCConfig().times(100) == [20, 40, 60, 80]
    assert SMCConfig().times(1) == [0]
    assert SMCConfig(start=0.5, stop=1.0, every=0.0).times(4) == [2, 3]


def test_settings_that_cannot_work_are_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"particles": -1}, {"strength": -1.0}, {"start": 0.9}, {"every": -0.1}, {"resample_below": 1.5},
        {"potential": "best"}, {"resampling": "stratified"}, {"proposal": "twisted"}, {"scale": "range"},
        {"moves": MovesConfig(kind="pcn", ode=True)}, {"moves": MIDWAY, "proposal": "gradient"},
    ]  # fmt: skip
    for settings in wrong:
        with pytest.raises(ConfigError):
            SMCConfig(**settings)
