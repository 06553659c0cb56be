"""What a judge is worth on the shapes world, where the truth is exact: every protocol, edits, and its biases."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.intervals import Interval, bootstrap, wilson
from diffalign.judges.asking import Decision
from diffalign.judges.finding import EMBEDDED
from diffalign.judges.wording import BETTER, FIRST, SECOND, fill
from diffalign.scoring import make_reward, score
from diffalign.world.edit_sets import OUTCOMES, picture
from diffalign.world.grammar import say
from diffalign.world.rendering import render
from diffalign.zoo.lessons import Pupil, soft
from diffalign.zoo.vlm_measure import (
    Attempt,
    attempts,
    correlation,
    measure_answers,
    measure_generated,
    rate,
    spearman,
)
from diffalign.zoo.wear import worn

PROTOCOLS = ("vqascore", "point_score", "unifiedreward", "rubric", "key_facts", "principle")
MIX = {"exact": 25, "none": 15, "wrong": 25, "over": 25, "wrecked": 10}  # what a middling editor makes


@dataclass(frozen=True, kw_only=True)
class JudgeBench:
    """Which judge, and how many rows of each kind."""

    judge: Any = EMBEDDED
    questions: int = 1000  # yes-or-no
    edits: int = 300  # rated by editscore with one and with `passes` passes
    passes: int = 4
    choices: int = 60  # edits of which the best of `candidates` is picked
    candidates: int = 8
    pairs: int = 300
    pictures: int = 200  # for each protocol
    generated: int = 240
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("questions", "edits", "passes", "choices", "candidates", "pairs", "pictures", "generated"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bench.{name} is {getattr(self, name)}, but it must be at least 1.")


def measure(config: JudgeBench | None = None, *, on_step: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Everything, as plain numbers."""
    from diffalign.zoo.shelf import folder

    config = config or JudgeBench()
    found: dict[str, Any] = {"judge": str(config.judge), "seed": config.seed}
    if config.judge == EMBEDDED:
        on_step("yes-or-no questions")
        found["yes_no"] = measure_answers(folder(EMBEDDED), seed=config.seed, n=config.questions)
    on_step("generated pictures")
    found["generated"] = measure_generated(config.judge, seed=config.seed, n=config.generated)
    on_step("edits")
    found["edits"] = edits(config, on_step)
    on_step("best of several edits")
    found["best_of"] = best_of(config, on_step)
    on_step("pairs")
    found["pairs"] = position_bias(config)
    found["protocols"] = protocols(config, on_step)
    return found


def edits(config: JudgeBench, on_step: Callable[[str], None]) -> dict[str, Any]:
    """`editscore` with one pass and with several against the exact quality, on the same edits, and `edit_r1`."""
    tried = attempts(config.edits, config.seed)
    truth = [one.quality for one in tried]
    specs: Mapping[str, Any] = {
        "editscore, 1 pass": {"editscore": {"judge": config.judge, "passes": 1}},
        f"editscore, {config.passes} passes": {"editscore": {"judge": config.judge, "passes": config.passes}},
        "edit_r1": {"edit_r1": {"judge": config.judge}},
    }
    rated: dict[str, list[float]] = {}
    for name, spec in specs.items():
        on_step(f"edits by {name}")
        rated[name] = rate(make_reward(spec), tried)
    found: dict[str, Any] = {"n": len(tried)}
    for name, totals in rated.items():
        found[name] = agreement(totals, truth, config.seed) | {
            "by_outcome": {
                o: _mean([t for t, one in zip(totals, tried, strict=True) if one.outcome == o]) for o in OUTCOMES
            }
        }
    one, several = (rated[name] for name in list(specs)[:2])
    found["gain of passes"] = paired_gain(one, several, truth, config.seed).json()
    return found


def agreement(totals: Sequence[float], truth: Sequence[float], seed: int) -> dict[str, Any]:
    """The share of valid rows, and on them the rank correlation and how many pairs of unlike truth are told apart."""
    sound = [(a, b) for a, b in zip(totals, truth, strict=True) if math.isfinite(a)]
    found: dict[str, Any] = {"valid": wilson(len(sound), len(totals)).json()}
    if len(sound) > 2:
        a, b = zip(*sound, strict=True)
        found["spearman"] = correlation(a, b, seed=seed).json()
        found["pairs"] = told_apart(a, b)
    return found


