"""Jobs whose steps have true advantages in closed form, and the settings that tests of credit share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffalign.bench.credit_methods import Method, Methods
from diffalign.cases import Case
from tests.cli.conftest import here, tiny  # noqa: F401
from tests.tiny import build
from tests.train.jobs import job

STEPS = 5
CALL = {"num_inference_steps": STEPS, "height": 16, "width": 16, "guidance_scale": 1.0}
NOISE = {"level": 0.7}
DENSE = {"objective": "dense_grpo", "advantage": {"step_norm": "group_step", "normalise": "dr", "clip": 1e9}}


class Latent:
    """The mean of the latents that were decoded last: linear in where a walk ends."""

    name, version, differentiable, modality = "latent", "1", False, "image"

    def __init__(self, pipe: Any) -> None:
        coder, self.seen = pipe.vae, torch.empty(0)
        decode = coder.decode

        def kept(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen = (z - coder.config.shift_factor) * coder.config.scaling_factor
            return decode(z, *args, **kwargs)

        coder.decode = kept

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        return self.seen.flatten(1).mean(1).float()


@contextmanager
def still_job(**settings: Any) -> Iterator[Any]:
    """A job whose model predicts no velocity: every step is x' = c x + nu eps, and the reward is linear."""
    pipe = build("sd3")
    with torch.no_grad():
        pipe.transformer.proj_out.weight.zero_()
        pipe.transformer.proj_out.bias.zero_()
    with job("sd3", pipe=pipe, reward=Latent(pipe), call=CALL, overlap=False, **settings) as (found, _):
        yield found


def walked(found: Any, methods: Methods) -> tuple[list[Any], Tensor]:
    return methods.walker.sampled(found, 0, found.cases_of(0))


def shrinking(rollout: Any) -> tuple[Tensor, Tensor]:
    """Factor c_i and deviation nu_i of every step."""
    one = torch.ones_like(rollout.walk.latents[0][:1])
    steps = [rollout.kernel(rollout.driver.levels, one, 0 * one, i) for i in range(STEPS)]
    return torch.tensor([float(s.mean.flatten()[0]) for s in steps]).double(), torch.tensor(
        [s.std for s in steps]
    ).double()


def all_methods(**more: Any) -> dict[str, Method]:
    from diffalign import config

    return {name: config.build(Method, told) for name, told in {"flow_grpo": {}, **more}.items()}


class Failing:
    """Brightness that now and then is no number."""

    name, version, differentiable, modality, range = "failing", "1", False, "image", None

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        places = torch.arange(self.asked, self.asked + len(media))
        self.asked += len(media)
        return torch.where(places % 7 == 2, torch.nan, media.flatten(1).mean(1).cpu())
