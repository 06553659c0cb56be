"""How good the tiny judge is: its yes-or-no answers, its ratings of edits, and how it does on generated pictures.

Scenes, edits and wear are drawn from seeds that training never uses; truth is exact.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.intervals import Interval, bootstrap, wilson
from diffalign.judges.asking import Decision
from diffalign.judges.parse import read_scores
from diffalign.judges.wording import SHOWS, fill
from diffalign.world.edit_sets import OUTCOMES, EditTriple, attempt, edit_case, sample_edit
from diffalign.world.edits import judge_edit
from diffalign.world.facts import facts
from diffalign.world.grammar import say
from diffalign.world.rendering import render
from diffalign.zoo.lessons import SCALE, Pupil, strict
from diffalign.zoo.wear import some_wear, worn


@dataclass(frozen=True)
class Asked:
    """A yes-or-no question with its answer."""

    image: Tensor
    question: str
    truth: bool
    kind: str  # caption, or the kind of fact


def questions(n: int, seed: int) -> list[Asked]:
    """Half about whole captions, half about single facts; yes and no equally often in each."""
    pupil, found = Pupil(random.Random(f"measure {seed}"), strong=0.0), list[Asked]()
    while len(found) < n:
        want, whole = len(found) % 2 == 0, len(found) % 4 < 2
        clauses, scene = pupil.asked()
        if whole and strict(clauses, scene) == want:
            text, kind = fill(SHOWS, prompt=say(clauses)), "caption"
        else:
            known = [] if whole else [one for one in facts(clauses) if (one.holds(scene) == "yes") == want]
            if not known:
                continue
            one = pupil.rng.choice(known)
            text, kind = one.question, one.kind
        found.append(Asked(worn(render(scene), pupil.wear()), text, want, kind))
    return found


def measure_answers(target: Path, *, seed: int, n: int) -> dict[str, Any]:
    """Share of balanced yes-or-no questions about unseen scenes that are answered rightly, in all and by kind."""
    from diffalign.judges.local import LocalJudge

    judge, asked = LocalJudge(str(target)), questions(n, seed)
    hits: dict[str, list[bool]] = {}
    for some in (asked[k : k + 64] for k in range(0, len(asked), 64)):
        said = judge.decide([Decision(text=one.question, images=(one.image,)) for one in some])
        for one, answer in zip(some, said, strict=True):
            hits.setdefault(one.kind, []).append(answer is not None and (answer[0] > 0.5) == one.truth)
    every = [hit for kind in hits.values() for hit in kind]
    whole = wilson(sum(every), len(every))
    kinds = {kind: {**wilson(sum(some), len(some)).json(), "n": len(some)} for kind, some in sorted(hits.items())}
    return {"strict": whole.mean, "lo": whole.lo, "hi": whole.hi, "n": len(every), "seed": seed, "kinds": kinds}


@dataclass(frozen=True)
class Attempt:
    """A picture, its case, and how good it is for it; `outcome` is what was made of an edit."""

    media: Tensor
    case: Case
    quality: float
    outcome: str = ""


def attempts(n: int, seed: int) -> list[Attempt]:
    """Edits with outcomes of every kind in turn."""
    rng, found = random.Random(f"edits {seed}"), list[Attempt]()
    for k in range(n):
        triple = sample_edit(rng)
        found.append(attempt_of(triple, edit_case(triple, seed=k), OUTCOMES[k % len(OUTCOMES)], rng))
    return found


def attempt_of(triple: EditTriple, case: Case, outcome: str, rng: random.Random) -> Attempt:
    """A mildly worn picture of an edit that came out so."""
    scene = attempt(triple, outcome, rng)
    quality = judge_edit(triple.source, scene, triple.edit).quality
    return Attempt(worn(render(scene), some_wear(rng, strong=0.0)), case, quality, outcome)


def rate(reward: Any, tried: Sequence[Attempt]) -> list[float]:
    """Totals, NaN where a row is invalid."""
    from diffalign.scoring import score

    media = torch.stack([one.media for one in tried])
    totals: list[float] = score(reward, media, [one.case for one in tried], chunk=16, all_invalid=True).total.tolist()
    return totals


def spearman(a: Any, b: Any) -> float:
    """Rank correlation; ties share their mean rank, and what never changes has none."""
    from scipy.stats import spearmanr

    if min(a) == max(a) or min(b) == max(b):
        return math.nan
    return float(spearmanr(a, b).statistic)


def correlation(a: Sequence[float], b: Sequence[float], *, draws: int = 1000, seed: int = 0) -> Interval:
    """Spearman's rank correlation, with its bootstrap 95 % interval over rows."""
    import numpy as np

    rng, x, y = np.random.default_rng(seed), np.asarray(a), np.asarray(b)
    picks = (rng.integers(0, len(x), len(x)) for _ in range(draws))
    lo, hi = np.nanquantile([spearman(x[pick], y[pick]) for pick in picks], [0.025, 0.975])
    return Interval(spearman(a, b), float(lo), float(hi))


