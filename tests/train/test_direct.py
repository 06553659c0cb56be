"""Direct back-propagation: where the chain is cut, against autograd by hand on tiny pipelines and in closed form."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign import media
from diffalign.cases import derived_seed
from diffalign.errors import ConfigError, NotDifferentiable
from diffalign.noise import Levels, Transition, case_noise, ddim
from diffalign.train import preflight
from diffalign.train.objectives.direct import DirectConfig
from tests.train import jobs

FOUR = ("sd15_ddim", "sd3", "flux", "wan21")
SIGMA = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0]).double()


def moved(driver: Any, step: Transition, i: int) -> Tensor:
    """The next latent, with the noise that a walk draws there."""
    return step.sample(case_noise(driver.seeds, step.mean, "step", i)) if step.std else step.mean


def by_hand(job: Any, cut: int, *, jump: bool = False, eta: float = 0.0) -> Tensor:
    """The gradient of minus the mean brightness, step by step from the seam's own pieces."""
    for part in [
        job.cases_of(0)[k : k + job.config.micro_batch] for k in range(0, job.config.images, job.config.micro_batch)
    ]:
        driver, kernel = job.driver(part), ddim(eta)
        x = driver.start().float()
        for i in range(cut):
            with torch.no_grad():
                x = moved(driver, kernel(driver.levels, x, driver.predict(x, i), i), i)
        x = x.detach()
        for i in range(cut, driver.length):
            prediction = driver.predict(x, i, grad=True)
            if jump:
                x = driver.levels.denoised(x, prediction, i)
                break
            x = moved(driver, kernel(driver.levels, x, prediction, i), i)
        reward = media.to_tensor(driver.decode(x, grad=True)).float().flatten(1).mean(1)
        (-reward.sum() / job.config.images).backward()
    return jobs.gradients(job)


def learnt(job: Any, chosen: Any, step: int = 0) -> Tensor:
    jobs.learn(job, chosen, chosen.collect(job, step).micros)
    return jobs.gradients(job)


def close(found: Tensor, expected: Tensor) -> None:
    assert float(expected.norm()) > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("steps", [1, 2, None])
@pytest.mark.parametrize("family", FOUR)
def test_the_last_steps_have_the_gradient_of_autograd_with_the_latent_before_them_cut_off(
    family: str, steps: int | None
) -> None:
    with jobs.job(family, {"direct": {"steps": steps}}) as (job, chosen):
        jobs.touched(job)
        close(learnt(job, chosen), by_hand(job, 0 if steps is None else job.length - steps))


@pytest.mark.parametrize("steps", [1, None])
def test_noise_between_the_steps_is_a_constant_of_the_gradient(steps: int | None) -> None:
    with jobs.job("sd15_ddim", {"direct": {"steps": steps, "eta": 0.7}}) as (job, chosen):
        jobs.touched(job)
        close(learnt(job, chosen), by_hand(job, 0 if steps is None else job.length - steps, eta=0.7))


@pytest.mark.parametrize("family", ["sd15_ddim", "sd3"])
def test_a_jump_has_the_gradient_of_one_clean_estimate(family: str) -> None:
    with jobs.job(family, {"direct": {"rule": "jump", "span": [0.34, 0.66]}}) as (job, chosen):
        jobs.touched(job)
        close(learnt(job, chosen), by_hand(job, 1, jump=True))


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_on_a_linear_chain_the_gradient_of_the_last_steps_has_its_closed_form(last: int) -> None:
    """v = theta x, so that x_T = x_0 prod(1 - h_i theta)."""
    levels, theta, x = Levels(1 - SIGMA, SIGMA, "flow"), torch.tensor(0.3, requires_grad=True), torch.tensor([[2.0]])
    cut = DirectConfig(steps=last).cut(4, 0)
    for i in range(4):
        x = ddim(0.0)(levels, x, theta * x, i).mean
        x = x.detach() if i < cut else x
    (slope,) = torch.autograd.grad(x.sum(), theta)
    h = -SIGMA.diff()
    closed = -float(x.detach()) * sum(float(each) / (1 - float(each) * 0.3) for each in h[cut:])
    assert float(slope) == pytest.approx(closed, rel=1e-5)


def test_steps_before_the_cut_give_the_images_that_the_whole_chain_gives() -> None:
    drawn = []
    for steps in (1, 3):
        with jobs.job("sd3", {"direct": {"steps": steps}}) as (job, chosen):
            micro = chosen.collect(job, 0).micros[0]
            drawn.append(chosen.drawn(job, job.driver(micro.cases), micro.cut)[0].detach())
    assert torch.equal(*drawn)


def test_the_gradient_does_not_depend_on_checkpointing_or_micro_batches() -> None:
    slopes = []
    asked: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}, {"micro_batch": 1}, {"micro_batch": 2}]
    for settings in asked:
        decode = bool(settings)
        with jobs.job("sd3", {"direct": {"steps": 2, "checkpoint_decode": decode}}, **settings) as (job, chosen):
            slopes.append(learnt(job, chosen))
    for slope in slopes[1:]:
        close(slope, slopes[0])


