"""One door to every search method: `align(pipe, prompt, method="tree", reward="clip", budget=800)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffalign import registry
from diffalign.budget import Limits
from diffalign.errors import ConfigError, UnknownName
from diffalign.search_shell import SearchShell
from diffalign.searching import Improvement, Method

OWN = ("value", "veto", "grown", "finish", "checkpointing")  # what single methods take beside their config
BINDING = ("veto",)  # promises about every image that comes back, so that all methods must keep them


def align(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    reward: Any,
    method: str = "tree",
    budget: Limits | int | float | str | None = None,
    top_k: int | None = None,
    on_improve: Callable[[Improvement], None] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    shares: Sequence[float] | None = None,
    **call: Any,
) -> Any:
    """The stock call of `pipe` for `prompt`, aligned to `reward` by `method`; the output carries a `.report`.

    `budget` is NFE per prompt (400), seconds per prompt ("20s" or 20.0) or `Limits`. A method may be several in turn,
    such as "smc+reno" or "tree+random": each starts from the noise that the one before found best, all share one budget
    by `shares` (equal by default), and the best image of all comes back. `settings` holds each method's own config:
    {"tree": {"width": 3}}. What only some methods know goes to those: `value` and `veto` (see SearchPipeline), `grown`
    (TreePipeline), `finish` and `checkpointing` (ReNOPipeline). Ctrl-C gives back the best so far.
    """
    if reward is None:
        raise ConfigError("reward is None, but alignment needs one: a name from `diffalign ls rewards`, or an object.")
    names = [name.strip() for name in method.split("+")]
    parts = _shares(names, shares)
    for name in settings or {}:
        if name not in names:
            raise ConfigError(f"settings are for '{name}', but the method is '{method}'.")
    own = {name: given for name in OWN if (given := call.pop(name, None)) is not None}
    methods = [(_method(name, settings or {}, own), part) for name, part in zip(names, parts, strict=True)]
    for name in own:
        deaf = [each for each in names if name not in _knows(each, settings or {})]
        if len(deaf) == len(names) or (deaf and name in BINDING):
            raise ConfigError(f"{name}= is given, but {deaf[0]} does not know it. Leave it out, or use another method.")
    options = {"reward": reward, "budget": budget, "top_k": top_k, "on_improve": on_improve}
    searcher: SearchShell = _shell(names[0]).from_pipe(pipe)
    return searcher.search_in_turn((), {"prompt": prompt, **call}, method, methods, **options)


def _kinds() -> tuple[str, ...]:
    """The methods that one pipeline holds together."""
    search: Any = registry.make_pipeline_class("search")
    kinds: tuple[str, ...] = search.KINDS
    return kinds


def _home(name: str) -> tuple[str, dict[str, Any]]:
    """The registered pipeline that runs a method, and what tells it which of its methods.

    Best-of-N through this door is a random search: the same budget, previews and Ctrl-C as the others.
    """
    name = "random" if name == "best_of_n" else name
    return ("search", {"method": name}) if name in _kinds() else (name, {})


def _shell(name: str) -> Any:
    shell: Any = registry.make_pipeline_class(_home(name)[0])
    if not issubclass(shell, SearchShell):
        known = [info.name for info in registry.pipelines()]
        raise UnknownName.among("search method", name, [*known, *_kinds()], "diffalign ls pipelines")
    return shell


def _knows(name: str, settings: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """What the method takes beside its config."""
    known: tuple[str, ...] = _shell(name).knows({**_home(name)[1], **settings.get(name, {})})
    return known


def _method(name: str, settings: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any]) -> Method:
    chosen = {**_home(name)[1], **settings.get(name, {})}
    told = {each: own[each] for each in _knows(name, settings) if each in own}
    built: Method = _shell(name).method(chosen, **told)
    return built


def _shares(names: Sequence[str], shares: Sequence[float] | None) -> list[float]:
    if shares is None:
        return [1 / len(names)] * len(names)
    if len(shares) != len(names) or not all(share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(
            f"shares are {list(shares)} for {len(names)} methods; give one each, above 0, adding up to 1."
        )
    return list(shares)