class Heard:
    """A judge whose replies are counted: whether each, at its first and second try, has two scores."""

    def __init__(self, judge: Any) -> None:
        self.judge, self.sound = judge, list[bool]()
        self.name, self.most_images, self.version = judge.name, judge.most_images, None

    def reply(self, questions: Any) -> Any:
        replies = self.judge.reply(questions)
        self.sound += [not one.problem and read_scores(one.text, 2, 0, SCALE) is not None for one in replies]
        return replies

    def decide(self, decisions: Any) -> Any:
        return self.judge.decide(decisions)


def measure_edits(judge: Any, *, seed: int, n: int, passes: int = 1) -> dict[str, Any]:
    """`editscore` by this judge against the exact quality: rank correlation, and the share of replies that parse."""
    from diffalign.judges.finding import find_judge
    from diffalign.scoring import make_reward

    heard = Heard(find_judge(judge))
    reward = make_reward({"editscore": {"judge": heard, "passes": passes}})
    tried = attempts(n, seed)
    rated = zip(rate(reward, tried), tried, strict=True)
    sound = [(total, one.quality) for total, one in rated if math.isfinite(total)]
    found: dict[str, Any] = {"n": n, "passes": passes, "valid": wilson(len(sound), len(tried)).json()}
    found["parsed"] = wilson(sum(heard.sound), len(heard.sound)).json() | {"replies": len(heard.sound)}
    if len(sound) > 2:
        found["spearman"] = correlation(*zip(*sound, strict=True), seed=seed).json()
    return found


def measure_generated(judge: Any, *, seed: int, n: int, per_prompt: int = 8) -> dict[str, Any]:
    """`vqascore` on pictures of shapes-sd3: balanced accuracy at one half, and AUC within prompts."""
    from diffalign.scoring import make_reward, score
    from diffalign.zoo.accuracy import judged
    from diffalign.zoo.clip import auc

    reward = make_reward({"vqascore": {"judge": judge}})
    rated, truth, aucs = list[float](), list[bool](), list[float]()
    for media, cases, right in judged(seed=seed, n=n, per_prompt=per_prompt):
        found = score(reward, media, cases).total
        rated, truth = rated + found.tolist(), truth + right.tolist()
        if right.any() and not right.all():
            aucs.append(auc(found, right))
    yes = [value > 0.5 for value, good in zip(rated, truth, strict=True) if good]
    no = [value <= 0.5 for value, good in zip(rated, truth, strict=True) if not good]
    return {
        "n": len(rated),
        "right": len(yes),
        "yes": wilson(sum(yes), len(yes)).json(),
        "no": wilson(sum(no), len(no)).json(),
        "balanced": (sum(yes) / len(yes) + sum(no) / len(no)) / 2,
        "auc_within_prompts": {**bootstrap(aucs, seed=seed).json(), "prompts": len(aucs)},
    }


def measured(target: Path, *, seed: int, n: int) -> dict[str, Any]:
    """What the card says: yes-or-no answers, ratings of edits, and the same questions on generated pictures."""
    answers = measure_answers(target, seed=seed, n=4 * n)
    edits = measure_edits(str(target), seed=seed, n=n)
    generated = measure_generated(str(target), seed=seed, n=n)
    return {
        "strict": answers["strict"],
        "measured": {"yes_no": answers},
        "as_a_reward": {"editscore": edits, "vqascore_on_generated": generated},
    }
