"""`diffalign bench`: measure diffalign itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from diffalign.cli.bench_credit import Credit
from diffalign.cli.bench_judges import Judges, Server
from diffalign.cli.bench_loop import LoopBench
from diffalign.cli.bench_rewards import Rewards
from diffalign.cli.bench_said import said
from diffalign.cli.bench_scores import Mixing, Scoring
from diffalign.cli.bench_search import Search
from diffalign.cli.bench_train import TrainBench
from diffalign.cli.bench_watch import WatchBench
from diffalign.cli.verb import Opt, Verb
from diffalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Seam(Verb):
    """What the seam costs: a predict over the bare model call, and a whole rollout over the stock call.

    Both are ratios measured in one run, with a model whose call takes about --model-ms. 1.00 means free.

    \b
    diffalign bench seam
    diffalign bench seam --model-ms 10 --steps 8 --json seam.json
    """

    NAME: ClassVar[str] = "seam"
    model_ms: Annotated[float, Opt("How long one call of the model takes, in milliseconds.")] = 50.0
    steps: Annotated[int, Opt("Steps of a rollout.")] = 20
    repeats: Annotated[int, Opt("Timed pairs; the median of their ratios counts.")] = 15

    def __post_init__(self) -> None:
        for name, value in (("model_ms", self.model_ms), ("steps", self.steps), ("repeats", self.repeats)):
            if not value > 0:
                raise ConfigError(f"{name} is {value}, but it must be above 0.")

    def cost(self) -> dict[str, Any]:
        calls = 2 * self.repeats + 2 * (self.repeats // 5 + 2) * self.steps
        return {"seconds": round(calls * self.model_ms / 1000, 1)}

    def run(self) -> dict[str, Any]:
        from diffalign.bench import seam

        rollouts = self.repeats // 5 + 1
        size = seam.SeamBench(
            model_ms=self.model_ms, steps=self.steps, repeats=self.repeats, rollouts=rollouts, seed=self.seed
        )
        with said() as on_step:
            found = seam.measure(size, on_step=on_step)
        for name, value in found.items():
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
        return found


@dataclass(frozen=True, kw_only=True)
class Pace(Verb):
    """How fast search runs: prompts in lock-step, and what an iteration of noise optimisation costs.

    Lock-step is the images per second of --prompts prompts in one call over those of one prompt a call, by tree and
    particles, on a small model that is nearly all overhead and on shapes-sd3. An iteration of noise optimisation is
    measured against the bare forward and backward pass of the same graph on shapes-turbo, in time and in the memory
    that it keeps. All are ratios from one run.

    \b
    diffalign bench pace
    diffalign bench pace --prompts 4 --repeats 1 --json pace.json
    """

    NAME: ClassVar[str] = "pace"
    prompts: Annotated[int, Opt("Prompts in lock-step.")] = 16
    repeats: Annotated[int, Opt("Timed pairs; the median of their ratios counts.")] = 3

    def __post_init__(self) -> None:
        for name, value in (("prompts", self.prompts), ("repeats", self.repeats)):
            if not value > 0:
                raise ConfigError(f"{name} is {value}, but it must be above 0.")

    def run(self) -> dict[str, Any]:
        from diffalign.bench import pace

        size = pace.PaceBench(prompts=self.prompts, repeats=self.repeats, seed=self.seed)
        with said() as on_step:
            found = pace.measure(size, on_step=on_step)
        for model, ratios in found["lockstep"].items():
            for method, ratio in ratios.items():
                print(f"{self.prompts} prompts of {model} in lock-step by {method}: {ratio:.3g} times as fast")
        for name in ("time", "memory"):
            print(f"noise optimisation over the bare passes, {name}: {found[f'reno_{name}_ratio']:.4g}")
        return found


VERBS: tuple[type[Verb], ...] = (
    Seam,
    Pace,
    Search,
    Rewards,
    Scoring,
    Mixing,
    Judges,
    Server,
    Credit,
    TrainBench,
    WatchBench,
    LoopBench,
)
