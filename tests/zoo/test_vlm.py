"""The tiny judge's recipe: lessons have exact answers, tokens are those a served model sees, runs resume."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from diffalign.judges import parse
from diffalign.judges.wording import SHOWS, fill
from diffalign.world.edit_sets import picture
from diffalign.world.edits import judge_edit
from diffalign.world.facts import facts
from diffalign.world.grammar import parse as parse_prompt
from diffalign.world.rendering import render
from diffalign.zoo import edit_lessons, picture_lessons, rubric_lessons, vlm, vlm_model, vlm_words
from diffalign.zoo.curriculum import LONG, SHORT, draw
from diffalign.zoo.fit import FitConfig
from diffalign.zoo.lessons import Pupil, soft, strict
from diffalign.zoo.telling import square, tell
from diffalign.zoo.wear import MILD, Wear, worn


def small() -> vlm.VLMConfig:
    """The recipe, shrunk to seconds."""
    brief = FitConfig(steps=2, save_every=1, warmup=1, matrix_rate=1e-3)
    return vlm.VLMConfig(
        picture_width=32,
        picture_layers=1,
        width=32,
        layers=1,
        heads=1,
        inner=32,
        seeing=brief,
        rounds=(vlm.Round(fit=brief, short=2, long=2), vlm.Round(fit=brief, short=1, long=1)),
        seen=2,
        shares=(0.5, 0.5),
    )


@pytest.fixture(scope="module")
def words() -> object:
    return vlm_words.tokenizer()


def test_a_chat_through_the_processor_is_what_training_spells(words: object) -> None:
    pictures, speller, rng = vlm_model.processor(words), vlm.Speller(words), random.Random(0)
    for k in range(60):
        lesson = draw(LONG if k % 2 else SHORT, rng)
        images = [worn(render(scene), wear) for scene, wear in lesson.scenes]
        shown = [{"type": "image", "image": picture(image)} for image in images]
        chat = [{"role": "user", "content": [*shown, {"type": "text", "text": lesson.question}]}]
        told = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = pictures.apply_chat_template([chat], **told)
        assert inputs["input_ids"][0].tolist() == speller.ids(lesson)[0]
        if images:
            assert torch.allclose(inputs["pixel_values"], vlm.prepare(images), atol=1 / 127)


def test_every_answer_comes_back_from_its_tokens(words: object) -> None:
    speller, rng = vlm.Speller(words), random.Random(1)
    for k in range(200):
        lesson = draw(LONG if k % 2 else SHORT, rng)
        assert words.decode(speller.ids(lesson)[1]) == lesson.answer + vlm_words.END  # type: ignore[attr-defined]


@pytest.mark.parametrize("label", ["Yes", "No", *"ABCDE"])
def test_labels_are_single_tokens(words: object, label: str) -> None:
    assert len(words(label, add_special_tokens=False)["input_ids"]) == 1  # type: ignore[operator]


def test_any_text_has_tokens_and_comes_back(words: object) -> None:
    for text in ("Überraschung! ÷ 漢字 🟥", "a  b\n\tc", '{"score": [1, 2]}', "<|nonsense|>"):
        assert words.decode(words(text, add_special_tokens=False)["input_ids"]) == text  # type: ignore


@pytest.mark.parametrize("lesson", [picture_lessons.shows, picture_lessons.fact])
def test_yes_and_no_are_equally_often_right(lesson: object) -> None:
    pupil = Pupil(random.Random(0))
    answers = [lesson(pupil).answer for _ in range(300)]  # type: ignore[operator]
    assert set(answers) == {"Yes", "No"}
    assert 120 < answers.count("Yes") < 180


def test_what_a_caption_lesson_says_is_what_the_verifier_says() -> None:
    pupil = Pupil(random.Random(2))
    before, after = fill(SHOWS, prompt="|").split("|")
    for _ in range(100):
        lesson = picture_lessons.shows(pupil)
        said = lesson.question.strip().split("\n")[0].removeprefix(before).removesuffix(after)
        clauses = parse_prompt(said)
        assert clauses is not None
        assert strict(clauses, lesson.scenes[0][0]) == (lesson.answer == "Yes")


def test_replies_about_edits_are_in_the_form_that_the_reward_reads() -> None:
    pupil = Pupil(random.Random(3))
    for lesson in (edit_lessons.edit_semantics, edit_lessons.edit_looks):
        for _ in range(100):
            found = parse.read_scores(lesson(pupil).answer, 2, 0, 25)
            assert found is not None
            assert all(0 <= value <= 25 for value in found)
    for _ in range(50):
        assert isinstance(json.loads(edit_lessons.edit_checks(pupil).answer)["checks"], list)
        assert json.loads(rubric_lessons.items(pupil).answer)


def test_the_rating_of_an_edit_is_its_exact_quality() -> None:
    pupil = Pupil(random.Random(4))
    for _ in range(100):
        triple, result = pupil.edited()
        verdict = judge_edit(triple.source, result, triple.edit)
        told = edit_lessons.compared(triple, result)
        assert ("asked: done" in told) == (verdict.followed == 1)
        assert ("rest: kept" in told) == (verdict.kept == 1)


def test_all_facts_hold_of_a_scene_that_shows_the_prompt() -> None:
    pupil = Pupil(random.Random(5))
    for _ in range(200):
        clauses, scene = pupil.asked()
        held = all(one.holds(scene) == "yes" for one in facts(clauses))
        if strict(clauses, scene):
            assert held, (clauses, tell(scene))
        assert 0 <= soft(clauses, scene) <= 1


def test_squares_of_the_board() -> None:
    assert [square(0, 0), square(63.9, 63.9), square(8, 0), square(64, -1)] == ["a1", "h8", "b1", "h1"]


def test_wear_is_nothing_at_zero_and_more_is_worse() -> None:
    pupil = Pupil(random.Random(6))
    image = render(pupil.asked()[1])
    assert torch.equal(worn(image, Wear()), image)
    gaps = [(worn(image, Wear(soft, 0.0)) - image).abs().mean() for soft in (0.0, 0.3, 0.9)]
    assert gaps == sorted(gaps)
    assert Wear(MILD, MILD).naturalness == Wear(MILD, MILD).cleanness == 1.0
    assert Wear(1.0, 1.0).naturalness == Wear(1.0, 1.0).cleanness == 0.0


def test_the_recipe_writes_a_model_that_transformers_loads_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    whole = vlm.make(small(), work=tmp_path / "whole", seed=0, resume=True)
    again = vlm.make(small(), work=tmp_path / "again", seed=0, resume=True)
    first = AutoModelForImageTextToText.from_pretrained(whole)
    second = AutoModelForImageTextToText.from_pretrained(again)
    assert first.dtype == torch.float32
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert AutoProcessor.from_pretrained(whole).tokenizer.eos_token == vlm_words.END
    assert not list(whole.rglob("*.bin"))
