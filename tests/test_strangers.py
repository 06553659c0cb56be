"""Loops nobody told the seam about: toy pipelines whose `__call__` is written in ways that stock classes are."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from diffalign.drive import Driver
from diffalign.errors import SeamError
from diffalign.noise import ddim
from diffalign.recording import difference
from tests.test_drive import recorded


class Net(torch.nn.Module):
    """A denoiser of one linear layer that also remembers that it ran."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.mix = torch.nn.Linear(4, 4)
        self.seen = None

    def forward(self, x, t):
        self.seen = x.detach().mean()
        return torch.tanh(self.mix(x) + float(t) / 1000)


class Toy(DiffusionPipeline):
    """Four steps over latents (B, 4, 4, 4); subclasses write their own loop."""

    def __init__(self, net, scheduler):
        super().__init__()
        self.register_modules(net=net, scheduler=scheduler)

    def begin(self, rows, steps, generator):
        self.scheduler.set_timesteps(steps)
        return randn_tensor((rows, 4, 4, 4), generator=generator) * self.scheduler.init_noise_sigma

    def advance(self, x, t):
        scaled = self.scheduler.scale_model_input(x, t)
        return self.scheduler.step(self.net(scaled, t), t, x, return_dict=False)[0]


class CountsFirst(Toy):
    """Reads through its timesteps to find out where to stop."""

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=4, generator=None, output_type="pt", return_dict=True):
        x = self.begin(len(prompt), num_inference_steps, generator)
        timesteps = self.scheduler.timesteps
        timesteps = timesteps[: len(list(filter(lambda t: t >= 300, timesteps)))]
        for _i, t in enumerate(timesteps):
            x = self.advance(x, t)
        return (x,)


class NoisesAfterwards(Toy):
    """Keeps half of its latents on a known image, noised by what the scheduler says is the next level."""

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=4, generator=None, output_type="pt", return_dict=True):
        x = self.begin(len(prompt), num_inference_steps, generator)
        self.scheduler.set_begin_index(0)
        noise, known = x / self.scheduler.init_noise_sigma, torch.ones_like(x)
        mask = torch.zeros_like(x)
        mask[..., :2] = 1
        timesteps = self.scheduler.timesteps
        for i, t in enumerate(timesteps):
            x = self.advance(x, t)
            if i < len(timesteps) - 1:
                x = mask * self.scheduler.add_noise(known, noise, timesteps[i + 1][None]) + (1 - mask) * x
        return (x,)


class Unnumbered(Toy):
    """Has no loop index, takes no latents, counts its cases in `batch_size` and gives only one kind of output."""

    @torch.no_grad()
    def __call__(self, batch_size=1, num_inference_steps=4, generator=None, output_type="pt", return_dict=True):
        if output_type != "pt":
            raise ValueError(f"output_type {output_type}")
        x = self.begin(batch_size, num_inference_steps, generator)
        for t in self.scheduler.timesteps:
            x = self.advance(x, t)
        return (x,)


class ReadsItsModel(Toy):
    """Uses something that only a real model call leaves behind."""

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=4, generator=None, output_type="pt", return_dict=True):
        x = self.begin(len(prompt), num_inference_steps, generator)
        for _i, t in enumerate(self.scheduler.timesteps):
            self.net.seen = None
            prediction = self.net(x, t)
            prediction = prediction + 0.1 * self.net.seen
            x = self.scheduler.step(prediction, t, x, return_dict=False)[0]
        return (x,)


class KeepsState(Toy):
    """Copies its scheduler's state before the step and puts it back, `views` times per timestep."""

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=4, views=1, generator=None, output_type="pt", return_dict=True):
        x = self.begin(len(prompt), num_inference_steps, generator)
        kept = [copy.deepcopy(self.scheduler.__dict__) for _ in range(views)]
        for _i, t in enumerate(self.scheduler.timesteps):
            for k in range(views):
                self.scheduler.__dict__.update(kept[k])
                x = self.advance(x, t)
                kept[k] = copy.deepcopy(self.scheduler.__dict__)
        return (x,)


