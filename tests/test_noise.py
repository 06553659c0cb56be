"""Schedules and transitions against closed forms."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from diffalign.errors import ConfigError, SeamError
from diffalign.noise import (
    Levels,
    Transition,
    case_generator,
    case_noise,
    cps,
    ddim,
    flow_diffusion,
    flow_sde,
    read_levels,
)

VARIANCE = 0.25


def flow_levels(steps: int) -> Levels:
    s = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return Levels(1 - s, s, "flow")


def gaussian_velocity(x, s: float, mean: float, variance: float):
    """The exact flow field of data N(mean, variance)."""
    gain = (1 - s) * variance / ((1 - s) ** 2 * variance + s**2)
    x0 = mean + gain * (x - (1 - s) * mean)
    return (x - x0) / s


def marginal(levels: Levels, kernel, field) -> tuple[float, float]:
    """Mean and variance at the end of the chain: every step is affine, so two probes give it exactly."""
    mean, variance = 0.0, float(levels.sigma[0] ** 2)
    for i in range(len(levels)):
        probes = torch.tensor([[0.0], [1.0]], dtype=torch.float32)
        step = kernel(levels, probes, field(probes.double(), i).float(), i)
        shift, gain = float(step.mean[0]), float(step.mean[1] - step.mean[0])
        mean, variance = shift + gain * mean, gain**2 * variance + step.std**2
    return mean, variance


def flow_marginal(steps: int, kernel, mean: float = 0.5, variance: float = VARIANCE) -> tuple[float, float]:
    levels = flow_levels(steps)
    return marginal(levels, kernel, lambda x, i: gaussian_velocity(x, float(levels.sigma[i]), mean, variance))


def test_the_flow_sde_reaches_the_data_variance_at_first_order():
    # reference values of methods/flow_grpo.md, section 8.4: a = 0.7, data variance 0.25
    found = [flow_marginal(steps, flow_sde(0.7))[1] for steps in (10, 100, 1000)]
    assert found == pytest.approx([0.2300, 0.2504, 0.2509], abs=2e-4)
    assert abs(flow_marginal(4000, flow_sde(0.7))[1] - VARIANCE) < 1e-3


def test_the_flow_ode_reaches_the_data_law_at_first_order():
    errors = [abs(flow_marginal(steps, ddim(0.0))[1] - VARIANCE) for steps in (50, 100, 200)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_ddim_with_noise_reproduces_the_known_gaussian_chain():
    # data N(0.5, 0.7^2), eta = 1: variances of methods/dts.md, section 8
    for steps, known in ((3, 0.106862), (10, 0.308008)):
        u = torch.linspace(0.02, 1, steps, dtype=torch.float64).flip(0)
        bar = torch.cat([torch.cos(0.999 * math.pi / 2 * u) ** 2, torch.ones(1, dtype=torch.float64)])
        levels = Levels(bar.sqrt(), (1 - bar).sqrt(), "sample")

        def posterior_mean(x, i, bar=bar):
            a, s2 = float(bar[i].sqrt()), 1 - float(bar[i])
            return 0.5 + a * 0.49 / (a * a * 0.49 + s2) * (x - a * 0.5)

        start = Levels(levels.alpha, torch.cat([torch.ones(1, dtype=torch.float64), levels.sigma[1:]]), "sample")
        assert float(start.sigma[0]) == 1.0
        mean, variance = 0.0, 1.0
        for i in range(steps):
            probes = torch.tensor([[0.0], [1.0]])
            step = ddim(1.0)(levels, probes, posterior_mean(probes.double(), i).float(), i)
            shift, gain = float(step.mean[0]), float(step.mean[1] - step.mean[0])
            mean, variance = shift + gain * mean, gain**2 * variance + step.std**2
        assert variance == pytest.approx(known, rel=2e-4)
        assert mean == pytest.approx(0.5, abs=2e-3)


def test_coefficient_preserving_steps_are_exact_on_a_point_mass():
    levels, m = flow_levels(7), 0.3
    mean, variance = 0.0, 1.0
    for i in range(len(levels) - 1):
        s = float(levels.sigma[i])
        probes = torch.tensor([[0.0], [1.0]])
        step = cps(0.8)(levels, probes, (probes - m) / s, i)
        gain = float(step.mean[1] - step.mean[0])
        mean, variance = float(step.mean[0]) + gain * mean, gain**2 * variance + step.std**2
        assert variance == pytest.approx(float(levels.sigma[i + 1]) ** 2, rel=1e-4)
        assert mean == pytest.approx((1 - float(levels.sigma[i + 1])) * m, abs=1e-5)


def test_coefficient_preserving_steps_shrink_gaussian_data_by_the_documented_bias():
    assert flow_marginal(10, cps(0.8))[1] == pytest.approx(0.124, abs=1e-3)


def test_the_flow_sde_widens_a_point_mass_by_the_known_amount():
    levels, a, m = flow_levels(10), 0.7, 0.0
    for i in (1, 4, 8):
        t, s = float(levels.sigma[i]), float(levels.sigma[i + 1])
        probes = torch.tensor([[0.0], [1.0]])
        step = flow_sde(a)(levels, probes, (probes - m) / t, i)
        g, h = a * math.sqrt(t / (1 - t)), t - s
        variance = float(step.mean[1] - step.mean[0]) ** 2 * t**2 + step.std**2
        assert variance == pytest.approx(s**2 + g**2 * h**2 / t * (1 + g**2 / (4 * t)), rel=1e-4)


def test_without_noise_every_kernel_is_the_euler_step():
    levels, x, v = flow_levels(5), torch.randn(2, 3), torch.randn(2, 3)
    for i in range(4):
        euler = x - float(levels.sigma[i] - levels.sigma[i + 1]) * v
        for kernel in (ddim(0.0), cps(0.0), flow_sde(0.0)):
            assert torch.allclose(kernel(levels, x, v, i).mean, euler, atol=1e-6)


def test_full_coefficient_preserving_noise_keeps_only_the_clean_part():
    levels, x, v = flow_levels(5), torch.randn(2, 3), torch.randn(2, 3)
    step = cps(1.0)(levels, x, v, 1)
    s = float(levels.sigma[2])
    assert step.std == pytest.approx(s)
    assert torch.allclose(step.mean, (1 - s) * levels.denoised(x, v, 1), atol=1e-6)


def test_the_first_flow_sde_step_takes_its_noise_from_the_second_level():
    levels, x, v = flow_levels(10), torch.randn(1, 4), torch.randn(1, 4)
    assert flow_sde(0.7)(levels, x, v, 0).std == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.9)) * math.sqrt(0.1))


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_a_start_just_below_pure_noise_is_one_from_pure_noise(cls, shift, steps):
    scheduler = cls(**FLOW, flow_shift=shift)
    scheduler.set_timesteps(steps)
    levels, a = read_levels(scheduler, scheduler.timesteps), 0.7
    assert 0.999 < float(levels.sigma[0]) < 1
    pure = Levels(levels.alpha.clone(), levels.sigma.clone(), "flow")
    pure.alpha[0], pure.sigma[0] = 0.0, 1.0
    assert flow_diffusion(levels, 0, a) == pytest.approx(flow_diffusion(pure, 0, a), rel=1e-3)
    for i in range(steps - 1):
        one, none = torch.ones(1, 1), torch.zeros(1, 1)
        of_x = flow_sde(a)(levels, one, none, i)
        assert (0.3 if i else 1 - a * a / 2 - 1e-5) <= float(of_x.mean) <= 1  # what is left of x
        assert 0 < of_x.std <= (1.1 if i else a + 1e-5)
        h = float(levels.sigma[i] - levels.sigma[i + 1])
        assert h <= -float(flow_sde(a)(levels, none, one, i).mean) <= h * (1 + a * a / 2) + 1e-5


@given(st.floats(0.01, 3), st.integers(1, 5))
def test_log_density_is_the_normal_one_in_both_conventions(std, rows):
    mean, x = torch.randn(rows, 2, 3), torch.randn(rows, 2, 3)
    normal = torch.distributions.Normal(mean, std).log_prob(x).flatten(1)
    step = Transition(mean, std)
    assert torch.allclose(step.log_prob(x), normal.sum(1), rtol=1e-4, atol=1e-4)
    assert torch.allclose(step.log_prob(x, "mean"), normal.mean(1), rtol=1e-4, atol=1e-4)
    assert step.log_prob(x).dtype == torch.float32


def test_log_density_refuses_an_unknown_convention():
    with pytest.raises(ConfigError, match="'sum'"):
        Transition(torch.zeros(1, 2), 1.0).log_prob(torch.zeros(1, 2), "total")


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        DDIMScheduler(),
        DPMSolverMultistepScheduler(),
        EulerDiscreteScheduler(),
        EulerAncestralDiscreteScheduler(),
        LCMScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        DDIMScheduler(prediction_type="v_prediction"),
        EulerDiscreteScheduler(prediction_type="v_prediction"),
        DDIMScheduler(prediction_type="sample"),
    ],
    ids=lambda s: f"{type(s).__name__}-{s.config.get('prediction_type')}",
)
def test_the_face_of_every_scheduler_returns_the_clean_latent_and_the_noise_it_was_made_of(scheduler):
    scheduler.set_timesteps(8)
    levels = read_levels(scheduler, scheduler.timesteps)
    x0, eps = torch.randn(2, 3), torch.randn(2, 3)
    for i in range(len(levels)):
        alpha, sigma = levels.at(i)
        x, scale = alpha * x0 + sigma * eps, math.hypot(alpha, sigma)
        prediction = {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": (alpha * eps - sigma * x0) / scale,
            "flow": eps - x0,
        }[levels.prediction]
        assert torch.allclose(levels.denoised(x, prediction, i), x0, atol=2e-3 * max(1, sigma / max(alpha, 1e-3)))
        assert torch.allclose(levels.epsilon(x, prediction, i), eps, atol=2e-3 * max(1, 1 / sigma))
    assert (levels.sigma / levels.alpha.clamp(min=1e-9)).diff().le(0).all()


def test_the_flow_schedule_of_sd3_is_the_published_one():
    # shift 3, ten steps: methods/flow_grpo.md, section 5
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    known = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    assert read_levels(scheduler, scheduler.timesteps).sigma.tolist() == pytest.approx(known, abs=1e-4)


def test_flow_sde_on_another_model_names_the_alternative():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    levels = read_levels(scheduler, scheduler.timesteps)
    with pytest.raises(SeamError, match="ddim"):
        flow_sde()(levels, torch.zeros(1, 2), torch.zeros(1, 2), 0)


@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=6, unique=True))
def test_a_case_draws_the_same_noise_whoever_its_neighbours_are(seeds):
    like = torch.zeros(len(seeds), 2, 3)
    together = case_noise(seeds, like, "step", 4)
    for row, seed in zip(together, seeds, strict=True):
        assert torch.equal(row, case_noise([seed], like[:1], "step", 4)[0])


def test_streams_of_one_case_are_independent():
    first, second = (torch.randn(8, generator=case_generator(3, "step", i)) for i in (0, 1))
    assert not torch.equal(first, second)
