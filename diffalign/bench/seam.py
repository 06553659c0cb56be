"""What the seam costs: predict over the bare model call, and a whole rollout over the stock call, as ratios from one
run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from diffalign.drive import Driver
from diffalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SeamBench:
    """A random SD3-class model, deep enough that one guided call takes about `model_ms`."""

    model_ms: float = 50.0  # target length of one denoiser call
    steps: int = 20  # of the rollout
    repeats: int = 15  # timed pairs; the median of their ratios is reported
    rollouts: int = 3  # timed pairs of whole rollouts
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("model_ms", "steps", "repeats", "rollouts"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"bench.{name} is {getattr(self, name)}, but it must be above 0.")


def measure(config: SeamBench | None = None, *, on_step: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Time both ratios on a random model of the configured size; `on_step` hears what is being timed."""
    config = config or SeamBench()
    on_step("building a model")
    pipe, call = _sized_model(config)
    call["num_inference_steps"] = config.steps
    driver = Driver(pipe, **call)
    x = driver.start()
    bare = _bare_call(driver, x)
    tell = told(on_step, "timing predict")
    predicts = alternated((bare, lambda: driver.predict(x, config.steps // 2)), config.repeats, unused=2, tell=tell)
    stock, tell = _stock_call(pipe, call), told(on_step, "timing rollouts")
    rollouts = alternated((stock, lambda: Driver(pipe, **call).rollout(quiet=True)), config.rollouts, tell=tell)
    return {
        "predict_ratio": median(b / a for a, b in predicts),
        "rollout_ratio": median(b / a for a, b in rollouts),
        "model_ms": 1000 * median(a for a, _ in predicts),
        "steps": config.steps,
        "pipeline": type(pipe).__name__,
        "device": str(x.device),
    }


def alternated(
    runs: Sequence[Callable[[], Any]],
    count: int,
    *,
    unused: int = 1,
    tell: Callable[[int, int], None] = lambda *_: None,
) -> list[tuple[float, ...]]:
    """Seconds of each of `runs`, taken in turn `count` times after `unused` rounds that warm them up.

    `tell(k, n)` hears that round k of n begins.
    """
    found: list[tuple[float, ...]] = []
    for k in range(count + unused):
        tell(k + 1, count + unused)
        found.append(tuple(_seconds(run) for run in runs))
    return found[unused:]


def told(on_step: Callable[[str], None], what: str) -> Callable[[int, int], None]:
    """Says which round of `what` begins."""
    return lambda k, n: on_step(f"{what}, round {k} of {n}")


def _seconds(run: Callable[[], Any]) -> float:
    _synchronise()
    begin = time.perf_counter()
    run()
    _synchronise()
    return time.perf_counter() - begin


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def model_calls(driver: Driver, x: torch.Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of every denoiser call that one predict makes."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    driver.predict(x, 0)
    model = driver.modules[driver.denoiser or "transformer"]
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        driver.predict(x, 0)
    finally:
        handle.remove()
    return seen


def _bare_call(driver: Driver, x: torch.Tensor) -> Callable[[], Any]:
    """The denoiser call that one predict makes, with the very arguments it was given, and nothing around it."""
    seen = model_calls(driver, x)
    model = driver.modules[driver.denoiser or "transformer"]

    def bare() -> None:
        with torch.no_grad():
            for args, kwargs in seen:
                model(*args, **kwargs)

    return bare


def _stock_call(pipe: Any, call: dict[str, Any]) -> Callable[[], Any]:
    def stock() -> None:
        pipe(**call, generator=torch.Generator("cpu").manual_seed(0), output_type="pt")

    pipe.set_progress_bar_config(disable=True)
    return stock


def _sized_model(config: SeamBench) -> tuple[Any, dict[str, Any]]:
    """A random SD3 pipeline without text encoders; layers are added until a guided call takes `model_ms`."""
    layers = 2
    pipe, call = random_sd3(layers, config.seed)
    per_layer = _layer_seconds(pipe, call) / layers
    return random_sd3(max(1, round(config.model_ms / 1000 / per_layer)), config.seed)


def _layer_seconds(pipe: Any, call: dict[str, Any]) -> float:
    driver = Driver(pipe, num_inference_steps=2, **call)
    bare = _bare_call(driver, driver.start())
    return median(_seconds(bare) for _ in range(7))


def random_sd3(layers: int, seed: int, *, heads: int = 6, side: int = 32) -> tuple[Any, dict[str, Any]]:
    """A random SD3 pipeline of this depth, width and latent side, without text encoders, and its call."""
    from diffusers import (
        AutoencoderTiny,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=side,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            attention_head_dim=64,
            num_attention_heads=heads,
            joint_attention_dim=64,
            caption_projection_dim=64 * heads,
            pooled_projection_dim=64,
            pos_embed_max_size=side,
        )
        blocks = {f"{half}coder_block_out_channels": (min(64, 8 * heads),) * 4 for half in ("en", "de")}
        vae = AutoencoderTiny(latent_channels=4, scaling_factor=1.0, shift_factor=0.0, **blocks)
        embeds = {"prompt_embeds": torch.randn(1, 16, 64), "negative_prompt_embeds": torch.randn(1, 16, 64)}
        pooled = {"pooled_prompt_embeds": torch.randn(1, 64), "negative_pooled_prompt_embeds": torch.randn(1, 64)}
    parts = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), **parts
    )
    return pipe, {**embeds, **pooled, "height": 8 * side, "width": 8 * side, "guidance_scale": 4.0}