class TwoLatents(Toy):
    """Moves a second latent with a copy of its scheduler, and each hears the other."""

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=4, generator=None, output_type="pt", return_dict=True):
        x = self.begin(len(prompt), num_inference_steps, generator)
        beside, second = randn_tensor(x.shape, generator=generator), copy.deepcopy(self.scheduler)
        for _i, t in enumerate(self.scheduler.timesteps):
            prediction = self.net(x + 0.5 * beside, t)
            x = self.scheduler.step(prediction, t, x, return_dict=False)[0]
            beside = second.step(-prediction, t, beside, return_dict=False)[0]
        return (x,)


class ManyRows(Toy):
    """Steps two latents for each case."""

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=4, generator=None, output_type="pt", return_dict=True):
        x = self.begin(2 * len(prompt), num_inference_steps, generator)
        for _i, t in enumerate(self.scheduler.timesteps):
            x = self.advance(x, t)
        return (x,)


def toy(cls, scheduler=None):
    return cls(Net().eval().requires_grad_(False), scheduler or DDIMScheduler(clip_sample=False))


def holds(pipe, **call):
    """Every step is predicted as stock predicted it, in any order; whole rollouts end where stock does."""
    steps, media = recorded(pipe, **call)
    driver = Driver(pipe, **call, generator=torch.Generator().manual_seed(3))
    assert driver.length == len(steps)
    assert difference(driver.start(), steps[0][0]) == 0.0
    for i in reversed(range(len(steps))):
        assert difference(driver.predict(steps[i][0], i), steps[i][1]) == 0.0
    assert difference(driver.rollout(quiet=True).media, media) == 0.0
    assert difference(driver.rollout(ddim(0.0), quiet=True).media, media) < 1e-6 * float(media.abs().max())
    return driver


def test_a_loop_that_reads_its_timesteps_beforehand_is_followed_where_it_steps():
    assert holds(toy(CountsFirst), prompt=["a"]).length == 2


def test_a_loop_that_adds_noise_at_the_schedulers_own_count_finds_it_where_a_native_step_leaves_it():
    holds(toy(NoisesAfterwards, EulerDiscreteScheduler()), prompt=["a"])


def test_a_loop_without_an_index_takes_latents_at_every_step():
    pipe = toy(Unnumbered)
    driver = holds(pipe, batch_size=1)
    x = driver.start().requires_grad_()
    (slope,) = torch.autograd.grad(driver.predict(x, 0, grad=True).sum(), x)
    assert slope.any()


def test_cases_counted_by_batch_size_are_narrowed():
    seeds = [torch.Generator().manual_seed(s) for s in (3, 17)]
    driver = Driver(toy(Unnumbered), batch_size=2, generator=seeds)
    assert driver.batch == 2
    both, second = driver.rollout(ddim(0.5)).media, driver.select([1]).rollout(ddim(0.5)).media
    assert difference(both[1:], second) < 1e-6


def test_blank_steps_run_a_model_that_the_pipeline_reads_from_and_count_it():
    driver = holds(toy(ReadsItsModel), prompt=["a"])
    before = driver.budget.nfe
    driver.predict(driver.start(), 2)
    assert driver.budget.nfe - before == 2


def test_an_error_in_a_real_step_is_not_tried_again():
    driver, tries = Driver(toy(ReadsItsModel), prompt=["a"]), []

    def fail(i, like):
        tries.append(i)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        driver.rollout(ddim(1.0), noise=fail)
    assert tries == [0]


def test_a_loop_that_puts_its_schedulers_state_back_stays_under_control():
    holds(toy(KeepsState), prompt=["a"])


def test_several_steps_per_timestep_are_refused_with_the_reason():
    with pytest.raises(SeamError, match="more than once per timestep"):
        Driver(toy(KeepsState), prompt=["a"], views=2).rollout(ddim(0.0))


def test_a_second_latent_is_followed_from_the_start_and_refused_in_the_middle():
    pipe = toy(TwoLatents)
    steps, media = recorded(pipe, prompt=["a"])
    driver = Driver(pipe, prompt=["a"], generator=torch.Generator().manual_seed(3))
    assert difference(driver.predict(steps[0][0], 0), steps[0][1]) == 0.0
    assert difference(driver.rollout(ddim(0.0)).media, media) < 1e-6 * float(media.abs().max())
    with pytest.raises(SeamError, match="second latent"):
        driver.predict(steps[2][0], 2)


def test_latents_that_are_not_one_row_per_case_are_refused_with_the_reason():
    with pytest.raises(SeamError, match="rows must be cases"):
        Driver(toy(ManyRows), prompt=["a"]).start()
