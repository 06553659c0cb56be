"""The one loop: rollout -> score -> advantages -> objective -> step -> log -> checkpoint, whatever the objective is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffalign.train import alarm_page, evaluate
from diffalign.train.job import Job
from diffalign.train.objective import Objective
from diffalign.train.steps import Steps
from diffalign.train.watch import Verdict, Watch


class Loop(Steps):
    """One run of one fine-tuning job, watched."""

    job: Job
    objective: Objective

    def __init__(self, job: Job, objective: Objective, *, track: Callable[[dict[str, float], int], None]) -> None:
        super().__init__(job, objective, track=track)
        self.watch = Watch(job.config.watch)
        self.alarms: list[dict[str, Any]] = []

    def begin(self) -> None:
        self.objective.prepare(self.job)

    def look(self) -> dict[str, Any]:
        """Draw what training is judged by, let the watch see it, and keep pictures."""
        job = self.job
        with self.averaged():
            found = evaluate.evaluate(job, self.step, self.training)
        verdict = self.watch.observe(found)
        if job.main:
            evaluate.keep_samples(job, found)
            if self.step == 0:
                evaluate.keep_base(job.folder, found)
        self._raise_alarms(verdict, found)
        if verdict.action in ("stop", "rollback"):
            names = ", ".join(alarm.signature for alarm in verdict.alarms)
            self.halted = f"the watch says {verdict.action} ({names})"
            self.went_back = verdict.best_step if verdict.action == "rollback" else None
        return {**verdict.metrics, **evaluate.figures(found, self.watch.base, job.seed)}

    def _raise_alarms(self, verdict: Verdict, found: Any) -> None:
        for alarm in verdict.alarms:
            self.alarms.append({"step": alarm.step, "signature": alarm.signature, "says": alarm.says})
            self.job.say(f"alarm at step {alarm.step}: {alarm.says}")
            if self.job.main:
                base = evaluate.kept_base(self.job.folder)
                alarm_page.write_alarm(
                    alarm,
                    self.job.folder,
                    base["media"].float() / 255,
                    found.media,
                    prompts=[case.prompt for case in self.job.monitor],
                    rewards=(base["proxy"], found.proxy),
                )

    @property
    def best(self) -> int | None:
        return self.watch.best_step

    def more(self) -> dict[str, Any]:
        return {"alarms": self.alarms, "watch": self.watch.state_dict()}

    def restore_more(self, state: Mapping[str, Any]) -> None:
        self.alarms = list(state["alarms"])
        self.watch.load_state_dict(state["watch"])
        if not self.kept(self.watch.best_step):  # a checkpoint of another folder, or one older than the best of its run
            self.watch.forget_best()
