"""From a pipeline and a config to a finished run: what the command line and a script call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from diffalign import atomic, config
from diffalign.judges.secrets import without_secrets
from diffalign.train import alarm_page, checkpoint, preflight, run_folder, tracking
from diffalign.train.job import Job
from diffalign.train.loop import Loop
from diffalign.train.objective import Objective, make
from diffalign.train.opening import opened, seeded
from diffalign.train.settings import TrainConfig
from diffalign.train.summary import said, summary

Show = Callable[[int, Mapping[str, Any]], None]


def train(
    pipe: Any,
    settings: TrainConfig,
    *,
    model: str = "",
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    out: str | Path = "out/train",
    origin: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
    show: Show = lambda step, row: None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Tune `pipe` in place and write a run folder; gives back what summary.json holds.

    `call` has the stock arguments of this pipeline, such as steps and size; `origin` is what config.yaml says besides,
    such as how the model was loaded. With `dry_run` only the preflight runs. The pipeline and the random generators are
    left as they were found.
    """
    objective = make(settings.objective)
    with ExitStack() as stack:
        job = stack.enter_context(
            opened(pipe, settings, model=model, call=call or {}, seed=seed, out=Path(out), say=say)
        )
        preflight.check(job, objective)
        if dry_run:
            return _dry(job, objective)
        told = {"model": job.model, "seed": seed, **(origin or {}), "call": dict(call or {}), **config.plain(settings)}
        told = _told(without_secrets(told))
        place = _begin(job, told, stack)
        names = tracking.chosen(settings.trackers)
        track = tracking.tracker(job.accelerator, names if job.main else [], job.folder, told)
        loop = Loop(job, objective, track=track)
        if place is not None:
            loop.restore(checkpoint.load(place, job.rank))
            job.say(f"resumed at step {loop.step} from {place}")
        else:
            if settings.preflight:
                _say_preflight(job, objective)
            seeded(seed)
        loop.run(show)
        return _finish(loop)


def _told(value: Any) -> Any:
    """Settings as config.yaml has them: an object that a script gave, such as a reward, by its name."""
    if isinstance(value, Mapping):
        return {str(name): _told(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_told(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(getattr(value, "name", None) or getattr(value, "__name__", type(value).__name__))


def _begin(job: Job, told: Mapping[str, Any], stack: ExitStack) -> Path | None:
    """Lock and prepare the folder in the main process; every process learns where to go on."""
    place: Path | None = None
    if job.main:
        stack.enter_context(run_folder.locked(job.folder))
        place = run_folder.begin(job.folder, told, resume=job.config.resume, force=job.config.force).checkpoint
    place = job.from_main(place)  # where the main process fails instead, the others end with it
    return place


def _say_preflight(job: Job, objective: Objective) -> preflight.Preflight:
    found = preflight.fly(job, objective)
    for line in found.lines(job):
        job.say(line)
    return found


def _dry(job: Job, objective: Objective) -> dict[str, Any]:
    return {"dry_run": True, **vars(_say_preflight(job, objective))}


def _finish(loop: Loop) -> dict[str, Any]:
    """Save the result for stock pipelines, the curves and the summary."""
    job = loop.job
    rows, saved = loop.metrics.values.rows(), job.folder / "lora"
    chosen = loop.chosen
    with loop.averaged():
        job.trained.save(saved, main=job.main)
    found = summary(
        rows,
        loop.cost(),
        loop.alarms,
        chosen=chosen,
        ended=loop.ended or "all steps done",
        skipped_updates=loop.skipped,
        load=job.trained.how_to_load(saved),
    )
    if job.main:
        alarm_page.plot(rows, job.folder / "plot.png")
        atomic.write_json(job.folder / "summary.json", found)
        job.say(said(found))
        job.say(f"the result is in {saved}; in a stock pipeline: {'; '.join(found['load'])}")
    job.accelerator.wait_for_everyone()
    job.accelerator.end_training()
    return found
