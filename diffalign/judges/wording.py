"""What judges are asked, in our own words. A hole such as {prompt} takes a text; pictures come before the words.

Published judges were trained with the wording of their packages; rewards take that in place of these, from a file of
yours. `shapes-vlm` knows exactly these sentences and a few like them.
"""

from __future__ import annotations

SHOWS = 'Does the picture show "{prompt}"?'  # a yes-or-no question, for vqascore
POINTS = 'How well does the picture show "{prompt}"?'
LEVELS = ("not at all", "a small part of it", "about half of it", "nearly all of it", "all of it")
FINAL_SCORE = (
    'The picture was made from the words "{prompt}".\n'
    "Say briefly what fits and what does not, then rate it from 1, nothing fits, to 5, everything does.\n"
    'End with a line "Final Score: " and the number.'
)
THREE_SCORES = (
    'The picture was made from the words "{prompt}".\n'
    "Rate from 1 to 5 how well it fits the words, how sound its objects are, and how good it looks.\n"
    "Reply with three lines: Alignment Score, Coherence Score and Style Score, each followed by a colon and a number."
)
BETTER = 'Which of the two pictures shows "{prompt}" better?'
FIRST, SECOND = "the first picture", "the second picture"

EDIT_SEMANTICS = (
    "The first picture was edited and became the second one.\n"
    "The instruction was: {instruction}\n"
    "Compare them, then give two scores from 0 to {scale}: how fully the instruction was carried out, and how little "
    "else was changed.\n"
    'Reply with JSON only: {{"reasoning": "...", "score": [a, b]}}'
)
EDIT_LOOKS = (
    "Judge how the picture looks, not what it shows.\n"
    "Look for faults, then give two scores from 0 to {scale}: how natural it looks, and how free it is of artefacts.\n"
    'Reply with JSON only: {{"reasoning": "...", "score": [a, b]}}'
)

PRINCIPLES = (
    "The picture will be edited. The instruction is: {instruction}\n"
    "Write up to {most} yes-or-no questions that tell a good edit from a bad one: whether the instruction was "
    "followed, whether the rest was kept, and how good the picture looks. Yes must be the good answer.\n"
    'Reply with a JSON list only: [{{"question": "...", "category": "follow, keep or quality"}}]'
)
EDIT_CHECKS = (
    "The first picture was edited and became the second one.\n"
    "The instruction was: {instruction}\n"
    "Examine each of these checks; 1 if it holds, 0 if it does not or you are unsure:\n{checks}\n"
    "Then give a final score from 0 to 10 of your own reasoning, not just the mean of the checks: 0 if nothing was "
    "edited, less for every change nobody asked for and for whatever costs work to mend; leave out checks that "
    "contradict the instruction.\n"
    'Reply with JSON only: {{"reasoning": "...", "checks": [1, 0], "score": 7.5}}'
)

RUBRIC = (
    'A picture will be made from the words "{prompt}".\n'
    "Split them into up to {most} facts, each as a yes-or-no question about the picture alone, with yes as the good "
    "answer. One fact a question: an object, a number, a colour, a relation, a style.\n"
    'Reply with a JSON list only: [{{"question": "...", "must": true}}]'
)
ITEMS = (
    "Examine the picture. For each of these questions name what you see that tells, then answer yes, partial, no or "
    "unsure:\n{items}\n"
    'Reply with a JSON list only, one entry a question, in order: [{{"evidence": "...", "answer": "..."}}]'
)
PROFILE = (
    'The picture was made from the words "{prompt}".\n'
    "List what holds and what fails, each with what in the picture tells and how bad it is, from 0 to 3.\n"
    'Reply with a JSON list only: [{{"criterion": "...", "evidence": "...", "status": "pass, fail or partial", '
    '"severity": 0}}]'
)
CONTRAST = (
    'Two pictures were made from the words "{prompt}". One reader found in the first:\n{first}\n'
    "and in the second:\n{second}\n"
    "From where they differ, write up to {most} yes-or-no questions that can be answered from one picture alone and "
    "hold for any picture of these words, with yes as the good answer. Mark what every good picture must meet.\n"
    'Reply with a JSON list only: [{{"question": "...", "must": true}}]'
)

PRINCIPLE = (
    'The pictures, {names}, were all made from the words "{prompt}".\n'
    "Rate each from 1 to 5 by this principle alone: {principle}\n"
    'Reply with JSON only: {{"scores": {{"picture-1": 3}}, "best-to-worst": ["picture-1"]}}'
)
TELL = "Say what the picture shows, one thing after the other, in reading order."


def pair_schema(scale: float) -> dict[str, object]:
    """Of a reply with two scores from 0 to `scale`."""
    each = {"type": "number", "minimum": 0, "maximum": scale}
    score = {"type": "array", "items": each, "minItems": 2, "maxItems": 2}
    return {
        "type": "object",
        "properties": {"reasoning": {"type": "string"}, "score": score},
        "required": ["reasoning", "score"],
        "additionalProperties": False,
    }


def fill(template: str, **holes: object) -> str:
    """The template with its holes filled; braces inside what fills them stay as they are."""
    return template.format(**holes)


def options(text: str, labels: tuple[str, ...], described: tuple[str, ...] = ()) -> str:
    """A question with a closed set of answers: `labels`, which may stand for longer descriptions."""
    lines = [text, *(f"{label}. {meaning}" for label, meaning in zip(labels, described, strict=False))]
    ask = f"Answer {labels[0]} or {labels[1]}." if len(labels) == 2 else f"Answer with one of {', '.join(labels)}."
    return "\n".join([*lines, ask])
