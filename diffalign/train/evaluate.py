"""Where training stands: the stock sampler on fixed prompts and seeds, judged by everything that watches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import atomic, media, scoring
from diffalign.cases import Case, batched, derived_seed
from diffalign.clip_tower import ClipTower
from diffalign.drive import Driver
from diffalign.intervals import bootstrap
from diffalign.noise import Kernel, ddim, flow_sde
from diffalign.train import diversity
from diffalign.train.job import Job, rate
from diffalign.train.look import Look
from diffalign.train.overoptimisation import gap_interval, panel_moves, path_kl
from diffalign.train.rollout import sample
from diffalign.train.run_folder import BASE
from diffalign.train.watch import Evaluation

KL_NOISE = {"flow": flow_sde(0.7)}  # the walks whose divergence is measured; ancestral DDIM for all other models


def monitor_cases(cases: Sequence[Case], per_prompt: int, seed: int) -> list[Case]:
    """Every prompt with its seeds, the same at every evaluation of every run with this seed."""
    return [
        case.with_seed(derived_seed(seed, "evaluate", k, member))
        for k, case in enumerate(cases)
        for member in range(per_prompt)
    ]


@torch.no_grad()
def evaluate(job: Job, step: int, training: Mapping[str, float]) -> Evaluation:
    """Draw the monitor cases with the stock call and judge them; every process gets the whole."""
    cases, each = list(job.monitor), job.config.evaluate.per_prompt
    size = max(1, job.config.evaluate.batch // each) * each  # pictures of a prompt stay together
    mine = [cases[k] for k in _share(job, job.rank)]
    idle = len(_share(job, 0)) - len(mine)  # all processes call a model whose weights they share equally often
    pixels = torch.cat([draw(job, chunk) for chunk in batched(mine + cases[:1] * idle, size)])[: len(mine)]
    columns: dict[str, list[Tensor]] = {}
    for chunk, made in zip(batched(mine, size), torch.split(pixels, size), strict=True):
        scores = torch.stack([rate(reward, made, chunk) for reward, _ in job.members], dim=1)
        columns.setdefault("proxy", []).append(job.total(scores))
        if job.truth is not None:
            columns.setdefault("truth", []).append(rate(job.truth, made, chunk))
        for name, reward in job.panel:
            columns.setdefault(f"panel {name}", []).append(rate(reward, made, chunk))
        if job.tower is not None:
            columns.setdefault("features", []).append(_embedded(job.tower, made))
    found = {name: torch.cat(column) for name, column in columns.items()}
    found["media"] = (pixels * 255).round().to(torch.uint8)
    whole = _all(job, found)
    if step == 0:
        _tell_unjudged(job, whole)
    features = whole.get("features")
    return Evaluation(
        step=step,
        prompts=torch.arange(len(cases)) // each,
        proxy=whole["proxy"],
        panel={name: whole[f"panel {name}"] for name, _ in job.panel},
        truth=whole.get("truth"),
        media=whole["media"].float() / 255,
        features=features,
        prompt_margin=None if features is None else prompt_margin(job, features),
        kl=job.from_main(divergence(job)),
        training=dict(training),
    )


def _tell_unjudged(job: Job, whole: Mapping[str, Tensor]) -> None:
    """Say which rewards that only watch can judge nothing here."""
    told = {"truth": "truth", **{f"panel {name}": f"panel member {name}" for name, _ in job.panel}}
    for column, name in told.items():
        if job.main and column in whole and bool(whole[column].isnan().all()):
            warnings.warn(
                f"the {name} judges none of the {len(whole[column])} evaluation pictures, so it tells nothing. Leave "
                "it out, or evaluate on prompts that it can judge.",
                stacklevel=2,
            )


def draw(job: Job, cases: Sequence[Case]) -> Tensor:
    """Media (B, [F,] 3, H, W) of the stock call, as 8-bit pictures would show them."""
    cases = [replace(case, prompt=job.config.evaluate.before + case.prompt) for case in cases]
    driver = Driver(job.pipe, cases, budget=job.budget, memory=job.memory, **job.deployed)
    made = media.to_tensor(driver.rollout(quiet=True).media).float().cpu()
    media.require_finite(made, type(job.pipe).__name__)
    return (made.clamp(0, 1) * 255).round() / 255


def _embedded(tower: ClipTower, made: Tensor) -> Tensor:
    """Embeddings (B, D) of pictures; of a video, the mean over its frames."""
    if made.ndim == 4:
        return tower.images(made).cpu()
    each = tower.images(made.flatten(0, 1)).cpu()
    return each.view(made.shape[0], made.shape[1], -1).mean(1)


def prompt_margin(job: Job, features: Tensor) -> Tensor | None:
    """How much closer each picture is to its own prompt than to that of another (N,)."""
    assert job.tower is not None
    prompts = [case.prompt for case in job.monitor]
    each = job.config.evaluate.per_prompt
    if len(set(prompts)) < 2:
        return None
    texts = job.tower.texts(prompts, torch.device("cpu"))
    others = texts.roll(each, 0)
    return (features * (texts - others)).sum(1)


def divergence(job: Job) -> float:
    """KL of the policy's stochastic walks from those of the base model: NaN where none is walked."""
    count = job.config.evaluate.kl_prompts
    if not count:
        return math.nan
    cases = list(job.monitor)[:: job.config.evaluate.per_prompt][:count]
    driver = Driver(job.pipe, cases, budget=job.budget, memory=job.memory, **job.deployed)
    kernel: Kernel = KL_NOISE.get(driver.levels.prediction, ddim(1.0))
    steps = range(driver.length - 1)  # the last one has hardly any noise
    walked = sample(driver, kernel, steps, convention="sum", keep_means=True)
    base: dict[int, Tensor] = {}

    def keep(i: int, prediction: Tensor, transition: Any, log_prob: Tensor) -> None:
        base[i] = transition.mean
        std[i] = transition.std

    std: dict[int, float] = {}
    with job.trained.reference():
        walked.replay("sum", keep, grad=False)
    noisy = [i for i in steps if std[i] > 0]
    if not noisy:
        return math.nan
    squared = torch.stack([(walked.means[i] - base[i]).square().flatten(1).sum(1) for i in noisy], dim=1)
    return path_kl(squared, torch.tensor([std[i] for i in noisy], dtype=torch.float64))


