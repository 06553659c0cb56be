"""What a tiny family is, how its components are seeded, and the cases every family is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import nn

M = TypeVar("M")
PROMPTS = ("red cube", "blue ball", "green tree", "grey boat")


@dataclass(frozen=True)
class Family:
    """One stock pipeline class, small enough to run in a blink."""

    name: str
    build: Callable[[], DiffusionPipeline]  # a fresh pipeline; the same bits every time
    call: Callable[[int], dict[str, Any]]  # fresh keyword arguments for that many cases
    video: bool = False
    batch: bool = True  # takes several cases with a list of generators
    reason: str = ""  # why `batch` is False
    stray_noise: bool = False  # the stock call also draws from torch's global generator
    broken: str = ""  # why the stock class cannot run here


def seeded(cls: Callable[..., M], *args: Any, **config: Any) -> M:
    """Build one component from seed 0, whatever was built before, with no all-zero parameter left."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        component = cls(*args, **config)
        if isinstance(component, nn.Module):
            wake(component.eval())
    return component


@torch.no_grad()
def wake(module: nn.Module) -> None:
    """Redraw zero-initialised parameters: an output layer of zeros hides every conditioning path."""
    for parameter in module.parameters():
        if parameter.numel() and not parameter.any():
            parameter.normal_(std=0.2)


@torch.no_grad()
def loud(cls: Callable[..., M], gain: float = 2.0, **config: Any) -> M:
    """Build a component with enlarged weights, so that every condition is heard through its one or two layers."""
    model = seeded(cls, **config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(gain)
    return model


def vae(levels: int = 2, **extra: Any) -> AutoencoderKL:
    """The image autoencoder most families share; each level after the first halves the picture."""
    blocks = {"block_out_channels": (8,) * levels, "norm_num_groups": 4, "layers_per_block": 1}
    blocks |= {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return seeded(AutoencoderKL, **blocks | extra)


def assemble(cls: type[DiffusionPipeline], **components: Any) -> DiffusionPipeline:
    """Put components into a stock pipeline that runs quietly."""
    pipe = cls(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(batch: int) -> list[str]:
    """Different prompts, one for each case."""
    return [PROMPTS[i % len(PROMPTS)] for i in range(batch)]


def pictures(batch: int, size: int = 16) -> list[Image.Image]:
    """Different seeded pictures of four flat colours, one for each case."""
    colours = torch.rand((batch, 2, 2, 3), generator=torch.Generator().manual_seed(7))
    return [Image.fromarray((c * 255).byte().numpy()).resize((size, size), Image.Resampling.NEAREST) for c in colours]


def asking(
    size: int = 16, guidance: str = "guidance_scale", negative: bool = True, **extra: Any
) -> Callable[[int], dict[str, Any]]:
    """The usual call: prompts, negative prompts where the class takes them, guidance and four steps at a small size."""

    def call(batch: int) -> dict[str, Any]:
        against = {"negative_prompt": ["blurry"] * batch} if negative else {}
        usual = {"prompt": prompts(batch), guidance: 3.0, "num_inference_steps": 4, "height": size, "width": size}
        return usual | against | extra

    return call


def editing(size: int = 16, image: str = "image", guidance: str = "guidance_scale", **extra: Any):
    """The usual call with one picture for each case under the argument `image`."""
    ask = asking(size, guidance, **extra)

    def call(batch: int) -> dict[str, Any]:
        return ask(batch) | {image: pictures(batch, size)}

    return call
