"""Names -> factories: the cards of the shipped rewards, then decorators, then entry points of installed packages."""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from diffalign import config, loading, own_rewards
from diffalign.errors import ConfigError, ModelError, UnknownName

REWARDS, PIPELINES = "diffalign.rewards", "diffalign.pipelines"
Modality = Literal["image", "video", "edit"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Card:
    """What `rewards/cards.yaml` says about one shipped reward."""

    module: str  # file under rewards/, without .py
    meaning: str  # what a score tells, in one sentence
    modality: Modality = "image"
    differentiable: bool = False
    range: tuple[float, float] | None = None  # None: unbounded, or it depends on the image size
    licence: str = "Apache-2.0"  # of the weights; of our code where there are none
    hub: str | None = None  # id of the default weights
    revision: str | None = None  # commit of those weights
    memory: str = "none"  # device memory at the default settings
    cost: str = "none to speak of"  # what one image costs, in forward passes or seconds
    typical: tuple[float, float] | None = None  # what photographs and good generations get; never a limit
    misses: str = ""  # what it does not see, and how it is gamed
    proof: str = "exact"  # how far its values are tested: exact, golden, layout (names and shapes of the weights only)
    reads_prompt: bool = False  # whether the score depends on the prompt
    needs: str = ""  # what a case needs beside image and prompt, with an example of its row
    requires: tuple[str, ...] = ()  # modules beyond the core dependencies
    extra: str | None = None  # the pip extra that brings them
    no_gradient: str = ""  # why there is none, as a clause


@dataclass(frozen=True, kw_only=True)
class RewardInfo:
    """One row of `diffalign ls rewards`."""

    name: str
    modality: str
    differentiable: bool
    range: tuple[float, float] | None
    installable: bool  # what it needs is here, or an extra of ours brings it
    meaning: str = ""
    licence: str = ""
    hub: str | None = None
    revision: str | None = None
    memory: str = ""
    cost: str = ""
    typical: tuple[float, float] | None = None
    misses: str = ""
    proof: str = ""
    reads_prompt: bool = False
    needs: str = ""
    extra: str | None = None
    missing: tuple[str, ...] = ()  # modules it needs that are not installed here
    source: str = "diffalign"  # the distribution it comes from, or "this process"


@dataclass(frozen=True, kw_only=True)
class PipelineInfo:
    """One row of `diffalign ls pipelines`."""

    name: str
    target: str  # module:class
    source: str = "diffalign"


_rewards: dict[str, Any] = {}
_pipelines: dict[str, type] = {}


def register_reward(
    name: str,
    *,
    differentiable: bool | None = None,
    modality: Modality | None = None,
    version: str | None = None,
    range: tuple[float, float] | None = None,
) -> Callable[[F], F]:
    """Make a class, or a function `(media, cases) -> (B,)`, known by name to every verb."""
    given = {"differentiable": differentiable, "modality": modality, "version": version, "range": range}
    defaults = {"differentiable": False, "modality": "image", "version": None, "range": None}

    def mark(target: F) -> F:
        card = cards().get(name)
        if card and target.__module__ != f"{REWARDS}.{card.module}":
            raise ConfigError(
                f"'{name}' is the name of a reward that ships with diffalign. Register yours under another one."
            )
        target.name = name  # type: ignore[attr-defined]
        for key, value in given.items():
            if value is not None or not hasattr(target, key):
                setattr(target, key, defaults[key] if value is None else value)
        _rewards[name] = target
        return target

    return mark


def register_pipeline(name: str) -> Callable[[type], type]:
    """Make a drop-in pipeline class known by name."""

    def mark(target: type) -> type:
        _pipelines[name] = target
        return target

    return mark


@functools.cache
def cards() -> dict[str, Card]:
    """The cards of the shipped rewards, by name."""
    text = (importlib.resources.files(REWARDS) / "cards.yaml").read_text(encoding="utf-8")
    return {
        name: config.build(Card, card, where=f"cards.yaml:{name}")
        for name, card in config.parse(text, "cards.yaml").items()
    }


def find_reward(name: str) -> Any:
    """The class or function registered as `name`, or at the address `file.py:name` or `module:name`."""
    if ":" in name:
        return _at_address(name)
    if name in cards():
        importlib.import_module(f"{REWARDS}.{cards()[name].module}")
    if name in _rewards:
        return _rewards[name]
    points = loading.plugins(REWARDS)
    if name in points:
        return _unpack(loading.load_plugin(points[name]), name)
    if name in own_rewards.names():
        return find_reward("trained")
    raise UnknownName.among("reward", name, [*reward_names(), *own_rewards.names()], "diffalign ls rewards")


def reward_names() -> list[str]:
    """Every name `find_reward` knows, without importing anything."""
    return sorted({*cards(), *_rewards, *loading.plugins(REWARDS)})


def rewards() -> list[RewardInfo]:
    """Every reward that works here, by name; a plug-in that does not load is warned about and left out."""
    found = {name: _from_card(name, card) for name, card in cards().items()}
    for name, target in {**_rewards, **dict(_working_plugins())}.items():
        if name not in found:
            found[name] = _from_object(name, target)
    for name, folder in own_rewards.names().items():
        if name not in found:
            try:
                found[name] = _from_training(name, folder)
            except ModelError as e:
                warnings.warn(str(e), stacklevel=2)
    return [found[name] for name in sorted(found)]


def pipelines() -> list[PipelineInfo]:
    """Every drop-in pipeline, by name, without importing one."""
    points = loading.plugins(PIPELINES).values()
    found = {p.name: PipelineInfo(name=p.name, target=p.value, source=loading.owner(p)) for p in points}
    for name, cls in _pipelines.items():
        found.setdefault(
            name, PipelineInfo(name=name, target=f"{cls.__module__}:{cls.__qualname__}", source="this process")
        )
    return [found[name] for name in sorted(found)]


def make_pipeline_class(name: str) -> type:
    """The drop-in pipeline class called `name`, or at the address `file.py:name` or `module:name`."""
    if ":" in name:
        module, attribute = loading.load_address(name)
        return _checked_class(loading.find_in(module, attribute, "pipeline"), name)
    if name in _pipelines:
        return _pipelines[name]
    points = loading.plugins(PIPELINES)
    if name in points:
        return _checked_class(loading.load_plugin(points[name]), name)
    raise UnknownName.among("pipeline", name, {*points, *_pipelines}, "diffalign ls pipelines")


def embedded(name: str) -> Path:
    """The folder of a model that ships with diffalign."""
    folder = Path(__file__).parent / "zoo" / "models" / name
    if not folder.is_dir():
        raise ModelError(
            f"the embedded model '{name}' is not in this installation ({folder}). Make it: diffalign zoo build {name}"
        )
    return folder


def _at_address(address: str) -> Any:
    module, name = loading.load_address(address)
    if not hasattr(module, name) and getattr(_rewards.get(name), "__module__", None) == module.__name__:
        return _rewards[name]
    return loading.find_in(module, name, "reward")


def _unpack(loaded: Any, name: str) -> Any:
    """An entry point may name the reward itself or the module that registers it."""
    if not isinstance(loaded, ModuleType):
        return loaded
    return _rewards[name] if name in _rewards else loading.find_in(loaded, name, "reward")


def _working_plugins() -> Iterator[tuple[str, Any]]:
    for point in loading.plugins(REWARDS).values():
        if point.name in cards():
            loading.warn_once(point, _shadowed(point))
        elif (loaded := loading.try_plugin(point)) is not None:
            try:
                yield point.name, _unpack(loaded, point.name)
            except UnknownName as e:
                loading.warn_once(point, f"the plug-in '{point.name}' of the package '{loading.owner(point)}': {e}")


def _shadowed(point: EntryPoint) -> str:
    return f"the package '{loading.owner(point)}' offers a reward '{point.name}', a name diffalign ships; ours is used."


def _from_card(name: str, card: Card) -> RewardInfo:
    missing = tuple(module for module in card.requires if importlib.util.find_spec(module) is None)
    return RewardInfo(
        name=name,
        modality=card.modality,
        differentiable=card.differentiable,
        range=card.range,
        installable=not missing or card.extra is not None,
        meaning=card.meaning,
        licence=card.licence,
        hub=card.hub,
        revision=card.revision,
        memory=card.memory,
        cost=card.cost,
        typical=card.typical,
        misses=card.misses,
        proof=card.proof,
        reads_prompt=card.reads_prompt,
        needs=card.needs,
        extra=card.extra,
        missing=missing,
    )


def _from_object(name: str, target: Any) -> RewardInfo:
    point = loading.plugins(REWARDS).get(name)
    return RewardInfo(
        name=name,
        modality=getattr(target, "modality", "image"),
        differentiable=bool(getattr(target, "differentiable", False)),
        range=getattr(target, "range", None),
        installable=True,
        meaning=(getattr(target, "__doc__", None) or "").strip().partition("\n")[0],
        source=loading.owner(point) if point else "this process",
    )


def _from_training(name: str, folder: Path) -> RewardInfo:
    if not (folder / own_rewards.CARD).is_file():
        raise ModelError(own_rewards.gone(name, folder))
    card, told = own_rewards.read_card(folder), cards()["trained"]
    return replace(
        _from_card(name, told),
        meaning=card.meaning,
        differentiable=card.tower == "clip",
        cost=f"a pass of {Path(card.base).name}",
        misses="what its data did not show; people's taste is that of whoever compared, a judge's that of the judge",
        source=str(folder),
    )


def _checked_class(found: Any, name: str) -> type:
    if not isinstance(found, type):
        raise ConfigError(f"'{name}' is {found!r}, but a drop-in pipeline is a class.")
    return found
