"""DPO and KTO: closed forms, an optimum, and pairs on tiny pipelines."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.train.objectives.dpo import DPO, DPOConfig, RegulariseConfig, ends, opinion, pair_loss, utility_loss
from tests.train import jobs

PAIRS: dict[str, Any] = {"group_size": 3, "micro_batch": 3}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.5, 2000.0])
def test_at_the_reference_the_loss_is_log_2_with_a_slope_of_a_quarter_beta(beta: float) -> None:
    error = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)  # winner and loser beyond the reference
    loss = pair_loss(error[:, 0] - error[:, 1], beta)
    torch.testing.assert_close(loss, torch.full((3,), math.log(2)).double())
    loss.sum().backward()
    torch.testing.assert_close(error.grad, torch.tensor([[beta / 4, -beta / 4]] * 3).double())


@given(st.floats(-3, 3), st.floats(0.1, 5))
def test_a_pair_the_other_way_round_has_the_other_chance(gap: float, beta: float) -> None:
    both = pair_loss(torch.tensor([gap, -gap], dtype=torch.float64), beta)
    assert float((-both).exp().sum()) == pytest.approx(1)
    assert float(both.sum()) >= 2 * math.log(2) - 1e-12


def test_on_a_linear_model_autograd_gives_the_formula_by_hand() -> None:
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x, target, old = draw(2, 8), draw(2, 8, seed=1), draw(2, 8, seed=2)
    error = (theta * x - target).square().mean(1) - (old - target).square().mean(1)
    gap, beta = error[0] - error[1], 3.0
    pair_loss(gap, beta).backward()
    slopes = (2 * (0.3 * x - target) * x).mean(1)
    expected = beta / 2 * (1 - torch.sigmoid(-beta / 2 * gap.detach())) * (slopes[0] - slopes[1])
    torch.testing.assert_close(theta.grad, expected)


def test_the_optimum_on_gaussian_pairs_is_the_law_that_chose_them() -> None:
    """Winners by Bradley-Terry of a reward: the learnt preference is that reward's, whatever the reference."""
    reward, beta = torch.tensor([0.0, 1.0, 2.5]).double(), 2.0
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    chance = torch.stack([torch.sigmoid(reward[i] - reward[j]) for i, j in pairs])
    error = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([error], max_iter=200)

    def loss() -> Tensor:
        optimiser.zero_grad()
        gaps = torch.stack([error[i] - error[j] for i, j in pairs])
        found = (chance * pair_loss(gaps, beta)).sum()
        found.backward()
        return found

    optimiser.step(loss)
    learnt = -beta / 2 * error.detach()
    torch.testing.assert_close(learnt - learnt[0], reward - reward[0], atol=1e-4, rtol=0)


def test_kto_at_the_reference_is_one_half_with_a_slope_of_a_quarter_beta() -> None:
    gain, sign = torch.zeros(4, dtype=torch.float64, requires_grad=True), torch.tensor([1.0, -1.0, -1.0, 1.0]).double()
    loss = utility_loss(gain, sign, 0.0, 8.0).mean()
    assert float(loss.detach()) == 0.5
    loss.backward()
    torch.testing.assert_close(gain.grad, -sign * 8.0 / 4 / 4)


