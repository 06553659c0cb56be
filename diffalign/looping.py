"""How a stock pipeline's loop is run under our control; `drive.Driver` is its public face.

A run hands latents in, visits chosen loop indices and answers each scheduler step. Latents go in through the
`latents` argument where the pipeline takes them as they are; elsewhere a blank step (one whose model calls are
answered with zeros) gives them back to the loop. Indices come from the loop's own `enumerate`; a loop that hides it
walks through blank iterations instead.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from diffalign import arguments
from diffalign.budget import Budget
from diffalign.cases import Case
from diffalign.errors import DiffalignError, ModelError, SeamError
from diffalign.memory import Memory, same_bits
from diffalign.restore import KeptState
from diffalign.stage import Stage
from diffalign.standin import stand_in, unstepped
from diffalign.steering import Answer, IndexUnseen, Previewed, Run, with_true_index
from diffalign.tap import Watch, taps_on

LEARNT = (  # what holds for a pipeline and its arguments whatever the rows and seeds
    "_timesteps",
    "_takes_latents",
    "_passes_latents",
    "_moves_latents",
    "_hides_index",
    "_needs_model",
    "_previews",
)
PATIENCE = 4  # passes of one stock call until we know what it does before its loop and in its blank steps


class LatentsChanged(BaseException):
    """Raised inside a pipeline that changes the latents it was handed."""


class Loop:
    """One pipeline, one batch of cases, one set of stock arguments, and the machinery that runs its loop."""

    def __init__(
        self,
        pipe: Any,
        cases: Sequence[Case] | None = None,
        *,
        budget: Budget | None = None,
        memory: Memory | None = None,
        **call: Any,
    ) -> None:
        if getattr(pipe, "scheduler", None) is None:
            raise SeamError(
                f"{type(pipe).__name__} has no scheduler of its own to follow. Pass the inner pipeline that has one."
            )
        self.pipe = pipe
        self.call = arguments.clean(pipe, arguments.from_cases(pipe, cases, call) if cases else call)
        self.batch = len(cases) if cases else arguments.batch_of(self.call)
        self.seeds = [c.seed for c in cases] if cases else arguments.seeds_from(call, self.batch)
        self.cases = list(cases) if cases else arguments.to_cases(self.call, self.seeds)
        self.budget = budget or Budget(prompts=self.batch)
        self.memory = memory or Memory()
        self.scheduler = stand_in(pipe.scheduler)
        self.modules = {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
        self._known = arguments.parameters(pipe)
        self._watch = Watch(self.memory, {})
        self._function = with_true_index(inspect.unwrap(arguments.stock_call(pipe)), lambda: self._watch.run)
        self._stage = Stage(pipe, taps_on(pipe, self.modules, self._watch), KeptState(self.modules))
        self._timesteps: Tensor | None = None
        self._first: Tensor | None = None  # the start latents of this batch's own seeds
        self._drawn: list[Tensor] | None = None  # generator states once the start noise is drawn
        self._live: list[torch.Generator] = []
        self._moves_latents = False  # the loop changes latents after a step: decoding passes through a blank last step
        self._takes_latents: bool | None = None
        self._passes_latents = False  # they reach the first step, though handing them in may shift later draws
        self._hides_index = False
        self._needs_model = False  # blank steps run the model and throw its output away
        self._raw = arguments.unread_output(arguments.stock_call(pipe))
        self._counts = arguments.counts_steps(self._function)
        self._previews = 0  # how many times the pipeline reads through its timesteps before its loop

    def learn_from(self, other: Loop) -> None:
        """Take over what another loop of the same pipeline and arguments has found out about it."""
        for name in LEARNT:
            setattr(self, name, getattr(other, name))

    @property
    def denoiser(self) -> str | None:
        """Name of the component whose rows count, once it has run."""
        return self._watch.denoiser

    def _loop(
        self,
        x: Tensor | None,
        visit: Sequence[int],
        answer: Answer,
        *,
        grad: bool = False,
        native: bool = False,
        **options: Any,
    ) -> tuple[Any, Tensor]:
        """Visit loop indices with x at the first of them; give back the call's output and the last latents.

        `native` steps may draw noise of their own: handed latents must not bring the start's draws back.
        """
        for _ in range(3):  # a loop that hides its index or changes what it is handed is run again, the careful way
            run = self._plan(x, list(visit), answer)
            handed = x if run.unit_start else None
            drawn = self._drawn_generators() if native and handed is not None and not visit[0] else None
            try:
                out = self._run(run, latents=handed, grad=grad, generators=drawn, **options)
            except IndexUnseen:
                self._hides_index = True
                continue
            except LatentsChanged:
                if not run.unit_start:
                    break
                self._takes_latents = False
                continue
            if run.last is None:
                raise SeamError(f"the loop of {type(self.pipe).__name__} never reached its step {visit[0]}.")
            last = run.last
            run.forget()
            return out, last
        raise SeamError(f"{type(self.pipe).__name__} changes the latents it is given before its step {visit[0]}.")

    def _plan(self, x: Tensor | None, visit: list[int], answer: Answer) -> Run:
        """The run that brings x to visit[0]: handed in, drawn by the call, or given back by a blank step before it."""
        handed, first = self._hands_in(x, visit[0]), visit[0]
        natural = x is None or (first == 0 and self._is_own_start(x))
        blank: frozenset[int] = frozenset()
        if self._hides_index:
            if not (handed or natural or first > 0):
                raise SeamError(
                    f"{type(self.pipe).__name__} neither takes latents nor shows its index: step 0 is out of reach."
                )
            visit, blank = list(range(visit[-1] + 1)), frozenset(range(first))
        elif not (handed or natural):
            visit, blank = [max(first - 1, 0), *visit], frozenset([0])
        run = Run(answer, visit=visit, blank=blank, unit_start=handed)
        run.answer = self._guard(run, x, answer)
        return run

    def _hands_in(self, x: Tensor | None, first: int) -> bool:
        """Whether x goes in through `latents`; where that shifts later draws, only at step 0: no blank precedes it."""
        if x is None:
            return False
        clean = self._can_hand_in()
        return clean or (first == 0 and self._passes_latents and not self._is_own_start(x))

    def _is_own_start(self, x: Tensor) -> bool:
        return self._first is not None and not x.requires_grad and same_bits(x, self._first)

    def _guard(self, run: Run, x: Tensor | None, answer: Answer) -> Answer:
        """Blank steps give x back; the first real step must see x, bit for bit."""
        fresh = [True]

        def guarded(index: int, prediction: Tensor, sample: Tensor) -> Tensor | None:
            if run.blanked:
                return x if x is not None else sample
            if fresh and x is not None and not same_bits(sample, x):
                raise LatentsChanged
            if not fresh and run.last is not None and not same_bits(sample, run.last):
                self._moves_latents = True
            fresh.clear()
            if not torch.isfinite(prediction).all():
                raise ModelError(
                    f"the model gave NaN or inf at step {index} (t = {float(self.scheduler.run.current):g}). "
                    "Try dtype float32 or bfloat16, or a lower guidance_scale."
                )
            return answer(index, prediction, sample)

        return guarded

    def _run(self, run: Run, **options: Any) -> Any:
        """The stock call under `run`; again where it reads its timesteps beforehand or cannot do without its model."""
        run.wet = self._needs_model
        for _ in range(PATIENCE):
            run.previews, run.strict_index = self._previews, self._counts
            try:
                out = self._stock(run, **options)
            except Previewed:
                self._previews += 1
            except DiffalignError:
                raise
            except Exception:
                if run.wet or run.answered or not (run.blank and run.in_loop):
                    raise
                run.wet = True
            else:
                self._needs_model |= run.wet and not run.guess
                return out
            run.restart()
        raise SeamError(f"{type(self.pipe).__name__} walks over its timesteps without ever stepping its scheduler.")

    def _stock(
        self,
        run: Run,
        *,
        grad: bool = False,
        latents: Tensor | None = None,
        output_type: str | None = None,
        callback: Any = None,
        quiet: bool = True,
        generators: list[torch.Generator] | None = None,
        whole: bool = False,
    ) -> Any:
        """The stock call under `run`; returns its media field, or its `whole` output object."""
        fresh = (torch.Generator("cpu").manual_seed(seed) for seed in self.seeds)
        self._live = [g.clone_state() for g in generators or fresh]
        own = {
            "generator": self._live[0] if self.batch == 1 else self._live,
            "output_type": output_type or self._raw,
            "return_dict": whole,
            "latents": latents,
            "callback_on_step_end": callback,
        }
        given = {k: copy.copy(v) if isinstance(v, list | dict) else v for k, v in self.call.items()}  # some edit theirs
        kwargs = {**given, **{k: v for k, v in own.items() if v is not None and k in self._known}}
        self._watch.run, self._watch.rows, self._watch.blank_rows, run.on_step = run, 0, [], self._watch.on_step
        self.scheduler.run = run
        try:
            with self._stage.set(self.scheduler, quiet=quiet), nullcontext() if grad else torch.no_grad():
                out = self._function(self.pipe, **kwargs)
        finally:
            self._watch.run = None
            self.budget.charge(nfe=self._watch.rows)
        if run.timesteps is not None and self._timesteps is None:
            self._timesteps = run.timesteps.detach().clone()
        return out[0] if isinstance(out, tuple) and not whole else out

    # where the chain starts

    def _drawn_start(self) -> Tensor:
        """What the first step sees for the cases' own seeds; costs a model call only where blank ones do not fit."""
        if "generator" not in self._known:
            raise SeamError(f"{type(self.pipe).__name__} takes no generator, so its cases cannot own their seeds.")
        seen = self._sample_at_first_step()
        if seen is None:
            raise SeamError(f"the loop of {type(self.pipe).__name__} does not walk over its scheduler's timesteps.")
        if len(seen) != self.batch:
            raise SeamError(
                f"{type(self.pipe).__name__} steps {len(seen)} latents for {self.batch} case(s), and rows must be "
                "cases: each owns its seed."
            )
        if self._takes_latents is None:
            self._takes_latents = "latents" in self._known and self._hands_on(seen)
        return seen

    def _hands_on(self, x: Tensor) -> bool:
        """Whether the first step sees the latents that the call is given, and the generators are left alone."""
        try:
            seen = self._sample_at_first_step(latents=x)
        except Exception:
            return False
        self._passes_latents = seen is not None and same_bits(seen, x)
        fresh = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
        untouched = all(torch.equal(g.get_state(), f.get_state()) for g, f in zip(self._live, fresh, strict=True))
        return self._passes_latents and untouched  # else later draws would not be the stock call's

    def _sample_at_first_step(self, *, latents: Tensor | None = None) -> Tensor | None:
        seen: list[Tensor] = []

        def capture(index: int, prediction: Tensor, sample: Tensor) -> Tensor:
            seen.append(sample)
            if latents is None:
                self._drawn = [g.get_state() for g in self._live]
            return sample

        run = Run(capture, visit=[0], blank=frozenset([0]), guess=True, unit_start=latents is not None)
        self._run(run, latents=latents)
        return seen[0] if seen else None

    def start(self) -> Tensor:
        """Latents (B, ...) at level 0 for the cases' own seeds, as the stock call draws them."""
        if self._first is None:
            self._first = self._drawn_start()
        return self._first.clone()

    def _can_hand_in(self) -> bool:
        if self._takes_latents is None:
            self.start()
        return bool(self._takes_latents)

    def _drawn_generators(self) -> list[torch.Generator]:
        """Generators as the stock call has them once the start noise is drawn; some decoders draw from them."""
        if self._drawn is None:
            self.start()
        assert self._drawn is not None
        fresh = [torch.Generator("cpu") for _ in self._drawn]
        return [g.set_state(state) for g, state in zip(fresh, self._drawn, strict=True)]

    def native_scheduler(self) -> Any:
        """The native scheduler after the pipeline's own `set_timesteps`, with no step taken."""
        return unstepped(self.scheduler)
