"""Rubrics written by a judge: a prompt split into checks, or the checks that tell two pictures apart.

Linyue Ma et al.: "An Efficient Rubric-based Generative Verifier for Search-Augmented LLMs", 2025 (arXiv 2510.14660): a
request becomes atomic facts. Dengcan Liu et al.: "CDRRM: Contrast-Driven Rubric Generation for Reliable and
Interpretable Reward Modeling", 2026 (arXiv 2603.08035): each answer is profiled by itself, the rubric is made from how
the profiles differ without knowing which answer is preferred, and it is kept only if judging by it finds that one.

Where we differ:
- The writer sees no picture of the prompt's; for an edit it sees the source and asks with Edit-R1's three categories.
- Which profile stands first follows from the pixels, so that the place does not give the label away.
- One weight for all items; the papers' principles (tie-breakers) are items that are no must.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.judges.asking import Backend, Question, ask
from diffalign.judges.parse import number, read_list
from diffalign.judges.protocols import Wording
from diffalign.judges.rewarding import instruction_of, mark_of
from diffalign.judges.rubric_files import Rubric, RubricFolder, rubric_of
from diffalign.judges.rubric_judging import MOST, OUR_WORDING, How, Row, check
from diffalign.rules.rubrics import KINDS, Gate, aggregate
from diffalign.score_cache import pixels_of
from diffalign.vision import to_tensor

Rows = list[dict[str, Any]]
STATUSES = ("pass", "fail", "partial", "n.a.")
TOKENS = 1024  # of a rubric or profile
LONGEST = 300  # characters of a question or finding


@dataclass(frozen=True)
class Written:
    """A rubric and what the writer said; None where that could not be read."""

    rubric: Rubric | None
    raw: tuple[str, ...]


@dataclass(frozen=True)
class Contrasted:
    """A rubric from two pictures; `kept` is whether judging by it finds the preferred one, None where not asked."""

    rubric: Rubric | None
    scores: tuple[float, float] | None  # of the preferred picture and of the other one
    raw: tuple[str, ...]

    @property
    def kept(self) -> bool:
        return self.scores is not None and self.scores[0] > self.scores[1]


def write_rubrics(
    backend: Backend,
    cases: Sequence[Case],
    *,
    most: int = MOST,
    words: Wording = OUR_WORDING,
    device: torch.device | None = None,
) -> list[Written]:
    """One rubric per case: from its prompt, or from its instruction and source picture, shown on `device`."""
    questions = [_question(case, most, words, device) for case in cases]
    found = ask(backend, questions, _read_items)
    return [
        Written(None if rows is None else _rubric(case, rows[:most]), texts)
        for case, (rows, texts) in zip(cases, found, strict=True)
    ]


def profile(
    backend: Backend, prompt: str, pictures: Sequence[Tensor], words: Wording = OUR_WORDING
) -> list[tuple[Rows | None, tuple[str, ...]]]:
    """What holds and what fails in each picture (3, H, W), each looked at by itself."""
    text = words.say("profile", prompt=prompt)
    return ask(backend, [Question(text=text, images=(p,), max_tokens=TOKENS) for p in pictures], _read_findings)


def contrast(
    backend: Backend, prompt: str, first: Rows, second: Rows, *, most: int = MOST, words: Wording = OUR_WORDING
) -> Written:
    """A rubric from how two profiles differ; nothing here knows which picture is preferred."""
    text = words.say("contrast", prompt=prompt, first=_told(first), second=_told(second), most=most)
    ((rows, texts),) = ask(backend, [Question(text=text, max_tokens=TOKENS)], _read_items)
    return Written(None if rows is None else _rubric(Case(prompt=prompt), rows[:most]), texts)


def contrasted(
    backend: Backend,
    prompt: str,
    preferred: Tensor,
    other: Tensor,
    *,
    most: int = MOST,
    how: How = "together",
    gate: Gate = "soft",
    words: Wording = OUR_WORDING,
) -> Contrasted:
    """Profile two pictures (3, H, W), write a rubric from the difference, and test it on the label."""
    pictures = (preferred, other)
    profiles = profile(backend, prompt, sorted(pictures, key=lambda p: pixels_of(p[None])), words)
    raw = tuple(text for _, texts in profiles for text in texts)
    (first, _), (second, _) = profiles
    if first is None or second is None:
        return Contrasted(None, None, raw)
    written = contrast(backend, prompt, first, second, most=most, words=words)
    raw += written.raw
    if written.rubric is None:
        return Contrasted(None, None, raw)
    checked = check(backend, [Row((p,), written.rubric) for p in pictures], how=how, words=words)
    raw += tuple(text for one in checked for text in one.raw)
    values = [one.values for one in checked if one.values is not None]
    if len(values) < 2:
        return Contrasted(written.rubric, None, raw)
    scores = [aggregate(v, written.rubric.items, gate=gate) for v in values]
    return Contrasted(written.rubric, (scores[0], scores[1]), raw)


class RubricWriter:
    """Writes the rubric of a prompt once; `folder` keeps it as a file that a person may edit."""

    def __init__(
        self,
        backend: Callable[[], Backend],
        folder: RubricFolder | None = None,
        *,
        most: int = MOST,
        words: Wording = OUR_WORDING,
    ) -> None:
        self.backend, self.folder, self.most, self.words = backend, folder, most, words
        self._known: dict[tuple[str, str, str], Written] = {}

    def mark(self) -> str:
        """What tells this writer from others."""
        return f"{mark_of(self.backend())} {self.most} {self.words.mark}"

    def rubrics(self, cases: Sequence[Case], device: torch.device | None = None) -> list[Written]:
        """The rubric of each case, written now where it is not known; what could not be read is asked again later."""
        keys = [key_of(case) for case in cases]
        new = {key: case for key, case in zip(keys, cases, strict=True) if key not in self._known}
        failed: dict[tuple[str, str, str], Written] = {}
        if new:
            asked = list(new.values())
            found = write_rubrics(self.backend(), asked, most=self.most, words=self.words, device=device)
            for key, written in zip(new, found, strict=True):
                if written.rubric is None:
                    failed[key] = written
                else:
                    self._known[key] = self._kept(written)
        return [failed[key] if key in failed else self._known[key] for key in keys]

    def _kept(self, written: Written) -> Written:
        if self.folder is None or written.rubric is None:
            return written
        marked = written.rubric.marked(self.mark())
        self.folder.add(marked)
        return Written(marked, written.raw)


def key_of(case: Case) -> tuple[str, str, str]:
    """What a rubric is written for: the prompt, and for an edit its instruction and a hash of its source."""
    prompt = " ".join(case.prompt.split())
    if case.source is None:
        return prompt, "", ""
    return prompt, " ".join(instruction_of(case).split()), pixels_of(to_tensor(case.source))[0][:16]


def _question(case: Case, most: int, words: Wording, device: torch.device | None) -> Question:
    if case.source is None:
        return Question(text=words.say("rubric", prompt=case.prompt, most=most), max_tokens=TOKENS)
    text = words.say("principles", instruction=instruction_of(case), most=most)
    return Question(text=text, images=(to_tensor(case.source)[0].to(device),), max_tokens=TOKENS)


def _rubric(case: Case, rows: Rows) -> Rubric:
    told = (case.prompt if case.source is None else instruction_of(case)).encode("utf-8", "replace").decode()
    about = {"prompt": told} if case.source is None else {"instruction": told, "source": key_of(case)[2]}
    name = re.sub(r"\W+", "-", told.lower()).strip("-")[:60].strip("-") or "rubric"
    return rubric_of(rows, f"the rubric for '{told[:80]}'", defaults={"name": name, **about})


def _read_items(text: str) -> Rows | None:
    """Items from a list of questions, each with `must` or a category; None where one of them is neither."""
    found: Rows = []
    for row in read_list(text) or []:
        question = row.get("question") if isinstance(row, dict) else None
        if not isinstance(question, str) or not 0 < len(question.strip()) <= LONGEST:
            return None
        must, kind = row.get("must", False), row.get("category", row.get("type", "follow"))
        if not isinstance(must, bool) or kind not in KINDS:
            return None
        if question.strip() not in {known["question"] for known in found}:
            found.append({"question": question.strip(), "must": must, "type": kind})
    return found or None


def _read_findings(text: str) -> Rows | None:
    """Findings from a list of criterion, status, severity and evidence; None where one of them lacks a field."""
    found: Rows = []
    for row in read_list(text) or []:
        if not isinstance(row, dict) or row.get("status") not in STATUSES:
            return None
        criterion, evidence = row.get("criterion"), row.get("evidence", "")
        severity = number(row.get("severity", 0), 0, 3)
        if not isinstance(criterion, str) or not criterion.strip() or not isinstance(evidence, str) or severity is None:
            return None
        short = {"criterion": criterion.strip()[:LONGEST], "evidence": evidence.strip()[:LONGEST]}
        found.append({**short, "status": row["status"], "severity": int(severity)})
    return found or None


def _told(findings: Rows) -> str:
    """A profile as the judge writes it."""
    return json.dumps(findings, ensure_ascii=False)
