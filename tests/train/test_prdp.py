"""PRDP: its closed forms on few numbers, its optimum on a Gaussian, and its gradient on tiny pipelines."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.train.objectives.prdp import PRDPConfig, clipped_ratio, pair_loss
from tests.train import jobs

seeds = st.integers(0, 200)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(now: Tensor, old: Tensor, base: Tensor, reward: Tensor, config: PRDPConfig) -> Tensor:
    """The loss of one prompt's walks from log-densities (S, B)."""
    ratio, before = now - base, old - base
    clipped = clipped_ratio(ratio, before, config.clip, config.clip)
    return pair_loss(config.over(ratio), config.over(clipped), reward, config.beta)


@pytest.mark.parametrize("over_steps", ["mean", "sum"])
def test_the_first_gradient_is_the_policy_gradient_with_the_group_mean_as_baseline(over_steps: str) -> None:
    steps, images, beta = 3, 5, 0.7
    base, reward = draw(steps, images), draw(images, seed=1)
    now = base.clone().requires_grad_()
    loss = whole(now, base, base, reward, PRDPConfig(beta=beta, over_steps=over_steps))
    gaps = [((a - b) / beta) ** 2 for k, a in enumerate(reward.tolist()) for b in reward.tolist()[k + 1 :]]
    assert float(loss.detach()) == pytest.approx(sum(gaps) / len(gaps))
    loss.backward()
    pairs, share = images * (images - 1) / 2, 1 / steps if over_steps == "mean" else 1.0
    closed = -2 * images / (pairs * beta) * share * (reward - reward.mean())
    torch.testing.assert_close(now.grad, closed.expand(steps, -1))


@given(seeds, st.floats(-5, 5), st.floats(-5, 5))
def test_what_walks_of_a_prompt_have_in_common_does_not_matter(seed: int, more: float, higher: float) -> None:
    ratio, clipped, reward = draw(4, seed=seed), draw(4, seed=seed + 1), draw(4, seed=seed + 2)
    same = pair_loss(ratio + higher, clipped + higher, reward + more, 0.5)
    torch.testing.assert_close(same, pair_loss(ratio, clipped, reward, 0.5))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(pair_loss(ratio[order], clipped[order], reward[order], 0.5), same)


@given(seeds)
def test_walks_that_explain_their_rewards_have_no_loss(seed: int) -> None:
    reward = draw(5, seed=seed)
    ratio = reward / 0.3 + 7
    assert float(pair_loss(ratio, ratio, reward, 0.3)) == pytest.approx(0, abs=1e-20)


@given(seeds, st.floats(0.01, 3))
def test_the_clipped_loss_is_never_below_and_equal_inside_the_range(seed: int, clip: float) -> None:
    base, old, reward = draw(3, 4, seed=seed), draw(3, 4, seed=seed + 1), draw(4, seed=seed + 2)
    now = old + draw(3, 4, seed=seed + 3)
    free, held = PRDPConfig(beta=0.5, clip=1e9), PRDPConfig(beta=0.5, clip=clip)
    assert whole(now, old, base, reward, held) >= whole(now, old, base, reward, free) - 1e-12
    near = old + (now - old).clamp(-clip, clip) * 0.999
    torch.testing.assert_close(whole(near, old, base, reward, held), whole(near, old, base, reward, free))


