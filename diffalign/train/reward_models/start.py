"""From comparisons to a reward that every verb knows by its name: what the command line and a script call."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from diffalign import atomic, config, own_rewards, registry, weights
from diffalign.budget import Budget
from diffalign.data.preferences import prompt_key
from diffalign.errors import ConfigError, OutputError
from diffalign.judges.secrets import without_secrets
from diffalign.own_rewards import TrainedCard
from diffalign.train import checkpoint, opening, processes, run_folder, sharding, tracking
from diffalign.train.adapter_files import whole_folder
from diffalign.train.ema import whole
from diffalign.train.reward_models import comparisons, curves, raters
from diffalign.train.reward_models.learning import Preferences, RewardJob
from diffalign.train.reward_models.looking import RewardLoop
from diffalign.train.reward_models.settings import RewardConfig
from diffalign.zoo.fit import keep_freed_memory

TRIES = 20  # steps until one has something to learn
Show = Callable[[int, Mapping[str, Any]], None]


def train_reward(
    settings: RewardConfig,
    *,
    seed: int = 0,
    out: str | Path = "out/reward",
    device: str = "cpu",
    command: str = "",
    say: Callable[[str], None] = print,
    show: Show = lambda step, row: None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Teach a model what the data prefers; gives back what summary.json holds. The result is in OUT/reward."""
    require_free(settings.name, Path(out))
    with ExitStack() as stack:
        job = stack.enter_context(opened(settings, seed=seed, out=Path(out), device=device, say=say))
        _say_what(job)
        if dry_run:
            return {"dry_run": True, **_tried(job)}
        told = without_secrets({"seed": seed, "device": device, "out": str(out), **config.plain(settings)})
        place: Path | None = None
        if job.main:
            stack.enter_context(run_folder.locked(job.folder))
            free = (*run_folder.FREE, "device", "patience", "name")
            start = run_folder.begin(job.folder, told, resume=settings.resume, force=settings.force, free=free)
            place = start.checkpoint
        place = job.from_main(place)
        names = tracking.chosen(settings.trackers)
        loop = RewardLoop(job, track=tracking.tracker(job.accelerator, names if job.main else [], job.folder, told))
        if place is not None:
            loop.restore(checkpoint.load(place, job.rank))
            job.say(f"resumed at step {loop.step} from {place}")
        else:
            _say_tried(job, _tried(job))
            opening.seeded(seed)
        loop.run(show)
        loop.end()
        return _finish(loop, command)


def require_free(name: str | None, out: Path) -> None:
    """Refuse a name that stands for another reward, and places that cannot be written, before anything is learnt."""
    folder = out / "reward"
    if folder.is_dir() and any(folder.iterdir()) and not (folder / own_rewards.CARD).is_file():
        raise OutputError(f"'{folder}' holds other files, and the result would replace them. Choose another --out.")
    if name is None:
        return
    try:
        atomic.require_folder(own_rewards.home())
    except OutputError as e:
        raise OutputError(f"names of rewards cannot be kept: {e} Set DIFFALIGN_REWARDS, or leave out name.") from e
    if name in registry.reward_names() and name not in own_rewards.names():
        raise ConfigError(f"'{name}' is the name of a reward that is there already. Choose another name.")
    taken = own_rewards.names().get(name)
    if taken is not None and (taken / own_rewards.CARD).is_file() and taken != (out / "reward").resolve():
        warnings.warn(f"the name '{name}' stands for the reward in '{taken}' until this one is done.", stacklevel=3)


@contextmanager
def opened(
    settings: RewardConfig, *, seed: int, out: Path, device: str, say: Callable[[str], None]
) -> Iterator[RewardJob]:
    """The job with its data read and its model loaded; the random generators are left as they were found."""
    keep_freed_memory()
    if sharding.asked():
        raise ConfigError("the launcher asks for FSDP, but a reward model is trained whole in every process.")
    split = comparisons.read(settings)
    with ExitStack() as stack:
        stack.callback(checkpoint.restore_rng, checkpoint.capture_rng())
        accelerator = opening.accelerate(device, settings, out)
        stack.enter_context(processes.together(accelerator))
        if settings.batch % accelerator.num_processes:
            raise ConfigError(
                f"batch is {settings.batch}, which {accelerator.num_processes} processes cannot share evenly."
            )
        opening.seeded(seed)
        on = accelerator.device if accelerator.num_processes > 1 else torch.device(device)
        yield RewardJob(
            config=settings,
            trained=raters.make(settings, on),
            accelerator=accelerator,
            folder=out,
            seed=seed,
            budget=Budget(),
            say=say if accelerator.is_main_process else lambda text: None,
            train=split.train,
            heldout=split.heldout,
        )


def _say_what(job: RewardJob) -> None:
    config = job.config
    pairs, held = comparisons.count_pairs(job.train, config), comparisons.count_pairs(job.heldout, config)
    count = sum(p.numel() for p in job.trained.parameters())
    job.say(
        f"learns from {pairs:,} pairs of {prompts(job.train):,} prompts; judged by {held:,} pairs of "
        f"{prompts(job.heldout):,} others; trains {count:,} numbers of {config.model}"
    )


