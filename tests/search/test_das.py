from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diffalign.noise import Transition
from diffalign.search import smc
from diffalign.search.das import DAS, log_ratio, slope, tempered
from diffalign.search.smc import SMCConfig, run
from tests.search.toys import exact, gaussian_chain, judge_of, linear


def test_tempering_reaches_the_whole_strength_when_the_paper_says_so() -> None:
    assert tempered(0.008, 86, 100) < 1
    assert tempered(0.008, 87, 100) == 1
    assert tempered(0.1, 0, 20) == 0
    assert tempered(0.001, 20, 20) == 1
    assert tempered(0.0, 0, 20) == 1


def test_the_weight_is_the_ratio_of_the_two_densities() -> None:
    mean, noise, shift, std = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3), 0.3
    x = mean + std * (noise + shift)
    p, q = Transition(mean, std), Transition(mean + std * shift, std)
    torch.testing.assert_close(log_ratio(noise + shift, shift), p.log_prob(x) - q.log_prob(x), atol=1e-4, rtol=1e-4)


def test_the_slope_of_a_row_knows_nothing_of_the_others() -> None:
    chain = gaussian_chain(cases=4)
    judge = judge_of(chain, lambda media, rows: media[:, 0] ** 2)
    x, rows = torch.randn(4, 1), [0, 1, 2, 3]
    prediction, value, gradient = slope(chain, judge, x, 3, rows)
    alone = slope(chain, judge, x[2:3], 3, [2])
    assert torch.equal(alone[2][0], gradient[2])
    alpha, sigma = chain.levels.at(3)
    gain = 0.49 * alpha / (alpha**2 * 0.49 + sigma**2)
    torch.testing.assert_close(gradient, 2 * gain * prediction)
    torch.testing.assert_close(value, prediction[:, 0] ** 2)


def test_rows_without_a_reward_get_no_push() -> None:
    chain = gaussian_chain(cases=2)
    judge = judge_of(chain, lambda media, rows: torch.where(torch.tensor([True, False]), media[:, 0], torch.nan))
    _, value, gradient = slope(chain, judge, torch.ones(2, 1), 2, [0, 1])
    assert value.isnan().tolist() == [False, True]
    assert gradient[0] != 0
    assert gradient[1] == 0


def test_a_gradient_of_zero_is_feynman_kac_with_tempering() -> None:
    def flat(media: Tensor, rows: Sequence[int]) -> Tensor:
        return (2 * media[:, 0]).detach() + 0 * media[:, 0]

    settings = {**DAS, "tempering": 0.15, "strength": 4.0, "particles": 6}
    chain, other = gaussian_chain(cases=3), gaussian_chain(cases=3)
    das = run(chain, judge_of(chain, flat), SMCConfig(**settings))
    fk = run(other, judge_of(other, flat), SMCConfig(**{**settings, "proposal": "prior"}))
    assert torch.equal(das.latents, fk.latents)
    assert torch.equal(das.log_z, fk.log_z)
    assert das.resampled.any()


@pytest.mark.parametrize("gamma", [0.0, 0.15])
@pytest.mark.parametrize("below", [0.5, 1.0])
def test_the_shifted_proposal_keeps_the_evidence_and_the_tilted_mean(gamma: float, below: float) -> None:
    chain = gaussian_chain(cases=600)
    config = SMCConfig(**{**DAS, "tempering": gamma, "resample_below": below, "particles": 4})
    found = run(chain, judge_of(chain, linear(2.0)), config)
    z = (found.log_z - exact(chain).log_z(2.0)).exp()
    error = z.std() / 600**0.5
    assert abs(z.mean() - 1) < 3 * error
    pull = z * ((found.log_weights.exp() * found.latents[..., 0]).sum(1) - exact(chain).tilted(2.0)[0])
    assert abs(pull.mean()) < 3 * pull.std() / 600**0.5


def test_the_gradient_makes_weights_more_even_than_the_prior() -> None:
    chain, other = gaussian_chain(cases=100), gaussian_chain(cases=100)
    never = {"particles": 8, "resample_below": 0.0}
    das = run(chain, judge_of(chain, linear(2.0)), SMCConfig(**{**DAS, **never, "tempering": 0.0}))
    fk = run(other, judge_of(other, linear(2.0)), SMCConfig(**never))
    assert das.ess[-1].mean() > fk.ess[-1].mean() + 1


def test_backward_passes_are_counted_and_fit_the_budget() -> None:
    chain = gaussian_chain(cases=2, budget=100)
    found = run(chain, judge_of(chain, linear(1.0)), SMCConfig(**DAS))
    count = found.rewards.shape[1]
    assert count == 3  # at most 30 NFE each
    assert chain.budget.nfe == 2 * count * (9 * 3 + 1)  # the last step has no noise and asks for no gradient
    assert chain.budget.decodes == 2 * count * 11
    assert chain.budget.allows()


def test_the_preset_is_a_valid_configuration() -> None:
    assert smc.SMCConfig(**DAS).times(10) == list(range(10))
