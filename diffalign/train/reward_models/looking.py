"""The loop of a reward model: how it judges prompts that teach nothing, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffalign import vision
from diffalign.data import accuracy
from diffalign.errors import ConfigError
from diffalign.train.reward_models import comparisons
from diffalign.train.reward_models.learning import Preferences, RewardJob
from diffalign.train.steps import Steps

MOST = 1e3  # leads, on average, beyond which a temperature is not sought


class RewardLoop(Steps):
    """One run of one training."""

    job: RewardJob

    def __init__(self, job: RewardJob, *, track: Callable[[dict[str, float], int], None]) -> None:
        super().__init__(job, Preferences(job), track=track)
        self.history: list[tuple[int, float]] = []  # steps with their losses on held-out prompts
        self.gone: set[int] = set()  # steps before a resumption whose weights are not here
        self.data = comparisons.digest([*job.train, *job.heldout])

    def look(self) -> dict[str, Any]:
        """Accuracy and loss on held-out prompts; ends the run where they have not fallen for long."""
        with self.averaged():
            found = judge(self.job)
        self.history.append((self.step, found["heldout_loss"]))
        best = self.best
        later = [step for step, _ in self.history if best is not None and step > best]
        if len(later) >= self.job.config.patience:
            self.halted = f"no lower loss on held-out prompts in {len(later)} looks"
            self.went_back = best
        return found

    @property
    def best(self) -> int | None:
        """The step with the lowest loss on held-out prompts, the first of equals."""
        known = [each for each in self.history if each[0] not in self.gone]
        return min(known, key=lambda each: (each[1], each[0]))[0] if known else None

    def more(self) -> dict[str, Any]:
        return {"history": [list(each) for each in self.history], "data": self.data}

    def restore_more(self, state: Mapping[str, Any]) -> None:
        if state["data"] != self.data and not self.job.config.force:
            raise ConfigError(
                "the data is not what this run began with, so its losses on held-out prompts would not compare. Put it "
                "back, choose another --out, or pass --force."
            )
        self.history = [(int(step), float(loss)) for step, loss in state["history"]]
        self.gone = {step for step, _ in self.history if not self.kept(step)}

    def end(self) -> None:
        """Take the best weights, where the last are not."""
        best = self.best
        if self.went_back is None and best is not None and best != self.step:
            self.went_back = best
            self.bring_back(best)


@torch.no_grad()
def ratings(job: RewardJob) -> list[list[float]]:
    """What every held-out picture gets, entry by entry; processes share the work."""
    mine = list(range(job.rank, len(job.heldout), job.processes))
    flat: list[float] = []
    waiting: list[tuple[Any, str]] = [
        (picture, job.heldout[k].case.prompt) for k in mine for picture in job.heldout[k].pictures
    ]
    size = job.config.evaluate.batch
    for start in range(0, len(waiting), size):
        some = waiting[start : start + size]
        images = [vision.to_tensor([picture.open()])[0] for picture, _ in some]
        job.budget.charge(nfe=len(some))
        flat += job.rater.rate(images, [prompt for _, prompt in some])[:, 0].float().cpu().tolist()
    place, own = 0, []
    for k in mine:
        count = len(job.heldout[k].pictures)
        own.append((k, flat[place : place + count]))
        place += count
    every = own if job.processes == 1 else _gathered(own)
    return [found for _, found in sorted(every)]


def _gathered(own: list[tuple[int, list[float]]]) -> list[tuple[int, list[float]]]:
    from accelerate.utils import gather_object

    found: list[tuple[int, list[float]]] = gather_object(own)
    return found


def judge(job: RewardJob) -> dict[str, Any]:
    """The figures of a look: accuracy by prompt with its interval, loss, ties, and what scores are centred by."""
    config, found = job.config, ratings(job)
    judged = [comparisons.judged(e, s, config.tie_below) for e, s in zip(job.heldout, found, strict=True)]
    told = accuracy.measure("half", judged, seed=job.seed)
    pairs = [
        (pair, scores)
        for entry, scores in zip(job.heldout, found, strict=True)
        for pair in comparisons.pairs_of(entry.scores, config.tie_below)
    ]
    leads = [(s[p.first] - s[p.second]) * (1 if p.label > 0.5 else -1) for p, s in pairs]
    every = torch.tensor([score for scores in found for score in scores], dtype=torch.float64)
    assert told.accuracy is not None
    return {
        "accuracy": told.accuracy.mean,
        "accuracy_lo": told.accuracy.lo,
        "accuracy_hi": told.accuracy.hi,
        "heldout_loss": loss_of(leads),
        "temperature": temperature(leads),
        "rating_mean": float(every.mean()),
        "rating_deviation": float(every.std(correction=0)),
        "heldout_pairs": float(len(pairs)),
        "tied_scores": told.score_ties / max(told.pairs, 1),
        "tied_labels": told.label_ties / max(told.pairs, 1),
    }


def loss_of(leads: Sequence[float], temperature: float = 1.0) -> float:
    """-log sigma(lead / temperature) on average, whatever the loss that teaches."""
    gaps = torch.tensor(leads, dtype=torch.float64) / temperature
    return float(torch.nn.functional.softplus(-gaps).mean())


def temperature(leads: Sequence[float]) -> float:
    """What ratings are divided by for their sigmoids to be the best chances: the loss's minimum, by golden section."""
    unit = math.sqrt(sum(lead**2 for lead in leads) / max(len(leads), 1))
    if not unit:
        return 1.0  # nothing is told apart
    some = [lead / unit for lead in leads]

    def loss(log: float) -> float:
        heat = math.exp(log)
        unsure = (loss_of([1.0], heat) + loss_of([-1.0], heat)) / 2  # one more pair that went either way
        return len(some) * loss_of(some, heat) + unsure

    low, high = -math.log(MOST), math.log(MOST)
    inverse = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - inverse * (high - low), low + inverse * (high - low)
        if loss(a) <= loss(b):
            high = b
        else:
            low = a
    return unit * math.exp((low + high) / 2)
