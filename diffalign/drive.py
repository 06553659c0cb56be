"""Any diffusers pipeline as a denoiser: schedule, prediction at the true loop index, rollouts, decoding, gradients,
replay.

A `Driver` runs the stock call with a stand-in scheduler (`standin`), tapped components (`tap`) and our own loop
control (`looping`); these files with `arguments` are the only ones that know how a stock pipeline is called, and
nothing in them names a model family. What a pipeline computes before its loop from unchanged inputs is computed once
for as long as the driver lives. After every call, also one that raised, the pipeline is as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign import arguments
from diffalign.arguments import undecorated
from diffalign.budget import BACKWARD_COST
from diffalign.cases import Case
from diffalign.errors import SeamError
from diffalign.looping import Loop
from diffalign.noise import Convention, Kernel, Levels, Transition, case_noise, ddim, read_levels
from diffalign.restore import adapters_off
from diffalign.standin import copy_of
from diffalign.steering import Run

__all__ = ["Driver", "Trajectory", "grad_call", "undecorated"]


KEPT_SELECTIONS = 64  # drivers of other rows that one driver remembers


@dataclass
class Trajectory:
    """A stored walk: step start + k goes from latents[k] to moves[k]; the loop itself may change a move after that."""

    latents: list[Tensor]  # (steps + 1) x (B, ...), as the steps saw them; the last is what the last step gave
    timesteps: Tensor  # (steps,)
    start: int = 0
    moves: list[Tensor] = field(default_factory=list)  # steps x (B, ...), drawn by our transitions
    predictions: list[Tensor] = field(default_factory=list)
    log_probs: Tensor | None = None  # (steps, B) float32
    media: Any = None
    cases: Sequence[Case] = ()


class Driver(Loop):
    """One pipeline, one batch of cases, one set of stock arguments, as a denoiser."""

    @functools.cached_property
    def levels(self) -> Levels:
        """alpha and sigma of every level, in the scaling of the loop's latents."""
        steps = self.timesteps
        return read_levels(self.native_scheduler(), steps)

    @functools.cached_property
    def _narrowed(self) -> dict[tuple[int, ...], Driver]:
        return {}

    @property
    def timesteps(self) -> Tensor:
        """The timesteps (T,) that the pipeline's loop walks over, after its own shifts and slices."""
        if self._timesteps is None:
            self.start()
        assert self._timesteps is not None
        return self._timesteps

    @property
    def length(self) -> int:
        return len(self.timesteps)

    @functools.cached_property
    def costs(self) -> list[int]:
        """NFE of one row at every level, told by a pass whose model calls are all blank: nothing is spent."""
        steps = self.length
        run = Run(lambda i, prediction, sample: sample, visit=range(steps), blank=frozenset(range(steps)), guess=True)
        self._run(run)
        if len(self._watch.blank_rows) == steps:
            return [rows // self.batch for rows in self._watch.blank_rows]
        return [max(self._watch.last_rows // self.batch, 1)] * steps  # a pipeline whose blank steps run the model

    def from_noise(self, noise: Tensor) -> Tensor:
        """Latents (B, ...) at level 0 for standard normal `noise` shaped like `start()`."""
        like = self.start()
        scheduler = self.native_scheduler()
        if self.timesteps[0] != scheduler.timesteps[0]:
            raise SeamError(
                f"{type(self.pipe).__name__} starts from an image, not from pure noise. Vary the cases' seeds instead."
            )
        return (noise.to(like) * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(like.dtype)

    def predict(self, x: Tensor, i: int, *, grad: bool = False) -> Tensor:
        """What the stock scheduler would be handed at latents x (B, ...) of loop index i, guidance included."""
        seen: list[Tensor] = []

        def capture(index: int, prediction: Tensor, sample: Tensor) -> Tensor:
            seen[:] = [prediction]
            return sample

        self._loop(x, [i], capture, grad=grad)
        return self._charge_backward(seen.pop())  # what ran last is remembered, and a graph must not live on in it

    def transition(self, x: Tensor, prediction: Tensor, i: int, kernel: Kernel | None = None) -> Transition:
        """The Gaussian from level i to i + 1 under `kernel` (deterministic DDIM by default)."""
        return (kernel or ddim(0.0))(self.levels, x, prediction, i)

    def denoised(self, x: Tensor, prediction: Tensor, i: int) -> Tensor:
        return self.levels.denoised(x, prediction, i)

    def rollout(
        self,
        kernel: Kernel | None = None,
        *,
        x: Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
        grad: bool = False,
        convention: Convention = "sum",
        noise: Callable[[int, Tensor], Tensor] | None = None,
        output_type: str = "pt",
        keep_predictions: bool = False,
        callback: Any = None,
        quiet: bool = False,
        tracked: Container[int] = (),
        dtype: torch.dtype | None = None,
    ) -> Trajectory:
        """One stock call from level `start` to media; `kernel` draws our transitions, None keeps the stock steps.

        `noise(i, like)` gives the standard normals of step i; by default each case draws its own. With `stop` the
        walk ends at that level and its media are what the pipeline decodes there. At `tracked` steps the model runs as
        a replay with gradients would, so that this gives the same bits; nothing is kept for a backward pass. `dtype`
        is that of the latents our transitions give, by default the pipeline's.
        """
        if x is None and start > 0:
            raise SeamError("a rollout from the middle of the chain needs the latents to start from: pass x=.")
        draw = noise or self._own_noise
        levels = self.levels if kernel is not None else None  # read before the loop, which must not be entered twice
        walk = Trajectory([], self.timesteps[start:stop], start, cases=self.cases)
        log_probs: list[Tensor] = []

        def answer(i: int, prediction: Tensor, sample: Tensor) -> Tensor | None:
            walk.latents.append(sample)
            if tracked:
                prediction = prediction.detach()
                torch.set_grad_enabled(i + 1 in tracked)
            self._charge_backward(prediction)
            if keep_predictions:
                walk.predictions.append(prediction)
            if kernel is None or levels is None:
                return None
            step = kernel(levels, sample, prediction, i)
            following = step.sample(draw(i, sample) if step.std else None, dtype=dtype or sample.dtype)
            log_probs.append(step.log_prob(following, convention))
            walk.moves.append(following)
            return following

        visit = range(start, start + len(walk.timesteps))
        shown = {"output_type": output_type, "callback": callback, "quiet": quiet}
        with torch.set_grad_enabled(start in tracked) if tracked else nullcontext():
            walk.media, last = self._loop(x, visit, answer, grad=grad or bool(tracked), native=kernel is None, **shown)
        walk.latents.append(last)
        walk.log_probs = torch.stack(log_probs) if log_probs else None
        self._charge_decode(output_type)
        return walk

    def replay(
        self,
        walk: Trajectory,
        kernel: Kernel,
        *,
        grad: bool = True,
        convention: Convention = "sum",
        on_step: Callable[[int, Tensor, Transition, Tensor], None] | None = None,
    ) -> Tensor:
        """Log-densities (steps, B) of a stored walk under the current weights, in one call at the true indices.

        `on_step(i, prediction, transition, log_prob)` may run that step's backward at once: memory stays one step's.
        """
        levels, log_probs = self.levels, list[Tensor]()

        def answer(i: int, prediction: Tensor, sample: Tensor) -> Tensor:
            k = i - walk.start
            prediction = self._charge_backward(prediction)
            step = kernel(levels, walk.latents[k], prediction, i)
            log_prob = step.log_prob(walk.moves[k], convention)
            if on_step is not None:
                on_step(i, prediction, step, log_prob)
            log_probs.append(log_prob if on_step is None else log_prob.detach())
            return walk.moves[k]

        self._loop(walk.latents[0], range(walk.start, walk.start + len(walk.timesteps)), answer, grad=grad)
        return torch.stack(log_probs)

    def decode(self, x: Tensor, *, grad: bool = False, output_type: str = "pt") -> Any:
        """Media of latents (B, ...) at the last level, as the stock call decodes them; differentiable with `grad`."""
        found = self._read_out(x, grad=grad, output_type=output_type)
        self._charge_decode(output_type)
        return found

    def output(self, x: Tensor) -> Any:
        """The stock call's output object around latents x (B, ...) of the last level, not decoded where that can be."""
        return self._read_out(x, whole=True)

    def _read_out(self, x: Tensor, **options: Any) -> Any:
        if self._can_hand_in() and not self._moves_latents:
            try:
                generators = self._drawn_generators()
                return self._run(Run(_native, visit=[], unit_start=True), latents=x, generators=generators, **options)
            except UnboundLocalError:  # a loop whose variables are read after it cannot be skipped whole
                self._moves_latents = True
        last = Run(lambda *_: x, visit=[self.length - 1], blank=frozenset([0]), guess=not self._watch.blanks)
        found = self._run(last, **options)  # a last step whose model call is blank gives x back to the loop
        last.forget()
        return found

    def select(self, rows: Sequence[int]) -> Driver:
        """The driver for these rows of the batch (repeats welcome); shares memory and budget with this one."""
        key = tuple(rows)
        if key == tuple(range(self.batch)):
            return self
        if key not in self._narrowed:
            if len(self._narrowed) >= KEPT_SELECTIONS:
                del self._narrowed[next(iter(self._narrowed))]
            self._narrowed[key] = self._twin(arguments.take(self.call, key, self.batch), key)
        return self._narrowed[key]

    def asked(self, cases: Sequence[Case], **call: Any) -> Driver:
        """The driver for other cases and the same stock arguments; shares memory, budget and what is known of both."""
        twin = Driver(self.pipe, cases, budget=self.budget, memory=self.memory, **call)
        twin.learn_from(self)
        twin.__dict__["levels"] = self.levels
        return twin

    def reseeded(self, seeds: Sequence[int]) -> Driver:
        """The driver for the same cases with other seeds; shares memory and budget with this one."""
        twin = self._twin(self.call, range(self.batch))
        twin.seeds = list(seeds)
        twin.cases = [case.with_seed(seed) for case, seed in zip(self.cases, seeds, strict=True)]
        return twin

    def _twin(self, call: dict[str, Any], rows: Sequence[int]) -> Driver:
        twin = Driver(self.pipe, budget=self.budget, memory=self.memory, **call)
        twin.batch, twin.seeds, twin.cases = len(rows), [self.seeds[r] for r in rows], [self.cases[r] for r in rows]
        twin.learn_from(self)
        if "levels" in self.__dict__:  # the twin's own scheduler has walked nowhere yet
            twin.__dict__["levels"] = self.levels
        return twin

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The model without its adapters, for the length of the block; no second copy is made."""
        before = self.memory.scope
        with adapters_off(self.modules.values()):
            self.memory.scope = "reference/"
            try:
                yield
            finally:
                self.memory.scope = before

    def close(self) -> None:
        """Hand offloaded modules back to where their hooks keep them."""
        if getattr(self.pipe, "_all_hooks", None):
            self.pipe.maybe_free_model_hooks()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _own_noise(self, i: int, like: Tensor) -> Tensor:
        return case_noise(self.seeds, like, "step", i)

    def _charge_decode(self, output_type: str) -> None:
        if output_type != "latent":
            self.budget.charge(decodes=self.batch)

    def _charge_backward(self, prediction: Tensor) -> Tensor:
        """A backward pass through this prediction costs two more passes of the rows behind it."""
        if prediction.requires_grad:  # a hook that held this driver would close a circle that no collector opens
            budget, rows = self.budget, self._watch.last_rows
            prediction.register_hook(lambda _: budget.charge(nfe=BACKWARD_COST * rows))  # type: ignore[no-untyped-call]
        return prediction


def _native(index: int, prediction: Tensor, sample: Tensor) -> None:
    return None


def grad_call(pipe: Any, **call: Any) -> Any:
    """The stock call with gradients: the same image bit for bit, differentiable in latents, embeddings and weights."""
    scheduler, pipe.__dict__["scheduler"] = pipe.scheduler, copy_of(pipe.scheduler)
    try:
        with torch.enable_grad():
            return undecorated(pipe)(**call)
    finally:
        pipe.__dict__["scheduler"] = scheduler  # the copy may hold parts of the graph
