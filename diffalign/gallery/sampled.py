"""What a method made in this process, as a side of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffalign.gallery.sides import Item, Role, Side, numbered

if TYPE_CHECKING:
    from diffalign.bench.sample import Sampled


def side_of(
    name: str,
    done: Sampled,
    *,
    truth: Sequence[bool] | None = None,
    card: Mapping[str, Any] | None = None,
    commands: Sequence[str] = (),
    steered: bool = True,
) -> Side:
    """The best image of every case, with its scores, cost and seed."""
    keys = numbered([case.prompt for case in done.cases])
    items = [
        Item(
            key=key,
            prompt=case.prompt,
            picture=done.pixels[i][0],
            seed=done.seeds[i][0],
            scores=(score.parts_at(0) if (score := done.scores[i]) else {})
            | ({} if truth is None else {"truth": float(truth[i])}),
            tags=(str(case.metadata["tag"]),) if case.metadata.get("tag") else (),
            command=commands[i] if commands else None,
        )
        for i, (key, case) in enumerate(zip(keys, done.cases, strict=True))
    ]
    names = dict.fromkeys(name for item in items for name in item.scores)
    role: Role = "proxy" if steered else "heldout"
    roles: dict[str, Role] = {each: "truth" if each == "truth" else role for each in names}
    cost = {each: value / max(len(done.cases), 1) for each, value in done.spent.items()}
    return Side(name=name, items=items, card=card, cost=cost, diversity=done.diversity, roles=roles)


def _scores(done: Sampled, i: int) -> dict[str, float | None]:
    score = done.scores[i]
    return {} if score is None else score.parts_at(0)