def told_apart(rated: Sequence[float], truth: Sequence[float]) -> float:
    """Of two rows of which one is better, how often it is rated higher; ties count half."""
    a, b = torch.tensor(rated), torch.tensor(truth)
    better = b[:, None] > b[None]
    gap = a[:, None] - a[None]
    return float(((gap > 0).double() + 0.5 * (gap == 0).double())[better].mean())


def paired_gain(one: Sequence[float], several: Sequence[float], truth: Sequence[float], seed: int) -> Interval:
    """How much the rank correlation of the second is above that of the first, over rows valid in both."""
    import numpy as np

    rows = np.array([r for r in zip(one, several, truth, strict=True) if math.isfinite(r[0]) and math.isfinite(r[1])])
    if len(rows) < 3:
        return Interval(math.nan, math.nan, math.nan)

    def gain(some: Any) -> float:
        return spearman(some[:, 1], some[:, 2]) - spearman(some[:, 0], some[:, 2])

    rng = np.random.default_rng(seed)
    lo, hi = np.nanquantile([gain(rows[rng.integers(0, len(rows), len(rows))]) for _ in range(1000)], [0.025, 0.975])
    return Interval(gain(rows), float(lo), float(hi))


def best_of(config: JudgeBench, on_step: Callable[[str], None]) -> dict[str, Any]:
    """The exact quality of the first edit, of the best by `editscore`, and of the truly best; made and generated."""
    reward = make_reward({"editscore": {"judge": config.judge, "passes": config.passes}})
    made = _made_candidates(config)
    found = {"rendered": _chosen(reward, made, config.seed)}
    on_step("best of several generated edits")
    found["generated"] = _chosen(reward, _generated_candidates(config), config.seed)
    return found


def _made_candidates(config: JudgeBench) -> list[list[Attempt]]:
    """Candidates of an editor that makes each outcome as often as MIX says."""
    from diffalign.world.edit_sets import edit_case, sample_edit
    from diffalign.zoo.vlm_measure import attempt_of

    rng, found = random.Random(f"best of {config.seed}"), []
    for k in range(config.choices):
        triple = sample_edit(rng)
        case = edit_case(triple, seed=k)
        outcomes = rng.choices(list(MIX), list(MIX.values()), k=config.candidates)
        found.append([attempt_of(triple, case, outcome, rng) for outcome in outcomes])
    return found


def _generated_candidates(config: JudgeBench) -> list[list[Attempt]]:
    """Edits that shapes-sd3 makes of the source by image to image with a caption of what is wanted."""
    from diffusers import StableDiffusion3Img2ImgPipeline

    from diffalign.world.edit_sets import edit_case, sample_edit, verify_edits
    from diffalign.zoo.shelf import card, load

    pipe = StableDiffusion3Img2ImgPipeline(**load("shapes-sd3").components)
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in card("shapes-sd3")["call"].items() if k not in ("height", "width")}
    rng, found = random.Random(f"generated {config.seed}"), []
    for k in range(config.choices):
        case = edit_case(sample_edit(rng), seed=k)
        generators = [torch.Generator().manual_seed(1000 * k + j) for j in range(config.candidates)]
        wanted = [str(case.metadata["caption"])] * config.candidates
        media: Tensor = pipe(
            wanted,
            image=[case.source] * config.candidates,
            strength=0.75,
            generator=generators,
            output_type="pt",
            **call,
        ).images.float()
        truths = verify_edits(media, [case] * config.candidates)
        found.append([Attempt(m, case, v.quality, "generated") for m, v in zip(media, truths, strict=True)])
    return found


def _chosen(reward: Any, candidates: Sequence[Sequence[Attempt]], seed: int) -> dict[str, Any]:
    totals = rate(reward, [one for some in candidates for one in some])
    first, best, oracle, start = [], [], [], 0
    for some in candidates:
        mine = totals[start : start + len(some)]
        start += len(some)
        order = sorted(range(len(some)), key=lambda k: -mine[k] if math.isfinite(mine[k]) else math.inf)
        first.append(some[0].quality)
        best.append(some[order[0]].quality)
        oracle.append(max(one.quality for one in some))
    gain = [b - a for a, b in zip(first, best, strict=True)]
    named = {"first": first, "best by editscore": best, "truly best": oracle, "gain": gain}
    return {"n": len(first), **{name: bootstrap(values, seed=seed).json() for name, values in named.items()}}


