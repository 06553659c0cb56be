"""Run a method over a set of cases in batches: media, scores and cost per prompt, comparable between methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from diffalign import media, registry, scoring
from diffalign.arguments import parameters
from diffalign.budget import Budget
from diffalign.cases import Case, batched
from diffalign.errors import ConfigError
from diffalign.intervals import Interval, bootstrap, wilson
from diffalign.metering import metered
from diffalign.scoring import Score

STOCK = "stock"
ALIKE = 4  # images per prompt whose distance is the diversity
COSTS = ("nfe", "decodes", "reward_calls", "seconds")


@dataclass
class Sampled:
    """What one method made of some cases: `pixels[i]` (k, [F,] 3, H, W) are the images of case i, best first."""

    method: str
    cases: list[Case] = field(default_factory=list)
    pixels: list[Tensor] = field(default_factory=list)
    scores: list[Score | None] = field(default_factory=list)  # of those images, rows as in `pixels`
    seeds: list[list[int]] = field(default_factory=list)  # of those images
    reports: list[Any] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COSTS, 0.0))  # summed over prompts

    def report_of(self, i: int) -> tuple[Any, int]:
        """The report of the call that made case i, and the case's row in it."""
        for report in self.reports:
            if i < len(report.best):
                return report, i
            i -= len(report.best)
        raise IndexError(i)

    def row(self, passed: Sequence[bool] | None = None) -> dict[str, Any]:
        """The row every comparison prints: cost per prompt, proxy and truth with intervals."""
        cost = {name: self.spent[name] / max(len(self.cases), 1) for name in COSTS}
        truth = wilson(sum(passed), len(passed)).json() if passed else None
        return {"method": self.method, **cost, "proxy": self.proxy.json() if self.proxy else None, "truth": truth}

    @property
    def diversity(self) -> float | None:
        """Mean distance between the best few images of a prompt, where a method leaves several."""
        spreads = [spread(self.several(i)) for i in range(len(self.pixels))]
        found = [each for each in spreads if each is not None]
        return sum(found) / len(found) if found else None

    def several(self, i: int) -> Tensor:
        """The best few images of case i: what its search kept, or those it gave back."""
        report, row = self.report_of(i) if self.reports else (None, 0)
        kept = getattr(report, "kept", None)
        return torch.stack([leaf.media for leaf in kept[row]]) if kept else self.pixels[i][:ALIKE]

    @property
    def proxy(self) -> Interval | None:
        """Mean reward of the best images; invalid ones stay out."""
        values = [float(s.total[0]) for s in self.scores if s is not None and bool(s.valid[0])]
        return bootstrap(values) if values else None


def sample(
    pipe: Any,
    cases: Sequence[Case],
    *,
    method: str = STOCK,
    reward: Any = None,
    call: Mapping[str, Any],
    options: Mapping[str, Any],
    batch: int = 8,
    each: Callable[[Sampled, list[int]], None] = lambda done, new: None,
) -> Sampled:
    """Run `method` (stock, or a drop-in pipeline's name) on every case; `each` hears of each batch's new cases."""
    done = Sampled(method)
    run = _stock if method == STOCK else _searched
    for some in alike(cases, batch):
        first = len(done.cases)
        with torch.no_grad():
            run(done, pipe, some, reward, _asked(pipe, some, call), options)
        each(done, list(range(first, len(done.cases))))
    return done


def alike(cases: Sequence[Case], batch: int) -> Iterator[list[Case]]:
    """Neighbours in chunks of at most `batch` whose pictures to edit have one size, or which have none."""
    for _, some in groupby(cases, key=lambda case: case.source and case.source.size):
        yield from batched(list(some), batch)


def _asked(pipe: Any, cases: list[Case], call: Mapping[str, Any]) -> dict[str, Any]:
    """Stock arguments for these cases; each has a generator of its own."""
    generators = [torch.Generator().manual_seed(case.seed) for case in cases]
    alone = len(cases) == 1
    asked: dict[str, Any] = {"prompt": cases[0].prompt if alone else [case.prompt for case in cases]}
    if cases[0].source is not None:
        require_editor(pipe)
        asked["image"] = cases[0].source if alone else [case.source for case in cases]
    return {**asked, **call, "generator": generators[0] if alone else generators}


def require_editor(pipe: Any) -> None:
    """Refuse a pipeline that takes no picture to edit, or takes its picture as a condition."""
    known = parameters(pipe)
    conditioned = any(getattr(pipe, name, None) is not None for name in ("controlnet", "adapter"))
    if "image" in known and not (conditioned and "control_image" not in known):
        return
    why = "reads its picture as a condition" if "image" in known else "takes no picture"
    raise ConfigError(
        f"there is a picture to edit, but {type(pipe).__name__} {why}. Leave the picture out, or give an "
        "image-to-image or editing model with --model, such as timbrooks/instruct-pix2pix."
    )


def _stock(
    done: Sampled, pipe: Any, cases: list[Case], reward: Any, asked: dict[str, Any], options: Mapping[str, Any]
) -> None:
    budget = Budget(prompts=len(cases))
    with metered(pipe, budget):
        output = pipe(**asked, output_type="pt")
    fields, key = media.open_output(output)
    pixels = media.to_tensor(fields[key])
    media.require_finite(pixels, type(pipe).__name__)
    budget.charge(decodes=len(pixels))
    _add(done, budget.spent(), cases, pixels)
    judged = None
    if reward is not None:
        judged = scoring.score(reward, pixels, cases, cache=options.get("score_cache"), all_invalid=True)
    for i, case in enumerate(cases):
        done.scores.append(judged.select([i]) if judged is not None else None)
        done.seeds.append([case.seed])


def _searched(
    done: Sampled, pipe: Any, cases: list[Case], reward: Any, asked: dict[str, Any], options: Mapping[str, Any]
) -> None:
    shell: Any = registry.make_pipeline_class(done.method)
    told = asked | {"prompt": cases[0] if len(cases) == 1 else cases}  # with the metadata that verifiable rewards read
    output = shell.from_pipe(pipe)(**told, output_type="pt", reward=reward, **options)
    fields, key = media.open_output(output)
    report = output.report
    _add(done, report.budget, cases, fields[key])
    done.reports.append(report)
    for i, best in enumerate(report.best):
        everything = Score(
            report.scores.total[i], {k: v[i] for k, v in report.scores.parts.items()}, report.scores.valid[i]
        )
        done.scores.append(everything.select(best))
        done.seeds.append([report.seeds[i][k] for k in best.tolist()])


def spread(images: Tensor) -> float | None:
    """Mean distance over pairs of images (N, 3, H, W): root mean square of the pixel differences; None for one."""
    if len(images) < 2:
        return None
    return float(torch.pdist(images.flatten(1).float()).mean() / images[0].numel() ** 0.5)


def dense_steps(report: Any, row: int) -> dict[str, list[Any]] | None:
    """Levels and dense step rewards of a report's prompt, None where invalid; None for other methods."""
    steps = getattr(report, "extras", {}).get("dense")
    if steps is None:
        return None
    rewards = [value if value == value else None for value in steps["rewards"][row].tolist()]
    return {"levels": list(steps["levels"]), "rewards": rewards}


def _add(done: Sampled, spent: Mapping[str, float], cases: list[Case], pixels: Tensor) -> None:
    done.cases += cases
    done.pixels += list(pixels.float().cpu().reshape(len(cases), -1, *pixels.shape[1:]))
    for name in COSTS:
        done.spent[name] += spent[name] * len(cases)
