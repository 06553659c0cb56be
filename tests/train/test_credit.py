from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign import config, shaping
from diffalign.errors import ConfigError
from diffalign.noise import Levels, flow_sde
from diffalign.train import credit
from diffalign.train.credit import CreditConfig
from tests.train import bench_chain

T = 10
VALUES = st.lists(st.floats(-100, 100), min_size=T + 1, max_size=T + 1)


def sd3(a: float = 1.0) -> tuple[Levels, Tensor, Tensor]:
    """Levels, nu (T,) and h (T,) of the SD3 schedule (shift 3, 10 steps)."""
    lowest = 3e-3 / (1 + 2e-3)  # of the scheduler's thousand levels, shifted once already
    even = torch.linspace(1, lowest, T, dtype=torch.float64)
    s = torch.cat([3 * even / (1 + 2 * even), torch.zeros(1, dtype=torch.float64)])
    s = s.round(decimals=4)  # as in the spec, whose figures then agree to the last digit
    levels = Levels(1 - s, s, "flow")
    h = s[:-1] - s[1:]
    below = torch.where(s[:-1] < 1, s[:-1], s[1])
    nu = a * (s[:-1] / (1 - below)).sqrt() * h.sqrt()
    return levels, nu, h


def test_tempflow_weights_on_the_sd3_schedule_are_those_of_the_spec() -> None:
    _, nu, h = sd3()
    # credit_assignment.md 3.1: all ten steps, and the first nine alone
    ten = torch.tensor([1.749, 1.856, 1.339, 1.114, 0.979, 0.882, 0.797, 0.705, 0.563, 0.016], dtype=torch.float64)
    nine = torch.tensor([1.577, 1.673, 1.207, 1.004, 0.883, 0.795, 0.719, 0.635, 0.508, 0], dtype=torch.float64)
    torch.testing.assert_close(credit.tempflow_weights(nu), ten, atol=6e-4, rtol=0)
    nu[-1] = 0
    torch.testing.assert_close(credit.STEP_WEIGHTS["tempflow"](nu, h), nine, atol=6e-4, rtol=0)


@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=20), st.floats(0.1, 10))
def test_tempflow_weights_average_1_and_do_not_see_the_noise_level(nu: list[float], a: float) -> None:
    weights = credit.tempflow_weights(torch.tensor(nu))
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(credit.tempflow_weights(a * torch.tensor(nu)), weights)


def test_a_window_of_one_step_keeps_the_weight_that_the_step_has_among_all() -> None:
    _, nu, h = sd3()
    whole, reference = credit.tempflow_weights(nu, h), float(nu.mean())
    for i in range(T):
        part = slice(i, i + 1)
        for weigh in (credit.tempflow_weights, credit.STEP_WEIGHTS["tempflow"]):
            torch.testing.assert_close(weigh(nu[part], h[part], reference), whole[part])
        assert credit.tempflow_weights(nu[part], h[part]).tolist() == [1]  # a window's own mean knows of no other
        for name in ("none", "ratio_norm"):
            assert torch.equal(credit.STEP_WEIGHTS[name](nu, h, reference), credit.STEP_WEIGHTS[name](nu, h))


def test_steps_of_equal_noise_have_tempflow_weight_1_and_steps_without_noise_0() -> None:
    nu, h = torch.tensor([0.0, 0.3, 0.3, 0.0]), torch.tensor([0.1, 0.2, 0.5, 0.2])
    assert credit.STEP_WEIGHTS["tempflow"](nu, h).tolist() == [0, 1, 1, 0]
    assert credit.STEP_WEIGHTS["none"](nu, h).tolist() == [0, 1, 1, 0]
    assert credit.STEP_WEIGHTS["ratio_norm"](nu, h).tolist() == pytest.approx([0, 5, 2, 0])
    assert credit.tempflow_weights(torch.zeros(3)).tolist() == [0, 0, 0]


