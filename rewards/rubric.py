"""How much of a rubric a picture meets: atomic yes-or-no items, each answered by a judge, added up by rules.

Linyue Ma et al.: "An Efficient Rubric-based Generative Verifier for Search-Augmented LLMs", 2025 (arXiv 2510.14660):
items are facts, at most ten of them a question. Zae Myung Kim et al.: "Toward Evaluative Thinking: Meta Policy
Optimization with Evolving Reward Models", 2025 (arXiv 2504.20157): one pass an item, and their sum. The arithmetic, and
where it differs: diffalign/rules/rubrics.py.

A case's rubric is its metadata's `rubric` (a list of questions or items, or what a file holds), else that of the file
or folder `rubric`, else one that `writer` writes once from the prompt, or from the instruction and source of an edit.

Where we differ:
- The papers verify text; here the answers are about a picture, and for an edit about it beside its source.
- An answer too few or too many makes the row invalid. Items a person marked as musts gate the total.
- Rows of one prompt in one call share a rubric, else it is an error. Files are read once; `refresh` reads them again.
- `unedited_above`, our own, gives 0 to an edit that equals its source, without asking.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import vision
from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.judges.asking import Backend, Judgement
from diffalign.judges.editing import likeness
from diffalign.judges.finding import EMBEDDED, find_judge
from diffalign.judges.protocols import OURS, read_wording, require_images
from diffalign.judges.rewarding import JudgeReward, instruction_of, require_decibel
from diffalign.judges.rubric_files import MOST_ITEMS, Rubric, RubricFolder, read_rubric, rubric_of
from diffalign.judges.rubric_judging import MOST, TEXTS, Checked, How, Row, check
from diffalign.judges.rubric_writing import RubricWriter, Written, key_of
from diffalign.registry import register_reward
from diffalign.rules.rubrics import Gate, Total, aggregate, by_kind, passed, require_arithmetic, require_one_version
from diffalign.scoring import engine_version

NO_PROMPT = "there is no prompt to write a rubric from"
UNREADABLE = "the writer's reply holds no list of questions"


@register_reward("rubric", range=(0.0, 1.0))
class RubricReward(JudgeReward):
    """`ask: each` takes the probability of yes of every item; `gate` is what a violated must does to the total.

    `folder` keeps written rubrics as files, which count from then on. Parts: the mean of each type, every item, the
    gate's factor.
    """

    reads = ("rubric", "source", "instruction")

    def __init__(
        self,
        judge: str | Mapping[str, Any] | Backend = EMBEDDED,
        log: str | None = None,
        *,
        rubric: str | Mapping[str, Any] | None = None,
        writer: str | Mapping[str, Any] | Backend | None = None,
        folder: str | None = None,
        write: bool = True,
        ask: How = "together",
        at_once: int = MOST,
        items: int = MOST,
        gate: Gate = "soft",
        strength: float = 0.5,
        total: Total = "mean",
        unedited_above: float | None = 50.0,
        wording: str = OURS,
    ) -> None:
        super().__init__(judge, log)
        require_arithmetic(gate, strength, total, self.name)
        if ask not in ("together", "each") or at_once < 1 or not 1 <= items <= MOST_ITEMS:
            raise ConfigError(
                f"rubric has ask {ask!r}, at_once {at_once} and items {items}; ask is together or each, the others "
                f"are at least 1, items at most {MOST_ITEMS}."
            )
        require_decibel(unedited_above, self.name)
        self._given, self._writer, self.write = rubric, writer, write
        self.folder = Path(folder).expanduser() if folder else None
        self.how, self.at_once, self.items = ask, at_once, items
        self.gate, self.strength, self.total, self.unedited_above = gate, strength, total, unedited_above
        self.wording = read_wording(wording, TEXTS, self.name)
        self.revision, self._told = f"1 {self.wording.mark}", {"wording": wording}
        self.range = (0.0, 1.0) if total == "mean" else None
        self._require_files()

    @property
    def options(self) -> dict[str, Any]:
        """Everything that changes the score, the rubrics by their content."""
        written = self._writer if isinstance(self._writer, str) else type(self._writer).__qualname__
        told: dict[str, Any] = {"rubric": self._fixed_id()}
        told |= {"folder": self._kept_id(), "writer": written, "write": self.write}
        told |= {"ask": self.how, "at_once": self.at_once, "items": self.items, "gate": self.gate}
        told |= {"strength": self.strength, "total": self.total, "unedited_above": self.unedited_above}
        return self.judge_options | told | self._told

    @property
    def version(self) -> str | None:
        """That of the judge, and of the writer where it is another one."""
        own = super().version
        if self._writer is None or own is None:
            return own
        other = engine_version("writer", self.writer, self._writer)
        return None if other is None else f"{own} {other}"

    @cached_property
    def writer(self) -> Backend:
        """What writes rubrics: the judge unless another is given."""
        return self.backend if self._writer is None else find_judge(self._writer)

    def refresh(self) -> None:
        """Read the files again: after an edit of them, or where a new version was written."""
        self.__dict__.pop("_fixed", None)
        if self.folder is not None:
            self.__dict__.pop("_book", None)
        self._require_files()

    def rubrics(self, cases: Sequence[Case], device: torch.device | None = None) -> list[Written]:
        """The rubric of each case and, where it is written now, what the writer said."""
        found = [self._known(case) for case in cases]
        new = [k for k, rubric in enumerate(found) if rubric is None and self._asked_of(cases[k])]
        if new and not self.write:
            raise ConfigError(
                f"there is no rubric for '{cases[new[0]].prompt[:80]}', and write is false. Add one to the folder, "
                "one with `any: true`, or a `rubric` to the case's metadata."
            )
        written = dict(zip(new, self._book.rubrics([cases[k] for k in new], device) if new else [], strict=True))
        missing = Written(None, (NO_PROMPT,))
        return [
            Written(rubric, ()) if rubric is not None else written.get(k, missing) for k, rubric in enumerate(found)
        ]

    def judge(self, media: Tensor, cases: Sequence[Case]) -> list[Judgement]:
        pictures = vision.quantise(media)
        found = [self._unedited(picture, case) for picture, case in zip(pictures, cases, strict=True)]
        rows = [k for k, known in enumerate(found) if known is None]
        rubrics = dict(zip(rows, self.rubrics([cases[k] for k in rows], media.device), strict=True))
        sound = {k: written.rubric for k, written in rubrics.items() if written.rubric is not None}
        require_one_version(("\n".join(key_of(cases[k])) for k in sound), (rubric.label for rubric in sound.values()))
        asked = [self._row(pictures[k], cases[k], rubric) for k, rubric in sound.items()]
        answers = check(self.backend, asked, how=self.how, words=self.wording, most=self.at_once) if asked else []
        for k, answer in zip(sound, answers, strict=True):
            found[k] = self._judged(sound[k], answer, rubrics[k].raw)
        problems = {k: NO_PROMPT if written.raw == (NO_PROMPT,) else UNREADABLE for k, written in rubrics.items()}
        return [
            one or Judgement(raw=rubrics[k].raw, problem=problems.get(k, UNREADABLE)) for k, one in enumerate(found)
        ]

    def _judged(self, rubric: Rubric, answer: Checked, before: tuple[str, ...]) -> Judgement:
        raw = (rubric.label, *before, *answer.raw)
        if answer.values is None:
            return Judgement(raw=raw, problem=answer.problem)
        total = aggregate(answer.values, rubric.items, gate=self.gate, strength=self.strength, total=self.total)
        if not math.isfinite(total):
            return Judgement(raw=raw, problem="the judge's probabilities are not in [0, 1]")
        parts = by_kind(answer.values, rubric.items)
        parts["gate"] = passed(answer.values, rubric.items, gate=self.gate, strength=self.strength)
        each = {f"item/{item.id}": value for item, value in zip(rubric.items, answer.values, strict=True)}
        return Judgement(total, parts | each, raw)

    def _row(self, picture: Tensor, case: Case, rubric: Rubric) -> Row:
        """A picture, for an edit beside its source."""
        if case.source is None:
            return Row((picture,), rubric)
        require_images(self.backend, 2, self.name)
        source = vision.to_tensor(case.source)[0].to(picture.device)
        return Row((source, picture), rubric, instruction_of(case))

    def _unedited(self, picture: Tensor, case: Case) -> Judgement | None:
        if case.source is None or self.unedited_above is None:
            return None
        decibel = likeness(vision.to_tensor(case.source)[0].to(picture.device), picture)
        if not decibel > self.unedited_above:
            return None
        return Judgement(0.0, {"follow": 0.0}, (f"not asked: the edit is its source ({decibel:.1f} dB)",))

    def _known(self, case: Case) -> Rubric | None:
        """The rubric of a case that needs no writing."""
        instruction = instruction_of(case) if case.source is not None else None
        own = case.metadata.get("rubric")
        if own is not None:
            about = {"prompt": case.prompt} if instruction is None else {"instruction": instruction}
            return rubric_of(own, f"the rubric of the case '{case.prompt[:80]}'", defaults={"name": "case", **about})
        if isinstance(self._fixed, Rubric):
            return self._fixed
        source = key_of(case)[2]
        folders = [folder for folder in (self._fixed, self._folder) if folder is not None]
        found = (folder.find(case.prompt, instruction, source) for folder in folders)
        return next((rubric for rubric in found if rubric is not None), None)

    def _asked_of(self, case: Case) -> str:
        return (instruction_of(case) if case.source is not None else case.prompt).strip()

    @cached_property
    def _fixed(self) -> Rubric | RubricFolder | None:
        if self._given is None:
            return None
        if isinstance(self._given, Mapping):
            return rubric_of(self._given, "rubric.rubric", defaults={"name": "given", "any": True})
        path = Path(self._given).expanduser()
        return RubricFolder(path) if path.is_dir() else read_rubric(path)

    @property
    def _folder(self) -> RubricFolder | None:
        return self._book.folder

    def _find_writer(self) -> Backend:
        return self.writer

    @cached_property
    def _book(self) -> RubricWriter:
        folder = RubricFolder(self.folder) if self.folder is not None else None
        return RubricWriter(self._find_writer, folder, most=self.items, words=self.wording)

    def _require_files(self) -> None:
        """Read them now, so that a wrong one is known before a judge is loaded."""
        self._fixed, self._book  # noqa: B018

    def _fixed_id(self) -> str | None:
        fixed = self._fixed
        return None if fixed is None else fixed.id if isinstance(fixed, Rubric) else _digest(r.id for r in fixed)

    def _kept_id(self) -> str | None:
        """Of the rubrics in `folder` that this writer did not write just so: those it did follow from its name."""
        if self._folder is None or not len(self._folder):
            return None
        mark = self._book.mark()
        return _digest(rubric.id for rubric in self._folder if not rubric.is_as_written(mark))


def _digest(ids: Any) -> str | None:
    found = sorted(ids)
    return hashlib.sha256(" ".join(found).encode()).hexdigest()[:12] if found else None
