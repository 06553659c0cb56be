"""`diffalign bench loop`: what the training loop costs beside its model calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from diffalign.cli.verb import Opt, Verb, read_config


@dataclass(frozen=True, kw_only=True)
class LoopBench(Verb):
    """What a training step costs beside its model calls: images a second over those of the bare calls.

    Trains a few steps of a shipped config. After each, the same calls of denoiser and decoder are made again with
    nothing around them, with a backward pass where the step had one. 1.00 means that the loop is free.

    \b
    diffalign bench loop
    diffalign bench loop --job flow_grpo_shapes --pairs 10 --json loop.json
    diffalign bench loop --job dense_grpo_shapes settings.micro_batch=24
    """

    NAME: ClassVar[str] = "loop"
    job: Annotated[str, Opt("Config of `diffalign train`: a shipped name or a path.")] = "flow_grpo_shapes"
    pairs: Annotated[int, Opt("Timed steps, each with its bare calls.")] = 6
    settings: dict[str, Any] = field(default_factory=dict)  # over that config

    def run(self) -> dict[str, Any]:
        import tempfile
        from pathlib import Path

        from diffalign import config
        from diffalign.bench import overhead
        from diffalign.bench.training_runs import merged
        from diffalign.cli.train import Train
        from diffalign.train.settings import TrainConfig

        built: Any = config.build(Train.whole({}), merged(read_config(self.job), self.settings))
        with tempfile.TemporaryDirectory() as folder:
            found = overhead.measure(
                built.pipeline(),
                TrainConfig.of(built),
                folder=Path(folder) / "run",
                pairs=self.pairs,
                model=built.model,
                call=built.pipeline_call(),
                seed=self.seed,
            )
        ratio = found["ratio"]
        print(f"images a second over the bare calls: {ratio['mean']:.3f} [{ratio['lo']:.3f}, {ratio['hi']:.3f}]")
        print(f"a step of {found['images']} images: {found['step_seconds']:.2f} s, {found['pairs']} of them timed")
        for kind, seconds in found["bare_seconds"].items():
            print(f"  bare {kind}: {seconds:.2f} s")
        print(f"  all else: {found['rest_seconds']:.2f} s; scoring, partly beside: {found['reward_seconds']:.2f} s")
        return found
