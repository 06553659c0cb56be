"""Which lessons `shapes-vlm` has, and how often."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from diffalign.zoo import edit_lessons as edits
from diffalign.zoo import picture_lessons as pictures
from diffalign.zoo import rubric_lessons as rubrics
from diffalign.zoo.lessons import Lesson, Pupil

SHORT: Mapping[Callable[[Pupil], Lesson], float] = {
    pictures.shows: 30,
    pictures.fact: 22,
    pictures.open_question: 6,
    pictures.points: 10,
    pictures.better: 12,
    pictures.telling: 20,
}
LONG: Mapping[Callable[[Pupil], Lesson], float] = {
    edits.edit_semantics: 40,
    edits.edit_looks: 12,
    edits.edit_checks: 10,
    edits.principles: 4,
    rubrics.rubric: 4,
    rubrics.items: 8,
    rubrics.profile: 4,
    rubrics.contrast: 3,
    rubrics.principle: 7,
    pictures.final_score: 5,
    pictures.three_scores: 3,
}


# After a first round the judge tells what it sees nearly without a slip, but not yet what an edit changed.
LATER_SHORT: Mapping[Callable[[Pupil], Lesson], float] = {**SHORT, pictures.better: 24, pictures.telling: 8}
LATER_LONG: Mapping[Callable[[Pupil], Lesson], float] = {**LONG, edits.edit_semantics: 110, edits.edit_checks: 24}


def draw(mix: Mapping[Callable[[Pupil], Lesson], float], rng: random.Random) -> Lesson:
    """One lesson of a mix."""
    return rng.choices(list(mix), list(mix.values()))[0](Pupil(rng))
