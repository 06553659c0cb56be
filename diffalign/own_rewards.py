"""Rewards that people trained: folders with a `reward.json`, found by their path or by the name they were given.

The names lie in $DIFFALIGN_REWARDS, or in diffalign/rewards under the user's data folder: a file a name, which says
where the reward is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from diffalign import atomic
from diffalign.errors import ConfigError, ModelError

CARD = "reward.json"
AGAIN = "Give the path of its folder, or train it again under that name."


@dataclass(frozen=True, kw_only=True)
class TrainedCard:
    """What `reward.json` says of a trained reward."""

    name: str
    tower: str  # clip or vlm
    base: str  # the model it was made of
    base_version: str
    weights: str  # digest of what lies beside the card; another one is another reward
    mean: float  # of the ratings of held-out pictures, which scores are centred by
    deviation: float  # of the same
    temperature: float  # the chance that a picture is better is sigma(gap of scores / temperature)
    loss: str
    doubts: bool = False  # whether it tells a deviation beside its rating
    instruction: str = ""  # what a vision language model is asked
    accuracy: dict[str, float] = field(default_factory=dict)  # on held-out prompts: mean, lo, hi
    prompts: int = 0  # that taught it
    pairs: int = 0
    heldout_prompts: int = 0
    heldout_pairs: int = 0
    pixels: int | None = None  # of a picture at most, for a vision language model
    command: str = ""

    @property
    def computation(self) -> str:
        """What tells this reward's scores from those of another: its weights, and how they are read."""
        read = (self.tower, self.base_version, self.instruction, self.pixels, self.doubts, self.mean, self.deviation)
        return f"{self.weights} {hashlib.sha256(repr(read).encode()).hexdigest()[:8]}"

    @property
    def meaning(self) -> str:
        told = f"trained on {self.pairs:,} pairs of {self.prompts:,} prompts, from {Path(self.base).name}"
        if not {"mean", "lo", "hi"} <= set(self.accuracy):
            return told
        right = "{mean:.1%} [{lo:.1%}, {hi:.1%}]".format(**self.accuracy)
        return f"{told}; tells the better of two pictures on {right} of {self.heldout_pairs:,} held-out pairs"


def home() -> Path:
    """Where the names lie."""
    own = os.environ.get("DIFFALIGN_REWARDS")
    shared = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(own).expanduser() if own else Path(shared) / "diffalign" / "rewards"


def names() -> dict[str, Path]:
    """The folder of every name; one that can no longer be read is left out."""
    found = {}
    for file in sorted(home().glob("*.json")) if home().is_dir() else []:
        try:
            found[file.stem] = Path(json.loads(file.read_text(encoding="utf-8"))["folder"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def folder_of(name: str) -> Path | None:
    """The folder of a trained reward by its name or path, of the reward itself or of its training; None for others."""
    known = names().get(name)
    if known is not None and (known / CARD).is_file():
        return known
    place = Path(name).expanduser()
    for folder in (place, place / "reward"):
        if (folder / CARD).is_file():
            return folder.resolve()
    if known is not None:
        raise ModelError(gone(name, known))
    return None


def gone(name: str, folder: Path) -> str:
    """What to say of a name whose reward has moved."""
    return f"the reward '{name}' was trained in '{folder}', but there is no {CARD} any more. {AGAIN}"


def called(asked: str, folder: Path) -> str:
    """What scores of a reward stand under: its name, or that of the folder it was trained in."""
    if asked in names():
        return asked
    return read_card(folder).name or (folder.parent.name if folder.name == "reward" else folder.name)


def remember(name: str, folder: Path) -> Path:
    """Give a trained reward a name; an older one of that name is forgotten."""
    return atomic.write_json(home() / f"{name}.json", {"folder": str(folder.resolve())})


def require_name(name: str) -> None:
    """Refuse a name that is no plain word."""
    if not name.replace("_", "").replace("-", "").isalnum() or not name.isascii():
        raise ConfigError(f"the name of a reward is '{name}', but it has letters, digits, '-' and '_' only.")


def write_card(folder: Path, card: TrainedCard) -> None:
    atomic.write_json(folder / CARD, asdict(card))


def read_card(folder: Path) -> TrainedCard:
    """The card of a trained reward; ModelError where it is none."""
    file = folder / CARD
    try:
        told: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"cannot read '{file}', the card of a trained reward: {e}. {AGAIN}") from e
    known = {each.name for each in fields(TrainedCard)}
    needed = {"name", "tower", "base", "base_version", "weights", "mean", "deviation", "temperature", "loss"}
    lacking = sorted(needed - set(told if isinstance(told, Mapping) else ()))
    if lacking:
        raise ModelError(f"'{file}' lacks {', '.join(lacking)}, so it is no card of a trained reward. {AGAIN}")
    card = TrainedCard(**{name: value for name, value in told.items() if name in known})
    numbers = (card.mean, card.deviation, card.temperature)
    sound = all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
    if not sound or not min(numbers[1:]) > 0 or card.tower not in TOWERS:
        raise ModelError(
            f"'{file}' has tower '{card.tower}', mean {card.mean}, deviation {card.deviation} and temperature "
            f"{card.temperature}, which cannot be. {AGAIN}"
        )
    return card


TOWERS = ("clip", "vlm")