def position_bias(config: JudgeBench) -> dict[str, Any]:
    """How often the first slot is preferred, before and after both orders are asked; how often the verdict flips."""
    from diffalign.judges.finding import find_judge

    judge, pupil = find_judge(config.judge), Pupil(random.Random(f"pairs {config.seed}"), strong=0.0)
    asked: list[tuple[str, Tensor, Tensor, bool]] = []
    while len(asked) < config.pairs:
        clauses, a = pupil.asked()
        b = pupil.asked()[1] if pupil.rng.random() < 0.3 else pupil.scene(clauses)
        if (gap := soft(clauses, a) - soft(clauses, b)) != 0:
            first, second = (worn(render(scene), pupil.wear()) for scene in (a, b))
            asked.append((fill(BETTER, prompt=say(clauses)), first, second, gap > 0))
    both: list[tuple[float, float, bool]] = []
    for some in (asked[k : k + 32] for k in range(0, len(asked), 32)):
        said = judge.decide([_choice(t, a, b) for t, a, b, _ in some] + [_choice(t, b, a) for t, a, b, _ in some])
        pairs = zip(said[: len(some)], said[len(some) :], some, strict=True)
        both += [(p[0], q[0], row[3]) for p, q, row in pairs if p and q]
    first_slot = [p > 0.5 for one in both for p in one[:2]]
    one_order = [right for p, q, good in both for right in ((p > 0.5) == good, (q > 0.5) != good)]
    return {
        "n": len(both),
        "first slot": wilson(sum(first_slot), len(first_slot)).json(),
        "flipped": wilson(sum((p > 0.5) == (q > 0.5) for p, q, _ in both), len(both)).json(),
        "right, one order": wilson(sum(one_order), len(one_order)).json(),
        "right, both orders": bootstrap([_fair(*one) for one in both], seed=config.seed).json(),
        "points after the swap": _left_bias(config, asked),
    }


def _fair(p: float, q: float, good: bool) -> float:
    """How right the verdict of both orders is: a half where they disagree."""
    first, second = p > 0.5, q <= 0.5
    return 0.5 if first != second else float(first == good)


def _left_bias(config: JudgeBench, asked: Sequence[tuple[str, Tensor, Tensor, bool]]) -> float:
    """By how many points `pairwise` differs between (a, b) and (b, a), asked in two runs: 0 unless it errs."""
    reward = make_reward({"pairwise": {"judge": config.judge}})
    prompt = BETTER.split("{prompt}")
    gaps = []
    for some in (asked[k : k + 16] for k in range(0, len(asked), 16)):
        named = [text.removeprefix(prompt[0]).removesuffix(prompt[1]) for text, *_ in some]
        a, b = torch.stack([row[1] for row in some]), torch.stack([row[2] for row in some])
        there = [Case(prompt=text, reference=picture(image)) for text, image in zip(named, b, strict=True)]
        back = [Case(prompt=text, reference=picture(image)) for text, image in zip(named, a, strict=True)]
        won, lost = (score(reward, m, c, all_invalid=True).total for m, c in ((a, there), (b, back)))
        gaps += (won + lost - 1).tolist()
    return 100 * abs(_mean(gaps) or 0.0)


def _choice(text: str, a: Tensor, b: Tensor) -> Decision:
    return Decision(text=text, images=(a, b), labels=("A", "B"), described=(FIRST, SECOND))


def protocols(config: JudgeBench, on_step: Callable[[str], None]) -> dict[str, Any]:
    """Each protocol that judges a picture by its prompt, against the share of the prompt's clauses that hold."""
    pupil = Pupil(random.Random(f"protocols {config.seed}"), strong=0.0)
    tried = []
    for k in range(config.pictures):
        clauses, scene = pupil.asked()
        image = worn(render(scene), pupil.wear())
        tried.append(Attempt(image, Case(prompt=say(clauses), seed=k), soft(clauses, scene)))
    truth, found = [one.quality for one in tried], dict[str, Any]()
    for name in PROTOCOLS:
        on_step(f"protocol {name}")
        reward = make_reward({name: {"judge": config.judge}})
        found[name] = agreement(rate(reward, tried), truth, config.seed)
    return found


def _mean(values: Sequence[float]) -> float | None:
    sound = [value for value in values if math.isfinite(value)]
    return sum(sound) / len(sound) if sound else None
