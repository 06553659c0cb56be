"""Everything of the loop that a checkpoint holds, so that a resumed run goes on as if it had never stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffalign.train import checkpoint, sharding
from diffalign.train.checkpoint import Checkpoint

if TYPE_CHECKING:
    from diffalign.train.loop import Loop


def of(loop: Loop) -> dict[str, Any]:
    """What the main process writes; every process asks, as each may hold a part of the weights."""
    scaler = loop.job.accelerator.scaler
    return {
        "step": loop.step,
        "updates": loop.updates,
        "bad": loop.bad,
        "skipped": loop.skipped,
        "spent": loop.cost(),
        "alarms": loop.alarms,
        "training": loop.training,
        "halted": [loop.halted, loop.went_back],
        "trained": loop.job.trained.state_dict(),
        "optimizer": sharding.gathered(loop.optimizer.state_dict()),
        "ema": loop.ema.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else {},
        "objective": loop.objective.state(),
        "watch": loop.watch.state_dict(),
    }


def restore_weights(loop: Loop, found: Checkpoint) -> None:
    """Take the weights of a checkpoint and their averages."""
    loop.job.trained.load_state_dict(found.state["trained"])
    loop.ema.load_state_dict(found.state["ema"])


def restore(loop: Loop, found: Checkpoint) -> None:
    """Go on from a checkpoint."""
    state, job = found.state, loop.job
    restore_weights(loop, found)
    loop.step, loop.updates = int(state["step"]), int(state["updates"])
    loop.bad, loop.skipped = int(state["bad"]), int(state["skipped"])
    loop.spent, loop.alarms = dict(state["spent"]), list(state["alarms"])
    loop.judging = {name: loop.spent.get(name, value) for name, value in loop.judging.items()}
    loop.training = dict(state["training"])
    loop.halted, loop.went_back = ("", None) if job.config.force else state["halted"]
    loop.optimizer.load_state_dict(state["optimizer"])
    sharding.spread(loop.optimizer)
    if job.accelerator.scaler is not None:
        job.accelerator.scaler.load_state_dict(state["scaler"])
    loop.objective.restore(state["objective"])
    loop.watch.load_state_dict(state["watch"])
    if not loop.kept(loop.watch.best_step):  # a checkpoint of another folder, or one older than the best of its run
        loop.watch.forget_best()
    loop.first, loop.resumed = loop.step, True
    if found.rng is not None:
        checkpoint.restore_rng(found.rng)
