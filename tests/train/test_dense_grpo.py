"""DenseGRPO: step rewards that telescope, vanish without noise, and are Flow-GRPO's walks; the calibration of noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign import noise
from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.noise import Levels
from diffalign.train import credit
from diffalign.train.objectives.dense_grpo import (
    CalibrationConfig,
    DenseGRPOConfig,
    calibrated,
    settled,
    share_of,
    thinned,
)
from tests.train import jobs
from tests.train.jobs import Brightness

DENSE = {"step_norm": "group_step", "eps": 1e-12}
KERNELS = {"flow_sde": "sd3", "cps": "sd3", "ddim": "sd15_ddim"}


@contextmanager
def dense(family: str = "sd3", *, steps: int = 4, reward: Any = None, **settings: Any) -> Iterator[tuple[Any, Any]]:
    """A dense job on a model that is not its base, with a reward in steps of a hundred."""
    outer = {name: settings.pop(name) for name in ("group_size", "micro_batch", "advantage") if name in settings}
    outer = {"advantage": DENSE, **outer}
    told, call = {"dense_grpo": settings}, {"num_inference_steps": steps}
    with jobs.job(family, told, reward=reward or Brightness(100), call=call, **outer) as (job, chosen):
        jobs.touched(job)
        yield job, chosen


def worth(job: Any, chosen: Any, rollout: Any) -> Tensor:
    """R (B, T + 1): what the completion of every level is worth, the image itself last."""
    final = (job.score(rollout.media, rollout.cases) * job.weights).sum(1, keepdim=True)
    return torch.cat([chosen.values(job, [rollout], range(rollout.driver.length)), final], 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gains_telescope_to_the_reward_less_that_of_the_start_without_noise(kernel: str) -> None:
    with dense(KERNELS[kernel], noise={"kernel": kernel, "train_last": kernel == "flow_sde"}) as (job, chosen):
        rollouts, rewards = chosen.sampled(job, 0, job.cases_of(0))
        gains = chosen.step_rewards(job, rollouts, rewards)
        start = torch.cat([worth(job, chosen, rollout)[:, 0] for rollout in rollouts])
        assert gains.shape == (6, len(rollouts[0].trained))
        assert float(gains.abs().min()) > 1e-4
        torch.testing.assert_close(gains.sum(1), rewards[:, 0] - start, rtol=1e-4, atol=1e-4)


def test_gains_follow_the_walk_from_level_to_level() -> None:
    with dense(noise={"window": 2, "low": 1}) as (job, chosen):
        rollouts, rewards = chosen.sampled(job, 0, job.cases_of(0))
        gains = chosen.step_rewards(job, rollouts, rewards)
        values = torch.cat([worth(job, chosen, rollout) for rollout in rollouts])
        torch.testing.assert_close(gains, credit.dense_gains(values)[:, 1:3], rtol=1e-4, atol=1e-4)
        level = DenseGRPOConfig(value="level", noise=chosen.config.noise)
        chosen.config = level
        torch.testing.assert_close(chosen.step_rewards(job, rollouts, rewards), values[:, 2:4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_completion_of_the_start_is_the_plain_sample_to_the_bit(kernel: str) -> None:
    with dense(KERNELS[kernel], noise={"kernel": kernel}) as (job, chosen), torch.no_grad():
        rollout = chosen.sampled(job, 0, job.cases_of(0))[0][0]
        plain = rollout.driver.rollout(noise.KERNELS[kernel](0.0), dtype=torch.float32)
        assert torch.equal(chosen.complete(job, rollout, 0), plain.media.float())
        stock = rollout.driver.rollout()
        torch.testing.assert_close(plain.media, stock.media, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_noisy_step_has_all_the_gain_and_the_others_none_to_the_bit(kernel: str) -> None:
    with dense(KERNELS[kernel], noise={"kernel": kernel, "window": 1, "low": 1}) as (job, chosen):
        rollouts, rewards = chosen.sampled(job, 0, job.cases_of(0))
        values = torch.cat([worth(job, chosen, rollout) for rollout in rollouts])
        gains = credit.dense_gains(values)
        assert not gains[:, [0, 2, 3]].any()
        assert bool((gains[:, 1] != 0).all())
        assert torch.equal(gains[:, 1], values[:, -1] - values[:, 0])
        assert torch.equal(chosen.step_rewards(job, rollouts, rewards), gains[:, 1:2])


def test_without_noise_there_are_neither_gains_nor_advantages() -> None:
    with dense() as (job, chosen):
        chosen.restore({"psi": [0.0] * 4})
        rollouts, rewards = chosen.sampled(job, 0, job.cases_of(0))
        assert not chosen.step_rewards(job, rollouts, rewards).any()
        found = chosen.collect(job, 0)
        assert not any(micro.advantages.any() for micro in found.micros)
        assert found.stats["frac_zero_std"] < 1  # the images differ by their starts
        jobs.learn(job, chosen, found.micros)
        assert not jobs.gradients(job).any()


def test_gains_fall_to_nothing_with_the_noise() -> None:
    largest = []
    for level in (1e-1, 1e-3):
        with dense(noise={"level": level}) as (job, chosen):
            gains = chosen.step_rewards(job, *chosen.sampled(job, 0, job.cases_of(0)))
            largest.append(float(gains.abs().max()))
    assert largest[1] < 0.03 * largest[0]


@pytest.mark.parametrize("window", [{"window": 0}, {"window": 2, "low": 1}])
def test_with_psi_of_the_flow_sde_the_walks_are_flow_grpos_to_the_bit(window: dict[str, int]) -> None:
    told, call = {"noise": window}, {"num_inference_steps": 5}
    found = []
    for objective in ("flow_grpo", "dense_grpo"):
        outer = {"advantage": DENSE} if objective == "dense_grpo" else {}
        with jobs.job("sd3", {objective: told}, call=call, **outer) as (job, chosen):
            jobs.touched(job)
            if objective == "dense_grpo":
                levels = job.levels
                chosen.restore({"psi": [noise.flow_diffusion(levels, i, 0.7) for i in range(5)]})
            found.append(chosen.sampled(job, 0, job.cases_of(0))[0])
    for flow, ours in zip(*found, strict=True):
        assert flow.trained == ours.trained
        assert torch.equal(flow.log_probs, ours.log_probs)
        assert all(torch.equal(a, b) for a, b in zip(flow.walk.latents, ours.walk.latents, strict=True))
        assert torch.equal(flow.media, ours.media)


@pytest.mark.parametrize("over", ["group_step", "group_all", "batch_step"])
def test_another_unit_of_the_reward_leaves_advantages_alone(over: str) -> None:
    def values(reward: Brightness) -> Tensor:
        with dense(reward=reward, advantage=DENSE | {"step_norm": over}) as (job, chosen):
            return torch.cat([micro.advantages for micro in chosen.collect(job, 0).micros])

    plain, other = values(Brightness(100)), values(Brightness(250, 7))
    assert plain.any()
    torch.testing.assert_close(plain, other, rtol=2e-2, atol=2e-2)


def test_advantages_of_every_step_have_mean_0_and_deviation_1_in_a_group() -> None:
    with dense() as (job, chosen):
        values = torch.cat([micro.advantages for micro in chosen.collect(job, 0).micros]).view(2, 3, -1)
        torch.testing.assert_close(values.mean(1), torch.zeros(2, 3), rtol=0, atol=1e-5)
        torch.testing.assert_close(values.std(1, correction=0), torch.ones(2, 3), rtol=1e-4, atol=0)


class Blind(Brightness):
    """Brightness that fails on the third picture of the first batch of completions."""

    def __init__(self) -> None:
        super().__init__(100)
        self.asked = 0

    def __call__(self, media: Tensor, cases: Any) -> Tensor:
        found = super().__call__(media, cases)
        if self.asked == 2:  # after the two micro-batches of images come their completions
            found[2] = torch.nan
        self.asked += 1
        return found


def test_a_failed_completion_costs_its_cells_only() -> None:
    with dense(reward=Blind()) as (job, chosen):
        found = chosen.collect(job, 0)
        values = torch.cat([micro.advantages for micro in found.micros])
        assert values.isfinite().all()
        assert float(values[2, 0]) == 0
        assert bool((values[[0, 1, 3, 4, 5]] != 0).all())
        torch.testing.assert_close(values[0, 0], -values[1, 0], rtol=1e-3, atol=1e-3)


@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_a_field_without_velocity_gives_gains_in_closed_form(eps: list[float]) -> None:
    sigma = torch.linspace(1, 0, 7, dtype=torch.float64)
    levels, weight = Levels(1 - sigma, sigma, "flow"), torch.tensor([2.0, -1.0])
    kernel, x = noise.diffused([0.5] * 6), torch.tensor([[0.3, -0.2]])
    latents = [x]
    for i, e in enumerate(eps):
        x = kernel(levels, x, torch.zeros_like(x), i).sample(torch.full_like(x, e))
        latents.append(x)
    values = torch.stack([at @ weight for at in latents], 1)  # a completion goes nowhere: R_t = w x_t
    moves = torch.stack([(b - a) @ weight for a, b in itertools.pairwise(latents)], 1)
    torch.testing.assert_close(credit.dense_gains(values), moves, rtol=1e-4, atol=1e-5)


def test_a_shorter_completion_skips_evenly_through_the_schedule() -> None:
    assert thinned(0, 10, 10) == list(range(10))
    assert thinned(7, 10, 5) == [7, 8, 9]
    assert thinned(0, 10, 2) == [0, 5]
    assert thinned(4, 10, 1) == [4]
    assert thinned(2, 10, 3) == [2, 5, 7]


def test_a_completion_in_one_call_is_the_one_step_estimate_and_in_all_calls_the_plain_one() -> None:
    with dense(completion=1) as (job, chosen), torch.no_grad():
        rollout = chosen.sampled(job, 0, job.cases_of(0))[0][0]
        driver, before = rollout.driver, job.budget.nfe
        found = chosen.complete(job, rollout, 1)
        assert job.budget.nfe - before == 2 * 3  # one call with guidance for three images
        x = rollout.walk.latents[1]
        expected = driver.decode(driver.denoised(x, driver.predict(x, 1), 1))
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
        whole = chosen.complete(job, rollout, 3)  # a single step is left anyway
        rest = driver.rollout(noise.flow_sde(0.0), x=rollout.walk.latents[3], start=3, dtype=torch.float32)
        assert torch.equal(whole, rest.media.float())


# calibration


def signs(*rows: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)[:, None]


def test_psi_rises_where_gains_are_balanced_and_falls_on_both_sides() -> None:
    told = CalibrationConfig()
    assert calibrated([0.5], signs(1, -1, 1, -1), told) == pytest.approx([0.51])
    assert calibrated([0.5], signs(1, 1, -1), told) == pytest.approx([0.51])  # a difference of 1 is below 2
    assert calibrated([0.5], signs(1, 1, 1, -1), told) == pytest.approx([0.49])  # of 2 is not: strictly below
    assert calibrated([0.5], signs(-1, -1, -1), told) == pytest.approx([0.49])
    assert calibrated([0.5], signs(1, 1, 1), told) == pytest.approx([0.49])
    assert calibrated([0.5], signs(0, 0, 0), told) == pytest.approx([0.51])  # ties count on neither side
    assert calibrated([0.5], signs(1, 1, 1), CalibrationConfig(tolerance=4)) == pytest.approx([0.51])


def test_psi_stays_between_its_bounds_and_steps_move_apart() -> None:
    told = CalibrationConfig(floor=0.02, cap=0.5)
    gains = torch.cat([signs(1, 1, 1), signs(1, -1, 0)], 1)
    assert calibrated([0.02, 0.5], gains, told) == [0.02, 0.5]
    assert calibrated([0.3, 0.3], gains, told) == pytest.approx([0.29, 0.31])


@given(st.lists(st.floats(0.01, 2), min_size=1, max_size=4), st.integers(0, 99))
def test_psi_moves_by_one_change_at_most(psi: list[float], seed: int) -> None:
    told = CalibrationConfig()
    gains = torch.randn(5, len(psi), generator=torch.Generator().manual_seed(seed))
    after = calibrated(psi, gains, told)
    assert all(abs(a - b) <= told.change + 1e-9 for a, b in zip(after, psi, strict=True))
    assert all(told.floor <= a <= told.cap for a in after)


def test_a_calibration_has_settled_when_every_step_stays_within_one_change() -> None:
    told = CalibrationConfig(settled=4)
    swing = [[0.5 + 0.01 * (k % 2)] for k in range(5)]
    assert settled(swing, told)
    assert not settled(swing[:4], told)
    assert not settled([*swing[:4], [0.52]], told)
    assert not settled([[a[0], 0.3 + 0.01 * k] for k, a in enumerate(swing)], told)


def test_a_calibration_starts_from_the_flow_sde_and_ends_on_the_mean_of_its_last_two() -> None:
    told = {"enabled": True, "rounds": 20, "settled": 4}
    with dense(calibrate=told, noise={"high": 2}, steps=5) as (job, chosen):
        start = [noise.flow_diffusion(job.levels, i, 0.7) for i in range(2)]
        assert min(start) > chosen.config.calibrate.cap  # which must not throw psi back at once
        seen: list[list[float]] = []

        def stub(job: Any, k: int) -> Tensor:  # in balance every other round: psi swings
            seen.append(chosen.psi)
            return torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0] if k % 2 else [1.0, 1.0]])

        chosen._round = stub
        chosen.prepare(job)
        assert len(seen) == 5
        assert seen[0] == pytest.approx([*start, 0, 0, 0])
        assert chosen.psi == pytest.approx([start[0] - 0.005, start[1] - 0.005, 0, 0, 0])
        again = type(chosen)(chosen.config)
        again.restore(chosen.state())
        assert again.psi == chosen.psi


def test_a_calibration_reaches_every_step_that_a_window_may_ever_hold() -> None:
    noisy = {"window": 1, "rule": "progressive", "every": 1, "low": 1}
    with dense(calibrate={"enabled": True, "rounds": 1, "samples": 2}, noise=noisy, steps=5) as (job, chosen):
        chosen.prepare(job)
        assert chosen.psi[0] == chosen.psi[4] == 0
        assert min(chosen.psi[1:4]) > 0
        for step, trained in enumerate((1, 2, 3, 1)):
            rollout = chosen.sampled(job, step, job.cases_of(step))[0][0]
            assert list(rollout.trained) == [trained]
            h = float(chosen.sizes(rollout)[0])
            assert chosen.deviations(rollout).tolist() == pytest.approx([chosen.psi[trained] * math.sqrt(h)])


def test_tempflow_weighs_calibrated_steps_alike_wherever_the_window_is() -> None:
    psi, weights = [0.0, 0.8, 0.5, 0.3, 0.0], []
    for noisy in ({"low": 1}, {"low": 1, "window": 1, "rule": "progressive", "every": 1}):
        with dense(credit={"weighting": "tempflow"}, noise=noisy, steps=5) as (job, chosen):
            chosen.restore({"psi": psi})
            found = [chosen.sampled(job, step, job.cases_of(step))[0][0] for step in range(3)]
            weights.append([chosen.step_weights(chosen.deviations(each), chosen.sizes(each)) for each in found])
    torch.testing.assert_close(torch.cat(weights[1]), weights[0][0])
    assert float(weights[0][0].mean()) == pytest.approx(1)


@pytest.mark.parametrize(
    "settings",
    [{"value": "level"}, {"credit": {"gamma": 1}}, {"credit": {"process": "renorm", "mu": 40.0}}],
)
def test_a_calibration_counts_plain_gains_whatever_is_credited(settings: dict[str, Any]) -> None:
    found = []
    for told in ({}, settings):
        with dense(calibrate={"enabled": True, "samples": 4}, steps=4, **told) as (job, chosen):
            chosen.restore({"psi": [0.6, 0.5, 0.4, 0.0]})
            found.append(chosen._round(job, 0))
    assert found[0].any()
    assert torch.equal(found[0], found[1])


@given(st.integers(1, 30), st.integers(1, 9))
def test_shares_of_a_calibration_are_of_one_length_and_hold_every_case_once(count: int, processes: int) -> None:
    cases = [Case(prompt=str(k)) for k in range(count)]
    shares = [share_of(cases, rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert [case for share in shares for case in share][:count] == cases


def test_a_calibration_measures_the_same_images_on_any_number_of_processes() -> None:
    with dense(calibrate={"enabled": True, "samples": 5}, steps=4) as (job, chosen):
        chosen.restore({"psi": [0.6, 0.5, 0.4, 0.0]})
        alone = chosen._round(job, 1)  # whose prompts follow those of the first
        lent, shares = job.accelerator, []
        for rank in range(2):
            told = {"num_processes": 2, "process_index": rank, "device": lent.device, "gather": lambda rows: rows}
            job.accelerator = SimpleNamespace(**told)
            shares.append(chosen._round(job, 1))
        job.accelerator = lent
        assert [len(share) for share in shares] == [3, 3]
        torch.testing.assert_close(torch.cat(shares)[:5], alone, rtol=1e-3, atol=1e-3)


def test_a_round_of_calibration_measures_gains_of_fresh_walks_of_every_noisy_step() -> None:
    with dense(calibrate={"enabled": True, "samples": 5, "rounds": 2}, steps=4) as (job, chosen):
        chosen.prepare(job)
        assert len(chosen.psi) == 4
        assert chosen.psi[3] == 0
        assert min(chosen.psi[:3]) > 0
        gains = [chosen._round(job, k) for k in (0, 0, 1)]
        assert gains[0].shape == (5, 3)
        assert torch.equal(gains[0], gains[1])
        assert not torch.equal(gains[0], gains[2])
        rollout = chosen.sampled(job, 0, job.cases_of(0))[0][0]
        levels = rollout.driver.levels
        expected = [p * math.sqrt(float(levels.sigma[i] - levels.sigma[i + 1])) for i, p in enumerate(chosen.psi[:3])]
        assert chosen.deviations(rollout).tolist() == pytest.approx(expected)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="step_norm is none"), dense(advantage={}):
        pass
    with (
        pytest.raises(ConfigError, match="psi is the noise of a flow"),
        dense("sd15_ddim", calibrate={"enabled": True}),
    ):
        pass
    for kernel in ("cps", "ddim"):
        with (
            pytest.raises(ConfigError, match=f"noise.kernel is {kernel}, but psi is the noise of the flow SDE"),
            dense(calibrate={"enabled": True}, noise={"kernel": kernel}),
        ):
            pass
    with pytest.raises(ConfigError, match="completion is 0"):
        DenseGRPOConfig(completion=0)
    with pytest.raises(ConfigError, match="floor 3"):
        CalibrationConfig(floor=3)