def prompts(entries: Any) -> int:
    return len({prompt_key(each.case.prompt) for each in entries})


def _tried(job: RewardJob) -> dict[str, float]:
    """What a step costs, and whether a gradient reaches the weights; nothing is learnt by it."""
    teaches = Preferences(job)
    for step in range(TRIES):  # where most pictures are ties a step may have nothing to learn
        start, parts = time.perf_counter(), teaches.collect(job, step).micros
        for part in parts:
            teaches.learn(job, part, 1.0)
        seconds = time.perf_counter() - start
        if parts and parts[0].total:
            break
    found = job.trained.parameters()
    reached = sum(p.grad is not None and bool(whole(p.grad).any()) for p in found) / len(found)
    for parameter in found:
        parameter.grad = None
    if not reached:
        raise ConfigError("no gradient reaches the model: every pair of the first step is told apart beyond doubt.")
    return {"seconds_per_step": seconds, "reached": reached}


def _say_tried(job: RewardJob, found: Mapping[str, float]) -> None:
    minutes = found["seconds_per_step"] * job.config.steps / 60
    job.say(
        f"a gradient reaches {found['reached']:.0%} of the weights; about {found['seconds_per_step']:.2f} s a step, "
        f"{minutes:.0f} minutes for {job.config.steps} steps without looks"
    )


def _finish(loop: RewardLoop, command: str) -> dict[str, Any]:
    """Save the reward with its card, the curves and the summary, and give it its name."""
    job = loop.job
    folder = job.folder / "reward"
    rows = job.from_main(loop.metrics.values.rows() if job.main else None)
    judged = [row for row in rows if row.get("accuracy") is not None]
    told = next(row for row in judged if row["step"] == loop.chosen)  # what is kept has been looked at
    with loop.averaged():
        if job.main:
            _save(job, folder, told, command)
    name = job.config.name or str(folder)
    found = {
        "before": figures(judged[0]),
        "after": figures(told),
        "steps": loop.step,
        "seconds": loop.cost()["seconds"],
        "model_calls": loop.cost()["nfe"],
        "alarms": [],
        "chosen": loop.chosen,
        "ended": loop.ended or "all steps done",
        "skipped_updates": loop.skipped,
        "temperature": told["temperature"],
        "reward": name,
        "load": [f"diffalign generate -p PROMPT --method best_of_n --n 16 --reward {name}"],
    }
    if job.main:
        curves.plot(rows, job.folder / "plot.png")
        atomic.write_json(job.folder / "summary.json", found)
        if job.config.name:
            own_rewards.remember(job.config.name, folder)
        job.say(said(found))
        job.say(f"the reward is in {folder}; use it as --reward {name}")
    job.accelerator.wait_for_everyone()
    job.accelerator.end_training()
    return found


def _save(job: RewardJob, folder: Path, told: Mapping[str, float], command: str) -> None:
    config = job.config
    with whole_folder(folder, own_rewards.CARD) as part:
        job.rater.save(part)
        deviation = told["rating_deviation"] or 1.0
        card = TrainedCard(
            name=config.name or "",
            tower=config.tower,
            base=_place(config.model),
            base_version=job.rater.version,
            weights=weights.digest_of_tensors(part),
            mean=told["rating_mean"],
            deviation=deviation,
            temperature=told["temperature"] / deviation,
            loss=config.loss.kind,
            doubts=config.loss.kind == "uncertain",
            instruction=config.instruction if config.tower == "vlm" else "",
            accuracy={end: told[f"accuracy{key}"] for end, key in (("mean", ""), ("lo", "_lo"), ("hi", "_hi"))},
            prompts=prompts(job.train),
            pairs=comparisons.count_pairs(job.train, config),
            heldout_prompts=prompts(job.heldout),
            heldout_pairs=int(told["heldout_pairs"]),
            pixels=config.pixels,
            command=command,
        )
        own_rewards.write_card(part, card)


def _place(model: str) -> str:
    """A model as it will be found from elsewhere."""
    here = Path(model).expanduser()
    return str(here.resolve()) if here.is_dir() else model


def figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy with its interval, and the loss, as a summary has them."""
    return {
        "accuracy": {"mean": row["accuracy"], "lo": row["accuracy_lo"], "hi": row["accuracy_hi"]},
        "loss": {"mean": row["heldout_loss"], "lo": None, "hi": None},
    }


def said(found: Mapping[str, Any]) -> str:
    """One line for people."""
    parts = []
    for side in ("before", "after"):
        told = found[side].get("accuracy")
        if told:
            parts.append("{mean:.1%} [{lo:.1%}, {hi:.1%}]".format(**told))
    return (
        f"right on {' -> '.join(parts)} of held-out pairs; {found['steps']} steps, {found['seconds'] / 60:.1f} "
        f"minutes; {found['ended']}; these are the weights of step {found['chosen']}"
    )
