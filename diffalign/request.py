"""A stock call seen as cases: who asks for what, from which seed, and how to ask again with other noise."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from diffalign import media
from diffalign.cases import Case, as_prompts, candidate_seed, derived_seed, row_seed
from diffalign.errors import ConfigError

EDITED = ("image", "images", "input_images")  # what pipelines call the pictures that they start from


@dataclass
class Request:
    """The arguments of one stock call and the cases they stand for.

    Candidate k of a case is drawn from `candidate_seed(case.seed, k)`, on a generator of its own, so it does not depend
    on its neighbours. Candidates of the first call are the stock images: they get the caller's own generator, latents.
    A generator that has drawn before stands for a seed of its own, so that one passed again gives other images.
    """

    arguments: dict[str, Any]
    cases: list[Case]  # one per prompt
    per_call: int = 1  # images of a prompt that one stock call makes
    given_seeds: list[int] = field(default_factory=list)  # of the caller's generators as they were given
    fresh: list[bool] = field(default_factory=list)  # whether those had drawn nothing before

    @classmethod
    def of(cls, pipe: Any, call: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Request:
        """Bind a call of `pipe` and read its prompts, pictures and seeds."""
        signature = inspect.signature(call)
        bound = signature.bind_partial(pipe, *args, **kwargs).arguments
        given: dict[str, Any] = {}
        for name, value in list(bound.items())[1:]:
            given |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        if "generator" not in signature.parameters:
            raise ConfigError(f"{type(pipe).__name__} takes no generator, so its candidates could not be told apart.")
        cases = _cases(pipe, signature, given)
        if "prompt" in given:
            given["prompt"] = as_prompts(given["prompt"])
        generators = given.get("generator")
        drawn = [_seed_of(each) for each in _listed(generators)]
        return cls(
            given,
            cases,
            given_seeds=drawn,
            fresh=[seed == int(each.initial_seed()) for seed, each in zip(drawn, _listed(generators), strict=True)],
        )

    @property
    def generator(self) -> Any:
        return self.arguments.get("generator")

    def require_prompts(self, reward: Any) -> None:
        """Refuse a reward that reads prompts (it says so by `reads_prompt`) when only embeddings were given."""
        if self.arguments.get("prompt") is not None or any(case.prompt for case in self.cases):
            return
        for part in getattr(reward, "leaves", [reward]):
            if getattr(part, "reads_prompt", False):
                raise ConfigError(
                    f"reward '{part.name}' reads the prompt, but the call gives embeddings only. Pass prompt= instead, "
                    "or use a reward that looks at pixels alone, such as 'brightness'."
                )

    def settle(self, rows: int) -> None:
        """Learn from the first call how many images a prompt gets, and fix the seeds."""
        if rows % len(self.cases):
            raise ConfigError(f"{len(self.cases)} prompts gave {rows} images, so they cannot be matched.")
        self.per_call = rows // len(self.cases)
        if isinstance(self.generator, list) and len(self.generator) != rows:
            raise ConfigError(
                f"{len(self.generator)} generators are given for {rows} images of one call. Pass one for each, or "
                "a single generator."
            )
        seeds = self._seeds(len(self.cases))
        self.cases = [case.with_seed(seed) for case, seed in zip(self.cases, seeds, strict=True)]

    def advance(self) -> None:
        """Use the caller's generators, as a stock call would: the next call with them draws something else."""
        for generator in _listed(self.generator):
            torch.rand((), generator=generator, device=generator.device)

    def _seeds(self, prompts: int) -> list[int]:
        if isinstance(self.generator, list):
            return self.given_seeds[:: self.per_call]
        if self.given_seeds:
            return [row_seed(self.given_seeds[0], row) for row in range(prompts)]
        drawn = torch.randint(2**62, (prompts,))  # follows torch.manual_seed, as the stock call does
        return [int(seed) for seed in drawn]

    def seed(self, row: int, candidate: int) -> int:
        """The seed of a prompt's candidate; one of the first call has its own generator's if the caller gave a list."""
        if candidate < self.per_call and isinstance(self.generator, list):
            return self.given_seeds[row * self.per_call + candidate]
        return candidate_seed(self.cases[row].seed, candidate)

    def told_seed(self, row: int, candidate: int) -> int:
        """The seed that makes a candidate again; -1 for one of the first call that no seed alone does."""
        if candidate >= self.per_call:
            return self.seed(row, candidate)
        at = row * self.per_call + candidate if isinstance(self.generator, list) else row + candidate
        named = at < len(self.fresh) and self.fresh[at]  # of a shared generator only the first image
        return self.seed(row, candidate) if named else -1

    def asked(self, number: int, **changes: Any) -> dict[str, Any]:
        """Arguments of stock call `number`: 0 is the caller's own, later ones draw fresh noise from their own seeds."""
        given = {**self.arguments, **changes}
        if number == 0:
            return given
        given.pop("latents", None)  # the caller's starting noise belongs to candidate 0
        first = number * self.per_call
        slots = [self.seed(row, first + j) for row in range(len(self.cases)) for j in range(self.per_call)]
        device = _device(self.generator)
        fresh = [torch.Generator(device).manual_seed(seed) for seed in slots]
        return given | {"generator": fresh if len(fresh) > 1 else fresh[0]}

    def card(self, pipe: Any) -> dict[str, Any]:
        """What was asked, in plain values: the settings that make two runs comparable."""
        names = ("num_inference_steps", "guidance_scale", "height", "width", "num_frames")
        asked = {name: self.arguments[name] for name in names if self.arguments.get(name) is not None}
        scheduler = type(getattr(pipe, "scheduler", None)).__name__
        return {"pipeline": type(pipe).__name__, "scheduler": scheduler, **asked}

    def asked_cases(self, number: int) -> list[Case]:
        """One case per image of stock call `number`, in the order of its output."""
        first = number * self.per_call
        rows = enumerate(self.cases)
        return [c.with_seed(self.seed(row, first + j)) for row, c in rows for j in range(self.per_call)]


