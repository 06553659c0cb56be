"""One door to every search method: `align(pipe, prompt, method="tree", reward="clip", budget=800)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffalign import registry
from diffalign.budget import Limits
from diffalign.errors import ConfigError, UnknownName
from diffalign.restore import frozen
from diffalign.searching import Improvement, Method, Options, SearchShell, Session

KINDS = ("random", "zero_order", "paths", "stepwise", "beam", "decisive", "svdd")
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {name: ("search", {"method": name}) for name in KINDS}
ALIASES["best_of_n"] = ALIASES["random"]  # through this door: the same budget, previews and Ctrl-C as the others


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
    {"tree": {"width": 3}}. Ctrl-C gives back the best so far.
    """
    names = [name.strip() for name in method.split("+")]
    parts = _shares(names, shares)
    methods = [(_method(name, settings or {}), part) for name, part in zip(names, parts, strict=True)]
    shell: Any = registry.make_pipeline_class(_home(names[0])[0])
    for name in settings or {}:
        if name not in names:
            raise ConfigError(f"settings are for '{name}', but the method is '{method}'.")
    options = Options(
        reward=reward,
        budget=budget,
        top_k=top_k,
        on_improve=on_improve,
        **{name: call.pop(name) for name in SearchShell.ADVANCED if name in call},
    )
    session = Session(shell.from_pipe(pipe), (), {"prompt": prompt, **call}, options)
    with torch.no_grad(), frozen(session.chain.driver.modules.values()):
        return session.run(method, methods)


def _home(name: str) -> tuple[str, dict[str, Any]]:
    """The registered pipeline that runs a method, and what tells it which of its methods."""
    return ALIASES.get(name, (name, {}))


def _method(name: str, settings: Mapping[str, Mapping[str, Any]]) -> Method:
    home, told = _home(name)
    shell: Any = registry.make_pipeline_class(home)
    if not issubclass(shell, SearchShell):
        known = [info.name for info in registry.pipelines()]
        raise UnknownName.among("search method", name, [*known, *ALIASES], "diffalign ls pipelines")
    built: Method = shell.method({**told, **settings.get(name, {})})
    return built


def _shares(names: Sequence[str], shares: Sequence[float] | None) -> list[float]:
    if shares is None:
        return [1 / len(names)] * len(names)
    if len(shares) != len(names) or not all(share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(
            f"shares are {list(shares)} for {len(names)} methods; give one each, above 0, adding up to 1."
        )
    return list(shares)
