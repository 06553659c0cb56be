from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import BudgetError, ConfigError
from diffalign.noise import Levels, Transition
from diffalign.search.moves import MovesConfig, MovesResult, begin, rejuvenate
from tests.search.toys import ToyChain, exact, gaussian_chain, judge_of, linear

CHAINS = 500


def moments(found: MovesResult) -> tuple[float, float]:
    return float(found.particles.x.mean()), float(found.particles.x.std())


def close_to(found: MovesResult, mean: float, deviation: float) -> None:
    """Mean and standard deviation of the particles lie within 3 standard errors."""
    count = len(found.particles.x)
    got = moments(found)
    assert got[0] == pytest.approx(mean, abs=3 * deviation / math.sqrt(count))
    assert got[1] == pytest.approx(deviation, abs=3 * deviation / math.sqrt(2 * count))


def reverse(mean: float, deviation: float) -> Any:
    """The exact Gaussian reverse kernel of data N(mean, deviation^2)."""

    def step(levels: Levels, x: Tensor, prediction: Tensor, i: int) -> Transition:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels.at(i), levels.at(i + 1)
        keep = alpha_t / alpha_s
        added, prior = sigma_t**2 - (keep * sigma_s) ** 2, (alpha_s * deviation) ** 2 + sigma_s**2
        variance = 1 / (1 / prior + keep**2 / added)
        return Transition(variance * (alpha_s * mean / prior + keep * x / added), math.sqrt(variance))

    return step


def test_redrawn_suffixes_reach_the_tilted_law() -> None:
    chain = gaussian_chain(cases=CHAINS)
    found = rejuvenate(chain, judge_of(chain, linear(2.0)), MovesConfig(kind="suffix", count=27))
    close_to(found, *exact(chain).tilted(2.0))


def test_turned_noises_reach_the_tilted_law() -> None:
    chain = gaussian_chain(cases=CHAINS, steps=5)
    found = rejuvenate(chain, judge_of(chain, linear(2.0)), MovesConfig(kind="pcn", count=40, renewal=0.6))
    close_to(found, *exact(chain).tilted(2.0))


def test_turned_start_noise_reaches_the_tilted_law_of_the_deterministic_sampler() -> None:
    chain = gaussian_chain(cases=CHAINS)
    found = rejuvenate(chain, judge_of(chain, linear(2.0)), MovesConfig(kind="pcn", ode=True, count=60))
    points = torch.tensor([[0.0], [1.0]])
    ends, _ = gaussian_chain().generate(points, [0, 0])
    mean, deviation = float(ends[0]), float(ends[1] - ends[0])
    assert mean + 2 * deviation**2 == pytest.approx(1.243, abs=0.002)
    close_to(found, mean + 2 * deviation**2, deviation)


def test_noising_and_denoising_by_the_true_reverse_reaches_the_tilted_data() -> None:
    chain = gaussian_chain(cases=CHAINS, kernel=reverse(0.5, 0.7))
    found = rejuvenate(chain, judge_of(chain, linear(2.0)), MovesConfig(kind="renoise", count=27))
    close_to(found, 0.5 + 2 * 0.49, 0.7)


def test_moving_only_the_poor_hunts_rewards_beyond_the_tilted_law() -> None:
    chain = gaussian_chain(cases=300)
    config = MovesConfig(kind="suffix", count=24, selective=True, threshold=2 * 1.116)
    mean, spread = moments(rejuvenate(chain, judge_of(chain, linear(2.0)), config))
    assert mean > 1.116 + 0.15
    assert spread < 0.45


@pytest.mark.parametrize("kind", ["suffix", "renoise", "pcn"])
def test_without_strength_every_move_is_accepted(kind: Any) -> None:
    chain = gaussian_chain(cases=20)
    found = rejuvenate(chain, judge_of(chain, linear(2.0)), MovesConfig(kind=kind, count=3), strength=0.0, chains=2)
    assert torch.equal(found.accepted, found.proposed)
    assert (found.proposed == 2).all()


