"""A pipeline made ready to train: its cases read, its rewards made, its adapter attached, all of it undone after."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign import scoring
from diffalign.arguments import parameters
from diffalign.cases import Case
from diffalign.drive import Driver
from diffalign.errors import ConfigError
from diffalign.restore import steady
from diffalign.reward_specs import parse_spec
from diffalign.train import (
    adapters,
    checkpoint,
    data,
    evaluate,
    heldout,
    known,
    precision,
    processes,
    sharding,
    tracking,
)
from diffalign.train.embeddings import PromptCache
from diffalign.train.job import Job
from diffalign.train.relabelled import highest, relabelled
from diffalign.train.settings import TrainConfig
from diffalign.zoo.fit import keep_freed_memory


@contextmanager
def opened(
    pipe: Any,
    settings: TrainConfig,
    *,
    model: str,
    call: Mapping[str, Any],
    seed: int,
    out: Path,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Job]:
    """The job with its adapter attached; the pipeline and the random generators are left as they were found."""
    keep_freed_memory()
    with ExitStack() as stack:
        stack.callback(checkpoint.restore_rng, checkpoint.capture_rng())
        sharding.check(settings)
        accelerator = accelerate(getattr(pipe, "_execution_device", pipe.device), settings, out)
        stack.enter_context(processes.together(accelerator))
        job = _job(pipe, settings, accelerator, model=model, call=dict(call), seed=seed, out=out, say=say)
        stack.callback(job.trained.detach)
        if sharding.asked():
            sharding.shard(job.trained.denoisers, job.device)
        stack.enter_context(dressed(job))
        yield job


def _job(
    pipe: Any,
    settings: TrainConfig,
    accelerator: Any,
    *,
    model: str,
    call: dict[str, Any],
    seed: int,
    out: Path,
    say: Callable[[str], None],
) -> Job:
    """The job with its cases read, its rewards made and its adapter attached."""
    members = parse_spec(settings.reward) if settings.reward else []
    if not members:
        raise ConfigError("the job has no reward, so there is nothing to raise. Add one, such as reward: {clip: 1.0}.")
    entries = known.read(settings.data) if settings.data.given else []
    pairs = relabelled(entries, settings.relabel, seed) if settings.relabel.enabled else entries
    if settings.relabel.enabled:
        say(f"prompts name scores up to {highest(pairs, settings.relabel)}: ask for that in evaluate.before")
    prompts = [each.case for each in pairs] or _cases(settings.prompts, settings.split, settings.limit)
    monitor = _monitor(settings, prompts)
    if entries and settings.evaluate.prompts is settings.evaluate.split is None:
        raise ConfigError(
            "the job learns from data, and evaluation has no prompts of its own: what is learnt by heart would count. "
            "Give evaluate.prompts or evaluate.split."
        )
    known.require_unseen(entries, monitor)
    tell: Callable[[str], None] = say if accelerator.is_main_process else lambda text: None
    raised = [leaf for reward, _ in members for leaf in scoring.leaves(reward)]
    panel = heldout.panel(parse_spec(settings.panel) if settings.panel else [], raised)
    truth = scoring.make_reward(settings.truth) if settings.truth else None
    tower = heldout.tower(settings.evaluate.tower, model, raised, tell)
    seeded(seed)
    training = call | settings.sampling
    with torch.no_grad():
        names = _denoisers(pipe, prompts[0], training)
    trained = adapters.attach(pipe, settings.adapter, adapters.find_denoisers(pipe, settings.adapter.modules, names))
    return Job(
        config=settings,
        pipe=pipe,
        model=model or type(pipe).__name__,
        call=training,
        deployed=call | settings.evaluate.call,
        prompts=prompts,
        monitor=evaluate.monitor_cases(monitor, settings.evaluate.per_prompt, seed),
        members=members,
        trained=trained,
        accelerator=accelerator,
        folder=out,
        seed=seed,
        truth=truth,
        panel=panel,
        tower=tower,
        stock=known.Stock(pairs, seed) if pairs else None,
        say=tell,
    )


def _denoisers(pipe: Any, case: Case, call: Mapping[str, Any]) -> tuple[str, ...]:
    """What denoises, which two steps of the pipeline tell; a call it cannot take is told as such."""
    try:
        return adapters.ran(Driver(pipe, [case], **call))
    except (ValueError, TypeError, AttributeError) as error:
        wants = ""
        if case.source is None and "image" in parameters(pipe):
            wants = (
                " It takes a picture: give prompts whose rows name a `source`, or sampling: {image: ...} from Python."
            )
        raise ConfigError(
            f"{type(pipe).__name__} does not take the call of this job ({type(error).__name__}: {str(error)[:200]}). "
            f"Check call and sampling.{wants}"
        ) from error


def _cases(file: str | None, split: Any, limit: int | None = None) -> list[Case]:
    """Prompts to train or to evaluate on; a prompt set of the shapes world repeats some on purpose, to weigh kinds."""
    return data.read(data.PromptsConfig(file=file, split=split, limit=limit, keep_duplicates=split is not None))


def accelerate(device: Any, settings: Any, folder: Path) -> Any:
    """Accelerate as a job with this precision and these trackers needs it, also after one that needed it otherwise."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    mixed = "fp16" if settings.precision == "fp16" else "no"  # bf16 needs no scaler; see `precision`
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()
    processes.require_group()
    made = Accelerator(
        cpu=processes.on_cpu(device),
        mixed_precision=mixed,
        log_with=tracking.chosen(settings.trackers) or None,
        project_dir=str(folder),
    )
    if mixed == "fp16" and made.scaler is None:
        raise ConfigError(
            f"precision is fp16, whose small gradients need a scaler, and there is none on {made.device}. Use "
            "precision=bf16, or precision=no."
        )
    return made


def seeded(seed: int) -> None:
    """The global generators, which stock code and rewards may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _monitor(settings: TrainConfig, training: list[Case]) -> list[Case]:
    """The prompts of every evaluation: their own set, or a share of the training prompts where none is named."""
    asked = settings.evaluate
    if asked.prompts is None and asked.split is None:
        return training[: asked.limit]
    cases = _cases(asked.prompts, asked.split)
    spread = [cases[k * len(cases) // min(asked.limit, len(cases))] for k in range(min(asked.limit, len(cases)))]
    if both := data.shared_prompts(training, spread):
        warnings.warn(
            f"{len(both)} of {len(spread)} evaluation prompts are trained on too, such as '{both[0][:60]}': what they "
            "show is not held out.",
            stacklevel=3,
        )
    return spread


@contextmanager
def dressed(job: Job) -> Iterator[None]:
    """The pipeline with what training adds around it: autocast, checkpointing, compilation, remembered prompts."""
    config, denoisers = job.config, job.trained.denoisers
    parts = [part for part in job.pipe.components.values() if isinstance(part, torch.nn.Module)]
    with ExitStack() as stack:
        stack.enter_context(steady(parts, every_half=True))
        stack.enter_context(precision.checkpointing(denoisers, config.gradient_checkpointing))
        stack.enter_context(precision.compiled(denoisers, config.compile))
        stack.enter_context(precision.autocast(denoisers.values(), config.precision))
        stack.enter_context(PromptCache(job.pipe))
        yield