def test_outside_the_range_on_the_wrong_side_there_is_no_gradient() -> None:
    """Both walks have gone further than they may towards their rewards: what is clipped is the larger loss."""
    base = torch.zeros(1, 2, dtype=torch.float64)
    now = torch.tensor([[5.0, -5.0]], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([100.0, 0.0], dtype=torch.float64)
    whole(now, base, base, reward, PRDPConfig(beta=1.0, clip=1e-3)).backward()
    assert not now.grad.any()


def test_two_walks_have_the_loss_of_one_pair() -> None:
    ratio = torch.tensor([0.4, -0.1], dtype=torch.float64, requires_grad=True)
    loss = pair_loss(ratio, ratio, torch.tensor([1.0, 0.25]), 2.0)
    error = 0.5 - 0.75 / 2
    assert float(loss.detach()) == pytest.approx(error**2)
    loss.backward()
    assert ratio.grad.tolist() == pytest.approx([2 * error, -2 * error])


def test_equal_rewards_make_no_pair_unless_all_do() -> None:
    ratio, reward = torch.tensor([1.0, 3.0], requires_grad=True), torch.ones(2)
    nothing = pair_loss(ratio, ratio, reward, 1.0)
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert not ratio.grad.any()
    assert float(pair_loss(ratio.detach(), ratio.detach(), reward, 1.0, every=True)) == 4
    lost = torch.tensor([1.0, math.nan])
    assert float(pair_loss(ratio.detach(), ratio.detach(), lost, 1.0)) == 0


def test_the_optimum_on_a_gaussian_is_the_tilted_law() -> None:
    """One step of mean m and deviation s, reward w.x: the optimum is m + s^2 w / beta, and there no walk is off."""
    s, beta, w, base = 0.5, 2.0, torch.tensor([1.0, -2.0]).double(), torch.tensor([0.3, 0.1]).double()

    def log_density(x: Tensor, mean: Tensor) -> Tensor:
        return -((x - mean) ** 2).sum(-1) / (2 * s * s)

    mean = base.clone().requires_grad_()
    optimiser = torch.optim.Adam([mean], lr=0.05)
    for step in range(600):
        x = mean.detach() + s * draw(8, 2, seed=step)
        ratio = log_density(x, mean) - log_density(x, base)
        loss = pair_loss(ratio, ratio, x @ w, beta)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.testing.assert_close(mean.detach(), base + s * s * w / beta, atol=1e-3, rtol=0)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("family", ["sd15_ddim", "sd3", "flux", "wan21"])
def test_at_the_start_every_ratio_is_1_and_the_loss_is_that_of_the_rewards(family: str) -> None:
    with jobs.job(family, {"prdp": {"beta": 0.01}}) as (job, chosen):
        found = chosen.collect(job, 0)
        chosen.refresh(job, found.micros)
        told = jobs.learn(job, chosen, found.micros)
        assert told["ratio_mean"] == pytest.approx(1, abs=1e-6)
        reward = torch.cat([micro.notes["reward"] for micro in found.micros]).view(2, 3).double()
        gaps = [((r[i] - r[j]) / 0.01) ** 2 for r in reward for i in range(3) for j in range(i)]
        assert told["regression"] == pytest.approx(float(sum(gaps)) / 6, rel=1e-5)
        assert float(jobs.gradients(job).norm()) > 0


@pytest.mark.parametrize("density", ["mean", "sum"])
def test_the_gradient_in_two_passes_is_that_of_the_whole_loss(density: str) -> None:
    """After an update, with groups that span micro-batches."""
    with jobs.job("sd3", {"prdp": {"beta": 0.5, "density": density, "clip": 10.0}}, micro_batch=2) as (job, chosen):
        found = chosen.collect(job, 0)
        chosen.refresh(job, found.micros)
        jobs.touched(job)
        chosen.refresh(job, found.micros)
        jobs.learn(job, chosen, found.micros)
        slope = jobs.gradients(job)
        now = torch.cat([micro.replay(density) for micro in found.micros], 1)
        base, old = (
            torch.cat([part(micro) for micro in found.micros], 1)
            for part in (lambda m: m.notes["base"], lambda m: m.log_probs)
        )
        reward = torch.cat([micro.notes["reward"] for micro in found.micros])
        parts = [(now[:, k : k + 3], old[:, k : k + 3], base[:, k : k + 3], reward[k : k + 3]) for k in (0, 3)]
        loss = torch.stack([whole(*part, chosen.config) for part in parts]).mean()
        assert not torch.equal(now, old)
        loss.backward()
        torch.testing.assert_close(slope, jobs.gradients(job), rtol=1e-3, atol=1e-4 * float(slope.abs().max()))


@pytest.mark.parametrize(
    ("given", "says"),
    [({"beta": 0.0}, "beta"), ({"clip": 0.0}, "clip"), ({"credit": {"weighting": "tempflow"}}, "whole walk")],
)
def test_settings_without_sense_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says), jobs.job("sd3", {"prdp": given}):
        pass


def test_advantages_that_would_not_be_read_are_refused() -> None:
    with (
        pytest.raises(ConfigError, match="differences of the rewards themselves"),
        jobs.job("sd3", "prdp", advantage={"normalise": "dr"}),
    ):
        pass
