"""Lessons about edits: the two calls of EditScore, checks for an instruction, and a reasoned score by them."""

from __future__ import annotations

from diffalign.judges import wording
from diffalign.world.edit_sets import EditTriple, sample_edit
from diffalign.world.edits import judge_edit
from diffalign.world.scenes import Scene
from diffalign.zoo.lessons import SCALE, SMALLEST, Lesson, Pupil, json_line
from diffalign.zoo.telling import tell
from diffalign.zoo.wear import MILD, Wear


def compared(triple: EditTriple, result: Scene) -> str:
    """The reasoning of an edit's judge: both pictures told, then what was asked and the rest."""
    verdict = judge_edit(triple.source, result, triple.edit)
    done = "done" if verdict.followed == 1 else "partly done" if verdict.followed > 0 else "not done"
    rest = "kept" if verdict.kept == 1 else "changed a little" if verdict.kept > 0.7 else "changed"
    return f"before: {tell(triple.source)}; after: {tell(result)}; asked: {done}; rest: {rest}"


def edit_semantics(pupil: Pupil) -> Lesson:
    triple, result = pupil.edited()
    verdict = judge_edit(triple.source, result, triple.edit)
    pair = [round(SCALE * verdict.followed), round(SCALE * verdict.kept)]
    question = wording.fill(wording.EDIT_SEMANTICS, instruction=triple.instruction, scale=SCALE)
    scenes = ((triple.source, pupil.wear(0.02)), (result, pupil.wear()))
    return Lesson(scenes, question, json_line({"reasoning": compared(triple, result), "score": pair}))


def look(wear: Wear) -> str:
    """What the picture suffers from, in words."""
    edges = "sharp" if wear.soft <= MILD else "soft" if wear.soft < 0.5 else "blurred"
    dirt = "clean" if wear.dirt <= MILD else "noisy" if wear.dirt < 0.5 else "dirty"
    return f"{edges} edges, {dirt} areas"


def edit_looks(pupil: Pupil) -> Lesson:
    _, scene = pupil.asked()
    wear = pupil.wear(0.6)
    pair = [round(SCALE * wear.naturalness), round(SCALE * wear.cleanness)]
    question = wording.fill(wording.EDIT_LOOKS, scale=SCALE)
    return Lesson(((scene, wear),), question, json_line({"reasoning": look(wear), "score": pair}))


def checks_of(triple: EditTriple) -> list[tuple[str, str]]:
    """Questions that tell a good edit from a bad one, each with its category."""
    edit = triple.edit
    name, new = f"{edit.colour} {edit.kind}", f"{edit.new_colour} {edit.new_kind}"
    follow = {
        "recolour": f"Is the {edit.kind} {edit.new_colour} now?",
        "resize": f"Is the {name} {edit.size} now?",
        "move": f"Is the {name} moved to the {edit.place}?",
        "remove": f"Is the {name} gone?",
        "replace": f"Is there a {new} in place of the {name}?",
        "add": f"Is there a {new} now?",
    }[edit.task]
    return [
        (follow, "follow"),
        ("Are all other objects as they were?", "keep"),
        ("Is the ground the same?", "keep"),
        ("Are the edges sharp?", "quality"),
        ("Is the picture clean?", "quality"),
    ]


def principles(pupil: Pupil) -> Lesson:
    triple = sample_edit(pupil.rng, smallest=SMALLEST)
    most = pupil.rng.choice((5, 8, 10, 10))
    question = wording.fill(wording.PRINCIPLES, instruction=triple.instruction, most=most)
    rows = [{"question": text, "category": category} for text, category in checks_of(triple)]
    return Lesson(((triple.source, pupil.wear()),), question, json_line(rows))


def edit_checks(pupil: Pupil) -> Lesson:
    triple, result = pupil.edited()
    verdict = judge_edit(triple.source, result, triple.edit)
    wear = pupil.wear(0.25)
    same_ground = abs(triple.source.ground - result.ground) < 0.1
    truth = {
        "follow": verdict.followed == 1,
        "Are all other objects as they were?": verdict.kept == 1 or (not same_ground and verdict.kept > 0.7),
        "Is the ground the same?": same_ground,
        "Are the edges sharp?": wear.soft <= 0.3,
        "Is the picture clean?": wear.dirt <= 0.3,
    }
    listed = checks_of(triple)
    if pupil.rng.random() < 0.5:
        pupil.rng.shuffle(listed)
        listed = listed[: pupil.rng.randint(2, len(listed))]
    flags = [int(truth[text] if text in truth else truth["follow"]) for text, _ in listed]
    final = 10 * verdict.quality * (wear.naturalness * wear.cleanness) ** 0.5
    numbered = "\n".join(f"{k}. {text}" for k, (text, _) in enumerate(listed, 1))
    question = wording.fill(wording.EDIT_CHECKS, instruction=triple.instruction, checks=numbered)
    reasoning = f"{compared(triple, result)}; {look(wear)}"
    answer = json_line({"reasoning": reasoning, "checks": flags, "score": round(final, 1)})
    return Lesson(((triple.source, pupil.wear(0.02)), (result, wear)), question, answer)
