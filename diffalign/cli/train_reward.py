"""`diffalign train` where the objective is `reward`: what the result will be asked, and everything it is taught by."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from diffalign.cli.train import bar, say
from diffalign.cli.verb import Opt, Verb

FIGURES = {"loss": "loss", "held out": "heldout_loss", "right": "accuracy"}


@functools.cache
def with_settings() -> type[Verb]:
    """The verb with every setting as a field; made late, because the settings need torch."""
    from diffalign.train.reward_models.settings import RewardConfig

    @dataclass(frozen=True, kw_only=True)
    class TrainReward(Verb, RewardConfig):
        """Teach a reward model what the data prefers; the result is in OUT/reward."""

        NAME: ClassVar[str] = "train"
        device: Annotated[str, Opt("cpu, cuda, cuda:1, mps; auto takes the fastest here.")] = "auto"
        out: Annotated[str | None, Opt("Folder of the run.")] = "out/reward"

        def cost(self) -> dict[str, Any]:
            """What the first step tells."""
            found = self._train(dry_run=True)
            return {name: value for name, value in found.items() if name != "dry_run"}

        def run(self) -> dict[str, Any]:
            with bar(self.steps, FIGURES, "accuracy") as show:
                return self._train(show=show)

        def status(self, result: Any) -> int:
            """130 where someone asked it to stop, as after any interruption."""
            from diffalign.train.interrupt import ASKED

            return 130 if result.get("ended") == ASKED else 0

        def _train(self, **more: Any) -> dict[str, Any]:
            import shlex
            import sys

            from diffalign.cli.model import ModelVerb, quiet_libraries
            from diffalign.train.reward_models.start import train_reward

            quiet_libraries()
            return train_reward(
                RewardConfig.of(self),
                seed=self.seed,
                out=self.out or "out/reward",
                device=ModelVerb(device=self.device).place()[0],
                command=shlex.join(["diffalign", *sys.argv[1:]]),
                say=say,
                **more,
            )

    return TrainReward
