"""Flow-GRPO: its closed forms, its clip, its divergences, and what `credit` makes of it."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from diffalign import noise
from diffalign.errors import ConfigError
from diffalign.noise import Levels
from diffalign.train import credit
from diffalign.train.objectives.flow_grpo import (
    FlowGRPO,
    FlowGRPOConfig,
    clip_figures,
    clipped_loss,
    kl_code,
    kl_path,
    kl_velocity,
)
from diffalign.train.policy import _guess
from diffalign.train.schedules import NoiseConfig
from tests.tiny import build
from tests.train import jobs
from tests.train.jobs import Brightness

SIGMA = torch.tensor([1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]).double()
LEVELS = Levels(1 - SIGMA, SIGMA, "flow")
steps = pytest.mark.parametrize("i", [0, 3, 7, 8])
small = st.floats(-0.5, 0.5)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scale(i: int, a: float) -> tuple[float, float, float, float]:
    """s, h, g and |d mu / d v| / h at step i."""
    s, h, g = float(SIGMA[i]), float(SIGMA[i] - SIGMA[i + 1]), noise.flow_diffusion(LEVELS, i, a)
    return s, h, g, 1 + g * g * (1 - s) / (2 * s)


@steps
@pytest.mark.parametrize("convention", ["mean", "sum"])
def test_the_gradient_for_the_prediction_has_its_closed_form(i: int, convention: str) -> None:
    x, v, eps = draw(2, 3, 4), draw(2, 3, 4, seed=1).requires_grad_(), draw(2, 3, 4, seed=2)
    advantage = torch.tensor([1.5, -0.5])
    kernel = noise.flow_sde(0.7)
    following = kernel(LEVELS, x, v.detach(), i).sample(eps)
    log_prob = kernel(LEVELS, x, v, i).log_prob(following, convention)
    config = FlowGRPOConfig(density=convention)
    loss = clipped_loss(log_prob - log_prob.detach(), advantage, *config.ranges(12))
    torch.testing.assert_close(loss, -advantage)
    loss.sum().backward()
    s, h, g, _ = scale(i, 0.7)
    count = 12 if convention == "mean" else 1
    expected = advantage.view(2, 1, 1) / count * math.sqrt(h) * (1 / g + g * (1 - s) / (2 * s)) * eps
    torch.testing.assert_close(v.grad, expected, rtol=2e-3, atol=1e-4 / count)  # means are float32


@steps
def test_the_three_divergences_are_one_up_to_known_factors(i: int) -> None:
    s, h, g, slope = scale(i, 0.7)
    x, v, base = draw(2, 3, 4), draw(2, 3, 4, seed=1), draw(2, 3, 4, seed=2)

    def mean(prediction: Tensor) -> Tensor:
        return x * (1 - g * g * h / (2 * s)) - h * prediction * slope

    exact = kl_path(mean(v), mean(base), g * math.sqrt(h))
    torch.testing.assert_close(kl_code(mean(v), mean(base), g * math.sqrt(h), h), exact * h / 12, rtol=1e-10, atol=0)
    closed = h / 2 * (1 / g + g * (1 - s) / (2 * s)) ** 2 * (v - base).square().flatten(1).sum(1)
    torch.testing.assert_close(exact, closed, rtol=1e-10, atol=0)
    gap = kl_velocity(LEVELS, x, v, base, i)
    torch.testing.assert_close(gap.double(), (v - base).square().flatten(1).mean(1), rtol=1e-5, atol=0)


def test_the_exact_divergence_is_torchs() -> None:
    a, b = draw(2, 5), draw(2, 5, seed=1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(a, 0.3), normal(b, 0.3)).sum(1)
    torch.testing.assert_close(kl_path(a, b, 0.3), expected)


@given(small, st.floats(-3, 3), st.floats(0.01, 0.3), st.floats(0.01, 0.3))
def test_the_clip_stops_the_gradient_on_the_far_side_only(
    log_ratio: float, advantage: float, low: float, high: float
) -> None:
    assume(log_ratio not in (-low, high))  # right at the edge both sides have a say
    log = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([advantage], dtype=torch.float64)
    loss = clipped_loss(log, a, low, high)
    loss.sum().backward()
    ratio = math.exp(log_ratio)
    stopped = (advantage > 0 and log_ratio > high) or (advantage < 0 and log_ratio < -low)
    assert float(log.grad) == pytest.approx(0 if stopped else -advantage * ratio)
    told = clip_figures(log, a, low, high)
    assert float(told["clip_low"] + told["clip_high"]) == stopped
    assert float(loss) >= -advantage * ratio - 1e-12  # never more optimistic than the plain objective


def test_a_clip_range_for_means_is_that_range_times_the_elements_for_sums() -> None:
    mean, total = (FlowGRPOConfig(clip=2e-4, clip_high=3e-4, density=density).ranges(50) for density in ("mean", "sum"))
    assert mean == pytest.approx((2e-4, 3e-4), rel=1e-3)  # to first order
    assert [math.exp(-mean[0]), math.exp(mean[1])] == pytest.approx([1 - 2e-4, 1 + 3e-4], rel=1e-12)
    assert total == pytest.approx((50 * mean[0], 50 * mean[1]), rel=1e-12)
    assert FlowGRPOConfig(clip=1e-4).ranges(7) == FlowGRPOConfig(clip=1e-4).ranges(70)


@given(st.floats(-1, 1), st.floats(1e-5, 0.3), st.integers(1, 70_000), st.sampled_from([-1.0, 1.0]))
def test_both_conventions_stop_the_gradient_at_the_same_place(
    share: float, clip: float, elements: int, sign: float
) -> None:
    log = 2 * clip * share  # of a mean density; the sum is that times the elements
    stopped = []
    for density, scale in (("mean", 1), ("sum", elements)):
        low, high = FlowGRPOConfig(clip=clip, density=density).ranges(elements)
        if max(abs(log) * scale, high) >= 80 or min(abs(abs(log) * scale / bound - 1) for bound in (low, high)) < 1e-9:
            return  # beyond what an exponential holds, or right at the edge
        told = clip_figures(torch.tensor([log * scale]).double(), torch.tensor([sign]), low, high)
        stopped.append((float(told["clip_low"]), float(told["clip_high"])))
    assert stopped[0] == stopped[1]
    assert any(stopped[0]) == ((sign > 0 and log > math.log1p(clip)) or (sign < 0 and log < math.log1p(-clip)))


def test_a_wide_clip_of_a_sum_has_a_finite_bound() -> None:
    low, high = FlowGRPOConfig(clip=0.2, density="sum").ranges(65536)
    loss = clipped_loss(torch.tensor([70.0, -70.0]), torch.tensor([1.0, -1.0]), low, high)
    assert loss.isfinite().all()


def test_both_conventions_clip_the_same_images_and_pull_in_the_same_direction() -> None:
    found = {}
    for density in ("mean", "sum"):
        with jobs.job("sd3", {"flow_grpo": {"density": density, "clip": 1e-4}}, reward=Brightness(100)) as (
            job,
            chosen,
        ):
            jobs.touched(job)
            micro = chosen.collect(job, 0).micros[0]
            jobs.learn(job, chosen, [micro])
            found[density] = jobs.gradients(job) / (micro.elements if density == "sum" else 1)
            before = micro.log_probs
            jobs.touched(job, 1e-3)
            found[density + " log"] = (micro.replay(density).detach() - before) / (
                micro.elements if density == "sum" else 1
            )
            found[density + " told"] = jobs.learn(job, chosen, [micro])
    mean, total = found["mean"], found["sum"]
    assert float((mean - total).norm()) < 1e-3 * float(mean.norm())
    torch.testing.assert_close(found["mean log"], found["sum log"], rtol=0.05, atol=1e-5)
    for side in ("clip_low", "clip_high"):
        assert found["mean told"][side] == pytest.approx(found["sum told"][side], abs=0.2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"clip": 0.0}, "clip is 0.0"),
        ({"clip": 1.0}, "clip is 1.0"),
        ({"clip_high": -1.0}, "clip_high -1.0"),
        ({"beta": -0.1}, "beta is -0.1"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FlowGRPOConfig(**settings)


# credit


def collected(family: str = "sd3", call: dict[str, Any] | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """Advantages (N, S) and gradient of a fresh step with these settings of the objective."""
    outer = {name: settings.pop(name) for name in ("advantage",) if name in settings}
    with jobs.job(family, {"flow_grpo": settings}, reward=Brightness(100), call=call, **outer) as (job, chosen):
        jobs.touched(job)
        micros = chosen.collect(job, 0).micros
        values = torch.cat([micro.advantages for micro in micros])
        jobs.learn(job, chosen, micros)
        return values, jobs.gradients(job)


def test_tempflow_weights_average_1_over_the_steps_of_a_walk() -> None:
    told = {"flow_grpo": {"credit": {"weighting": "tempflow"}}}
    with jobs.job("sd3", told, call={"num_inference_steps": 5}) as (job, chosen):
        micro = chosen.collect(job, 0).micros[0]
        nu, h = chosen.deviations(micro), chosen.sizes(micro)
        weights = credit.tempflow_weights(nu, h)
        assert float(weights.mean()) == pytest.approx(1)
        levels = micro.driver.levels
        expected = [noise.flow_diffusion(levels, i, 0.7) * math.sqrt(float(h[i])) for i in micro.trained]
        assert nu.tolist() == pytest.approx(expected)
        micro.advantages = torch.tensor([[1.0, -2.0, 3.0, 0.5]] * 3)
        loss = jobs.learn(job, chosen, [micro])["loss"]
        assert loss == pytest.approx(-float((micro.advantages[0] * weights).mean()), abs=1e-6)


@pytest.mark.parametrize("density", ["mean", "sum"])
def test_the_normalised_log_ratio_is_the_product_of_noise_and_change(density: str) -> None:
    told = {"flow_grpo": {"density": density, "credit": {"weighting": "ratio_norm"}}}
    with jobs.job("sd3", told) as (job, chosen):
        micro = chosen.collect(job, 0).micros[0]
        assert sorted(micro.means) == list(micro.trained)
        jobs.touched(job, 0.3)
        seen: list[tuple[Tensor, Tensor]] = []

        def compare(i: int, prediction: Tensor, step: Any, log_prob: Tensor) -> None:
            old, following = micro.means[i], micro.walk.latents[i + 1]
            k = i - micro.trained.start
            gap = (step.mean - old).square().flatten(1)
            drift = (gap.mean(1) if density == "mean" else gap.sum(1)) / (2 * step.std**2)
            got = step.std * (log_prob - micro.log_probs[k] + drift)  # GRPO-Guard's formula
            seen.append((got, credit.noise_log_ratio(following, step.mean, old, step.std, density)))

        with torch.no_grad():
            micro.replay(density, compare, grad=False)
        for got, expected in seen:
            assert float(expected.abs().max()) > 1e-5
            torch.testing.assert_close(
                got, expected, rtol=1e-3, atol=1e-6 * (micro.elements if density == "sum" else 1)
            )


def test_tempflow_weighs_a_step_alike_wherever_the_window_is() -> None:
    weighting, call = {"weighting": "tempflow"}, {"num_inference_steps": 5}
    with jobs.job("sd3", {"flow_grpo": {"credit": weighting}}, call=call) as (job, chosen):
        micro = chosen.collect(job, 0).micros[0]
        whole = chosen.step_weights(chosen.deviations(micro), chosen.sizes(micro))
        assert float(whole.mean()) == pytest.approx(1)
        assert float(whole.max() - whole.min()) > 0.1
    moving = {"window": 1, "rule": "progressive", "every": 1}
    with jobs.job("sd3", {"flow_grpo": {"credit": weighting, "noise": moving}}, call=call) as (job, chosen):
        for step in range(4):
            micro = chosen.collect(job, step).micros[0]
            assert list(micro.trained) == [step]
            weight = chosen.step_weights(chosen.deviations(micro), chosen.sizes(micro))
            torch.testing.assert_close(weight, whole[step : step + 1])
            micro.advantages = torch.ones(3, 1)
            assert jobs.learn(job, chosen, [micro])["loss"] == pytest.approx(-float(whole[step]), abs=1e-6)


def test_normalised_ratios_of_another_prediction_are_refused() -> None:
    told = {"flow_grpo": {"credit": {"weighting": "ratio_norm"}}}
    with pytest.raises(ConfigError, match=r"predicts epsilon. Use tempflow"), jobs.job("sd15_ddim", told):
        pass


@pytest.mark.parametrize(("kernel", "has_h"), [("flow_sde", True), ("cps", False), ("ddim", False)])
def test_the_published_divergence_has_a_factor_h_for_the_flow_sde_alone(kernel: str, has_h: bool) -> None:
    chosen = FlowGRPO(FlowGRPOConfig(beta=0.1, noise=NoiseConfig(kernel=kernel)))
    x, v, base = draw(2, 3, 4), draw(2, 3, 4, seed=1), draw(2, 3, 4, seed=2)
    step = noise.KERNELS[kernel](0.7)
    now, other = (step(LEVELS, x, prediction, 3) for prediction in (v, base))
    h = float(SIGMA[3] - SIGMA[4]) if has_h else 1.0
    found = chosen.divergence(LEVELS, x, 3, (now, v), (other, base))
    torch.testing.assert_close(found, kl_code(now.mean, other.mean, now.std, h), rtol=1e-6, atol=0)


@pytest.mark.parametrize("density", ["mean", "sum"])
def test_normalised_ratios_do_not_come_from_the_difference_of_two_large_densities(density: str) -> None:
    told = {"flow_grpo": {"density": density, "credit": {"weighting": "ratio_norm"}, "clip": 2e-6}}
    with jobs.job("sd3", told) as (job, chosen):
        jobs.touched(job)
        micro = chosen.collect(job, 0).micros[0]
        micro.walk.log_probs = micro.walk.log_probs + 1e-3  # as rounding may leave them
        assert jobs.learn(job, chosen, [micro])["ratio_mean"] == 1


def test_normalised_ratios_are_exactly_1_before_any_update_and_divide_the_loss_by_the_step_size() -> None:
    told = {"flow_grpo": {"credit": {"weighting": "ratio_norm"}, "clip": 2e-6}}
    with jobs.job("sd3", told) as (job, chosen):
        jobs.touched(job)
        micro = chosen.collect(job, 0).micros[0]
        micro.advantages = torch.tensor([[1.0, -2.0]] * 3)
        figures = jobs.learn(job, chosen, [micro])
        expected = -float((micro.advantages[0] / chosen.sizes(micro)).mean())
        assert figures["ratio_mean"] == pytest.approx(1, abs=1e-7)
        assert figures["loss"] == pytest.approx(expected, abs=1e-5)
        assert figures["clip_low"] == figures["clip_high"] == 0


def test_coca_with_alpha_1_is_flow_grpo_to_the_bit() -> None:
    plain, coca = collected(), collected(credit={"similarity": "coca", "alpha": 1.0})
    assert torch.equal(plain[0], coca[0])
    assert torch.equal(plain[1], coca[1])


def test_coca_weighs_steps_by_the_similarity_that_is_still_to_come() -> None:
    plain, weighed = collected()[0], collected(credit={"similarity": "coca"})[0]
    shares = weighed / plain
    assert torch.allclose(shares[:, 0], torch.ones(6), atol=1e-5)  # all of it is to come at the first step
    assert bool((shares[:, 1:] <= shares[:, :-1] + 1e-5).all())
    assert bool((shares >= -1e-5).all())
    assert float((shares[:, 1] - shares[:, 0]).abs().max()) > 1e-3


def phased(**credited: Any) -> tuple[Tensor, Tensor, Any]:
    """Step rewards (n, S) and final rewards (n,) of a walk whose steps are all trained, in phases."""
    told = {"noise": {"train_last": True}, "credit": {"phases": [0.9, 0.5], **credited}}
    outer = {"advantage": {"step_norm": "group_step"}, "call": {"num_inference_steps": 5}}
    with jobs.job("sd3", {"flow_grpo": told}, reward=Brightness(100), **outer) as (job, chosen):
        rollouts, rewards = chosen.sampled(job, 0, job.cases_of(0))
        gains = chosen.step_rewards(job, rollouts, rewards)
        found = chosen.collect(job, 0)
        return gains, rewards[:, 0], found


def test_phase_gains_telescope_to_the_reward_less_its_first_guess() -> None:
    gains, final, found = phased()
    assert gains.shape == (6, 5)
    told = {"flow_grpo": {"noise": {"train_last": True}}}
    with jobs.job("sd3", told, reward=Brightness(100), call={"num_inference_steps": 5}) as (job, chosen):
        rollouts, _ = chosen.sampled(job, 0, job.cases_of(0))
        first = chosen.worth(job, rollouts, [0], _guess)[:, 0]
    torch.testing.assert_close(gains.sum(1), final - first, rtol=1e-4, atol=1e-3)
    values = torch.cat([micro.advantages for micro in found.micros])
    assert values.shape == (6, 5)
    torch.testing.assert_close(values.view(2, 3, 5).sum(1), torch.zeros(2, 5), rtol=0, atol=1e-4)


def test_the_centre_of_renorm_cancels() -> None:
    found = [phased(process="renorm", mu=mu) for mu in (1.0, 40.0)]
    assert not torch.allclose(found[0][0], found[1][0])
    values = [torch.cat([micro.advantages for micro in each[2].micros]) for each in found]
    torch.testing.assert_close(values[0], values[1], rtol=1e-3, atol=1e-3)


def test_annealed_noise_is_stored_with_the_walk_and_keeps_the_ratio_at_1() -> None:
    told = {"flow_grpo": {"noise": {"level": 1.0, "anneal": 2.0, "least": 0.3}}}
    with jobs.job("sd3", told, call={"num_inference_steps": 5}) as (job, chosen):
        micro = chosen.collect(job, 0).micros[0]
        before, again = chosen.replayed(job, micro)
        assert torch.equal(before, again)
        shares = chosen.deviations(micro) / torch.tensor(
            [
                noise.flow_sde(1.0)(micro.driver.levels, x[:1], x[:1], i).std
                for i, x in enumerate(micro.walk.latents[:4])
            ]
        )
        assert shares.tolist() == pytest.approx([max(2 - math.exp(i / 2), 0.3) for i in range(4)], abs=1e-6)


@pytest.mark.parametrize("scheduler", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_a_video_model_whose_scheduler_starts_just_below_1_walks_within_bounds(scheduler: str) -> None:
    pipe = build("wan21")
    told = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe.scheduler = getattr(diffusers, scheduler)(**told)
    with jobs.job("wan21", pipe=pipe, call={"num_inference_steps": 4}) as (job, chosen):
        micro = chosen.collect(job, 0).micros[0]
        levels = micro.driver.levels
        assert 0.999 < float(levels.sigma[0]) < 1
        deviations = [float(x.std()) for x in micro.walk.latents]
        assert all(math.isfinite(each) and each < 4 for each in deviations), deviations
        before, again = chosen.replayed(job, micro)
        assert before.isfinite().all()
        assert torch.equal(before, again)


def test_flow_noise_on_another_model_is_refused() -> None:
    with (
        pytest.raises(Exception, match=r"flow_sde.*Use ddim"),
        jobs.job("sd15_ddim", {"flow_grpo": {"noise": {"kernel": "flow_sde"}}}),
    ):
        pass
