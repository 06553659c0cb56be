"""What a training step costs beside its model calls: images a second over those of the bare calls, from one run.

While a run trains, the calls of its denoiser and its decoder are noted, with their arguments and whether a gradient
came back. After every step the same calls are made again with nothing around them, those that learn with a backward
pass, and both are timed: a pair for each step. Scoring, log-densities, noise, the optimiser and the average of the
weights are what the step has more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.intervals import bootstrap
from diffalign.reward_kinds import Ask, Composite, Score
from diffalign.scoring import make_reward
from diffalign.train.settings import TrainConfig
from diffalign.train.start import train
from diffalign.train.targets import find_denoisers

TIMED = f"{__name__}:Timed"
NEVER = 10**9  # steps between evaluations


class Timed(Composite):
    """A reward that adds up the seconds it takes."""

    spent: ClassVar[float] = 0.0
    name, differentiable, range = "timed", False, None

    def __init__(self, rewards: Any) -> None:
        inner = make_reward(rewards)
        self.rewards, self.modality, self.options = [inner], inner.modality, {"rewards": str(rewards)}

    def through(self, media: Tensor, cases: Sequence[Case], ask: Ask) -> Score:
        begin = time.perf_counter()
        found = ask(self.rewards[0], media, cases)
        Timed.spent += time.perf_counter() - begin
        return found


@dataclass
class Call:
    """One call of a model in a step."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: str  # forward, decode, or learn: a forward pass with a backward pass after it

    def again(self) -> None:
        """The same call with nothing around it."""
        if self.kind != "learn":
            with torch.no_grad():
                self.model(*self.args, **self.kwargs)
            return
        with torch.enable_grad():
            found = _tensor(self.model(*self.args, **self.kwargs))
        found.backward(torch.ones_like(found))  # type: ignore[no-untyped-call]


@dataclass
class Pairs:
    """Seconds of steps and of their bare calls."""

    calls: list[Call] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)  # bare seconds by kind, all steps
    left: float = 0.0  # when the latest step began
    reward: float = 0.0

    def show(self, step: int, row: Mapping[str, Any], *, last: int) -> None:
        """Called by the loop between two steps: time what has just ended and its bare calls."""
        _synchronise()
        seconds = time.perf_counter() - self.left
        if 0 < step < last and self.calls:  # the last step ends with an evaluation
            calls, self.calls = self.calls, []
            bare = self._again(calls)
            if step > 1:  # the first one warms both up
                self.step.append(seconds)
                self.bare.append(sum(bare.values()))
                self.reward += Timed.spent
                for kind, spent in bare.items():
                    self.parts[kind] = self.parts.get(kind, 0.0) + spent
        self.calls, Timed.spent = [], 0.0
        _synchronise()
        self.left = time.perf_counter()

    def _again(self, calls: Sequence[Call]) -> dict[str, float]:
        spent: dict[str, float] = {}
        watching, self.calls = self.calls, []
        for call in calls:
            _synchronise()
            begin = time.perf_counter()
            call.again()
            _synchronise()
            spent[call.kind] = spent.get(call.kind, 0.0) + time.perf_counter() - begin
        for model in {id(call.model): call.model for call in calls}.values():
            model.zero_grad(set_to_none=True)
        self.calls = watching
        return spent

    @contextmanager
    def noted(self, pipe: Any) -> Iterator[None]:
        """A block in which the calls of the pipeline's denoisers and decoder are kept."""
        found = [(model, "forward") for model in find_denoisers(pipe).values()]
        if isinstance(decoder := getattr(getattr(pipe, "vae", None), "decoder", None), nn.Module):
            found.append((decoder, "decode"))
        with ExitStack() as stack:
            for model, kind in found:
                hook = model.register_forward_hook(partial(self._note, kind), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _note(self, kind: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        call = Call(model, _detached(args), _detached(kwargs), kind)
        self.calls.append(call)
        if kind == "forward" and (found := _tensor(out)).requires_grad:
            found.register_hook(lambda _: setattr(call, "kind", "learn"))  # type: ignore[no-untyped-call]


def measure(
    pipe: Any,
    settings: TrainConfig,
    *,
    folder: Path,
    pairs: int = 6,
    model: str = "",
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train a few steps in `folder`, each followed by its bare calls; the mean of their ratios, with its interval."""
    if pairs < 2:
        raise ConfigError(f"pairs is {pairs}, but an interval needs at least 2.")
    noted, last = Pairs(), pairs + 2
    short = replace(
        settings,
        steps=last,
        minutes=None,
        reward={TIMED: {"rewards": settings.reward}},
        truth=None,
        panel=(),
        evaluate=replace(settings.evaluate, limit=2, per_prompt=1, every=NEVER, kl_prompts=0),
        checkpoint_every=None,
        resume="never",
        trackers=(),
        preflight=False,
    )
    with noted.noted(pipe):
        show = partial(noted.show, last=last)
        train(pipe, short, model=model, call=call, seed=seed, out=folder, say=say, show=show)
    return told(noted, settings.images)


def told(found: Pairs, images: int) -> dict[str, Any]:
    """The ratio of images a second, and where the seconds of a step went."""
    ratios, count = [b / s for b, s in zip(found.bare, found.step, strict=True)], len(found.step)
    return {
        "ratio": bootstrap(ratios).json(),
        "pairs": count,
        "images": images,
        "images_per_second": images / median(found.step) if found.step else math.nan,
        "step_seconds": sum(found.step) / count,
        "bare_seconds": {kind: spent / count for kind, spent in sorted(found.parts.items())},
        "reward_seconds": found.reward / count,
        "rest_seconds": (sum(found.step) - sum(found.bare)) / count,
    }


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _tensor(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
    return found


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: _detached(item) for key, item in value.items()}
    return type(value)(_detached(item) for item in value) if type(value) in (list, tuple) else value
