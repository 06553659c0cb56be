"""The manifest: everything the page shows, as plain data. `docs/gallery.md` has every field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from diffalign.data.named_pictures import IMAGES
from diffalign.errors import ConfigError
from diffalign.gallery import compare
from diffalign.gallery.pictures import VIDEOS, Unreadable, store
from diffalign.gallery.sides import Item, Picture, Side, matched, named_apart, roles_of

FORMAT, VERSION = "diffalign-gallery", 1


@dataclass(frozen=True, kw_only=True)
class Heading:
    """What stands above the pairs."""

    title: str = "Before and after"
    subtitle: str | None = None
    command: str | None = None
    notes: Sequence[str] = ()
    about: Mapping[str, str] | None = None  # what each reward measures


def build(
    sides: Sequence[Side],
    folder: Path,
    heading: Heading,
    advance: Callable[[int], None] = lambda n: None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Write every picture into `folder`/media and say in one manifest what is where and how the systems compare."""
    sides = named_apart(sides)
    rows, roles = matched(sides), roles_of(sides)
    notes, entries = list(heading.notes), []
    for key, items in rows:
        entries.append(_entry(key, items, folder))
        advance(1)
    notes += _gaps(sides, entries)
    scores = [
        {name: [_score(items[k], name) for _, items in rows] for name in roles} for k in range(len(sides))
    ]  # of each system, one per entry
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "title": heading.title,
        "subtitle": heading.subtitle,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": heading.command,
        "systems": [_system(side) for side in sides],
        "rewards": [_reward(name, role, scores, heading.about) for name, role in roles.items()],
        "entries": entries,
        "summaries": compare.summaries(scores, list(roles), seed=seed),
        "unlike": unlike(sides),
        "curves": [dict(curve) for side in sides for curve in side.curves],
        "notes": notes,
    }
    return manifest | {"id": _identity(manifest)}


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a gallery on disk, whose paths stay inside its folder."""
    file = folder / "manifest.json" if folder.is_dir() else folder
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"'{file}' is not a gallery's manifest ({e}). Give the folder that holds index.html.") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ConfigError(f"'{file}' is not a gallery's manifest. Give the folder that holds index.html.")
    if not isinstance(manifest.get("version"), int) or manifest["version"] > VERSION:
        raise ConfigError(
            f"'{file}' has version {manifest.get('version')!r}, and this diffalign reads up to {VERSION}. Update it "
            "with `pip install -U diffalign`."
        )
    for path in paths(manifest):
        require_inside(path)
    return manifest


def paths(value: Any) -> list[str]:
    """Every media path of a manifest, or of a part of it."""
    if isinstance(value, list):
        return [path for each in value for path in paths(each)]
    if not isinstance(value, dict):
        return []
    own = [value[name] for name in ("shown", "original") if name in value and "kind" in value]
    return own + [path for each in value.values() for path in paths(each)]


def require_inside(path: Any) -> None:
    """Refuse a media path that could leave the gallery's folder or name another place."""
    plain = (
        isinstance(path, str) and path.lower().endswith((*IMAGES, *VIDEOS)) and not any(c in path for c in ":\\?#\0")
    )
    if not plain or path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise ConfigError(f"a manifest names the file {path!r}, which is not inside its folder. Do not trust it.")


def unlike(sides: Sequence[Side]) -> list[str]:
    """How the evaluation cards differ from the baseline's in what should agree; the methods are meant to differ."""
    first = sides[0]
    if len(sides) > 1 and all(side.card is None for side in sides):
        return ["No system has an evaluation card, so nothing says that they were made under the same conditions."]
    found = []
    for side in sides[1:]:
        if first.card is None or side.card is None:
            found.append(f"{side.name if side.card is None else first.name} has no evaluation card.")
            continue
        for name in sorted(first.card.keys() | side.card.keys()):
            a, b = first.card.get(name), side.card.get(name)
            steered = name == "rewards" and not (a and b)  # a plain draw needs none
            if name not in ("method", "attention") and not steered:
                found += [
                    f"{path} of {side.name} is {_brief(theirs)}, and of {first.name} {_brief(ours)}."
                    for path, ours, theirs in _differences(name, a, b)
                ]
    return list(dict.fromkeys(found))


def _differences(path: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values differ, inside mappings too."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(a.keys() | b.keys()):
            yield from _differences(f"{path}.{key}", a.get(key), b.get(key))
    elif a != b:
        yield path, a, b


def _entry(key: str, items: Sequence[Item | None], folder: Path) -> dict[str, Any]:
    first = next(item for item in items if item is not None)
    inputs = {name: _media(picture, folder)[0] for name, picture in first.inputs.items()}
    return {
        "id": hashlib.sha256(key.encode()).hexdigest()[:12],
        "prompt": first.prompt,
        "tags": list(first.tags),
        "seed": None if first.seed is None else str(first.seed),
        "inputs": {name: media for name, media in inputs.items() if media},
        "instruction": first.instruction,
        "shots": [None if item is None else _shot(item, folder) for item in items],
    }


def _shot(item: Item, folder: Path) -> dict[str, Any]:
    media, why = (None, item.missing or "no picture") if item.picture is None else _media(item.picture, folder)
    samples = [(step, _media(picture, folder)[0]) for step, picture in item.samples]
    shot = {
        "media": media,
        "missing": why,
        "scores": {name: _kept(value) for name, value in item.scores.items()},
        "seed": None if item.seed is None else str(item.seed),
        "command": item.command,
        "steps": None if item.steps is None else {name: list(values) for name, values in item.steps.items()},
        "checks": [dict(check) for check in item.checks],
        "candidates": item.candidates,
        "samples": [{"step": step, "media": picture} for step, picture in samples if picture],
    }
    return {name: value for name, value in shot.items() if value not in (None, [], "")} | {"media": media}


def _media(picture: Picture, folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    try:
        return store(picture, folder), None
    except Unreadable as e:
        return None, str(e)


def _system(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "card": None if side.card is None else dict(side.card),
        "cost": dict(side.cost),
        "diversity": side.diversity,
        "command": side.command,
    }


def _reward(
    name: str, role: str, scores: Sequence[Mapping[str, Any]], about: Mapping[str, str] | None
) -> dict[str, Any]:
    values = [value for system in scores for value in system[name] if value is not None]
    span = [min(values), max(values)] if values else None
    return {"name": name, "role": role, "range": span, "about": (about or {}).get(name)}


def _score(item: Item | None, name: str) -> float | None:
    return None if item is None else _kept(item.scores.get(name))


def _kept(value: float | None) -> float | None:
    """A score as the page has it: six digits, so that what only rounding tells apart is a tie."""
    return None if value is None else float(f"{value:.6g}")


def _gaps(sides: Sequence[Side], entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on each system that lacks pictures of some prompts."""
    lacks = [sum(not (entry["shots"][k] or {}).get("media") for entry in entries) for k in range(len(sides))]
    short = [(side.name, n) for side, n in zip(sides, lacks, strict=True) if n]
    return [f"{name} has no picture for {n} of {len(entries)} entries." for name, n in short]


def _identity(manifest: Mapping[str, Any]) -> str:
    """The same systems, prompts and pictures have the same id, whenever the page is made, whatever their scores."""
    shown = [[entry["id"], entry["prompt"], paths(entry["shots"])] for entry in manifest["entries"]]
    told = [[system["name"] for system in manifest["systems"]], shown]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
