"""`diffalign train`: tune a model by a reward, watched."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from diffalign.cli.model import ModelVerb
from diffalign.cli.verb import Opt, Verb
from diffalign.errors import ConfigError

SHOWN = {
    "reward": "reward",
    "proxy": "proxy",
    "truth": "truth",
    "kl": "kl_base",
}  # figures of a row, by what we call them


@dataclass(frozen=True, kw_only=True)
class Train(ModelVerb):
    """Tune a model by a reward: a LoRA any stock pipeline loads, curves, and an alarm where the reward is gamed.

    Settings are those of a config file; every one can be overridden, groups of them with dots. Before the first step
    the ratio, the gradient and the reward are tried on the real pipeline; --dry-run does only that, with an estimate of
    time and memory. Run the same command again to go on after a stop: a resumed run ends at the same weights.

    Writes OUT/lora (the result), metrics.jsonl, plot.png, summary.json, samples/step-N, checkpoints/step-N and alarms/.
    `diffalign gallery OUT` shows it.

    \b
    diffalign train flow_grpo_shapes
    diffalign train flow_grpo_shapes --minutes 5 --out out/try
    diffalign train flow_grpo_shapes --dry-run
    diffalign train configs/train/flow_grpo_shapes.yaml optim.learning_rate=1e-4 groups=8
    diffalign train flow_grpo_shapes reward='{clip: 1.0}' evaluate.every=20
    diffalign train flow_grpo_sd35_24gb prompts=my_prompts.txt evaluate.prompts=others.txt
    accelerate launch --multi_gpu --num_processes 2 -m diffalign train flow_grpo_shapes
    diffalign ls objectives

    A config with `objective: reward` teaches a reward model what people, or a judge, prefer. OUT/reward is the result,
    which every verb then knows by its name:

    \b
    diffalign generate --split train --limit 300 --method best_of_n --n 4 --top-k 4 -r shapes_soft --out out/judged
    diffalign train reward_shapes data.from_search=[out/judged] name=my_taste --out out/my_taste
    diffalign generate -p "two red circles" --method best_of_n --n 16 --reward my_taste
    """

    NAME: ClassVar[str] = "train"
    CONFIG_FIRST: ClassVar[bool] = True
    out: Annotated[str | None, Opt("Folder of the run.")] = "out/train"
    steps: Annotated[int, Opt("Rollouts, each followed by an update.")] = 300
    minutes: Annotated[float | None, Opt("End after so many minutes, resumed parts included.")] = None
    resume: Annotated[str, Opt("auto, never, or the folder of a checkpoint.")] = "auto"
    force: Annotated[bool, Opt("Resume although settings changed.")] = False

    @classmethod
    def whole(cls, told: Mapping[str, Any]) -> type[Verb]:
        from diffalign import config

        objective = told.get("objective")
        if isinstance(objective, str):  # as typed
            objective = config.parse(objective, "objective")
        if any(name.startswith("objective.reward") for name in told) or (
            isinstance(objective, Mapping) and "reward" in objective
        ):
            raise ConfigError("a reward model has its settings beside the objective. Write objective: reward.")
        if objective == "reward":
            from diffalign.cli.train_reward import with_settings

            return with_settings()
        return _with_settings()

    def cost(self) -> dict[str, Any]:
        """What the preflight finds out."""
        found = self._train(dry_run=True)
        return {name: value for name, value in found.items() if name != "dry_run"}

    def run(self) -> dict[str, Any]:
        with bar(self.steps) as show:
            return self._train(show=show)

    def status(self, result: Any) -> int:
        """130 where someone asked it to stop, as after any interruption."""
        from diffalign.train.interrupt import ASKED

        return 130 if result.get("ended") == ASKED else 0

    def _train(self, **more: Any) -> dict[str, Any]:
        from diffalign.train.settings import TrainConfig
        from diffalign.train.start import train

        return train(
            self.pipeline(),
            TrainConfig.of(self),
            model=self.model,
            call=self.pipeline_call(),
            seed=self.seed,
            out=self.out or "out/train",
            origin={name: getattr(self, name) for name in ("device", "dtype", "attention", "lora", "out")},
            say=say,
            **more,
        )


@functools.cache
def _with_settings() -> type[Train]:
    """The verb with every setting of a job as a field; made late, because the settings need torch."""
    from diffalign.train.settings import TrainConfig

    class Whole(Train, TrainConfig):
        """A job as the command line tells it."""

    Whole.__doc__ = Train.__doc__
    return dataclass(frozen=True, kw_only=True)(Whole)


def say(text: str) -> None:
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stderr)


@contextmanager
def bar(
    steps: int, names: Mapping[str, str] = SHOWN, look: str = "proxy"
) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """A bar with the figures that people look at, and images a second; elsewhere a line for each row with a `look`."""
    import os

    from tqdm.auto import tqdm

    watched = sys.stderr.isatty() and int(os.environ.get("LOCAL_RANK", "0")) == 0
    shown: dict[str, str] = {}
    with tqdm(total=steps, desc="train", disable=not watched) as bar:

        def show(step: int, row: Mapping[str, Any]) -> None:
            for name, key in names.items():
                if row.get(key) is not None:
                    shown[name] = f"{row[key]:.3g}"
            if row.get("images_per_second") is not None:
                shown["img/s"] = f"{row['images_per_second']:.2f}"
            bar.set_postfix(shown, refresh=False)
            bar.update(step - bar.n)
            if not watched and row.get(look) is not None and int(os.environ.get("RANK", "0")) == 0:
                print(f"step {step}: " + ", ".join(f"{k} {v}" for k, v in shown.items()), file=sys.stderr, flush=True)

        yield show
