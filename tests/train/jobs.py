"""Training jobs on tiny pipelines of the real classes, with a fake reward, ready for an objective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.cases import Case
from diffalign.train import adapters, opening, preflight
from diffalign.train.job import Job
from diffalign.train.objective import make
from diffalign.train.settings import TrainConfig
from tests.tiny import FAMILIES, build, call
from tests.tiny.family import PROMPTS

QUICK = {"groups": 2, "group_size": 3, "micro_batch": 3, "adapter": {"rank": 2}}
OF_CASES = ("prompt", "negative_prompt", "image", "control_image", "generator")  # what a job's call leaves to its cases
TOUCH = 0.05  # by how much `touched` moves weights


TREE = {"noise": {"window": 2, "rule": "fixed"}, "branches": 2}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "flow_grpo": {"objective": "flow_grpo"},
    "dense_grpo": {"objective": "dense_grpo", "advantage": {"step_norm": "group_step"}},
    "tree_grpo": {"objective": {"tree_grpo": TREE}, "group_size": 4, "micro_batch": 4},
}


class Brightness:
    """How bright a picture is, in any unit."""

    name, version, differentiable, modality, range = "brightness", "1", True, "image", None

    def __init__(self, scale: float = 1.0, shift: float = 0.0) -> None:
        self.scale, self.shift = scale, shift

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        return media.flatten(1).mean(1) * self.scale + self.shift


def asked(objective: str, **settings: Any) -> dict[str, Any]:
    """The settings of a job for this objective, with `settings` of the objective's own."""
    told = dict(OBJECTIVES[objective])
    given = told["objective"]
    own = {} if isinstance(given, str) else given[objective]
    return told | {"objective": {objective: {**own, **settings}}}


def stock(name: str, **changed: Any) -> dict[str, Any]:
    """The stock arguments of a tiny family without what a case gives."""
    given = {k: v for k, v in call(name).items() if k not in OF_CASES}
    return given | changed


def shown(name: str, k: int) -> dict[str, Any]:
    """The picture that a case of this family needs."""
    given = call(name, k + 1)
    names = {"control_image": "control", "image": "source"}
    return {ours: given[theirs][k] for theirs, ours in names.items() if theirs in given}


@contextmanager
def job(
    name: str = "sd3",
    objective: str | Mapping[str, Any] = "flow_grpo",
    *,
    reward: Any = None,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    prompts: Sequence[str] = PROMPTS,
    folder: Path | None = None,
    pipe: Any = None,
    members: Sequence[tuple[Any, float]] | None = None,
    tags: Sequence[str] = (),
    tower: Any = None,
    **settings: Any,
) -> Iterator[tuple[Job, Any]]:
    """A job on the tiny family `name` and its objective, with everything around that `train` puts there."""
    from diffalign import config

    told = config.build(TrainConfig, {**QUICK, "objective": objective, **settings})
    pipe = build(name) if pipe is None else pipe
    part = adapters.find_denoisers(pipe, told.adapter.modules)
    trained = adapters.attach(pipe, told.adapter, part)
    asked = stock(name, **{"num_inference_steps": 3, **dict(call or {})})
    data = [{"tag": tag} for tag in tags] or [{}] * len(prompts)
    cases = [Case(prompt=prompt, metadata=data[k], **shown(name, k)) for k, prompt in enumerate(prompts)]
    found = Job(
        config=told,
        pipe=pipe,
        model=name,
        call=asked,
        deployed=asked,
        prompts=cases,
        monitor=cases[:2],
        members=members or [(Brightness() if reward is None else reward, 1.0)],
        tower=tower,
        trained=trained,
        accelerator=Accelerator(cpu=True),
        folder=folder or Path("unused"),
        seed=seed,
    )
    try:
        with opening.dressed(found):
            chosen = make(objective)
            preflight.check(found, chosen)
            yield found, chosen
    finally:
        trained.detach()


@torch.no_grad()
def touched(job: Job, by: float = TOUCH) -> None:
    """Move every trained weight a little, so that the model is no longer its base."""
    for k, parameter in enumerate(job.trained.parameters()):
        parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))


def weights(job: Job) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in job.trained.named_parameters()}


def gradients(job: Job) -> Tensor:
    """The gradient of all trained weights as one vector, which is then cleared."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in job.trained.parameters()]
    flat = torch.cat([each.flatten() for each in found]).clone()
    for parameter in job.trained.parameters():
        parameter.grad = None
    return flat


def learn(job: Job, objective: Any, micros: Sequence[Any]) -> dict[str, float]:
    """Backward through all micro-batches as one update does; the figures of FIGURES."""
    rows, told = sum(len(micro) for micro in micros), dict[str, float]()
    for micro in micros:
        for name, value in objective.learn(job, micro, len(micro) / rows).items():
            told[name] = told.get(name, 0.0) + float(value)
    return told


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


UNABLE = {  # families that a job cannot sample, and why
    "sd_inpaint": "a case has no mask",
    "sdxl_inpaint": "a case has no mask",
    "cogview4": "its tiny tokenizer makes no token of an empty negative prompt",
    "qwen_image_edit": "it reads one picture for all prompts",
}
FAST = [
    name
    for name, family in FAMILIES.items()
    if family.batch and not family.broken and not family.stray_noise and name not in UNABLE
]
