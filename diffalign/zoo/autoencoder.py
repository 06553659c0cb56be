"""The autoencoder of the shapes models: 64x64 images <-> 4 x 16 x 16 latents, in diffusers' AutoencoderTiny."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.world.compose import sample_clauses, sample_scene
from diffalign.world.grammar import TAGS
from diffalign.world.rendering import render_many
from diffalign.world.scenes import Scene
from diffalign.zoo.fit import FitConfig, fit


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes, data and training of the autoencoder."""

    channels: int = 32
    batch: int = 32
    images: int = 8192  # rendered once, then drawn from at random
    noise: float = 0.1  # added to the latents in training, so that the decoder forgives small errors
    shrink: float = 1e-3  # weight of the squared latents
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=1200, learning_rate=1.5e-3, warmup=50, ema=0.99, weight_decay=0.0)
    )


def make(config: AutoencoderConfig) -> Any:
    """An untrained autoencoder."""
    from diffusers import AutoencoderTiny

    widths = (config.channels,) * 3
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 3),
        num_decoder_blocks=(3, 1, 1),
        latent_channels=4,
    )


def scenes(count: int, seed: int) -> list[Scene]:
    """Training scenes of every kind of prompt."""
    rng = random.Random(seed)
    kinds = (*TAGS, "hard")
    return [sample_scene(sample_clauses(kinds[i % len(kinds)], rng), rng, seen_only=True) for i in range(count)]


def train(config: AutoencoderConfig, *, folder: Path, seed: int, resume: bool) -> Any:
    """Train an autoencoder and set the scale and shift that make its latents standard."""
    torch.manual_seed(seed)
    model = make(config).to(memory_format=torch.channels_last)
    images = torch.cat([render_many(chunk) for chunk in _chunks(scenes(config.images, seed), 512)])

    def loss(step: int, generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(images), (config.batch,), generator=generator)
        return reconstruction(model, images[pick] * 2 - 1, config, generator)

    fit(model, loss, config.fit, folder=folder, seed=seed, resume=resume, title="autoencoder")
    latents = encode(model, images[:1024])
    model.register_to_config(scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))
    return model


def reconstruction(model: Any, x: Tensor, config: AutoencoderConfig, generator: torch.Generator) -> Tensor:
    """Absolute and squared error through noisy latents, plus a pull of the latents to zero."""
    z = model.encoder(x.contiguous(memory_format=torch.channels_last)).float()
    y = model.decoder(z + config.noise * torch.randn(z.shape, generator=generator)).float()
    loss: Tensor = nn.functional.l1_loss(y, x) + 2 * nn.functional.mse_loss(y, x) + config.shrink * z.square().mean()
    return loss


@torch.no_grad()
def encode(model: Any, images: Tensor) -> Tensor:
    """Raw latents (B, 4, H/4, W/4) of images in [0, 1]."""
    return torch.cat([model.encode(chunk * 2 - 1).latents for chunk in torch.split(images, 256)])


def _chunks(items: list[Scene], size: int) -> list[list[Scene]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