def test_further_passes_from_the_noise_that_was_there_repeat_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With noise that leads back to the stored last latent, an extra term is the base term."""
    with jobs.job("sd3", {"direct": {}}) as (job, chosen):
        plain = learnt(job, chosen)
    asked = {"direct": {"extra": 2, "average": False}}
    with jobs.job("sd3", asked, micro_batch=6) as (job, chosen):
        driver = job.driver(job.cases_of(0))
        walk = driver.rollout(ddim(0.0), quiet=True, dtype=torch.float32)
        alpha, sigma = driver.levels.at(driver.length - 1)
        exact = (walk.latents[-2] - alpha * walk.latents[-1]) / sigma
        monkeypatch.setattr("diffalign.train.objectives.direct.case_noise", lambda *_: exact)
        close(learnt(job, chosen), 3 * plain)
    with jobs.job("sd3", {"direct": {"extra": 2}}) as (job, chosen):
        monkeypatch.setattr("diffalign.train.objectives.direct.case_noise", case_noise)
        assert not torch.allclose(learnt(job, chosen), plain, rtol=1e-3)


def test_rewards_beyond_the_threshold_have_no_gradient() -> None:
    config = DirectConfig(threshold=2.0, scale=1e-3)
    reward = torch.tensor([3.0, 1.0], requires_grad=True)
    loss = config.loss(reward)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.0, 1e-3])
    assert reward.grad.tolist() == pytest.approx([0.0, -1e-3])


def test_cuts_stay_inside_the_chain_and_where_they_are_asked_for() -> None:
    near = Counter(DirectConfig(rule="random").cut(50, derived_seed(0, k)) for k in range(500))
    assert min(near) >= 1
    assert max(near) <= 49
    assert 40 < sum(k * n for k, n in near.items()) / 500 < 43
    anywhere = {DirectConfig(rule="random", uniform=True).cut(5, derived_seed(0, k)) for k in range(200)}
    assert anywhere == {1, 2, 3, 4}
    assert {DirectConfig(rule="jump").cut(40, derived_seed(0, k)) for k in range(500)} == set(range(30, 40))
    assert DirectConfig(rule="random", centre=0.98, spread=0.0).cut(50, 0) == 49
    assert DirectConfig(rule="random").cut(1, 0) == DirectConfig(rule="jump").cut(1, 3) == 0
    assert [DirectConfig(steps=k).cut(4, 0) for k in (1, 4)] == [3, 0]
    assert DirectConfig(rule="random", centre=0.05, spread=0.001).cut(10, 0) == 1


def test_an_anchor_is_nothing_at_the_base_and_pulls_back_from_elsewhere() -> None:
    with jobs.job("sd3", {"direct": {"anchor": 1.0, "scale": 1e-12}}) as (job, chosen):
        assert float(learnt(job, chosen).norm()) < 1e-6
        jobs.touched(job)
        assert float(learnt(job, chosen).norm()) > 1e-4


def test_the_preflight_has_no_ratio_and_counts_rows() -> None:
    with jobs.job("sd3", "direct", call={"guidance_scale": 1.0}) as (job, chosen):
        found = preflight.fly(job, chosen)
        assert found.ratio_off is None
        assert found.nfe_per_step == 6 * (3 + 2)
        assert not jobs.gradients(job).any()


def test_one_image_a_prompt_is_enough_and_a_reward_without_gradient_is_refused() -> None:
    with jobs.job("sd3", "direct", group_size=1, micro_batch=2) as (job, chosen):
        assert float(learnt(job, chosen).norm()) > 0

    class Deaf(jobs.Brightness):
        name, differentiable = "deaf", False

    with pytest.raises(NotDifferentiable, match="deaf"), jobs.job("sd3", "direct", reward=Deaf()):
        pass


def test_an_image_without_a_reward_is_left_out_of_the_gradient() -> None:
    class Picky(jobs.Brightness):
        def __call__(self, media: Tensor, cases: Any) -> Tensor:
            found = super().__call__(media, cases)
            return torch.where(torch.tensor([k == 0 for k in range(len(cases))]), torch.nan, found)

    with jobs.job("sd3", "direct", reward=Picky()) as (job, chosen):
        told = jobs.learn(job, chosen, chosen.collect(job, 0).micros)
        assert told["invalid"] == pytest.approx(1 / 3)
        assert jobs.gradients(job).isfinite().all()
        with pytest.raises(ConfigError, match="failed on 33% of the images of step 0"):
            chosen.collect(job, 1)


def test_advantages_that_would_not_be_read_are_refused() -> None:
    dr = {"normalise": "dr"}
    with pytest.raises(ConfigError, match="climbs the reward itself"), jobs.job("sd3", "direct", advantage=dr):
        pass


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"steps": 0}, "steps"),
        ({"span": [0.8, 0.2]}, "span"),
        ({"centre": 1.5}, "centre"),
        ({"extra": 1, "steps": 2}, "extra"),
        ({"scale": 0.0}, "scale"),
        ({"steps": 9}, "only 3"),
        ({"uniform": True}, "rule: random alone"),
        ({"rule": "jump", "steps": 2}, "rule: last alone"),
        ({"rule": "random", "span": [0.1, 0.2]}, "rule: jump alone"),
    ],
)
def test_settings_without_sense_are_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says), jobs.job("sd3", {"direct": bad}):
        pass
