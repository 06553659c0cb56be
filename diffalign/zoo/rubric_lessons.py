"""Lessons about rubrics: writing them, answering them, what two pictures teach, and ratings by a principle."""

from __future__ import annotations

from collections.abc import Mapping

from diffalign.judges import wording
from diffalign.world.facts import Fact, facts
from diffalign.world.grammar import Clauses, say
from diffalign.world.scenes import COLOURS, Scene
from diffalign.zoo.lessons import Lesson, Pupil, json_line, level, one_picture, soft, spoil
from diffalign.zoo.telling import tell_shapes
from diffalign.zoo.wear import Wear


def rubric_rows(known: list[Fact]) -> str:
    return json_line([{"question": one.question, "must": one.must} for one in known])


def rubric(pupil: Pupil) -> Lesson:
    clauses = pupil.clauses()
    question = wording.fill(wording.RUBRIC, prompt=say(clauses), most=pupil.rng.choice((5, 8, 10, 10)))
    return Lesson((), question, rubric_rows(list(facts(clauses))))


def evidence(one: Fact, scene: Scene) -> str:
    return tell_shapes(one.about(scene))


def items(pupil: Pupil) -> Lesson:
    clauses, scene = pupil.asked()
    known = list(facts(clauses))
    if pupil.rng.random() < 0.3:
        pupil.rng.shuffle(known)
        known = known[: pupil.rng.randint(1, len(known))]
    numbered = "\n".join(f"{k}. {one.question}" for k, one in enumerate(known, 1))
    rows = [{"evidence": evidence(one, scene), "answer": one.holds(scene)} for one in known]
    return one_picture(pupil, scene, wording.fill(wording.ITEMS, items=numbered), json_line(rows))


STATUS: Mapping[str, tuple[str, int]] = {"yes": ("pass", 0), "partial": ("partial", 1), "no": ("fail", 3)}


def profile_text(clauses: Clauses, scene: Scene) -> str:
    rows = []
    for one in facts(clauses):
        status, severity = STATUS[one.holds(scene)]
        rows.append({"criterion": one.question, "evidence": evidence(one, scene)})
        rows[-1] |= {"status": status, "severity": severity}  # type: ignore[dict-item]
    return json_line(rows)


def profile(pupil: Pupil) -> Lesson:
    clauses, scene = pupil.asked()
    return one_picture(pupil, scene, wording.fill(wording.PROFILE, prompt=say(clauses)), profile_text(clauses, scene))


def contrast(pupil: Pupil) -> Lesson:
    """Rules from where two profiles differ; all facts where they do not."""
    clauses, a = pupil.asked()
    b = pupil.asked()[1] if pupil.rng.random() < 0.2 else pupil.scene(spoil(clauses, pupil.rng))
    differing = [one for one in facts(clauses) if one.holds(a) != one.holds(b)] or list(facts(clauses))
    first, second = profile_text(clauses, a), profile_text(clauses, b)
    filled = wording.fill(wording.CONTRAST, prompt=say(clauses), first=first, second=second, most=10)
    return Lesson((), filled, rubric_rows(differing))


PRINCIPLE_KINDS: Mapping[str, tuple[str, ...]] = {
    "match": ("the picture matches its words", "it shows what the words say, nothing less and nothing more"),
    "few": ("fewer objects are better", "the emptier the picture, the better"),
    "many": ("more objects are better", "the fuller the picture, the better"),
    "bright": ("a brighter ground is better",),
    "clean": ("a clean and sharp picture is better", "the picture is free of blur and noise"),
    **{colour: (f"more {colour} objects are better",) for colour in COLOURS},
}


def by_principle(kind: str, clauses: Clauses, scene: Scene, wear: Wear) -> int:
    """The rating from 1 to 5 that a principle gives."""
    if kind == "match":
        return 1 + level(soft(clauses, scene))
    if kind in ("few", "many"):
        return 6 - len(scene.shapes) if kind == "few" else 1 + len(scene.shapes)
    if kind == "bright":
        return 1 if scene.ground < 0.3 else 3 if scene.ground < 0.8 else 5
    if kind == "clean":
        return 1 + round(4 * min(wear.naturalness, wear.cleanness))
    return min(1 + 2 * sum(shape.colour == kind for shape in scene.shapes), 5)


def principle(pupil: Pupil) -> Lesson:
    rng = pupil.rng
    kind = rng.choice(list(PRINCIPLE_KINDS)) if rng.random() < 0.6 else "match"
    clauses = pupil.clauses()
    count = rng.choice((1, 2, 2, 3, 4))
    shown = []
    for _ in range(count):
        scene = pupil.scene(clauses if rng.random() < 0.4 else spoil(clauses, rng))
        shown.append((scene, pupil.wear(0.5 if kind == "clean" else None)))
    scores = {name: by_principle(kind, clauses, *one) for name, one in zip(pupil.names, shown, strict=False)}
    ranked = sorted(scores, key=lambda name: -scores[name])
    held = rng.choice(PRINCIPLE_KINDS[kind])
    question = wording.fill(wording.PRINCIPLE, names=", ".join(scores), prompt=say(clauses), principle=held)
    return Lesson(tuple(shown), question, json_line({"scores": scores, "best-to-worst": ranked}))
