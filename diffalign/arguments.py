"""The arguments of a stock call: built from cases, counted, narrowed to some rows. Part of the seam with `drive`."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.cases import Case, row_seed
from diffalign.errors import ConfigError, SeamError

OURS = ("latents", "output_type", "return_dict", "generator")  # what the seam sets itself
COUNTED = ("prompt", "prompt_embeds", "image", "image_embeds", "image_embeddings", "class_labels")  # one entry per case
# Argument names that hold one entry per case; a system prompt is one text for all.
PER_CASE = re.compile(r"(?<!system_)prompt|image|embeds|mask|video|labels")


def stock_call(pipe: Any) -> Callable[..., Any]:
    """The stock `__call__` of a pipeline, also when one of our shells stands before it in the class order."""
    for cls in type(pipe).__mro__:
        if "__call__" in vars(cls) and not cls.__module__.startswith("diffalign"):
            call: Callable[..., Any] = vars(cls)["__call__"]
            return call
    raise SeamError(f"{type(pipe).__name__} has no __call__, so there is nothing to run. Pass a diffusers pipeline.")


def undecorated(pipe: Any) -> Callable[..., Any]:
    """The stock call of `pipe` without its `no_grad`, bound: the same image bit for bit, and gradients flow."""
    return inspect.unwrap(stock_call(pipe)).__get__(pipe)  # type: ignore[no-any-return]


def unread_output(call: Callable[..., Any]) -> str:
    """The `output_type` for runs whose media nobody reads: latents, where the pipeline's file knows the word."""
    try:
        source = inspect.getsource(sys.modules[call.__module__])
    except (OSError, TypeError, KeyError):
        return "latent"
    return "latent" if re.search(r"""["']latent["']""", source) else "pt"


def counts_steps(call: Callable[..., Any]) -> bool:
    """Whether a `__call__` could number its steps; a plain walk over the timesteps has no index to miss."""
    code = getattr(call, "__code__", None)
    return code is None or "enumerate" in code.co_names


def parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(stock_call(pipe)).parameters


def clean(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """`call` without what the seam sets itself, checked against the pipeline's own parameters."""
    known = parameters(pipe)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    unknown = [k for k in call if k not in known]
    if unknown and not open_ended:
        raise ConfigError(
            f"{type(pipe).__name__} takes no argument '{unknown[0]}'. It takes: {', '.join(list(known)[1:])}."
        )
    if call.get("num_images_per_prompt", 1) not in (1, None):
        raise ConfigError(
            "num_images_per_prompt must be 1 here: give each image its own case, so that it owns its seed."
        )
    return {k: v for k, v in call.items() if k not in OURS and not k.startswith("callback")}


def from_cases(pipe: Any, cases: Sequence[Case], call: Mapping[str, Any]) -> dict[str, Any]:
    """Stock arguments for `cases`: prompts, source images and control images where the pipeline takes them."""
    known = parameters(pipe)
    built = {k: [v] * len(cases) if isinstance(v, str) and k.startswith("negative_") else v for k, v in call.items()}
    if "prompt" in known and "prompt_embeds" not in call and "prompt" not in call:
        built["prompt"] = [c.prompt for c in cases]
    sources = [c.source for c in cases]
    if any(s is not None for s in sources) and "image" in known:
        built["image"] = sources
    controls = [c.control for c in cases]
    if any(c is not None for c in controls):
        built["control_image" if "control_image" in known else "image"] = controls
    return built


def batch_of(call: Mapping[str, Any]) -> int:
    """How many cases a stock call asks for."""
    for name in COUNTED:
        value = call.get(name)
        if isinstance(value, list | tuple | Tensor):
            return len(value)
        if value is not None:
            return 1
    return int(call.get("batch_size") or 1)


def take(call: Mapping[str, Any], rows: Sequence[int], batch: int) -> dict[str, Any]:
    """`call` for `rows` of its cases, repeated as often as they are named."""
    if list(rows) == list(range(batch)):
        return dict(call)
    return {name: _take_one(name, value, rows, batch) for name, value in call.items()}


def _take_one(name: str, value: Any, rows: Sequence[int], batch: int) -> Any:
    if name == "batch_size" and value == batch:
        return len(rows)
    if value is None or not PER_CASE.search(name) or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Tensor):
        return value[torch.as_tensor(list(rows), device=value.device)] if value.shape[0] == batch else value
    if isinstance(value, list | tuple):
        return [value[r] for r in rows] if len(value) == batch else value
    return [value] * len(rows) if batch == 1 and len(rows) > 1 else value


def seeds_from(call: Mapping[str, Any], batch: int) -> list[int]:
    """Seeds of the `generator` in a stock call; one generator for many gives each row its own, none means seed 0."""
    generator = call.get("generator")
    if isinstance(generator, list | tuple):
        return [int(g.initial_seed()) for g in generator]
    first = int(generator.initial_seed()) if generator is not None else 0
    return [row_seed(first, row) for row in range(batch)]


def to_cases(call: Mapping[str, Any], seeds: Sequence[int]) -> list[Case]:
    """Cases of a stock call: its prompts, or empty ones where it came with embeddings."""
    prompt = call.get("prompt")
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt] * len(seeds)
    return [Case(prompt=p if isinstance(p, str) else "", seed=s) for p, s in zip(prompts, seeds, strict=True)]