def _share(job: Job, rank: int) -> list[int]:
    """The cases of a process: every so many-th prompt, with all its pictures."""
    each = job.config.evaluate.per_prompt
    return [k for k in range(len(job.monitor)) if k // each % job.processes == rank]


def _all(job: Job, mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows dealt out to the processes in turn, back in their order."""
    if job.processes == 1:
        return mine
    from accelerate.utils import gather_object

    parts: list[dict[str, Tensor]] = gather_object([mine])
    order = torch.tensor([k for rank in range(job.processes) for k in _share(job, rank)]).argsort()
    return {name: torch.cat([part[name] for part in parts])[order] for name in mine}


def figures(found: Evaluation, base: Look, seed: int) -> dict[str, Any]:
    """Proxy, truth, the panel and the variety of the pictures as means over prompts with intervals.

    `heldout` is what the panel's members gained since `base` in units of its spread, as they have no unit in common.
    """
    told: dict[str, Any] = {}
    rows = {"proxy": found.proxy, "truth": found.truth, **{f"panel/{k}": v for k, v in found.panel.items()}}
    if found.panel:
        rows["heldout"] = panel_moves(found.panel, base.panel, found.prompts)
        gold = [(found.panel[name], base.panel[name]) for name in base.panel]
        if gap := gap_interval((found.proxy, base.proxy), gold, found.prompts, seed=seed):
            told |= {"hacking_gap_lo": gap.lo, "hacking_gap_hi": gap.hi}
    for name, values in rows.items():
        if values is None or not len(by_prompt := prompt_means(values, found.prompts)):
            continue
        interval = bootstrap(by_prompt, seed=seed)
        told |= {name: interval.mean, f"{name}_lo": interval.lo, f"{name}_hi": interval.hi}
    if each := variety(found):
        interval = bootstrap(each, seed=seed)
        told |= {"variety": interval.mean, "variety_lo": interval.lo, "variety_hi": interval.hi}
    return told


def prompt_means(values: Tensor, prompts: Tensor) -> list[float]:
    """The mean of each prompt's valid rows; a prompt without any is left out."""
    known = ~values.isnan()
    count = int(prompts.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, prompts[known], values[known].double())
    rows = torch.zeros(count, dtype=torch.float64).index_add_(0, prompts[known], torch.ones(int(known.sum())).double())
    return (sums[rows > 0] / rows[rows > 0]).tolist()


def variety(found: Evaluation) -> list[float]:
    """For each prompt the mean distance of its pictures to one another; to those of other prompts if all have one."""
    features = diversity.plain_features(found.media) if found.features is None else found.features
    seen = diversity.measure(features, found.prompts)
    return prompt_means(seen.others if bool(seen.own.isnan().all()) else seen.own, found.prompts)


def keep_samples(job: Job, found: Evaluation) -> None:
    """The first pictures of an evaluation as a run folder that the gallery reads."""
    from diffalign.bench.card import card_of

    folder, rows = job.folder / "samples" / f"step-{found.step}", []
    shown = list(job.monitor)[: job.config.evaluate.keep]
    for k, case in enumerate(shown):
        name = f"images/{k:05d}.png"
        picture = found.media[k]
        if picture.ndim == 4:  # a video: its frames side by side
            picture = picture.permute(1, 2, 0, 3).flatten(2)
        atomic.write_image(folder / name, media.to_pil(picture))
        row: dict[str, Any] = {"index": k, "rank": 0, "prompt": case.prompt, "seed": case.seed, "file": name}
        row["reward"] = _number(found.proxy[k])
        row["parts"] = {name: _number(values[k]) for name, values in found.panel.items()}
        if found.truth is not None:
            row["truth"] = _number(found.truth[k])
        rows.append(row)
    atomic.write_jsonl(folder / "results.jsonl", rows)
    told = {"name": "training", "objective": job.config.objective_name, "step": found.step}
    card = card_of(
        job.pipe,
        job.model,
        shown,
        job.deployed,
        reward=scoring.WeightedReward([r for r, _ in job.members], job.weights.tolist()),
        method=told,
    )
    atomic.write_json(folder / "card.json", card.json())


def keep_base(folder: Path, found: Evaluation) -> None:
    """The base model's pictures, for alarms to show beside later ones."""
    from safetensors.torch import save

    pixels = (found.media * 255).round().to(torch.uint8)
    atomic.write_bytes(folder / BASE, save({"media": pixels.contiguous(), "proxy": found.proxy.float()}))


def kept_base(folder: Path) -> dict[str, Tensor]:
    """What `keep_base` wrote."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(folder / BASE)
    return found


def _number(value: Tensor) -> float | None:
    found = float(value)
    return found if found == found else None
