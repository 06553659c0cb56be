"""The evaluation card: everything that must agree before two results may be compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffalign.cases import Case
from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

PACKAGES = ("diffalign", "torch", "diffusers", "transformers")


@dataclass(frozen=True, kw_only=True)
class EvaluationCard:
    """How a number was made; two cards are alike when every field but `method` and `attention` agrees."""

    model: str
    sampler: str
    call: Mapping[str, Any]  # steps, guidance, size and whatever else the pipeline was called with
    dtype: str
    seeds: tuple[int, ...]  # of the cases, in order
    prompts: str  # hash of the prompt set
    rewards: Mapping[str, str | None]  # name -> revision
    method: Mapping[str, Any] = field(default_factory=dict)  # what is being compared
    attention: str = "native"
    versions: Mapping[str, str] = field(default_factory=lambda: versions())

    def json(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return plain

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> EvaluationCard:
        """A card from the JSON it was written as."""
        known = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {
            name: tuple(v) if name == "seeds" else v for name, v in content.items() if name in known
        }
        missing = known - values.keys()
        if missing:
            raise ConfigError(f"this evaluation card has no '{min(missing)}'. Measure again with this version.")
        return cls(**values)


def require_alike(a: EvaluationCard, b: EvaluationCard) -> None:
    """Refuse to compare two results that were not made under the same conditions, naming what differs."""
    left, right = a.json(), b.json()
    for name in left:
        if name in ("method", "attention") or left[name] == right[name]:
            continue
        path, mine, theirs = _first_difference(name, left[name], right[name])
        raise ConfigError(
            f"these results cannot be compared: '{path}' is {_short(mine)} on one card and {_short(theirs)} on the "
            "other. Measure both under the same conditions."
        )


def hash_prompts(cases: Iterable[Case]) -> str:
    """One short name for a set of prompts in their order, and of the pictures to edit where there are some."""
    told = [case.prompt if case.source is None else [case.prompt, _digest(case.source)] for case in cases]
    return hashlib.sha256(json.dumps(told, ensure_ascii=False).encode()).hexdigest()[:16]


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()[:16]


def reward_versions(reward: Any) -> dict[str, str | None]:
    """The revision of each reward in a sum."""
    return {part.name: part.version for part in getattr(reward, "rewards", [reward])} if reward is not None else {}


def card_of(
    pipe: Any, model: str, cases: Sequence[Case], call: Mapping[str, Any], *, reward: Any = None, **more: Any
) -> EvaluationCard:
    """The card of a run of `pipe` on `cases`."""
    return EvaluationCard(
        model=model,
        sampler=type(getattr(pipe, "scheduler", None)).__name__,
        call=dict(call),
        dtype=str(getattr(pipe, "dtype", "float32")).removeprefix("torch."),
        seeds=tuple(case.seed for case in cases),
        prompts=hash_prompts(cases),
        rewards=reward_versions(reward),
        **more,
    )


def versions() -> dict[str, str]:
    """The packages that decide what comes out."""
    from importlib.metadata import version

    return {name: version(name) for name in PACKAGES}


def _first_difference(path: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    """The innermost place where two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if a.get(key) != b.get(key):
                return _first_difference(f"{path}.{key}", a.get(key), b.get(key))
    return path, a, b


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
