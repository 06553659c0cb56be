"""`diffalign score --calibrate`: images of a base model as the references that later scores are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from diffalign.cli.score_entry import Entry
from diffalign.errors import ConfigError, MediaError
from diffalign.gallery import rows

if TYPE_CHECKING:
    from diffalign.cases import Case
    from diffalign.cli.score_pass import Column
    from diffalign.cli.score_sources import Found

_CALLED = {"num_inference_steps": "steps", "guidance_scale": "guidance"}


def base_of(found: Found, told: Sequence[str] | Mapping[str, Any], table: str) -> dict[str, Any]:
    """What drew the images: from the cards of the runs they come from, and from key=value settings over it."""
    from diffalign import atomic

    atomic.require_file(table)
    given = _settings(told)
    if given and not found.runs:
        return given
    if not found.runs or found.plain:
        raise ConfigError(
            "--calibrate needs to know what drew these images, so that scores are later compared with the same base. "
            "Score runs of `diffalign generate`, or say it: --base model=NAME --base steps=28 --base guidance=4.5."
        )
    cards = [_from_card(run, given) for run in dict.fromkeys(found.runs)]
    for run, card in zip(dict.fromkeys(found.runs), cards, strict=True):
        if card != cards[0]:
            name = next(key for key in [*card, *cards[0]] if card.get(key) != cards[0].get(key))
            raise ConfigError(
                f"the runs '{found.runs[0]}' and '{run}' have another base: {name} is {cards[0].get(name)!r} and "
                f"{card.get(name)!r}. Calibrate them into two tables."
            )
    return cards[0]


def _settings(told: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    from diffalign import config

    if isinstance(told, Mapping):
        return dict(told)
    found: dict[str, Any] = {}
    for setting in told:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--base {setting} is not of the form key=value, for instance --base steps=28.")
        found[key.strip()] = config.parse(text, f"--base {setting}")
    return found


def _from_card(run: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Model, sampler and call of a run; only plain draws are references, unless --base says what they are of."""
    card = rows.read_object(run / "card.json")
    if card is None:
        raise ConfigError(f"the run '{run}' has no card.json, which says what drew its images. Make the run again.")
    method = rows.mapping(card.get("method"))
    if method.get("name", "stock") != "stock" and not given:
        raise ConfigError(
            f"the images of '{run}' were chosen by '{method['name']}', so they are better than what the base model "
            "draws, and no references of it. Generate with the method 'stock', or name their base with --base."
        )
    call = {_CALLED.get(name, name): value for name, value in rows.mapping(card.get("call")).items()}
    base: dict[str, Any] = {name: card[name] for name in ("model", "sampler", "dtype") if name in card}
    lora: dict[str, Any] = {"lora": method["lora"]} if method.get("lora") else {}
    return {**base, **lora, **call, **given}


def add(
    path: str, base: Mapping[str, Any], entries: Sequence[Entry], columns: Sequence[Column]
) -> list[dict[str, Any]]:
    """Add these scores to the tables in `path`; shows and gives back what the file then holds of each reward."""
    import torch

    from diffalign import calibration
    from diffalign.cli.score_shown import show_references
    from diffalign.score_cache import PICTURES
    from diffalign.scoring import Score

    tables = []
    for column in columns:
        total = torch.tensor([torch.nan if value is None else value for value in column.values])
        pictures = not set(PICTURES).isdisjoint(calibration.reads_of(column.reward))
        cases = (_case(entry, pictures) for entry in entries)
        tables.append(calibration.measure(column.reward, base, cases, Score(total)))
    calibration.write_tables(path, tables)
    names = {column.name for column in columns}
    written = [_row(table) for table in calibration.read_tables(path) if table.reward["name"] in names]
    show_references(written)
    print(f"references in {path}, of {_said(base)}")
    return written


def _case(entry: Entry, pictures: bool) -> Case:
    """What was asked of an image, with its pictures where they count; an image that cannot be read has none."""
    from diffalign.cases import Case

    if pictures and entry.inputs:
        with suppress(MediaError):
            return entry.load()[1]
    return Case(prompt=entry.prompt, metadata=entry.metadata)


def _row(table: Any) -> dict[str, Any]:
    counts = [len(values) for values in table.prompts.values()]
    return {
        "reward": table.reward["name"],
        "prompts": len(counts),
        "references_per_prompt": [min(counts), max(counts)],
        "median": median(table.values.tolist()),
        "std": table.std0,
        "hash": table.hash,
    }


def _said(base: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in base.items() if not isinstance(value, Mapping | list))
