"""`shapes-sd3`: a flow-matching StableDiffusion3Pipeline of 5.4 M parameters, trained on rendered scenes and captions.

Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024, arXiv 2403.03206).
Where we differ: text encoders are trained together with the transformer; the T5 is silent (see silence.py), so that
`max_sequence_length` empty tokens follow the caption, and training mixes short and default numbers of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.world.compose import held_out, sample_clauses, sample_scene
from diffalign.world.grammar import say
from diffalign.world.rendering import render_many
from diffalign.world.scenes import Scene
from diffalign.zoo.autoencoder import AutoencoderConfig, encode
from diffalign.zoo.autoencoder import train as train_autoencoder
from diffalign.zoo.fit import FitConfig, Loss, fit
from diffalign.zoo.silence import silent_encoder, silent_tokenizer
from diffalign.zoo.words import LENGTH, known, tokenizer

STEEP = {"single": 4, "colours": 8, "counting": 18, "two": 6, "binding": 22, "position": 26, "hard": 16}
TRAITS = {"single": 16, "colours": 20, "counting": 12, "two": 18, "binding": 12, "position": 12, "hard": 10}
EVEN = {"single": 12, "colours": 10, "counting": 16, "two": 16, "binding": 16, "position": 18, "hard": 12}


@dataclass(frozen=True, kw_only=True)
class Round:
    """One cosine of training on one draw of scenes."""

    fit: FitConfig
    mix: Mapping[str, int] = field(default_factory=lambda: STEEP)  # kinds of prompts, by weight
    draw: int = 1  # which scenes: rounds with the same draw see the same ones
    bare: float = 1.0  # share kept of prompts for single objects and open pairs that name neither size nor place


@dataclass(frozen=True, kw_only=True)
class SD3Config:
    """Sizes, data and training of the generator."""

    layers: int = 6
    heads: int = 5  # of 32 channels each
    text_widths: tuple[int, int] = (128, 64)  # of the two CLIP text encoders
    text_layers: tuple[int, int] = (3, 2)  # the pipeline reads the last but one
    images: int = 32768  # rendered and encoded once
    smallest: float = 6.0  # radius in pixels under which the autoencoder blurs squares into circles
    batch: int = 48
    dropout: float = 0.1  # share of captions replaced by the empty one, for guidance
    empty: tuple[int, ...] = (1, 32, 256)  # empty tokens after the caption; 256 is the pipeline's default
    empty_shares: tuple[float, ...] = (0.87, 0.1, 0.03)  # of the training steps
    centre: float = 0.3  # mean of the logit of the time; above 0 favours noisy images, where layout is decided
    rounds: tuple[Round, ...] = (  # each from the averaged weights of the one before
        Round(fit=FitConfig(steps=2400, matrix_rate=2e-3, ema=0.998)),
        Round(fit=FitConfig(steps=1000, learning_rate=7e-4, matrix_rate=1.4e-3, warmup=50, ema=0.998)),
        Round(
            fit=FitConfig(steps=2600, learning_rate=7e-4, matrix_rate=1.4e-3, warmup=50, ema=0.998),
            mix=EVEN,  # prompts that leave the colour open were the weakest after two rounds
            draw=4,
        ),
        Round(
            fit=FitConfig(steps=1500, learning_rate=7e-4, matrix_rate=1.4e-3, warmup=50, ema=0.998),
            mix=TRAITS,  # sizes and places of unseen shapes were the weakest after three rounds
            draw=5,
            bare=0.3,
        ),
    )
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)


DEFAULT = SD3Config()
CALL = {
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "height": 64,
    "width": 64,
    "max_sequence_length": 1,
}
FACTS = {
    "class": "StableDiffusion3Pipeline",
    "data": "32,768 rendered scenes with captions, without the held-out compositions",
    "method": "flow matching with jointly trained text encoders and classifier-free guidance",
    "call": CALL,
}


class Denoiser(nn.Module):
    """The trainable parts of the pipeline in one module."""

    def __init__(self, config: SD3Config) -> None:
        from diffusers import SD3Transformer2DModel

        super().__init__()
        joint = sum(config.text_widths)
        self.text_encoder = _text_encoder(config.text_widths[0], config.text_layers[0])
        self.text_encoder_2 = _text_encoder(config.text_widths[1], config.text_layers[1])
        self.transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=config.layers,
            attention_head_dim=32,
            num_attention_heads=config.heads,
            joint_attention_dim=joint,
            caption_projection_dim=32 * config.heads,
            pooled_projection_dim=joint,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        )
        for name, p in self.transformer.named_parameters():
            if any(part in name for part in ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
                nn.init.zeros_(p)  # every block starts as the identity, which learns about twice as fast here

    def forward(self, x_t: Tensor, sigma: Tensor, ids: Tensor, empty: int) -> Tensor:
        """Velocity (B, 4, H, W) for token ids (B, LENGTH) followed by `empty` zero tokens."""
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        words = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        pooled = torch.cat([first.text_embeds, second.text_embeds], -1)
        text = torch.cat([words, words.new_zeros(len(words), empty, words.shape[-1])], 1)
        velocity: Tensor = self.transformer(x_t, text, pooled, sigma * 1000, return_dict=False)[0]
        return velocity


def _text_encoder(width: int, layers: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tokens = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=LENGTH,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def captioned(
    count: int, smallest: float, seed: int, mix: Mapping[str, int], bare: float = 1.0, *, seen_only: bool = True
) -> tuple[list[str], list[Scene]]:
    """Captions, without held-out compositions if `seen_only`, and a scene for each.

    `bare` thins out prompts for single objects and open pairs that name neither size nor place.
    """
    rng = random.Random(seed)
    captions: list[str] = []
    scenes: list[Scene] = []
    while len(captions) < count:
        kind = rng.choices(list(mix), list(mix.values()))[0]
        clauses = sample_clauses(kind, rng)
        if bare < 1 and kind in ("single", "colours", "two"):
            while not any(want.size or want.place for want in clauses.wants) and rng.random() >= bare:
                clauses = sample_clauses(kind, rng)
        if not (seen_only and held_out(clauses)):
            captions.append(say(clauses))
            scenes.append(sample_scene(clauses, rng, seen_only=seen_only, smallest=smallest))
    return captions, scenes


def standard_latents(vae: Any, scenes: list[Scene]) -> Tensor:
    """Latents (B, 4, 16, 16) of zero mean and unit deviation."""
    with torch.autocast("cpu", torch.bfloat16):
        chunks = [encode(vae, render_many(scenes[i : i + 256])).float() for i in range(0, len(scenes), 256)]
    latents: Tensor = (torch.cat(chunks) - vae.config.shift_factor) * vae.config.scaling_factor
    return latents


def tokenise(captions: list[str]) -> Tensor:
    """Token ids (B, LENGTH) as the stock pipeline makes them."""
    ids: Tensor = tokenizer()(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")[
        "input_ids"
    ]
    return ids


def make(config: SD3Config, *, work: Path, seed: int, resume: bool) -> Path:
    """Train autoencoder and generator and write them in diffusers layout."""
    return release(train(config, folder=work, seed=seed, resume=resume), work / "model")


def release(pipe: Any, target: Path) -> Path:
    """Write a pipeline as it ships: fp16 safetensors that load in float32, without config keys that would warn."""
    pipe.to(torch.float16).save_pretrained(target, safe_serialization=True)
    _edit_config(target / "vae", without="block_out_channels")
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        _edit_config(target / part, dtype="float32")  # transformers loads a model in the dtype that its config names
    return target


def _edit_config(folder: Path, *, without: str = "", **changed: str) -> None:
    file = folder / "config.json"
    kept = {k: v for k, v in json.loads(file.read_text(encoding="utf-8")).items() if k != without}
    file.write_text(json.dumps(kept | changed, indent=2) + "\n", encoding="utf-8")


def train(config: SD3Config, *, folder: Path, seed: int, resume: bool) -> Any:
    """Train autoencoder and generator; returns a float32 pipeline."""
    vae = train_autoencoder(config.autoencoder, folder=folder / "autoencoder", seed=seed, resume=resume)
    torch.manual_seed(seed)
    model = Denoiser(config)
    drawn = cache(
        lambda draw, mix, bare: _data(config, vae, seed + draw, dict(mix), bare)
    )  # lazily: a finished round draws none
    for k, this in enumerate(config.rounds):
        title = f"generator, round {k + 1} of {len(config.rounds)}"
        loss = _round_loss(model, config, partial(drawn, this.draw, tuple(this.mix.items()), this.bare))
        fit(model, loss, this.fit, folder=folder / f"round-{k + 1}", seed=seed + k, resume=resume, title=title)
    return assemble(model, vae)


def _data(config: SD3Config, vae: Any, seed: int, mix: Mapping[str, int], bare: float) -> tuple[Tensor, Tensor]:
    """Latents (N, 4, 16, 16) and token ids (N, LENGTH) of `config.images` scenes."""
    captions, scenes = captioned(config.images, config.smallest, seed, mix, bare)
    return standard_latents(vae, scenes), tokenise(captions)


def _round_loss(model: Denoiser, config: SD3Config, data: Callable[[], tuple[Tensor, Tensor]]) -> Loss:
    blank = tokenise([""])

    def loss(step: int, generator: torch.Generator) -> Tensor:
        latents, ids = data()
        pick = torch.randint(len(latents), (config.batch,), generator=generator)
        keep = torch.rand(config.batch, 1, generator=generator) >= config.dropout
        empty = config.empty[int(torch.multinomial(torch.tensor(config.empty_shares), 1, generator=generator))]
        return flow_loss(model, latents[pick], torch.where(keep, ids[pick], blank), empty, config.centre, generator)

    return loss


def flow_loss(
    model: nn.Module, x0: Tensor, ids: Tensor, empty: int, centre: float, generator: torch.Generator
) -> Tensor:
    """Squared error of the velocity at logit-normal times."""
    sigma = torch.sigmoid(torch.randn(len(x0), generator=generator) + centre)
    noise = torch.randn(x0.shape, generator=generator)
    mix = sigma.view(-1, 1, 1, 1)
    velocity = model((1 - mix) * x0 + mix * noise, sigma, ids, empty)
    return nn.functional.mse_loss(velocity.float(), noise - x0)


def assemble(model: Any, vae: Any) -> Any:
    """The stock pipeline; word pieces get the embedding of the unknown word, which is all they can mean."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    for encoder in (model.text_encoder, model.text_encoder_2):
        table = encoder.get_input_embeddings().weight.data
        table[known() :] = table[tokenizer().unk_token_id]
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer(),
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer(),
        text_encoder_3=silent_encoder(model.transformer.config.joint_attention_dim),
        tokenizer_3=silent_tokenizer(),
    )


def measured(target: Path, *, seed: int, n: int) -> dict[str, Any]:
    """What the card says about accuracy: the card's call, the plain default call and the hard set."""
    from diffalign.zoo.accuracy import measure_pipeline
    from diffalign.zoo.shelf import load_from

    pipe = load_from(target)
    found = measure_pipeline(pipe, CALL, seed=seed, n=n)
    plain = measure_pipeline(pipe, {}, seed=seed, n=max(n // 3, 1))
    hard = measure_pipeline(pipe, CALL, seed=seed, n=n, split="hard")
    return {"strict": found["strict"], "measured": {"heldout": found, "default_call": plain, "hard": hard}}
