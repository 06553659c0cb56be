"""What judge protocols share: how a reply is sampled, whose wording is used, how many pictures a question takes."""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign import config
from diffalign.errors import ConfigError
from diffalign.judges import wording
from diffalign.judges.asking import Backend, Question

OURS = "ours"
FREE = ("scale", "most")  # holes that a text may say in numbers of its own


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a judge writes; one that is greedy says the same again."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    max_tokens: int = 512
    seed: int = 42  # of the first pass; the next has the next number

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and self.top_k >= 0 and self.max_tokens >= 1):
            raise ConfigError(
                f"the sampling {asdict(self)} cannot be: temperature and top_k are at least 0 and finite, "
                "top_p is in (0, 1], max_tokens at least 1."
            )

    def question(
        self, text: str, images: Sequence[Tensor], number: int = 0, schema: Mapping[str, Any] | None = None
    ) -> Question:
        """The question of pass `number`."""
        told = asdict(self) | {"seed": self.seed + number}
        return Question(text=text, images=tuple(images), schema=schema, **told)


@dataclass(frozen=True)
class Wording:
    """Templates by name, with what tells them from other ones."""

    templates: Mapping[str, str]

    def say(self, name: str, **holes: object) -> str:
        """One of them with its holes filled; half characters, which no tokenizer takes, are replaced."""
        return wording.fill(self.templates[name], **holes).encode("utf-8", "replace").decode()

    @property
    def mark(self) -> str:
        return hashlib.sha256(json.dumps(dict(self.templates), sort_keys=True).encode()).hexdigest()[:12]


def read_wording(given: str, ours: Mapping[str, str], who: str) -> Wording:
    """`ours`, or a file: YAML with the same names, or the bare text where there is one name.

    A file may leave names out. Its holes are those of ours, such as {instruction}; other braces stand for themselves.
    """
    if given == OURS:
        return Wording(ours)
    path = Path(given).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"{who}.wording is '{given[:80]}', which is neither 'ours' nor a file we can read ({type(e).__name__}). "
            f"Give a YAML file with texts for {', '.join(ours)}."
        ) from e
    told: Any = {next(iter(ours)): text}
    if path.suffix in (".yaml", ".yml"):
        told = config.parse(text, f"'{path}'")
        if not isinstance(told, Mapping) or not told:
            raise ConfigError(f"'{path}' holds no texts. Write one under each of {', '.join(ours)}.")
    elif len(ours) > 1:
        raise ConfigError(f"{who} asks with {len(ours)} texts, so '{path}' must be YAML with {', '.join(ours)}.")
    return Wording({**ours, **{str(name): _template(name, said, ours, f"'{path}'") for name, said in told.items()}})


def _template(name: Any, said: Any, ours: Mapping[str, str], where: str) -> str:
    if name not in ours:
        raise config.unknown_key(str(name), list(ours), where)
    holes = dict.fromkeys(hole for _, hole, _, _ in string.Formatter().parse(ours[name]) if hole)
    if not isinstance(said, str) or not said.strip():
        raise ConfigError(f"{where} has {said!r} under '{name}', but a wording is a text.")
    if missing := [hole for hole in holes if hole not in FREE and f"{{{hole}}}" not in said]:
        raise ConfigError(f"{where}: the text of '{name}' has no {{{missing[0]}}}. Its holes are {_listed(holes)}.")
    text = said.replace("{", "{{").replace("}", "}}")
    for hole in holes:
        text = text.replace(f"{{{{{hole}}}}}", f"{{{hole}}}")
    return text


def _listed(holes: Mapping[str, Any]) -> str:
    return ", ".join(f"{{{hole}}}" for hole in holes)


def require_images(backend: Backend, count: int, who: str) -> None:
    """Refuse a judge that sees fewer pictures at once than `who` shows it."""
    if backend.most_images < count:
        raise ConfigError(
            f"{who} shows {count} pictures in one question, but the judge '{backend.name}' takes "
            f"{backend.most_images}. Give another judge."
        )