@pytest.mark.parametrize(
    "config",
    [
        MovesConfig(kind="suffix", count=4),
        MovesConfig(kind="renoise", count=4),
        MovesConfig(kind="pcn", count=4),
        MovesConfig(kind="pcn", count=4, ode=True),
        MovesConfig(kind="suffix", count=4, selective=True),
    ],
)
def test_a_batch_gives_each_case_what_it_gets_alone(config: MovesConfig) -> None:
    chain = gaussian_chain(cases=3)
    together = rejuvenate(chain, judge_of(chain, linear(2.0)), config, chains=4)
    for k, seed in enumerate(chain.seeds):
        single = gaussian_chain(seed=seed)
        alone = rejuvenate(single, judge_of(single, linear(2.0)), config, chains=4)
        assert torch.equal(alone.particles.x, together.particles.x[4 * k : 4 * k + 4])
    torch.testing.assert_close(together.particles.rewards, 2 * together.particles.x[:, 0].double())


def test_a_moved_particle_carries_its_own_past() -> None:
    chain = gaussian_chain(cases=30)
    judge = judge_of(chain, linear(2.0))
    found = rejuvenate(chain, judge, MovesConfig(kind="pcn", count=5)).particles
    x = chain.start(found.noises[-1], found.rows)
    for i in range(chain.length):
        x = chain.transition(x, chain.predict(x, i, found.rows), i).sample(found.noises.get(i))
    assert torch.equal(x, found.x)


def test_the_budget_ends_the_sweeps_and_is_never_exceeded() -> None:
    for kind in ("suffix", "renoise", "pcn"):
        chain = gaussian_chain(cases=3, budget=57)
        found = rejuvenate(chain, judge_of(chain, linear(2.0)), MovesConfig(kind=kind, count=1000), chains=2)  # type: ignore[arg-type]
        assert chain.budget.nfe == sum(rows for _, rows in chain.calls) <= 3 * 57
        assert len(found.proposed) >= 1
    chain = gaussian_chain(budget=9)
    with pytest.raises(BudgetError):
        rejuvenate(chain, judge_of(chain, linear(2.0)))
    assert chain.calls == []


def test_invalid_proposals_are_refused_and_counted_and_invalid_particles_leave_at_once() -> None:
    chain = gaussian_chain(cases=60)
    judge = judge_of(chain, lambda media, rows: torch.where(media[:, 0] > 0.5, torch.nan, media[:, 0]))
    config = MovesConfig(kind="suffix", count=12, levels=(0.0,))
    first = begin(chain, judge, config, 1)
    assert first.rewards.isnan().any()
    found = rejuvenate(chain, judge, config, particles=first)
    assert found.invalid.sum() > 0
    assert not found.particles.rewards.isnan().any()


def test_a_constant_added_to_the_reward_changes_nothing() -> None:
    config = MovesConfig(kind="suffix", count=5)
    chain, other = gaussian_chain(cases=10), gaussian_chain(cases=10)
    a = rejuvenate(chain, judge_of(chain, linear(1.0)), config)
    b = rejuvenate(other, judge_of(other, lambda media, rows: media[:, 0] + 4), config)
    assert torch.equal(a.particles.x, b.particles.x)


def test_settings_that_cannot_work_are_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"kind": "gibbs"}, {"count": -1}, {"levels": ()}, {"levels": (1.0,)}, {"kind": "suffix", "levels": (0.5,)},
        {"renewal": 0.0}, {"kind": "suffix", "ode": True}, {"kind": "pcn", "midway": True},
    ]  # fmt: skip
    for settings in wrong:
        with pytest.raises(ConfigError):
            MovesConfig(**settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "acceptance"),
    [(MovesConfig(kind="suffix", count=120), None), (MovesConfig(kind="pcn", count=120), 0.78)],
)
def test_four_thousand_chains_reach_the_tilted_law(config: MovesConfig, acceptance: float | None) -> None:
    chain: ToyChain = gaussian_chain(cases=4000)
    found = rejuvenate(chain, judge_of(chain, linear(2.0)), config)
    close_to(found, *exact(chain).tilted(2.0))
    if acceptance is not None:
        share = float(found.accepted[60:].sum() / found.proposed[60:].sum())
        assert share == pytest.approx(acceptance, abs=0.01)  # 4,000 chains simulated beforehand gave .78