def test_the_two_ends_of_each_group_are_the_pair() -> None:
    advantage = torch.tensor([0.0, 2.0, -1.0, 1.0, 1.0, 9.0, 3.0])
    kept = torch.tensor([1, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
    groups = torch.tensor([5, 5, 5, 2, 2, 0, 0])
    assert ends(advantage, kept, groups).tolist() == [0, 1, -1, 0, 0, 0, 0]


@pytest.mark.parametrize("family", ["sd15_ddim", "sd3", "flux", "wan21"])
def test_on_a_pipeline_the_first_loss_is_log_2_and_a_pair_shares_noise_and_level(family: str) -> None:
    with jobs.job(family, {"dpo": {"draws": 2}}, **PAIRS) as (job, chosen):
        found = chosen.collect(job, 0)
        told = jobs.learn(job, chosen, found.micros)
        assert told["loss"] == pytest.approx(math.log(2), rel=1e-5)
        assert told["winner"] == told["loser"] == 0
        assert float(jobs.gradients(job).norm()) > 0
        for micro in found.micros:
            for place in chosen.visited(job, micro):
                assert len(place.rows) == 2
                assert sorted(micro.notes["sign"][place.rows].tolist()) == [-1, 1]
                assert torch.equal(*place.noise)


def test_a_step_along_the_gradient_agrees_with_more_pairs() -> None:
    with jobs.job("sd3", {"dpo": {"draws": 3, "beta": 50.0}}, **PAIRS) as (job, chosen):
        micros = chosen.collect(job, 0).micros
        before = jobs.learn(job, chosen, micros)["loss"]
        with torch.no_grad():
            for parameter in job.trained.parameters():
                if parameter.grad is not None:
                    parameter -= 2e-3 * parameter.grad / (parameter.grad.norm() + 1e-12)
        jobs.gradients(job)
        after = jobs.learn(job, chosen, micros)
        assert after["loss"] < before
        assert after["agrees"] > 0.5


def test_kto_centres_on_the_mean_gain_of_all_images() -> None:
    with jobs.job("sd3", {"dpo": {"loss": "kto", "draws": 1, "beta": 5.0}}, group_size=4, micro_batch=2) as (
        job,
        chosen,
    ):
        chosen.collect(job, 0)
        jobs.touched(job)
        micros = chosen.collect(job, 0).micros
        chosen.refresh(job, micros)
        gains = []
        for micro in micros:
            with torch.no_grad():
                for place, old in zip(chosen.visited(job, micro), micro.kept["reference"], strict=True):
                    gains.append(-chosen.excess(place, chosen.seen_by(place, place.driver), old))
        assert float(micros[0].centre[0]) == pytest.approx(max(float(torch.cat(gains).mean()), 0.0), abs=1e-9)
        jobs.learn(job, chosen, micros)
        assert float(jobs.gradients(job).norm()) > 0


def test_the_reference_follows_where_it_is_asked_to() -> None:
    with jobs.job("sd3", {"dpo": {"reset_every": 2}}, **PAIRS) as (job, chosen):
        chosen.collect(job, 0)
        jobs.touched(job)
        for step, moved in ((1, False), (2, True)):
            micros = chosen.collect(job, step).micros
            told = jobs.learn(job, chosen, micros)
            assert (told["loss"] == pytest.approx(math.log(2), rel=1e-5)) is moved


@pytest.mark.parametrize(
    ("bad", "says"),
    [({"beta": 0.0}, "beta"), ({"reset_every": -1}, "reset_every"), ({"liked": -1.0}, "liked")],
)
def test_settings_without_sense_are_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DPOConfig(**bad)


def test_a_pair_that_would_be_torn_apart_is_refused() -> None:
    with pytest.raises(ConfigError, match="learnt together"), jobs.job("sd3", "dpo", group_size=3, micro_batch=2):
        pass


def test_of_a_solved_prompt_no_image_is_liked_or_disliked() -> None:
    class Flat(jobs.Brightness):
        def __call__(self, media: Tensor, cases: Any) -> Tensor:
            first = cases[0].prompt
            found = super().__call__(media, cases)
            return torch.where(torch.tensor([case.prompt == first for case in cases]), 1.0, found)

    with jobs.job("sd3", {"dpo": {"loss": "kto"}}, reward=Flat(), micro_batch=6) as (job, chosen):
        micro = chosen.collect(job, 0).micros[0]
        assert micro.notes["sign"][:3].tolist() == [0, 0, 0]
        assert micro.weight[:3].tolist() == [0, 0, 0]
        assert {-1.0, 1.0} <= set(micro.notes["sign"][3:].tolist())


def test_weights_of_single_images_are_refused_with_pairs() -> None:
    with pytest.raises(ConfigError, match="loss: kto"):
        DPOConfig(liked=2.0)


# T-REG


def errors(seed: int) -> tuple[Tensor, Tensor]:
    return draw(6, seed=seed).abs(), draw(6, seed=seed + 1).abs()


@given(st.integers(0, 500), st.floats(0.01, 10))
def test_an_opinion_is_bounded_and_turns_with_the_prompts(seed: int, spread: float) -> None:
    better, worse = errors(seed)
    says = opinion(better, worse, spread)
    assert float(says.abs().max()) <= 0.5
    assert bool(((says > 0) == (better < worse)).all())
    torch.testing.assert_close(opinion(worse, better, spread), -says)
    assert not opinion(better, better, 0.0).any()


def learnt(weight: float, **told: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the first micro-batch of a job with this much regularisation."""
    own = {"beta": 500.0, "draws": 2, "regularise": {"weight": weight, **told}}
    with jobs.job("sd3", {"dpo": own}, **PAIRS) as (job, chosen):
        jobs.touched(job)
        chosen.prepare(job)
        micro = chosen.collect(job, 0).micros[0]
        found = chosen.learn(job, micro, 1.0)
        return found["loss"], [p.grad.clone() for p in job.trained.parameters() if p.grad is not None]


def test_equal_endings_are_plain_dpo_and_others_are_not() -> None:
    plain, slopes = learnt(0.0)
    same, equal = learnt(0.5, better=", fine", worse=", fine")
    assert float(same) == float(plain)
    assert all(torch.equal(a, b) for a, b in zip(slopes, equal, strict=True))
    other, moved = learnt(0.5, better=", fine", worse=" red cube blue ball")
    assert float(other) != float(plain)
    assert any(not torch.equal(a, b) for a, b in zip(slopes, moved, strict=True))


@given(st.integers(0, 300), st.floats(0, 1), st.floats(10, 3000))
def test_the_regular_part_is_the_error_by_the_opinion_where_the_pair_is_not_told_apart(
    seed: int, against: float, beta: float
) -> None:
    """L = alpha w [beta/2 r(w) e(w) + beta/2 r(l) e(l)] for a pair, whose two rows are averaged in the loss."""
    told = DPOConfig(beta=beta, regularise=RegulariseConfig(weight=0.3, against=against))
    chosen = DPO(told)
    chosen.spreads = {"2": 0.7}
    better, worse = errors(seed)
    prediction, target, gap = draw(6, 5, seed=seed + 2), draw(6, 5, seed=seed + 3), draw(6, seed=seed + 4) / beta
    place = SimpleNamespace(draw=1, i=2, rows=torch.arange(6), target=target)
    micro = SimpleNamespace(contrasted={(1, 0): (better, worse)})
    found = chosen.regular(SimpleNamespace(place=place, micro=micro, prediction=prediction), gap)  # type: ignore[arg-type]
    for k in range(6):
        says = 1 / (1 + math.exp(-(float(worse[k]) - float(better[k])) / 0.7)) - 0.5
        says = says * against if says < 0 else says
        unsure = 1 / (1 + math.exp(-beta / 2 * float(gap[k])))  # the loser is preferred to the winner
        error = float((prediction[k] - target[k]).square().mean())
        assert float(found[k]) / 2 == pytest.approx(0.3 * unsure * beta / 2 * says * error, rel=1e-6, abs=1e-9)


def test_opinions_are_measured_once_and_kept() -> None:
    own = {"beta": 500.0, "draws": 2, "regularise": {"weight": 0.5, "worse": " red cube"}}
    with jobs.job("sd3", {"dpo": own}, **PAIRS) as (job, chosen):
        chosen.prepare(job)
        kept = chosen.state()
        assert len(kept["spreads"]) == len(chosen.places(job))
        assert min(kept["spreads"].values()) > 0
        chosen.restore(kept)
        micro = chosen.collect(job, 0).micros[0]
        chosen.learn(job, micro, 1.0)
        assert chosen.spreads == kept["spreads"]
        assert all(not each.requires_grad for both in micro.contrasted.values() for each in both)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"loss": "kto", "regularise": {"weight": 0.1}}, "kto has single images"),
        ({"regularise": {"against": 2.0}}, "a share"),
    ],
)
def test_regularisation_without_sense_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says), jobs.job("sd3", {"dpo": given}, **PAIRS):
        pass