def test_gradient_scales_are_h_over_nu_then_h_then_1() -> None:
    a = 1.0
    levels, nu, h = sd3(a)
    step = flow_sde(a)
    generator = torch.Generator().manual_seed(0)
    plain, spread = [], {name: [] for name in credit.STEP_WEIGHTS}
    for i in range(T):
        x, v = torch.randn(2, 1, 4, 8, 8, generator=generator)
        v.requires_grad_()
        moved = step(levels, x, v, i)
        assert moved.std == pytest.approx(float(nu[i]))
        eps = torch.randn(x.shape, generator=generator)
        landed = moved.sample(eps).detach()
        old = moved.mean.detach()
        log_theta = moved.log_prob(landed, "mean")
        normed = credit.noise_log_ratio(landed, moved.mean, old, moved.std)
        drift = 1 + a * a / 2 if i else 1.0  # at s = 1 the slope of the mean in v is h alone
        unit = drift * eps.double() / eps.numel()
        for name, log_ratio in (("none", log_theta), ("tempflow", log_theta), ("ratio_norm", normed)):
            (grad,) = torch.autograd.grad(log_ratio.sum(), v, retain_graph=True)
            spread[name].append(grad.double() * credit.STEP_WEIGHTS[name](nu, h)[i] / unit)
        plain.append(float(h[i] / nu[i]))
    # credit_assignment.md section 0: the plain loss on SD3, a = 1
    golden = [0.0399, 0.0441, 0.0727, 0.1057, 0.1484, 0.2086, 0.3012, 0.4638, 0.8360, 0.9955]
    assert plain == pytest.approx(golden, abs=6e-5)
    for i in range(T):
        like = torch.ones_like(spread["none"][i])
        torch.testing.assert_close(spread["none"][i], -plain[i] * like, rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(spread["tempflow"][i], -h[i] / nu.mean() * like, rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(spread["ratio_norm"][i], -like, rtol=2e-3, atol=1e-4)


def by_densities(log: list[Tensor], theta: Tensor, old: Tensor, nu: float, convention: str = "mean") -> Tensor:
    """GRPO-Guard's formula: nu (l - l_old + mean(delta^2) / (2 nu^2))."""
    squares = (theta - old).square().flatten(1)
    return nu * (log[0] - log[1] + (squares.mean(1) if convention == "mean" else squares.sum(1)) / (2 * nu**2))


@pytest.mark.parametrize("convention", ["mean", "sum"])
def test_the_normalised_ratio_is_the_product_of_noise_and_change(convention: str) -> None:
    generator = torch.Generator().manual_seed(1)
    old, eps = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    theta = (old + 1e-2 * torch.randn(old.shape, generator=generator)).requires_grad_()
    nu = 0.3  # in float64, where two large log-densities can be subtracted
    landed = old + nu * eps
    log = [torch.distributions.Normal(m, nu).log_prob(landed).flatten(1) for m in (theta, old)]
    reduce = (lambda x: x.mean(1)) if convention == "mean" else (lambda x: x.sum(1))
    ratio = by_densities([reduce(each) for each in log], theta, old, nu, convention)
    expected = reduce((eps * (theta - old)).flatten(1))
    torch.testing.assert_close(ratio, expected)
    direct = credit.noise_log_ratio(landed, theta, old, nu, convention)
    tolerance = 1e-8 * (1 if convention == "mean" else eps[0].numel())
    torch.testing.assert_close(direct.double(), expected, atol=tolerance, rtol=1e-4)
    slopes = [torch.autograd.grad(r.sum(), theta, retain_graph=True)[0] for r in (ratio, direct)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("convention", ["mean", "sum"])
def test_the_normalised_ratio_is_exactly_1_before_the_first_update(convention: str) -> None:
    mean = torch.randn(3, 4, 8, 8)
    assert credit.noise_log_ratio(mean + 0.1, mean, mean, 0.2, convention).exp().tolist() == [1, 1, 1]


def test_the_normalised_ratio_has_no_drift_where_the_plain_one_falls() -> None:
    nu, delta = 0.5, 0.2
    eps = bench_chain.exact(1).eps.flatten()  # nodes and weights of the standard normal
    share = bench_chain.exact(1).share
    old = torch.zeros(3, 1, dtype=torch.float64)
    theta = old + delta
    landed = old + nu * eps.unsqueeze(1)
    log = [-((landed - m) ** 2).mean(1) / (2 * nu**2) for m in (theta, old)]
    normed = credit.noise_log_ratio(landed, theta, old, nu)
    torch.testing.assert_close(normed.double(), by_densities(log, theta, old, nu), rtol=1e-6, atol=1e-7)
    assert float((share * (log[0] - log[1])).sum()) == pytest.approx(-(delta**2) / (2 * nu**2))
    assert float((share * normed).sum()) == pytest.approx(0, abs=1e-8)


def test_a_step_without_noise_has_no_normalised_ratio() -> None:
    with pytest.raises(ConfigError, match=r"nu = 0\.0. Train SDE steps"):
        credit.noise_log_ratio(*torch.zeros(3, 1, 2), 0.0)


def test_coca_weights_are_those_of_the_spec() -> None:
    each = credit.coca(torch.tensor([[0.1, 0.3, 0.35, 0.6, 0.9, 1.0]]))
    assert each[0].tolist() == pytest.approx([1, 0.7778, 0.7222, 0.4444, 0.1111], abs=5e-5)
    pairs = credit.coca(torch.tensor([[0.1, 0.2, 0.3, 0.5, 0.6, 0.9, 1.0]]), window=2)
    assert pairs[0].tolist() == pytest.approx([1, 0.91176, 0.82353, 0.64706, 0.47059, 0.23529], abs=5e-6)


@given(VALUES, st.integers(1, T), st.floats(0, 1))
def test_coca_weights_start_at_1_and_never_rise(sims: list[float], window: int, alpha: float) -> None:
    weights = credit.coca(torch.tensor([sims], dtype=torch.float64) / 100, window, alpha)[0]
    assert float(weights[0]) == pytest.approx(1)
    assert bool((weights.diff() <= 1e-12).all())
    assert float(weights.min()) >= alpha - 1e-9


def test_coca_with_alpha_1_is_the_plain_broadcast() -> None:
    assert credit.coca(torch.rand(4, T + 1), window=3, alpha=1.0).tolist() == [[1.0] * T] * 4


@pytest.mark.parametrize("sims", [[0.5] * (T + 1), [1 - i / T for i in range(T + 1)], [i / T for i in range(T + 1)]])
def test_coca_without_gain_or_with_even_gains_is_uniform_credit(sims: list[float]) -> None:
    torch.testing.assert_close(credit.coca(torch.tensor([sims]))[0], torch.arange(T, 0, -1) / T)


def test_coca_counts_a_step_back_as_no_gain() -> None:
    weights = credit.coca(torch.tensor([[0.0, 0.5, 0.2, 1.0]]))[0]
    assert weights.tolist() == pytest.approx([1, 0.8 / 1.3, 0.8 / 1.3])


def test_phase_gains_telescope_and_span_broadcast_to_dense() -> None:
    q = torch.rand(3, T + 1, dtype=torch.float64)
    torch.testing.assert_close(credit.phase_gains(q, range(1, T + 1), T), credit.dense_gains(q))
    ends = [2, 5, T]
    split = credit.phase_gains(q[:, :4], ends, T)
    torch.testing.assert_close(split.sum(1), q[:, 3] - q[:, 0])
    torch.testing.assert_close(split[:, 2:5], ((q[:, 2] - q[:, 1]) / 3).unsqueeze(1).expand(3, 3))
    whole = torch.stack([torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])], 1)
    torch.testing.assert_close(credit.phase_gains(whole, [T], T), (whole[:, 1:] / T).expand(3, T))


@pytest.mark.parametrize("ends", [[3, 2, T], [3, T - 1], [T], [0, 4, T]])
def test_phase_ends_that_do_not_cover_the_chain_are_refused(ends: list[int]) -> None:
    with pytest.raises(ConfigError, match="rising phase ends"):
        credit.phase_gains(torch.rand(2, 4 if len(ends) == 3 else 3), ends, T)


def test_phases_end_where_the_noise_level_falls_to_their_cut() -> None:
    assert credit.phase_ends([1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0], [0.8, 0.4]) == [2, 4, 6]
    assert credit.phase_ends([1.0, 0.5, 0.0], []) == [2]
    with pytest.raises(ConfigError, match="leaves a phase of 2 steps empty"):
        credit.phase_ends([1.0, 0.5, 0.0], [0.7, 0.6])


@given(VALUES)
def test_dense_gains_telescope_to_the_final_reward_less_the_first_value(values: list[float]) -> None:
    R = torch.tensor([values], dtype=torch.float64)
    gains = credit.dense_gains(R)
    assert gains.shape == (1, T)
    torch.testing.assert_close(gains.sum(1), R[:, -1] - R[:, 0])
    torch.testing.assert_close(credit.returns(gains, 1), R[:, -1:] - R[:, :-1])
    assert credit.returns(gains, 0) is gains


def test_dense_gains_of_a_linear_reward_are_the_reward_of_the_move() -> None:
    x, w = torch.randn(3, T + 1, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(credit.dense_gains(x @ w), (x[:, 1:] - x[:, :-1]) @ w)


def test_without_noise_or_with_one_noisy_step_only_that_step_gains() -> None:
    assert not credit.dense_gains(torch.full((2, T + 1), 0.7)).any()
    R = torch.tensor([[0.2] * 4 + [0.9] * (T - 3)])
    assert credit.dense_gains(R)[0].nonzero().flatten().tolist() == [3]


def test_returns_take_no_discount_between() -> None:
    with pytest.raises(ConfigError, match=r"gamma is 2"):
        credit.returns(torch.zeros(1, 2), 2)


def test_credit_that_is_equal_over_steps_is_the_plain_advantage_at_every_step() -> None:
    R, gid = torch.rand(12, generator=torch.Generator().manual_seed(3)), torch.arange(12) // 4
    broadcast = credit.phase_gains(torch.stack([torch.zeros(12), T * R], 1), [T], T)
    torch.testing.assert_close(shaping.step_norm(broadcast, gid), shaping.adv_grpo(R, gid).unsqueeze(1).expand(12, T))


def test_dense_advantages_do_not_see_scale_and_shift_of_the_reward() -> None:
    R, gid = torch.rand(12, T + 1, dtype=torch.float64), torch.arange(12) // 4
    A = shaping.step_norm(credit.dense_gains(100 * R), gid)
    torch.testing.assert_close(shaping.step_norm(credit.dense_gains(700 * R - 5), gid), A, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(A.reshape(3, 4, T).mean(1), torch.zeros(3, T, dtype=torch.float64), atol=1e-9, rtol=0)
    assert not shaping.step_norm(credit.dense_gains(torch.full((12, T + 1), 0.7)), gid).any()


def test_null_controls_keep_the_sum_and_forget_the_step() -> None:
    A = torch.rand(5, T)
    mixed = credit.shuffled(A, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed.sort(1).values, A.sort(1).values)
    assert not torch.equal(mixed, A)
    torch.testing.assert_close(credit.averaged(A).sum(0), A.sum(0))


# The bench chain: every estimator against the true credit, without sampling error.


def test_bench_broadcast_has_correlation_one_over_root_t_and_variance_t_plus_1() -> None:
    chain = bench_chain.exact(T)
    assert chain.correlation(chain.broadcast()) == pytest.approx(1 / math.sqrt(T))
    assert chain.variance(chain.broadcast()).tolist() == pytest.approx([T + 1] * T)


def test_bench_dense_gains_are_the_true_credit_and_return_to_go_lies_between() -> None:
    chain = bench_chain.exact(T)
    gains = credit.dense_gains(chain.x)
    torch.testing.assert_close(gains, chain.truth)
    assert chain.correlation(gains) == pytest.approx(1)
    assert chain.variance(credit.returns(gains, 0)).tolist() == pytest.approx([2] * T)
    assert chain.variance(credit.returns(gains, 1)).tolist() == pytest.approx([T - i + 1 for i in range(T)])


@pytest.mark.parametrize(("ends", "sizes"), [([T], [10]), ([5, T], [5, 5]), ([2, 4, T], [2, 2, 6])])
def test_bench_phases_spread_credit_over_their_steps_only(ends: list[int], sizes: list[int]) -> None:
    chain = bench_chain.exact(T)
    A = credit.phase_gains(chain.x[:, [0, *ends]], ends, T)
    expected = [(n + 1) / n**2 for n in sizes for _ in range(n)]
    assert chain.variance(A).tolist() == pytest.approx(expected)
    variances = sum(n / n for n in sizes)  # the variance of a phase's credit is 1 / n, over n steps
    assert chain.correlation(A) == pytest.approx(len(sizes) / math.sqrt(variances * T))


def test_bench_coca_with_even_similarities_is_a_ramp_on_the_broadcast() -> None:
    chain = bench_chain.exact(T)
    sims = torch.linspace(0, 1, T + 1, dtype=torch.float64).expand(len(chain.eps), T + 1)
    weights = credit.coca(sims)
    A = chain.broadcast() * weights
    ramp = [(T - i) / T for i in range(T)]
    assert chain.variance(A).tolist() == pytest.approx([(T + 1) * w * w for w in ramp])
    assert chain.correlation(A) == pytest.approx(sum(ramp) / (T * math.sqrt(sum(w * w for w in ramp))))


def test_bench_renorm_halfway_between_gain_and_outcome() -> None:
    chain = bench_chain.exact(T)
    A = shaping.renorm(credit.dense_gains(chain.x), chain.reward)
    assert chain.correlation(A) == pytest.approx(2 / math.sqrt(T + 3))


@pytest.mark.parametrize("weighting", ["none", "tempflow"])
def test_bench_step_weights_scale_steps_and_leave_their_direction(weighting: str) -> None:
    nu = torch.linspace(2, 0.2, T, dtype=torch.float64)
    chain = bench_chain.exact(T, nu)
    weights = credit.STEP_WEIGHTS[weighting](nu, torch.full((T,), 1 / T, dtype=torch.float64))
    slope = chain.mean(
        chain.truth * chain.eps / nu * weights
    )  # d E[R] through log p, whose slope in the mean is eps / nu
    torch.testing.assert_close(slope, weights)
    assert credit.STEP_WEIGHTS["ratio_norm"](nu, torch.ones(T)).tolist() == [1] * T


def test_bench_null_control_loses_the_credit() -> None:
    chain = bench_chain.drawn(20000, T)
    mixed = credit.shuffled(chain.truth, torch.Generator().manual_seed(0))
    assert chain.correlation(mixed) == pytest.approx(1 / T, abs=0.02)  # a step gets its own gain back once in T


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weighting": "both"}, "credit.weighting is 'both'"),
        ({"window": 3}, "belong to coca"),
        ({"alpha": 0.5}, "belong to coca"),
        ({"similarity": "coca", "window": 0}, "credit.window is 0"),
        ({"similarity": "coca", "alpha": 1.5}, "credit.alpha is 1.5"),
        ({"similarity": "coca", "gamma": 1}, "Choose one of the two"),
        ({"similarity": "coca", "phases": [0.8]}, "Choose one of the two"),
        ({"phases": [0.4, 0.8]}, "falling noise levels"),
        ({"phases": [0.0]}, "falling noise levels"),
        ({"gamma": 2}, "credit.gamma is 2"),
        ({"mu": 0.5}, "only renorm reads it"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.build(CreditConfig, given, where="credit")


def test_settings_survive_the_config_file() -> None:
    made = CreditConfig(weighting="tempflow", phases=(0.8, 0.4), gamma=1, process="renorm", mu=0.5)
    assert config.build(CreditConfig, config.parse(config.dump(made), "here")) == made


def test_rewards_per_step_and_settings_for_them_go_together() -> None:
    CreditConfig(similarity="coca").require_source(dense=False)
    CreditConfig(gamma=1, process="renorm").require_source(dense=True)
    CreditConfig(phases=(0.5,), gamma=1).require_source(dense=False)
    for made in (CreditConfig(similarity="coca"), CreditConfig(phases=(0.5,))):
        with pytest.raises(ConfigError, match="rewards per step of its own"):
            made.require_source(dense=True)
    for made in (CreditConfig(gamma=1), CreditConfig(process="renorm")):
        with pytest.raises(ConfigError, match="no steps to go over"):
            made.require_source(dense=False)
