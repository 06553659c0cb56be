"""Lessons about one picture, or two of one prompt: does it show this, how many, how well, which is better."""

from __future__ import annotations

from diffalign.judges import wording
from diffalign.judges.asking import Decision
from diffalign.world.facts import facts
from diffalign.world.grammar import caption, parse, say
from diffalign.world.scenes import COLOURS, SHAPES, Scene
from diffalign.zoo.lessons import Lesson, Pupil, decided, level, one_picture, soft, strict
from diffalign.zoo.telling import tell, tell_shapes
from diffalign.zoo.wear import Wear


def yes_no(pupil: Pupil, scene: Scene, text: str, answer: bool, wear: Wear | None = None) -> Lesson:
    question = decided(Decision(text=text), pupil.rng)
    return Lesson(((scene, wear or pupil.wear()),), question, "Yes" if answer else "No")


def shows(pupil: Pupil) -> Lesson:
    """Whether a picture shows a prompt, yes and no equally often."""
    want = pupil.rng.random() < 0.5
    while True:
        clauses, scene = pupil.asked()
        if pupil.rng.random() < 0.1:
            clauses = parse(caption(scene)) or clauses
        if strict(clauses, scene) == want:
            return yes_no(pupil, scene, wording.fill(wording.SHOWS, prompt=say(clauses)), want)


def fact(pupil: Pupil) -> Lesson:
    """One fact of a prompt, yes and no equally often."""
    want = pupil.rng.random() < 0.5
    while True:
        clauses, scene = pupil.asked()
        known = [one for one in facts(clauses) if (one.holds(scene) == "yes") == want]
        if known:
            return yes_no(pupil, scene, pupil.rng.choice(known).question, want)


def open_question(pupil: Pupil) -> Lesson:
    """A number or a colour."""
    _, scene = pupil.asked()
    shape = pupil.rng.choice(scene.shapes)
    if pupil.rng.random() < 0.5:
        colour = pupil.rng.choice([shape.colour, None, pupil.rng.choice(list(COLOURS))])
        kind = pupil.rng.choice([shape.kind, pupil.rng.choice(SHAPES)])
        found = [s for s in scene.shapes if s.kind == kind and colour in (None, s.colour)]
        name = " ".join(word for word in (colour, kind + "s") if word)
        return one_picture(pupil, scene, f"How many {name} are there? Answer with a number.", str(len(found)))
    same = {s.colour for s in scene.shapes if s.kind == shape.kind}
    if len(same) > 1:
        return one_picture(pupil, scene, "What colour is the ground?", tell(scene).rsplit(" ", 1)[1])
    return one_picture(pupil, scene, f"What colour is the {shape.kind}?", shape.colour)


def telling(pupil: Pupil) -> Lesson:
    _, scene = pupil.asked()
    return one_picture(pupil, scene, wording.TELL, tell(scene))


def points(pupil: Pupil) -> Lesson:
    clauses, scene = pupil.asked()
    text = wording.fill(wording.POINTS, prompt=say(clauses))
    decision = Decision(text=text, labels=tuple("ABCDE"), described=wording.LEVELS, ordered=True)
    return Lesson(((scene, pupil.wear()),), decided(decision, pupil.rng), "ABCDE"[level(soft(clauses, scene))])


def final_score(pupil: Pupil) -> Lesson:
    clauses, scene = pupil.asked()
    rated = 1 + 4 * soft(clauses, scene)
    answer = f"It shows {tell_shapes(scene.shapes)}.\nFinal Score: {rated:.1f}"
    return one_picture(pupil, scene, wording.fill(wording.FINAL_SCORE, prompt=say(clauses)), answer)


def three_scores(pupil: Pupil) -> Lesson:
    clauses, scene = pupil.asked()
    wear = pupil.wear(0.5)
    rated = (1 + 4 * soft(clauses, scene), 1 + 4 * wear.naturalness, 1 + 4 * wear.cleanness)
    lines = zip(("Alignment", "Coherence", "Style"), rated, strict=True)
    answer = "\n".join(f"{name} Score: {value:.1f}" for name, value in lines)
    return Lesson(((scene, wear),), wording.fill(wording.THREE_SCORES, prompt=say(clauses)), answer)


def better(pupil: Pupil) -> Lesson:
    """Two pictures of one prompt, the better first or second equally often."""
    want = pupil.rng.random() < 0.5
    while True:
        clauses, a = pupil.asked()
        b = pupil.scene(clauses) if pupil.rng.random() < 0.5 else pupil.asked()[1]
        gap = soft(clauses, a) - soft(clauses, b)
        if gap == 0:
            continue
        first, second = (a, b) if (gap > 0) == want else (b, a)
        text = wording.fill(wording.BETTER, prompt=say(clauses))
        decision = Decision(text=text, labels=("A", "B"), described=(wording.FIRST, wording.SECOND))
        scenes = ((first, pupil.wear()), (second, pupil.wear()))
        return Lesson(scenes, decided(decision, pupil.rng), "A" if want else "B")
