"""How often a model shows exactly what was asked, judged by the exact verifier."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffalign.cases import Case, batched
from diffalign.intervals import wilson
from diffalign.world.promptsets import prompts
from diffalign.world.verifier import verify
from diffalign.zoo.shelf import card, folder


def measure(name: str, *, seed: int = 0, n: int = 240) -> dict[str, Any]:
    """Strict accuracy on held-out prompts at the card's call, with its Wilson 95 % interval.

    A picture-text model is measured as a judge instead: `shapes-clip` by the area under its ROC curve within prompts,
    `shapes-vlm` by its yes-or-no answers.
    """
    if name == "shapes-vlm":
        from diffalign.zoo.vlm_measure import measure_answers

        return {"name": name, **measure_answers(folder(name), seed=seed, n=n)}
    if name == "shapes-clip":
        from diffalign.zoo.clip import measure_judge

        return {"name": name, **measure_judge(folder(name), seed=seed, n=n)}
    from diffalign.zoo.shelf import load

    return {"name": name, **measure_pipeline(load(name), card(name)["call"], seed=seed, n=n)}


def measure_pipeline(
    pipe: Any, call: Mapping[str, Any], *, seed: int, n: int, split: str = "heldout"
) -> dict[str, float | int]:
    """Strict accuracy of a pipeline on `n` cases of a prompt set."""
    cases = drawn(split, seed=seed, n=n)
    hits = [v.strict for chunk in batched(cases, 40) for v in verify(generate(pipe, chunk, call), chunk)]
    found = wilson(sum(hits), len(hits))
    return {"strict": found.mean, "lo": found.lo, "hi": found.hi, "n": len(hits), "seed": seed}


def drawn(split: str, *, seed: int, n: int) -> list[Case]:
    """`n` cases in an order and with noise seeds that follow from `seed`; past the end of the set it starts over."""
    pool = prompts(split)
    random.Random(seed).shuffle(pool)
    return [replace(pool[i % len(pool)], seed=seed * 1_000_003 + i) for i in range(n)]


def judged(*, seed: int, n: int, per_prompt: int) -> Iterator[tuple[Tensor, list[Case], Tensor]]:
    """About `n` images of shapes-sd3 for held-out prompts, prompt by prompt: pixels, cases, and which are right."""
    from diffalign.zoo.shelf import load

    pipe, call = load("shapes-sd3"), card("shapes-sd3")["call"]
    for case in drawn("heldout", seed=seed, n=max(n // per_prompt, 1)):
        cases = [case.with_seed(case.seed + 7919 * k) for k in range(per_prompt)]
        media = generate(pipe, cases, call)
        yield media, cases, torch.tensor([verdict.strict for verdict in verify(media, cases)])


def generate(pipe: Any, cases: Sequence[Case], call: Mapping[str, Any]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1]; each case draws its noise from its own seed."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(case.seed) for case in cases]
    images: Tensor = pipe([c.prompt for c in cases], generator=generators, output_type="pt", **call).images
    return images.float()
