"""Sources on disk: run folders that `diffalign generate` wrote, and plain folders of pictures with matching names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.named_pictures import IMAGES
from diffalign.errors import ConfigError
from diffalign.gallery import rows, training
from diffalign.gallery.pictures import VIDEOS
from diffalign.gallery.sides import Item, Picture, Role, Side, numbered

AGAIN = "Make the run again."
QUESTION = re.compile(r"(^|/)(check|item)/")  # a part that is one question's answer: a check, and no column
NAMES = ("prompts.jsonl", "prompts.txt")  # beside plain pictures: their prompts, in the order of the names


def read_side(path: Path) -> Side:
    """The system a folder shows."""
    if not path.is_dir():
        raise ConfigError(
            f"'{path}' is not a folder. Give run folders of `diffalign generate`, or folders of pictures."
        )
    if (path / "results.jsonl").exists():
        return _run(path)
    if training.is_training(path):
        return training.read_training(path, _run)
    return _pictures(path)


def _run(path: Path) -> Side:
    """A run folder: the best image of each prompt."""
    best = [row for _, row in rows.read_lines(path / "results.jsonl", AGAIN) if row.get("rank", 0) == 0]
    card, summary = rows.read_object(path / "card.json"), rows.read_object(path / "summary.json")
    method = rows.mapping((card or {}).get("method"))
    steered = method.get("name", "stock") != "stock"
    keys = numbered([str(row.get("prompt", "")) for row in best])
    items = [_row_item(path, key, row, _total_name(card)) for key, row in zip(keys, best, strict=True)]
    cost = {
        name: value
        for name in ("nfe", "seconds", "decodes", "reward_calls")
        if isinstance(value := (summary or {}).get(name), int | float)
    }
    return Side(
        name=str(method.get("name") or path.resolve().name),
        items=items,
        card=card,
        cost=cost,
        diversity=rows.number((summary or {}).get("diversity")),
        roles=_roles(items, _total_name(card), steered),
    )


def _total_name(card: Mapping[str, Any] | None) -> str:
    """What the reward that was asked for is called."""
    return " + ".join(map(str, rows.mapping((card or {}).get("rewards")))) or "reward"


def _row_item(path: Path, key: str, row: Mapping[str, Any], total: str) -> Item:
    checks = [check for check in rows.listed(row.get("checks")) if isinstance(check, dict)]
    parts = {str(name): rows.number(value) for name, value in rows.mapping(row.get("parts")).items()}
    scores = {name: value for name, value in parts.items() if not QUESTION.search(name)}
    if "reward" in row:
        scores = {total: rows.number(row["reward"]), **scores}
    if "truth" in row:
        scores["truth"] = rows.number(row["truth"])
    return Item(
        key=key,
        prompt=str(row.get("prompt", "")),
        picture=_inside(path, row.get("file")),
        missing="the run names no file",
        seed=seed if isinstance(seed := row.get("seed"), int) and seed >= 0 else None,
        scores=scores,
        tags=tuple(map(str, rows.listed(row.get("tags")))),
        command=rows.text(row.get("command")),
        inputs=_inputs(path, row.get("inputs")),
        instruction=rows.text(row.get("instruction")),
        steps={str(name): rows.listed(values) for name, values in rows.mapping(row.get("steps")).items()} or None,
        checks=checks,
        candidates=candidates if isinstance(candidates := row.get("candidates"), int) else None,
    )


def _inputs(path: Path, named: Any) -> dict[str, Picture]:
    """The pictures a prompt came with: source, control, reference."""
    found = {str(name): _inside(path, file) for name, file in rows.mapping(named).items()}
    return {name: file for name, file in found.items() if file is not None}


def _roles(items: Sequence[Item], total: str, steered: bool) -> dict[str, Role]:
    """The total steers a search and only measures a plain draw; its parts belong to it."""
    names = dict.fromkeys(name for item in items for name in item.scores)
    own: dict[str, Role] = {"truth": "truth", total: "proxy" if steered else "heldout"}
    return {name: own.get(name, "part") for name in names}


def _pictures(path: Path) -> Side:
    """Pictures whose names tell which belong together; `name.txt` beside one is its prompt."""
    names = sorted(file.name for file in path.iterdir() if file.suffix.lower() in (*IMAGES, *VIDEOS))
    files = [file for name in names if (file := _inside(path, name))]
    if not files:
        raise ConfigError(f"'{path}' holds neither results.jsonl nor pictures ({', '.join(IMAGES + VIDEOS)}).")
    twins = {file.stem for k, file in enumerate(files) if k and file.stem == files[k - 1].stem}
    if twins:
        raise ConfigError(f"'{path}' has several pictures called '{min(twins)}'. Keep one of each name.")
    asked = _prompts(path, len(files))
    items = []
    for k, file in enumerate(files):
        prompt = asked[k] if asked else _beside(file)
        items.append(Item(key=file.stem, prompt=prompt, picture=file))
    return Side(name=path.resolve().name, items=items, card=rows.read_object(path / "card.json"))


def _prompts(path: Path, count: int) -> list[str] | None:
    from diffalign.cases import read_cases

    for name in NAMES:
        if (path / name).exists():
            _inside(path, name)
            prompts = [case.prompt for case in read_cases(path / name)]
            if len(prompts) != count:
                raise ConfigError(
                    f"'{path / name}' has {len(prompts)} prompts for {count} pictures. One each, in their order."
                )
            return prompts
    return None


def _beside(file: Path) -> str:
    """The caption beside a picture, else its name in words."""
    caption = file.with_suffix(".txt")
    if caption.exists():
        _inside(file.parent, caption.name)
        return caption.read_text(encoding="utf-8", errors="replace").strip()
    return file.stem.replace("_", " ")


def _inside(folder: Path, name: Any) -> Path | None:
    """A file a run names, which has to be its own."""
    if not isinstance(name, str):
        return None
    file = folder / name
    if "\0" in name or not file.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"'{folder}' names the file {name!r}, which is not inside it. Do not trust this run.")
    return file
