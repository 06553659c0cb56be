"""Edit-R1: an edit held against checks that were written for its instruction, and a final score reasoned from them.

"Leveraging Verifier-Based Reinforcement Learning in Image Editing" (Edit-R1), 2026 (arXiv 2604.27505). A judge first
splits the instruction into yes-or-no checks in three categories: followed, rest kept, quality. Then it gives each check
0 or 1 and a score from 0 to 10 of its own reasoning, which is the reward. There is no public code.

Where we differ:
- The wording is ours; the paper's prompts are not public. `wording` names a file with others.
- The writer of checks sees exemplars only where `exemplars` is a file of yours; the paper draws 4 of 60 by experts.
- One judge writes and examines; in the paper a larger one writes.
- The checks are kept in files that you may edit, with `principles`; an edited file is judged by from the next call on.
- The reward is score / 10 (`divide`); the paper normalises within a group anyway.
- `unedited_above`, our own, gives 0 to an edit that equals its source, without asking; the paper's verifier is told to.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.judges import wording as words
from diffalign.judges.asking import Backend, Judgement, Question, ask
from diffalign.judges.editing import EditReward
from diffalign.judges.finding import EMBEDDED
from diffalign.judges.parse import read_checks
from diffalign.judges.principles import PrincipleBook, Principles, key_of, read_exemplars, read_principles
from diffalign.judges.protocols import OURS, Sampling, read_wording
from diffalign.judges.rewarding import instruction_of, mark_of, require_decibel
from diffalign.registry import register_reward

TOP = 10.0
GREEDY = Sampling(max_tokens=1024)


@register_reward("edit_r1", modality="edit", range=(0.0, 1.0))
class EditR1(EditReward):
    """The total is `final`, 0 to 10, over `divide`; parts: means of all `checks` and of each category, each check."""

    def __init__(
        self,
        judge: str | Mapping[str, Any] | Backend = EMBEDDED,
        log: str | None = None,
        *,
        principles: str | None = None,  # a folder of YAML files
        most: int = 10,  # checks of one instruction
        exemplars: str | None = None,  # a YAML file: a list of {instruction, checks}
        shown: int = 4,  # of the exemplars
        at_source_size: bool = True,
        unedited_above: float | None = None,
        divide: float = TOP,
        wording: str = OURS,
        sampling: Sampling = GREEDY,
    ) -> None:
        super().__init__(judge, log)
        if most < 1 or shown < 1 or not 0 < divide < math.inf:
            raise ConfigError(
                f"edit_r1 has most {most}, shown {shown} and divide {divide:g}; all are positive, divide finite."
            )
        require_decibel(unedited_above, self.name)
        self.book, self.most, self.shown, self.divide = PrincipleBook(principles), most, shown, divide
        self.exemplars = read_exemplars(Path(exemplars).expanduser()) if exemplars else []
        self.sampling, self.at_source_size, self.unedited_above = sampling, at_source_size, unedited_above
        ours = {"principles": words.PRINCIPLES, "checks": words.EDIT_CHECKS}
        self.wording = read_wording(wording, ours, self.name)
        shown_mark = hashlib.sha256(repr(self.exemplars).encode()).hexdigest()[:12] if exemplars else ""
        self.revision, self.range = f"1 {self.wording.mark} {shown_mark}".strip(), (0.0, TOP / divide)
        self.options = self.edit_options | {"principles": principles, "most": most, "divide": divide}
        self.options |= {"exemplars": exemplars, "shown": shown, "wording": wording, "sampling": asdict(sampling)}
        self._writing = threading.Lock()

    @property
    def version(self) -> str | None:
        """As of every judge, and which checks of other writers are in the folder."""
        told = super().version
        return None if told is None else f"{told} {self.book.foreign(self.writer)}".strip()

    @property
    def writer(self) -> str:
        """Who writes the checks, with all that decides what they are."""
        told = [mark_of(self.backend), self.wording.templates["principles"], self.most, self.exemplars, self.shown]
        mark = hashlib.sha256(repr([*told, self.sampling]).encode()).hexdigest()[:12]
        return f"{self.backend.name} {mark}"

    def judge_edits(self, pairs: Sequence[tuple[Tensor, Tensor]], cases: Sequence[Case]) -> list[Judgement]:
        keys = [key_of(case) for case in cases]
        known, refused = self._principles([source for source, _ in pairs], cases, keys)
        rows = [k for k, key in enumerate(keys) if key in known]
        questions = [self._question(pairs[k], cases[k], known[keys[k]]) for k in rows]
        readers = [partial(read_checks, count=len(known[keys[k]].checks), low=0.0, high=TOP) for k in rows]
        found = {
            k: self._judged(known[keys[k]], *said)
            for k, said in zip(rows, ask(self.backend, questions, readers), strict=True)
        }
        missing = "no checks could be read for this instruction"
        return [found.get(k) or Judgement(raw=refused[key], problem=missing) for k, key in enumerate(keys)]

    def _principles(
        self, sources: Sequence[Tensor], cases: Sequence[Case], keys: Sequence[str]
    ) -> tuple[dict[str, Principles], dict[str, tuple[str, ...]]]:
        """The checks by key, each asked for once; and what was said where none could be read."""
        with self._writing:
            first = {key: k for k, key in reversed(list(enumerate(keys)))}
            known = {key: found for key, k in first.items() if (found := self.book.find(cases[k], key)) is not None}
            new = [k for k, key in enumerate(keys) if first[key] == k and key not in known]
            questions = [self.sampling.question(self._asked(cases[k], keys[k]), (sources[k],)) for k in new]
            told = ask(self.backend, questions, partial(read_principles, most=self.most))
            refused = {}
            for k, (found, said) in zip(new, told, strict=True):
                if found is None:
                    refused[keys[k]] = said
                else:
                    known[keys[k]] = found
                    self.book.keep(cases[k], keys[k], found, self.writer)
            return known, refused

    def _asked(self, case: Case, key: str) -> str:
        """What the writer of checks is told, with a few exemplars where there are any."""
        told = self.wording.say("principles", instruction=instruction_of(case), most=self.most)
        if not self.exemplars:
            return told
        some = random.Random(key).sample(self.exemplars, min(self.shown, len(self.exemplars)))
        listed = [
            f"{instruction}\n{json.dumps(principles.rows(), ensure_ascii=False)}" for instruction, principles in some
        ]
        return "\n\n".join(["Checks of other instructions, as examples:", *listed, told])

    def _question(self, pair: tuple[Tensor, Tensor], case: Case, principles: Principles) -> Question:
        """What is asked about one edit."""
        text = self.wording.say("checks", instruction=instruction_of(case), checks=principles.listed())
        return self.sampling.question(text, pair, schema=_schema(len(principles.checks)))

    def _judged(
        self, principles: Principles, found: tuple[tuple[int, ...], float] | None, said: tuple[str, ...]
    ) -> Judgement:
        raw = (f"principles {principles.id}", *said)
        if found is None:
            return Judgement(raw=raw, problem="the verdicts could not be read")
        verdicts, final = found
        each = {f"check/{check.question}": float(said) for check, said in zip(principles.checks, verdicts, strict=True)}
        return Judgement(final / self.divide, {"final": final, **principles.means(verdicts), **each}, raw)

    def untouched(self) -> dict[str, float]:
        return {"final": 0.0}


def _schema(count: int) -> Mapping[str, Any]:
    """Of the verdicts and the final score, in the order of the wording: what is said first is reasoned from."""
    checks = {"type": "array", "items": {"enum": [0, 1]}, "minItems": count, "maxItems": count}
    score = {"type": "number", "minimum": 0, "maximum": TOP}
    return {
        "type": "object",
        "properties": {"reasoning": {"type": "string"}, "checks": checks, "score": score},
        "required": ["reasoning", "checks", "score"],
        "additionalProperties": False,
    }
