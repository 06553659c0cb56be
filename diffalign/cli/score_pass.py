"""One pass of rewards over images of any size: what each says, what it cost, and why a row has no score."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffalign.cli.score_entry import Entry
from diffalign.errors import ConfigError, DiffalignError, HubError, InvalidReward, MediaError, MissingExtra

if TYPE_CHECKING:
    from PIL import Image

    from diffalign.cases import Case
    from diffalign.scoring import Reward, Score, ScoreCache

AHEAD = 4  # batches of images that may wait for others of their size
SETUP = (HubError, MissingExtra)  # what no other image would change


@dataclass
class Column:
    """What one reward says about every image; None is an invalid score."""

    reward: Reward
    weight: float
    values: list[float | None]
    parts: dict[str, list[float | None]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)  # image -> why it has no score, where that is known
    judged: int = 0  # images on which the reward gave an answer, be it NaN
    raised: int = 0  # images on which it raised an error that is not ours
    refused: int = 0  # and one that is
    failure: Exception | None = None  # the first error it raised
    asked: int = 0  # rows of it, or of its parts, that were computed
    answered: int = 0  # and that came from the cache
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.reward.name

    def put(self, at: Sequence[int], found: Score) -> None:
        """Keep the scores of some images, and of an invalid one what a shipped reward needs."""
        self.judged += len(at)
        for row, k in enumerate(at):
            valid = bool(found.valid[row])
            self.values[k] = float(found.total[row]) if valid else None
            if not valid and self.needs:
                self.reasons[k] = f"it needs {self.needs}"
            for part, value in found.parts_at(row).items():
                if part != self.name:
                    column = self.parts.setdefault(part, [None] * len(self.values))
                    column[k] = value if value is not None and value == value else None

    @property
    def needs(self) -> str:
        """What the card of a shipped reward says that a case needs."""
        from diffalign import registry

        card = registry.cards().get(self.name)
        shipped = card and type(self.reward).__module__ == f"{registry.REWARDS}.{card.module}"
        return card.needs if card and shipped else ""

    @property
    def reads_prompt(self) -> bool:
        from diffalign.scoring import leaves

        asked = [getattr(part, "function", part) for part in (self.reward, *leaves(self.reward))]
        return any(getattr(part, "reads_prompt", False) for part in asked)

    def lacks(self, case: Case) -> str | None:
        """What this reward needs of a request that is not there."""
        if self.reads_prompt and not case.prompt.strip():
            return "no prompt"
        return "no source image" if self.reward.modality == "edit" and case.source is None else None

    def failed(self, k: int, error: Exception) -> None:
        """Count an image that the reward raised on."""
        text = " ".join(str(error).split())
        ours = isinstance(error, DiffalignError)
        for each in filter(None, (error, error.__context__)):
            traceback.clear_frames(each.__traceback__)  # they hold what the reward computed
        self.failure = self.failure or error
        self.refused += ours
        self.raised += not ours
        self.reasons[k] = text if ours else f"{type(error).__name__}: {text[:200]}"

    def require_answer(self) -> None:
        """Raise what the reward raised where it scored nothing at all."""
        if isinstance(self.failure, DiffalignError) and all(value is None for value in self.values):
            raise self.failure
        self.require_sound()

    def require_sound(self, so_far: str = "") -> None:
        """Refuse a reward that has done nothing but raise errors that are not ours."""
        if self.failure and not self.judged and not self.refused:
            raise InvalidReward(
                f"reward '{self.name}' raised {_said(self.failure)} on every image{so_far}; it is called as "
                "reward(media, cases)"
            ) from self.failure


@dataclass(kw_only=True)
class Pass:
    """Goes through the images once; every reward sees each batch while it is in memory."""

    columns: list[Column]
    cache: ScoreCache
    batch: int = 16
    device: str = "cpu"
    strict: bool = False
    advance: Callable[[int], None] = lambda n: None
    unreadable: dict[int, str] = field(default_factory=dict)

    def run(self, entries: Sequence[Entry]) -> None:
        """Score all; images of one size wait for each other, so that mixed sizes still make batches."""
        waiting: dict[tuple[int, int], list[tuple[int, Image.Image, Case]]] = {}
        for k, entry in enumerate(entries):
            try:
                picture, case = entry.load()
            except MediaError as e:
                if self.strict:
                    raise MediaError(f"'{entry.name}': {e}. Leave --strict out to count it as invalid.") from e
                self.unreadable[k] = str(e)
                self.advance(1)
                continue
            waiting.setdefault(picture.size, []).append((k, picture, case))
            if len(waiting[picture.size]) == self.batch:
                self._score(waiting.pop(picture.size))
            elif sum(map(len, waiting.values())) >= AHEAD * self.batch:
                self._score(waiting.pop(max(waiting, key=lambda size: len(waiting[size]))))
        for rows in waiting.values():
            self._score(rows)

    def _score(self, rows: Sequence[tuple[int, Image.Image, Case]]) -> None:
        """One batch of one size through every reward."""
        from diffalign import vision

        media = vision.to_tensor([picture for _, picture, _ in rows]).to(self.device)
        self.cache.hold(media)
        for column in self.columns:
            able = []
            for row, (k, _, case) in enumerate(rows):
                if lacking := column.lacks(case):
                    column.reasons[k] = lacking
                else:
                    able.append(row)
            if able:
                some = media if len(able) == len(rows) else media[able]
                self._ask(column, [rows[row][0] for row in able], some, [rows[row][2] for row in able])
        self.advance(len(rows))

    def _ask(self, column: Column, at: Sequence[int], media: Any, cases: Sequence[Case]) -> None:
        """Score some images; where the reward raises, each on its own, so that one picture costs one row."""
        import torch

        from diffalign import scoring

        start, asked, answered = time.perf_counter(), self.cache.asked.total(), self.cache.answered.total()
        try:
            with torch.no_grad():
                column.put(at, scoring.score(column.reward, media, cases, cache=self.cache, all_invalid=True))
        except Exception as e:
            if isinstance(e, SETUP) or (self.strict and isinstance(e, DiffalignError)):
                raise
            if self.strict:
                raise InvalidReward(
                    f"reward '{column.name}' raised {_said(e)}. Leave --strict out to count such images as invalid."
                ) from e
            if len(at) == 1:
                column.failed(at[0], e)
                if column.raised >= self.batch:
                    column.require_sound(" so far")
                return
            for row, k in enumerate(at):
                self._ask(column, [k], media[row : row + 1], cases[row : row + 1])
            if isinstance(e, InvalidReward) and not any(k in column.reasons for k in at):
                raise  # each row is fine on its own, so it is the batch that the reward answers wrongly
            return
        column.seconds += time.perf_counter() - start
        column.asked += self.cache.asked.total() - asked
        column.answered += self.cache.answered.total() - answered


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def require_usable(columns: Sequence[Column], entries: Sequence[Entry]) -> None:
    """Refuse, before any work, what no image here could be judged by."""
    from diffalign.scoring import Composite

    Composite.require_names([column.reward for column in columns])
    for column in columns:
        name, reward = column.name, column.reward
        if name in ("file", "prompt", "error", "invalid", "total"):
            raise ConfigError(f"a reward called '{name}' would hide a column of the output. Give it another name.")
        if reward.modality == "video":
            raise ConfigError(f"reward '{name}' judges videos, and `diffalign score` gives it images.")
        if reward.modality == "edit" and not any("source" in entry.inputs for entry in entries):
            raise ConfigError(
                f"reward '{name}' judges edits, but no image comes with its source. Name it in a .jsonl file: "
                '{"file": ..., "prompt": ..., "source": ...}.'
            )
        if column.reads_prompt and not any(entry.prompt.strip() for entry in entries):
            raise ConfigError(
                f"reward '{name}' reads the prompt, but no image has one. Give --prompt, --prompts FILE, or a .txt "
                "file beside each image."
            )