def _cases(pipe: Any, signature: inspect.Signature, given: dict[str, Any]) -> list[Case]:
    """A case for each prompt, with the pictures of the call; one given in place of a prompt keeps its metadata."""
    prompt, prompts = given.get("prompt"), list[str | Case]()
    if prompt is None:
        prompts = [""] * _rows_without_prompts(given)
    else:
        prompts = [prompt] if isinstance(prompt, str | Case) else list(prompt)
    if not prompts:
        raise ConfigError("prompt is an empty list, but a search needs at least one prompt.")
    source, control = _pictures(pipe, signature, given)
    sources, controls = media.pictures(source, len(prompts)), media.pictures(control, len(prompts))
    asked = [replace(p, seed=0) if isinstance(p, Case) else Case(prompt=p) for p in prompts]
    return [
        replace(case, source=case.source if s is None else s, control=case.control if c is None else c)
        for case, s, c in zip(asked, sources, controls, strict=True)
    ]


def _pictures(pipe: Any, signature: inspect.Signature, given: dict[str, Any]) -> tuple[Any, Any]:
    """The picture to edit and the control picture of a call, as the caller gave them; of several the first counts."""
    known = signature.parameters
    parts = [getattr(pipe, name, None) for name in ("controlnet", "adapter")]
    conditioned = any(part is not None for part in parts)
    source = next((given[name] for name in EDITED if given.get(name) is not None), None)
    control = given.get("control_image")
    if "control_image" not in known and conditioned:
        source, control = None, source
    elif "control_mask" in known and "image" not in known:
        source = control  # what such a pipeline repaints is the control picture itself
    if isinstance(control, list | tuple) and control and any(_is_several(part) for part in parts):
        control = control[0]  # one entry for each of several ControlNets, not for each prompt
    return source, control


def _is_several(part: Any) -> bool:
    return hasattr(part, "nets") or hasattr(part, "adapters")


def _rows_without_prompts(given: dict[str, Any]) -> int:
    embedded = [v for k, v in given.items() if k.startswith("prompt_embeds") and v is not None]
    return len(embedded[0]) if embedded else int(given.get("batch_size", 1))


def _listed(generator: Any) -> list[torch.Generator]:
    given = generator if isinstance(generator, list) else [generator]
    return [each for each in given if each is not None]


def _seed_of(generator: torch.Generator) -> int:
    """The seed a generator was set to; one that has drawn since is known by its state."""
    seed, state = int(generator.initial_seed()), generator.get_state()
    if torch.equal(state, torch.Generator(generator.device).manual_seed(seed).get_state()):
        return seed
    return derived_seed(seed, "used", hashlib.sha256(state.numpy().tobytes()).hexdigest())


def _device(generator: Any) -> torch.device:
    first = generator[0] if isinstance(generator, list) else generator
    return torch.device("cpu") if first is None else first.device
