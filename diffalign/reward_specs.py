"""What people write where a reward is wanted -> (reward, weight) pairs."""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from diffalign import config, own_rewards, registry
from diffalign.errors import ConfigError, MissingExtra
from diffalign.judges.secrets import without_secrets
from diffalign.scoring import FunctionReward, Reward

Weighted = tuple[Reward, float]
_FORMS = "Write a name such as 'clip' or 'clip:2.0', file.py:name, module:name, or a mapping of names to weights."


def parse_spec(spec: Any) -> list[Weighted]:
    """Every reward a spec asks for, with its weight."""
    if isinstance(spec, str):
        name, weight = _split(spec)
        return [(_named(name, {}), weight)]
    if isinstance(spec, Mapping):
        found = [_from_entry(str(name), entry) for name, entry in spec.items()]
    elif isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[1], int | float):
        found = [(reward, weight * _weight(spec[1], reward.name)) for reward, weight in parse_spec(spec[0])]
    elif isinstance(spec, list | tuple):
        found = [pair for part in spec for pair in parse_spec(part)]
    elif callable(spec):
        return [(_make(spec, getattr(spec, "__name__", type(spec).__name__), {}), 1.0)]
    else:
        raise ConfigError(f"{spec!r} ({type(spec).__name__}) is not a reward. {_FORMS}")
    if not found:
        raise ConfigError(f"no reward is named in {spec!r}. {_FORMS}")
    return found


def _split(spec: str) -> tuple[str, float]:
    """`clip:2.0` -> ("clip", 2.0); `file.py:name` keeps its colon."""
    head, colon, tail = spec.strip().rpartition(":")
    if not colon:
        return spec.strip(), 1.0
    try:
        return head, _weight(float(tail), head)
    except ValueError:
        if head in registry.reward_names():
            raise ConfigError(f"'{tail}' in '{spec}' is not a weight. Write a number: {head}:1.0") from None
        return spec.strip(), 1.0


def _weight(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"the weight of reward '{name}' is {value!r}, but it must be a finite number.")
    return float(value)


def _from_entry(name: str, entry: Any) -> Weighted:
    if not isinstance(entry, Mapping):
        return _named(name, {}), _weight(entry, name)
    options = dict(entry)
    weight = _weight(options.pop("weight", 1.0), name)
    target = str(options.pop("reward", name))  # `sharp: {reward: clip, model: ...}` uses one reward twice
    reward = _named(target, options)
    if target != name:
        object.__setattr__(reward, "name", name)  # a reward may be a frozen dataclass
    return reward, weight


def _named(name: str, options: Mapping[str, Any]) -> Reward:
    """A reward that ships or is installed, or one that was trained here."""
    folder = None if ":" in name or name in registry.reward_names() else own_rewards.folder_of(name)
    if folder is None:
        return _make(registry.find_reward(name), name, options)
    if "model" in options:
        raise ConfigError(f"'{name}' is a reward that was trained, so it has a model. Drop the option model.")
    made = _make(registry.find_reward("trained"), "trained", {"model": str(folder), **options})
    object.__setattr__(made, "name", own_rewards.called(name, folder))
    return made


def _make(target: Any, name: str, options: Mapping[str, Any]) -> Reward:
    if isinstance(target, type):
        made = _construct(target, name, options)
        return made if _is_reward(made) else FunctionReward(made, {})
    if not callable(target):
        raise ConfigError(
            f"'{name}' is {target!r} ({type(target).__name__}), which cannot be called on images. {_FORMS}"
        )
    if inspect.isfunction(target):
        return FunctionReward(target, _checked(target, name, options, skip=2))
    if options:
        raise ConfigError(
            f"reward '{name}' is an object that already exists, so the options {without_secrets(options)} come too "
            "late."
        )
    return target if _is_reward(target) else FunctionReward(target, {})


def _is_reward(made: Any) -> TypeGuard[Reward]:
    """Whether it has the attributes of the protocol; none is computed to find out."""
    missing = object()
    names = ("name", "differentiable", "modality", "version", "range")
    return all(inspect.getattr_static(made, name, missing) is not missing for name in names)


def _construct(cls: type, name: str, options: Mapping[str, Any]) -> Any:
    checked = _checked(cls, name, options, skip=0)
    try:
        made = cls(**checked)
    except ImportError as e:
        card = registry.cards().get(name)
        if card and card.extra:
            raise MissingExtra.of(f"reward '{name}'", ", ".join(card.requires), card.extra) from e
        raise
    if not hasattr(made, "options") and not dataclasses.is_dataclass(made):
        made.options = checked  # part of the cache key
    return made


def _checked(target: Callable[..., Any], name: str, options: Mapping[str, Any], skip: int) -> dict[str, Any]:
    """Options against the target's own parameters: names, presence, and the types it declares."""
    where = f"rewards.{name}"
    parameters = list(inspect.signature(target).parameters.values())[skip:]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in options:
            if key not in named:
                raise config.unknown_key(key, [*named, "weight", "reward"], where)
    missing = [p.name for p in named.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise ConfigError(
            f"reward '{name}' needs a value for {', '.join(missing)}. Write {{{name}: {{{missing[0]}: ...}}}}"
        )
    hints = _hints(target)
    return {k: config.convert(v, hints.get(k, Any), f"{where}.{k}") for k, v in options.items()}


def _hints(target: Any) -> dict[str, Any]:
    try:
        signed = inspect.getattr_static(target, "__init__") if isinstance(target, type) else target
        return typing.get_type_hints(signed)
    except (NameError, TypeError):  # names that exist for type checkers only
        return {}
