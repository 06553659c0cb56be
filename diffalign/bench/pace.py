"""How fast search runs: prompts in lock-step against one at a time, and noise optimisation against its bare passes.

Everything is a ratio of two times from one run, the two taken in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from diffalign import registry, scoring, world, zoo
from diffalign.bench.seam import alternated, model_calls, random_sd3, told
from diffalign.cases import Case, derived_seed
from diffalign.drive import Driver
from diffalign.errors import ConfigError
from diffalign.restore import frozen

METHODS = ("tree", "smc")
Tell = Callable[[int, int], None]  # round k of n begins


@dataclass(frozen=True, kw_only=True)
class PaceBench:
    """How much is timed."""

    prompts: int = 16  # in lock-step
    images: int = 2  # budget of each prompt
    steps: int = 8  # of the small model, whose calls are nearly all overhead
    passes: int = 10  # iterations of noise optimisation
    repeats: int = 3  # timed pairs; the median of their ratios counts
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "images", "steps", "passes", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bench.{name} is {getattr(self, name)}, but it must be at least 1.")
        if self.prompts > (most := len(world.prompts("heldout"))):
            raise ConfigError(f"bench.prompts is {self.prompts}, but the held-out set has {most}.")


def measure(config: PaceBench | None = None, *, on_step: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """All ratios: lock-step above 1 is a gain, noise optimisation above 1 is a loss; `on_step` hears what is timed."""
    config = config or PaceBench()
    found: dict[str, Any] = {"prompts": config.prompts, "lockstep": {}}
    for name, pipe, asked in (("overhead-bound", *_small(config)), ("shapes-sd3", *_embedded("shapes-sd3", config))):
        for method in METHODS:
            tell = told(on_step, f"{method} on {name}")
            found["lockstep"].setdefault(name, {})[method] = lockstep(pipe, asked, method, config, tell)
    pipe, asked = _embedded("shapes-turbo", config)
    tell = told(on_step, "noise optimisation")
    return found | noise_optimisation(pipe, asked, scoring.make_reward("clip"), config, tell)


def lockstep(pipe: Any, asked: dict[str, Any], method: str, config: PaceBench, tell: Tell = lambda *_: None) -> float:
    """Images per second of all prompts in one call over that of one prompt a call."""
    kind: Any = registry.make_pipeline_class(method)
    shell = kind.from_pipe(pipe)
    shell.set_progress_bar_config(disable=True)
    rows = range(config.prompts)
    seeds = [derived_seed(config.seed, "prompt", row) for row in rows]
    plain = sum(Driver(pipe, **_rows(asked, [0])).costs)

    def search(chosen: Sequence[int]) -> None:
        generators = [torch.Generator("cpu").manual_seed(seeds[row]) for row in chosen]
        told = {"reward": "brightness", "budget": plain * config.images, "generator": generators}
        shell(**_rows(asked, chosen), **told)

    def alone() -> None:
        for row in rows:
            search([row])

    return median(a / b for a, b in alternated((alone, lambda: search(rows)), config.repeats, tell=tell))


def noise_optimisation(
    pipe: Any, asked: dict[str, Any], reward: Any, config: PaceBench, tell: Tell = lambda *_: None
) -> dict[str, float]:
    """Time and kept memory of one iteration over those of the bare forward and backward pass of the same graph."""
    kind: Any = registry.make_pipeline_class("reno")
    shell = kind.from_pipe(pipe)
    shell.set_progress_bar_config(disable=True)
    rows = range(min(config.prompts, 4))
    few = _rows(asked, rows)
    bare = _bare_pass(pipe, few, reward)

    def optimise(iterations: int) -> None:
        generators = [torch.Generator("cpu").manual_seed(row) for row in rows]
        shell(**few, reward=reward, generator=generators, reno={"iterations": iterations})

    def passes() -> None:
        for _ in range(config.passes):
            bare()

    parts = (lambda: optimise(1), lambda: optimise(1 + config.passes), passes)
    with frozen(pipe.components[name] for name in ("transformer", "vae")):
        ratios = [(whole - first) / between for first, whole, between in alternated(parts, config.repeats, tell=tell)]
        memory = kept_bytes(lambda: optimise(2)) / kept_bytes(bare)
    return {"reno_time_ratio": median(ratios), "reno_memory_ratio": memory}


def kept_bytes(run: Callable[[], Any]) -> int:
    """Bytes that `run` keeps for its backward passes, each piece of memory counted once."""
    pieces: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        pieces[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(pieces.values())


def _bare_pass(pipe: Any, asked: dict[str, Any], reward: Any) -> Callable[[], Tensor]:
    """Model, decoder, reward and the gradient in the noise, by hand for a one-step flow model."""
    driver = Driver(pipe, **asked)
    noise = driver.start()
    model, vae = pipe.transformer, pipe.vae
    ((args, kwargs),) = model_calls(driver, noise)

    def bare() -> Tensor:
        with torch.enable_grad():
            x = noise.clone().requires_grad_()
            velocity = model(*args, **{**kwargs, "hidden_states": x})[0]
            latents = (x - velocity) / vae.config.scaling_factor + vae.config.shift_factor
            media = (vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
            found = reward(media, driver.cases)
            total = found.total if isinstance(found, scoring.Score) else found
            (slope,) = torch.autograd.grad(total.sum(), x)
        return slope

    return bare


def _rows(asked: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The call for some of the prompts."""
    picked: dict[str, Any] = {k: v[list(rows)] for k, v in asked.items() if isinstance(v, Tensor)}
    if "prompt" in asked:
        picked["prompt"] = [asked["prompt"][row] for row in rows]
    return {**asked, **picked}


def _small(config: PaceBench) -> tuple[Any, dict[str, Any]]:
    pipe, call = random_sd3(1, config.seed, heads=1, side=8)
    wide = {k: v.expand(config.prompts, *v.shape[1:]) for k, v in call.items() if isinstance(v, Tensor)}
    return pipe, {**call, **wide, "num_inference_steps": config.steps}


def _embedded(name: str, config: PaceBench) -> tuple[Any, dict[str, Any]]:
    cases: list[Case] = list(world.prompts("heldout"))[: config.prompts]
    return zoo.load(name), {"prompt": [case.prompt for case in cases], **zoo.card(name)["call"]}
