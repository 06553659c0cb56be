"""What every training does: collect -> learn -> step -> log -> checkpoint, with a look at how it goes now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from diffalign.errors import ModelError
from diffalign.train import checkpoint, interrupt, sharding
from diffalign.train.checkpoint import Checkpoint
from diffalign.train.ema import Ema, whole
from diffalign.train.objective import Refreshes, Teaches
from diffalign.train.run_folder import Metrics
from diffalign.train.settings import OptimConfig
from diffalign.train.team import Team

BAD_UPDATES = 3  # in a row that end the run: one may be an accident
BAD_SCALES = 20  # the same where a scaler of half precision halves its scale from 65536 until nothing overflows
Show = Callable[[int, Mapping[str, Any]], None]


class Steps:
    """One run of one job; who inherits says what a look is."""

    def __init__(self, job: Team, objective: Teaches, *, track: Callable[[dict[str, float], int], None]) -> None:
        self.job, self.objective, self.track = job, objective, track
        config, optim = job.config, job.config.optim
        adamw = torch.optim.AdamW(
            job.trained.parameters(),
            lr=optim.learning_rate,
            betas=optim.betas,
            eps=optim.epsilon,
            weight_decay=optim.weight_decay,
        )
        self.optimizer = job.accelerator.prepare_optimizer(adamw)
        self.ema = Ema(job.trained.named_parameters(), config.ema, every=config.ema_every)
        self.metrics = Metrics(job.folder)
        self.step = self.first = 0  # steps that are done, now and when this process began
        self.resumed = False
        self.updates = self.bad = self.skipped = 0
        self.spent = {"seconds": 0.0, "nfe": 0}  # by earlier parts of a resumed run
        self.judging = {"judging_seconds": 0.0, "judging_nfe": 0.0}  # what of all that went into looks
        self.since = time.perf_counter()
        self.training: dict[str, float] = {}  # the latest figures of learning
        self.stopping = False
        self.ended = ""  # why the run ended before its last step
        self.halted = ""  # the same where a look ended it, which a resumed run abides by
        self.went_back: int | None = None  # the step whose weights a look brought back

    # what a look is

    def begin(self) -> None:
        """What is done once, before the first look of a new run."""

    def look(self) -> dict[str, Any]:
        """See how it goes: figures for the log. It may set `halted` and `went_back`."""
        raise NotImplementedError

    @property
    def best(self) -> int | None:
        """The step whose checkpoint must stay."""
        return None

    def more(self) -> dict[str, Any]:
        """What a checkpoint holds of whoever inherits."""
        return {}

    def restore_more(self, state: Mapping[str, Any]) -> None: ...

    # the run

    def run(self, show: Show) -> None:
        """Train to the last step, or until the time is over, the watch says stop, or someone asks."""
        config, self.since = self.job.config, time.perf_counter()
        with interrupt.heard(self._asked):
            if self.halted:
                self._halt()
            elif self.resumed and self.job.mean({"late": float(self._late())})["late"]:
                self.ended = "the time is over"
            if not self.resumed:
                self.begin()
                self._judge(show)
            while self.step < config.steps and not self.ended:
                row = self._one_step()
                self.step += 1
                due = self.step % config.evaluate.every == 0 or self.step == config.steps
                told = self.job.mean({"asked": float(self.stopping), "late": float(self._late())})
                asked, late = told["asked"] > 0, told["late"] > 0
                self.ended = interrupt.ASKED if asked else "the time is over" if late else ""
                if due or late:
                    self._judge(show, row)
                else:
                    self._log(row, show)
                    if self.ended or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                        self.save()

    def _one_step(self) -> dict[str, float]:
        """Collect and learn; figures of all processes."""
        job = self.job
        found = self.objective.collect(job, self.step)
        parts = _parts(found.micros, job.config.updates) * job.config.passes
        told = [self._update(part) for part in parts]
        row = {name: sum(each[name] for each in told) / len(told) for name in told[0]}
        row["skipped"] = float(self.skipped)
        self.training = {**found.stats, **row}
        return self.training

    def _update(self, micros: Sequence[Any]) -> dict[str, float]:
        """One optimiser step over some micro-batches."""
        job, rows = self.job, sum(len(micro) for micro in micros)
        told: dict[str, Any] = {}
        if isinstance(self.objective, Refreshes):
            self.objective.refresh(job, micros)
        for micro in micros:
            for name, value in self.objective.learn(job, micro, len(micro) / rows).items():
                told[name] = told.get(name, 0.0) + float(value)
        told = job.mean(told)
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        job.share_gradients()
        if self._taught:
            job.accelerator.unscale_gradients(self.optimizer)
        norm = float(whole(torch.nn.utils.clip_grad_norm_(job.trained.parameters(), job.config.optim.clip_norm)))
        told |= {"grad_norm": norm, "lr": rate}
        self._apply(math.isfinite(norm) and math.isfinite(told.get("loss", 0.0)), math.isfinite(told.get("loss", 0.0)))
        return told

    @property
    def _taught(self) -> bool:
        """Whether there is any gradient: where all advantages are 0 there is none, and a scaler cannot do without."""
        return any(parameter.grad is not None for parameter in self.job.trained.parameters())

    def _apply(self, sound: bool, finite: bool) -> None:
        """Step where loss and gradient are finite; else skip, and end the run where that happens again and again."""
        scaler = self.job.accelerator.scaler
        most = BAD_SCALES if finite and scaler is not None else BAD_UPDATES
        if self._taught and (sound or scaler is not None):  # a scaler skips by itself, and lowers its scale
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        self.bad = 0 if sound else self.bad + 1
        self.skipped += not sound
        if sound:
            self.ema.update(self.updates - 1)
        if self.bad >= most:
            raise ModelError(
                f"the loss or its gradient was not finite in {self.bad} updates in a row, the last in step "
                f"{self.step}. Nothing was learnt from them. Lower optim.learning_rate, or train with precision=no."
            )

    def _rate(self) -> float:
        """The learning rate of the next update."""
        optim: OptimConfig = self.job.config.optim
        last = self.job.config.steps * self.job.updates_each
        warm = min(1.0, (self.updates + 1) / optim.warmup) if optim.warmup else 1.0
        cosine = (1 + math.cos(math.pi * min(self.updates / last, 1.0))) / 2 if optim.decay == "cosine" else 1.0
        return optim.learning_rate * warm * cosine

    def _asked(self) -> None:
        self.stopping = True
        self.job.say("stopping after this step; once more stops at once")

    # looking

    def _judge(self, show: Show, row: Mapping[str, float] | None = None) -> None:
        """Look, log what was seen, keep a checkpoint, and end the run where the look says so."""
        begun = self.cost()
        seen = self.look()
        ended = self.cost()
        for name in ("seconds", "nfe"):
            self.judging[f"judging_{name}"] += ended[name] - begun[name]
        self._log({**(row or {}), **seen}, show)
        self.save()
        if self.halted:
            self._halt()

    def _halt(self) -> None:
        """End the run as the look said, with the weights it said."""
        self.ended = self.halted
        if self.went_back is not None:
            self.bring_back(self.went_back)
            self.ended += f": back to step {self.went_back}"

    def bring_back(self, step: int) -> None:
        """Take the weights of a step whose checkpoint is kept."""
        self.restore_weights(checkpoint.load(self._checkpoints / f"step-{step}", self.job.rank))

    @property
    def chosen(self) -> int:
        """The step whose weights are in the model."""
        return self.went_back if self.went_back is not None else self.step

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A block with the weights that are evaluated and saved."""
        with self.ema.swapped() if self.job.config.ema and self.job.config.evaluate.averaged else nullcontext():
            yield

    def _log(self, row: Mapping[str, Any], show: Show) -> None:
        cost = self.cost()
        pace = {"images_per_second": (self.step - self.first) * self.job.images / self._seconds}
        if self.job.main:
            self.metrics.values.append({"step": self.step, **row})
            self.metrics.timing.append({"step": self.step, **cost, **pace})
            self.track({k: v for k, v in {**row, **pace}.items() if isinstance(v, float)}, self.step)
        show(self.step, {**row, **pace})

    def cost(self) -> dict[str, float]:
        """Seconds and model calls so far, those before a resumption included, and what of them evaluations took."""
        return {
            "seconds": self.spent["seconds"] + self._seconds,
            "nfe": self.spent["nfe"] + self.job.budget.nfe * self.job.processes,
            **self.judging,
        }

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self.since

    def _late(self) -> bool:
        minutes = self.job.config.minutes
        return minutes is not None and self.cost()["seconds"] >= 60 * minutes

    # checkpoints

    @property
    def _checkpoints(self) -> Path:
        return self.job.folder / "checkpoints"

    def kept(self, step: int) -> bool:
        """Whether there is a checkpoint of a step."""
        return (self._checkpoints / f"step-{step}").is_dir()

    def save(self) -> None:
        """Keep everything a resumed run needs; the best checkpoint and the latest few stay."""
        job = self.job
        checkpoint.save(
            self._checkpoints,
            self.step,
            self.state(),
            rank=job.rank,
            processes=job.processes,
            barrier=job.accelerator.wait_for_everyone,
        )
        if job.main:
            checkpoint.prune(self._checkpoints, job.config.keep, protect=(self.best,))

    def state(self) -> dict[str, Any]:
        """What the main process writes; every process asks, as each may hold a part of the weights."""
        scaler = self.job.accelerator.scaler
        return {
            "step": self.step,
            "updates": self.updates,
            "bad": self.bad,
            "skipped": self.skipped,
            "spent": self.cost(),
            "training": self.training,
            "halted": [self.halted, self.went_back],
            "trained": self.job.trained.state_dict(),
            "optimizer": sharding.gathered(self.optimizer.state_dict()),
            "ema": self.ema.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "objective": self.objective.state(),
            **self.more(),
        }

    def restore_weights(self, found: Checkpoint) -> None:
        """Take the weights of a checkpoint and their averages."""
        self.job.trained.load_state_dict(found.state["trained"])
        self.ema.load_state_dict(found.state["ema"])

    def restore(self, found: Checkpoint) -> None:
        """Go on from a checkpoint."""
        state, job = found.state, self.job
        self.restore_weights(found)
        self.step, self.updates = int(state["step"]), int(state["updates"])
        self.bad, self.skipped = int(state["bad"]), int(state["skipped"])
        self.spent, self.training = dict(state["spent"]), dict(state["training"])
        self.judging = {name: self.spent.get(name, value) for name, value in self.judging.items()}
        self.halted, self.went_back = ("", None) if job.config.force else state["halted"]
        self.optimizer.load_state_dict(state["optimizer"])
        sharding.spread(self.optimizer)
        if job.accelerator.scaler is not None:
            job.accelerator.scaler.load_state_dict(state["scaler"])
        self.objective.restore(state["objective"])
        self.restore_more(state)
        self.first, self.resumed = self.step, True
        if found.rng is not None:
            checkpoint.restore_rng(found.rng)


def _parts(micros: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Micro-batches in `count` runs of neighbours, as even as they can be; an update needs at least one."""
    count = min(count, len(micros))
    cuts = [round(k * len(micros) / count) for k in range(count + 1)]
    return [micros[a:b] for a, b in pairwise(cuts)]
