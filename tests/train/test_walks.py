"""What the walks of a policy gradient are: windows of noise, start noises, and images that a reward fails on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffalign import noise
from diffalign.errors import ConfigError
from tests.train import jobs
from tests.train.jobs import Brightness, asked

KERNELS = {"flow_sde": "sd3", "cps": "sd3", "ddim": "sd15"}
every_objective = pytest.mark.parametrize("objective", jobs.OBJECTIVES)


@pytest.mark.parametrize("kernel", KERNELS)
def test_outside_a_window_steps_are_the_deterministic_ones_to_the_bit(kernel: str) -> None:
    told = {"flow_grpo": {"noise": {"kernel": kernel, "window": 1, "low": 1}}}
    with jobs.job(KERNELS[kernel], told, call={"num_inference_steps": 4}) as (job, chosen), torch.no_grad():
        jobs.touched(job)
        rollout = chosen.collect(job, 0).micros[0]
        still, driver = noise.KERNELS[kernel](0.0), rollout.driver
        assert rollout.trained == range(1, 2)
        walk = driver.rollout(still, dtype=torch.float32)
        assert torch.equal(walk.latents[1], rollout.walk.latents[1])
        assert not torch.equal(walk.latents[2], rollout.walk.latents[2])
        rest = driver.rollout(still, x=rollout.walk.latents[2], start=2, dtype=torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(rest.latents, rollout.walk.latents[2:], strict=True))
        assert torch.equal(rest.media, rollout.media)


def test_only_steps_of_the_window_are_replayed() -> None:
    told = {"flow_grpo": {"noise": {"window": 2, "low": 1}}}
    with jobs.job("sd3", told, call={"num_inference_steps": 5}) as (job, chosen):
        rollout = chosen.collect(job, 0).micros[0]
        times: list[float] = []

        def listen(module: nn.Module, args: Any, kwargs: Any) -> None:
            times.append(float(kwargs["timestep"].flatten()[0]))

        hook = job.trained.denoisers["transformer"].register_forward_pre_hook(listen, with_kwargs=True)
        jobs.learn(job, chosen, [rollout])
        hook.remove()
        assert times == pytest.approx(rollout.driver.timesteps[1:3].tolist())


def test_trained_steps_are_sampled_as_they_are_replayed_and_the_others_without_gradients() -> None:
    told = {"flow_grpo": {"noise": {"window": 2, "low": 1}}}
    with jobs.job("sd3", told, call={"num_inference_steps": 5}) as (job, chosen):
        modes: list[bool] = []
        chosen.noise(job, 0)
        part = job.trained.denoisers["transformer"]
        hook = part.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
        walk = chosen.sampled(job, 0, job.cases_of(0)[:3])[0][0].walk
        hook.remove()
        assert modes == [False, True, True, False, False]
        assert not any(x.requires_grad for x in walk.latents)


@pytest.mark.parametrize("micro_batch", [2, 3, 6])
def test_same_start_gives_a_group_one_start_noise_wherever_micro_batches_cut(micro_batch: int) -> None:
    told = {"flow_grpo": {"same_start": True, "noise": {"window": 1, "low": 1}}}
    with jobs.job("sd3", told, micro_batch=micro_batch, call={"num_inference_steps": 4}) as (job, chosen):
        micros = chosen.collect(job, 0).micros
        level = [torch.cat([micro.walk.latents[i] for micro in micros]).unflatten(0, (2, 3)) for i in range(5)]
        first = level[0]
        assert torch.equal(first[:, :1].expand_as(first), first)
        assert not torch.equal(first[0], first[1])
        assert torch.equal(first[0, 0], job.driver(job.cases_of(0)[:1]).start()[0])
        torch.testing.assert_close(level[1][:, :1].expand_as(first), level[1])
        assert all(not torch.allclose(x[:, 0], x[:, 1], atol=1e-3) for x in level[2:])


def test_without_it_every_image_starts_from_its_own_noise() -> None:
    with jobs.job("sd3", micro_batch=6) as (job, chosen):
        rollout = chosen.collect(job, 0).micros[0]
        assert torch.equal(rollout.walk.latents[0], job.driver(job.cases_of(0)).start())
        assert len(rollout.walk.latents[0].flatten(1).unique(dim=0)) == 6


class Picky(Brightness):
    """Brightness that says NaN of some images, or raises, by their place in a step."""

    def __init__(self, bad: tuple[int, ...], *, raises: bool = False) -> None:
        super().__init__(100)
        self.bad, self.raises, self.seeds = bad, raises, list[int]()

    def __call__(self, media: Tensor, cases: Any) -> Tensor:
        lost = torch.tensor([case.seed in [self.seeds[k] for k in self.bad] for case in cases])
        if self.raises and bool(lost.any()):
            raise RuntimeError("cannot read this picture")
        return torch.where(lost, torch.nan, super().__call__(media, cases))


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("objective", ["flow_grpo", "dense_grpo"])
@pytest.mark.filterwarnings("ignore:reward 'brightness' failed")
def test_images_that_a_reward_fails_on_are_left_out_of_their_group_and_counted(objective: str, raises: bool) -> None:
    reward = Picky((1,), raises=raises)
    with jobs.job("sd3", reward=reward, **asked(objective)) as (job, chosen):
        reward.seeds = [case.seed for case in job.cases_of(0)]
        found = chosen.collect(job, 0)
        values = torch.cat([micro.advantages for micro in found.micros])
        assert found.stats["invalid"] == pytest.approx(1 / 6)
        assert not values[1].any()
        assert values.isfinite().all()
        torch.testing.assert_close(values[0], -values[2], atol=1e-3, rtol=1e-3)  # a pair is all that is left
        assert values[0].any()
        assert values[3:].any()


@every_objective
@pytest.mark.filterwarnings("ignore:reward 'brightness' failed")
def test_too_many_failures_end_the_run_by_name_and_share(objective: str) -> None:
    reward = Picky((0, 1, 2, 3))
    with jobs.job("sd3", reward=reward, **asked(objective)) as (job, chosen):
        reward.seeds = [job.driver(job.cases_of(0)).seeds[k] for k in range(4)]
        if objective == "tree_grpo":  # leaves have seeds of their own
            reward.seeds = [leaf.seed for leaf in chosen.sampled(job, 0, job.cases_of(0))[0][0].leaves]
        share = 4 / job.config.images
        with pytest.raises(ConfigError, match=rf"brightness failed on {share:.0%} of the images of step 0, .* 20%"):
            chosen.collect(job, 0)


def test_one_image_in_a_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="group_size is 1"), jobs.job("sd3", group_size=1, micro_batch=1):
        pass


class Ranks(Brightness):
    """The share of the pictures of one prompt that a picture outshines."""

    name, listwise = "ranks", True

    def __call__(self, media: Tensor, cases: Any) -> Tensor:
        own, found = super().__call__(media, cases), []
        for k, case in enumerate(cases):
            beside = [j for j, other in enumerate(cases) if other.prompt == case.prompt]
            found.append((own[k] > own[beside]).float().mean())
        return torch.stack(found)


@pytest.mark.parametrize("settings", [{"dense_grpo": {}}, {"flow_grpo": {"credit": {"phases": [0.9]}}}])
def test_a_reward_that_compares_sees_whole_groups_wherever_micro_batches_cut(settings: dict[str, Any]) -> None:
    def gains(micro_batch: int) -> Tensor:
        outer = {"reward": Ranks(100), "advantage": {"step_norm": "group_step"}, "micro_batch": micro_batch}
        with jobs.job("sd3", settings, **outer) as (job, chosen):
            assert job.listwise
            return chosen.step_rewards(job, *chosen.sampled(job, 0, job.cases_of(0)))

    whole = gains(6)
    assert whole.any()
    assert torch.equal(whole, gains(2))


@pytest.mark.parametrize(
    ("objective", "over", "said"),
    [
        ("flow_grpo", "group_step", "an image has one reward"),
        ("dense_grpo", "none", "a reward for every step"),
        ({"flow_grpo": {"credit": {"phases": [0.9]}}}, "none", "a reward for every step"),
    ],
)
def test_rewards_per_step_and_their_sets_go_together(objective: Any, over: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said), jobs.job("sd3", objective, advantage={"step_norm": over}):
        pass


@pytest.mark.parametrize("objective", ["flow_grpo", "dense_grpo"])
def test_a_step_weighs_the_same_wherever_the_window_is(objective: str) -> None:
    """TempFlow's weight is relative to all steps that may have noise, not to those of the present window."""

    def weights(**noise: Any) -> dict[int, float]:
        settings = asked(objective, credit={"weighting": "tempflow"}, noise=noise)
        with jobs.job("sd3", call={"num_inference_steps": 5}, **settings) as (job, chosen):
            micro, found = chosen.collect(job, 0).micros[0], {}
            for k, i in enumerate(micro.trained):
                micro.advantages = torch.zeros_like(micro.advantages)
                micro.advantages[:, k] = 1
                found[i] = -float(chosen.learn(job, micro, 1.0)["loss"]) * len(micro.trained)
            return found

    whole = weights()
    assert sum(whole.values()) == pytest.approx(4, rel=1e-5)
    for low in (0, 2):
        part = weights(window=1, low=low, high=low + 1)
        assert part == {low: pytest.approx(1, rel=1e-5)}  # all that may have noise
    for step in weights(window=2, rule="uniform").items():
        assert step[1] == pytest.approx(whole[step[0]], rel=1e-4)
