"""What `shapes-vlm` learns: pictures with a question and the exact answer; what a lesson is and how it is drawn.

The questions are those of `diffalign.judges.wording`, so that every protocol of a judge runs with this model; the
kinds of lessons are in picture_lessons, edit_lessons and rubric_lessons, their shares in curriculum.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from functools import cache

from diffalign.judges.asking import Decision
from diffalign.world.compose import find_scene, sample_clauses
from diffalign.world.edit_sets import EditTriple, attempt, sample_edit
from diffalign.world.grammar import Clauses, parse, say
from diffalign.world.scenes import Scene
from diffalign.world.see import Sight
from diffalign.world.verifier import judge
from diffalign.zoo.wear import Wear, some_wear

KINDS = {"single": 6, "colours": 8, "counting": 18, "two": 8, "binding": 20, "position": 22, "hard": 18}
OUTCOMES = {"exact": 30, "none": 14, "wrong": 20, "over": 28, "wrecked": 8}
SCALE = 25  # of edit scores
SMALLEST = 5.5  # radius in pixels


@dataclass(frozen=True)
class Lesson:
    """Scenes with their wear, what is asked and what is right."""

    scenes: tuple[tuple[Scene, Wear], ...]
    question: str
    answer: str


@dataclass
class Pupil:
    """Draws what a lesson needs."""

    rng: random.Random
    strong: float = 0.1  # share of strongly worn pictures
    names: list[str] = field(default_factory=lambda: [f"picture-{k}" for k in range(1, 5)])

    def clauses(self) -> Clauses:
        return sample_clauses(self.rng.choices(list(KINDS), list(KINDS.values()))[0], self.rng)

    def scene(self, clauses: Clauses) -> Scene:
        """A scene of the clauses, or of others of their kind where no room for these is found."""
        while True:
            if scene := find_scene(clauses, self.rng, smallest=SMALLEST, tries=60):
                return scene
            clauses = self.clauses()

    def asked(self) -> tuple[Clauses, Scene]:
        """A prompt, and a scene that shows it, nearly shows it, or shows something else."""
        clauses = self.clauses()
        roll = self.rng.random()
        if roll < 0.4:
            return clauses, self.scene(clauses)
        if roll < 0.9:
            near = clauses
            for _ in range(self.rng.choice((1, 1, 2))):
                near = spoil(near, self.rng)
            return clauses, self.scene(near)
        return clauses, self.scene(self.clauses())

    def wear(self, strong: float | None = None) -> Wear:
        return some_wear(self.rng, self.strong if strong is None else strong)

    def edited(self) -> tuple[EditTriple, Scene]:
        triple = sample_edit(self.rng, smallest=SMALLEST)
        return triple, attempt(triple, self.rng.choices(list(OUTCOMES), list(OUTCOMES.values()))[0], self.rng)


def spoil(clauses: Clauses, rng: random.Random) -> Clauses:
    """The clauses with one thing changed; the number of objects stays one that scenes can hold."""
    from diffalign.zoo.clip import spoil as change

    for _ in range(20):
        changed = change(clauses, rng)
        if changed != clauses and 1 <= changed.total <= 4 and parse(say(changed)) is not None:
            return changed
    return clauses


def soft(clauses: Clauses, scene: Scene) -> float:
    """The share of a prompt's clauses that a scene meets."""
    return judge(Sight(scene.shapes), clauses).soft


def strict(clauses: Clauses, scene: Scene) -> bool:
    return judge(Sight(scene.shapes), clauses).strict


@cache
def _foreign_prompt() -> object:
    """The prompt that transformers' typed decisions use, compiled."""
    from transformers.decision.template_utils import DECISION_PROMPT
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(DECISION_PROMPT)


def decided(decision: Decision, rng: random.Random) -> str:
    """A decision as our backends ask it, or now and then as a server of typed decisions does."""
    if rng.random() < 0.65:
        return decision.prompt
    kind = "noul" if decision.labels == ("Yes", "No") else "score" if decision.ordered else "choice"
    choice_keys = list(decision.described or decision.labels)
    asked = {
        "type": kind,
        "instructions": decision.text,
        "options": ["true", "false"] if kind == "noul" else choice_keys,
        "labels": list(decision.labels),
        "descriptions": [None] * len(decision.labels) if kind != "score" else choice_keys,
    }
    text: str = _foreign_prompt().render(state="", question=asked)  # type: ignore[attr-defined]
    return text


def level(share: float) -> int:
    """From the share of clauses met to one of the five levels."""
    return 4 if share >= 1 else 3 if share >= 0.75 else 2 if share >= 0.45 else 1 if share > 0.2 else 0


def json_line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def one_picture(pupil: Pupil, scene: Scene, question: str, answer: str) -> Lesson:
    return Lesson(((scene, pupil.wear()),), question, answer)
