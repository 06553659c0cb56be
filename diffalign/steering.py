"""One pass through a pipeline's loop under our control: the run, the timesteps that follow it, the true loop index."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import SeamError

Answer = Callable[[int, Tensor, Tensor], Tensor | None]  # (index, prediction, sample) -> next latent; None: native step


class IndexUnseen(BaseException):
    """Raised inside a pipeline whose loop does not see our index, before a model call is wasted on the wrong one."""


class Previewed(BaseException):
    """Raised inside a pipeline that reads through its timesteps without stepping, to count or filter them."""


def _over(index: int, prediction: Tensor, sample: Tensor) -> Tensor | None:
    raise SeamError("a pass that is over was asked for another step.")


@dataclass
class Run:
    """One pass through a pipeline's loop: which indices it visits and what each step gives back."""

    answer: Answer
    visit: Sequence[int] | None = None  # None: the whole native loop
    blank: frozenset[int] = frozenset()  # visits (by order) whose model calls are answered without running the model
    guess: bool = False  # a blank call whose output shape is unknown looks like its input instead of running the model
    unit_start: bool = False  # latents are handed in as they are, so init_noise_sigma must be 1
    wet: bool = False  # this pipeline needs its model to run even where the output is thrown away
    previews: int = 0  # how many times the pipeline reads through its timesteps before its loop
    strict_index: bool = True  # refuse to call the model while the loop's own index is not ours
    on_step: Callable[[], None] = field(default=lambda: None)  # told after every step, before the answer
    order: int = -1  # how many visits have begun, minus one
    position: int = -1  # the loop index of the current visit
    indexed: bool = False  # the loop takes its index from our enumerate
    current: Tensor | None = None
    timesteps: Tensor | None = None  # (T,) what the pipeline's loop really walks over
    last: Tensor | None = None  # what the latest step gave back
    entered: int = 0  # how many times the timesteps have been iterated
    steps: int = 0  # scheduler steps of the current visit
    answered: bool = False  # a step that is not blank has been answered

    @property
    def in_loop(self) -> bool:
        return self.order >= 0

    @property
    def blanked(self) -> bool:
        return self.order in self.blank

    def begin(self, order: int, position: int, t: Tensor | None) -> None:
        self.order, self.position, self.current, self.steps = order, position, t, 0

    def __deepcopy__(self, memo: Any) -> Run:
        """A pipeline that copies its scheduler's state and puts it back stays under this run."""
        return self

    def restart(self) -> None:
        """Forget a pass that was broken off before its first answer."""
        self.begin(-1, -1, None)
        self.indexed, self.timesteps, self.last, self.entered = False, None, None, 0

    def forget(self) -> None:
        """Let go of whatever hangs on a pass that is over: schedulers keep their latest run, and no graph with it."""
        self.answer, self.last = _over, None

    def count_step(self, scheduler: str) -> None:
        """Note one scheduler step; the pipeline's latents must take exactly one per timestep."""
        self.steps += 1
        if self.in_loop and self.steps > 1:
            raise SeamError(
                f"this pipeline calls {scheduler}.step more than once per timestep, for several views or twice for the "
                "same latents, so no single prediction leads from one level to the next. Use it without a reward."
            )
        self.on_step()
        self.answered |= not self.blanked

    def needs_index(self) -> bool:
        """Whether the model is about to run at a loop index that the pipeline would take for another one."""
        return (
            self.strict_index
            and self.visit is not None
            and not self.indexed
            and not self.blanked
            and self.order != self.position
        )


def walk_type(owner: Any) -> type[Tensor]:
    """A tensor class whose iteration follows `owner.run`; only one-dimensional pieces of timesteps keep the class."""

    class Walk(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                out = func(*args, **(kwargs or {}))
            keeps = func in _KEEPERS and isinstance(out, Tensor) and out.ndim == 1
            return out.as_subclass(cls) if keeps else out

        def __iter__(self) -> Iterator[Tensor]:
            return _visits(owner, self.as_subclass(torch.Tensor))

        def __deepcopy__(self, memo: Any) -> Tensor:
            return self.as_subclass(torch.Tensor).clone()

    return Walk


_KEEPERS = {
    torch.Tensor.__getitem__,
    torch.Tensor.to,
    torch.Tensor.clone,
    torch.Tensor.detach,
    torch.Tensor.contiguous,
    torch.Tensor.cpu,
    torch.Tensor.cuda,
    torch.Tensor.float,
    torch.Tensor.long,
    torch.Tensor.flip,
}


def _visits(owner: Any, timesteps: Tensor) -> Iterator[Tensor]:
    run: Run = owner.run
    run.entered += 1
    if run.entered <= run.previews:
        yield from timesteps
        return
    run.timesteps = timesteps
    base = owner.__dict__.get("_begin_index")
    for order, index in enumerate(range(len(timesteps)) if run.visit is None else run.visit):
        if run.visit is not None:
            _seek(owner, base, index)
        t = timesteps[index]
        run.begin(order, index, t)
        yield t
        if not run.steps and run.last is None:  # a caller who interrupts later visits skips their steps too
            raise Previewed


def _seek(owner: Any, base: int | None, index: int) -> None:
    """Point a scheduler that counts its own steps at `index` of the loop."""
    if "_step_index" in owner.__dict__:
        owner.__dict__["_step_index"] = None
        if base is not None:
            owner.__dict__["_begin_index"] = base + index


def with_true_index(function: Callable[..., Any], run_of: Callable[[], Run | None]) -> Callable[..., Any]:
    """A copy of a pipeline's `__call__` whose `enumerate` over timesteps counts the true loop index."""
    if not isinstance(function, FunctionType):
        return function

    def enumerate(iterable: Iterable[Any], start: int = 0) -> Iterator[tuple[int, Any]]:
        for count, item in builtins.enumerate(iterable, start):
            run = run_of()
            ours = run is not None and item is run.current
            if run is not None and ours:
                run.indexed = True
            yield (run.position + start if run is not None and ours else count), item

    twin = FunctionType(
        function.__code__,
        {**function.__globals__, "enumerate": enumerate},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin
