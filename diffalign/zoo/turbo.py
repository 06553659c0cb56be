"""`shapes-turbo`: the one-step student of `shapes-sd3`.

The student starts from the teacher's weights and learns, at the noisiest time only, to predict a whole scene at once.
The layout of the scene is a function of noise and caption (see coding.py); with scenes independent of the noise the
best one-step answer would be a blur over all layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.world.grammar import parse
from diffalign.zoo import sd3
from diffalign.zoo.coding import CODES, encode_layout, scene_of
from diffalign.zoo.fit import FitConfig, fit
from diffalign.zoo.sd3 import EVEN, Denoiser, SD3Config, assemble, captioned, release, standard_latents, tokenise
from diffalign.zoo.shelf import load


@dataclass(frozen=True, kw_only=True)
class TurboConfig:
    """Data and training of the student."""

    images: int = 32768
    smallest: float = 6.0  # radius in pixels
    batch: int = 48
    empty: tuple[int, ...] = (1, 256)  # empty tokens after the caption
    empty_shares: tuple[float, ...] = (0.97, 0.03)
    teacher: SD3Config = field(default_factory=SD3Config)
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=2400, learning_rate=7e-4, matrix_rate=1.5e-3, warmup=50, ema=0.995)
    )


DEFAULT = TurboConfig()
CALL = sd3.CALL | {"num_inference_steps": 1, "guidance_scale": 1.0}
FACTS = sd3.FACTS | {
    "method": "one-step student: the teacher's weights, trained on at the noisiest time to draw the scene that noise "
    "and prompt mean together (diffalign/zoo/coding.py); no samples of the teacher are used",
    "call": CALL,
}


def make(config: TurboConfig, *, work: Path, seed: int, resume: bool) -> Path:
    """Train the student of the shipped teacher and write it in diffusers layout."""
    teacher = load("shapes-sd3")
    model = Denoiser(config.teacher)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        getattr(model, name).load_state_dict(getattr(teacher, name).state_dict())
    captions, _ = captioned(config.images, config.smallest, seed + 3, EVEN)
    codes = torch.randn(len(captions), CODES, generator=torch.Generator().manual_seed(seed))
    asked = [clauses for clauses in map(parse, captions) if clauses]
    rows = zip(asked, codes.tolist(), strict=True)
    scenes = [scene_of(clauses, row, smallest=config.smallest) for clauses, row in rows]
    latents, ids = standard_latents(teacher.vae, scenes), tokenise(captions)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(latents), (config.batch,), generator=generator)
        empty = config.empty[int(torch.multinomial(torch.tensor(config.empty_shares), 1, generator=generator))]
        noise = encode_layout(torch.randn(latents[pick].shape, generator=generator), codes[pick])
        return one_step_loss(model, noise, latents[pick], ids[pick], empty)

    fit(model, loss, config.fit, folder=work / "student", seed=seed, resume=resume, title="shapes-turbo")
    return release(assemble(model, teacher.vae), work / "model")


def one_step_loss(model: nn.Module, noise: Tensor, x0: Tensor, ids: Tensor, empty: int) -> Tensor:
    """Absolute and squared error of the scene that one Euler step from pure noise gives."""
    velocity = model(noise, torch.ones(len(noise)), ids, empty).float()
    return nn.functional.mse_loss(noise - velocity, x0) + 0.5 * nn.functional.l1_loss(noise - velocity, x0)


def measured(target: Path, *, seed: int, n: int) -> dict[str, Any]:
    """What the card says about accuracy."""
    from diffalign.zoo.accuracy import measure_pipeline
    from diffalign.zoo.shelf import load_from

    found = measure_pipeline(load_from(target), CALL, seed=seed, n=n)
    return {"strict": found["strict"], "measured": {"heldout": found}}
