"""Rubrics that a judge writes, and rubrics put to a judge."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from diffalign.cases import Case
from diffalign.judges import wording
from diffalign.judges.rubric_files import Rubric, RubricFolder, read_rubric
from diffalign.judges.rubric_judging import Row, check
from diffalign.judges.rubric_writing import RubricWriter, contrasted, profile, write_rubrics
from diffalign.rules.rubrics import Item
from tests.judges.scripted_rubrics import Scripted, checks, findings, items_of, verdicts

RED, BLUE = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
RED[0], BLUE[2] = 1.0, 1.0
CASE = Case(prompt="two red circles")
SOURCE = Image.new("RGB", (8, 8), "white")


def rubric(count: int) -> Rubric:
    items = tuple(Item(id=f"q{k}", question=f"question {k}?") for k in range(count))
    return Rubric(name="r", any=True, items=items)


def test_a_prompt_becomes_atomic_checks():
    judge = Scripted(lambda q: "Here it is:\n" + checks("Is it red?", "Are there two?", must=True))
    (written,) = write_rubrics(judge, [CASE], most=7)
    assert written.rubric is not None
    assert (written.rubric.prompt, written.rubric.name) == ("two red circles", "two-red-circles")
    assert [(i.id, i.question, i.must, i.type) for i in written.rubric.items] == [
        ("q1", "Is it red?", True, "follow"),
        ("q2", "Are there two?", True, "follow"),
    ]
    (asked,) = judge.asked
    assert asked.text == wording.fill(wording.RUBRIC, prompt="two red circles", most=7)
    assert asked.images == ()


def test_an_instruction_becomes_checks_of_three_types_with_the_source_in_view():
    rows = [{"question": f"{kind}?", "category": kind} for kind in ("follow", "keep", "quality")]
    judge = Scripted(lambda q: json.dumps(rows))
    case = Case(prompt="x", source=SOURCE, metadata={"instruction": "make it red"})
    (written,) = write_rubrics(judge, [case])
    assert written.rubric is not None
    assert (written.rubric.prompt, written.rubric.instruction) == (None, "make it red")
    assert [item.type for item in written.rubric.items] == ["follow", "keep", "quality"]
    assert len(judge.asked[0].images) == 1


def test_more_checks_than_asked_for_are_cut_and_one_asked_twice_counts_once():
    judge = Scripted(lambda q: checks("a?", "a?", "b?", "c?"))
    (written,) = write_rubrics(judge, [CASE], most=2)
    assert [item.question for item in written.rubric.items] == ["a?", "b?"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot.",
        "[]",
        '["Is it red?"]',
        '[{"question": ""}]',
        '[{"question": "a?", "must": "yes"}]',
        '[{"question": "a?", "must": 1}]',
        '[{"question": 3, "must": true}]',
        '[{"question": "a?", "category": "taste"}]',
        '[{"question": "a?", "category": ["follow"]}]',
        '[{"question": "a?", "must": true}, 7]',
        '[{"question": "' + "x" * 400 + '"}]',
    ],
)
def test_a_rubric_that_cannot_be_read_is_asked_once_more_and_then_none(text):
    judge = Scripted(lambda q: text)
    (written,) = write_rubrics(judge, [CASE])
    assert written.rubric is None
    assert len(judge.asked) == len(written.raw) == 2


def test_a_second_try_is_enough():
    judge = Scripted(lambda q: checks("a?") if len(judge.asked) > 1 else "[")
    assert write_rubrics(judge, [CASE])[0].rubric is not None


def test_the_writer_writes_once_for_each_prompt_and_keeps_it_as_a_file(tmp_path):
    judge = Scripted(lambda q: checks(f"{len(judge.asked)}?"))
    writer = RubricWriter(lambda: judge, RubricFolder(tmp_path))
    first = writer.rubrics([CASE, Case(prompt="a cat"), CASE])
    assert first[0] == first[2] != first[1]
    assert writer.rubrics([CASE])[0] == first[0]
    assert len(judge.asked) == 2
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    assert all(read_rubric(path).is_as_written(writer.mark()) for path in files)


def test_a_failed_rubric_is_asked_for_again_later():
    judge = Scripted(lambda q: checks("a?") if len(judge.asked) > 2 else "?")
    writer = RubricWriter(lambda: judge)
    assert writer.rubrics([CASE])[0].rubric is None
    assert writer.rubrics([CASE])[0].rubric is not None


@pytest.mark.parametrize(("count", "questions"), [(1, 1), (10, 1), (11, 2), (25, 3)])
def test_at_most_ten_items_go_into_one_question(count, questions):
    judge = Scripted(lambda q: verdicts(["yes"] * len(items_of(q))))
    (found,) = check(judge, [Row((RED,), rubric(count))])
    assert found.values == (1.0,) * count
    assert len(judge.asked) == questions
    assert [item for q in sorted(judge.asked, key=lambda q: -len(items_of(q))) for item in items_of(q)] == [
        f"question {k}?" for k in range(count)
    ]


def test_labels_keep_the_order_of_the_items():
    labels = ["yes", "partial", "no", "unsure"]
    judge = Scripted(lambda q: verdicts([labels[int(item.split()[1][:-1]) % 4] for item in items_of(q)]))
    found = check(judge, [Row((RED,), rubric(13)), Row((BLUE,), rubric(3))])
    assert found[0].values == tuple([1.0, 0.5, 0.0, 0.0] * 3 + [1.0])
    assert found[1].values == (1.0, 0.5, 0.0)


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_wrong_number_of_answers_makes_the_row_invalid_and_no_other(wrong):
    def says(question):
        count = len(items_of(question))
        return verdicts(["yes"] * (count + wrong if question.images[0] is RED else count))

    found = check(Scripted(says), [Row((RED,), rubric(12)), Row((BLUE,), rubric(2))])
    assert found[0].values is None
    assert found[0].problem
    assert found[1].values == (1.0, 1.0)


def test_each_item_may_be_a_decision_of_its_own():
    judge = Scripted(lambda q: "", lambda d: (0.9, 0.1) if "1" in d.text else (0.2, 0.8))
    (found,) = check(judge, [Row((RED,), rubric(2))], how="each")
    assert found.values == (0.2, 0.9)
    assert found.raw == ("q0: yes 0.200", "q1: yes 0.900")
    assert judge.asked == []
    silent = Scripted(lambda q: "", lambda d: None if "1" in d.text else (0.2, 0.8))
    assert check(silent, [Row((RED,), rubric(2))], how="each")[0].values is None


def test_of_an_edit_the_judge_sees_both_pictures_and_the_instruction():
    judge = Scripted(lambda q: verdicts(["yes"]))
    check(judge, [Row((BLUE, RED), rubric(1), "make it red")])
    check(judge, [Row((BLUE, RED), rubric(1), "make it red")], how="each")
    assert len(judge.asked[0].images) == len(judge.decided[0].images) == 2
    assert "make it red" in judge.asked[0].text
    assert "make it red" in judge.decided[0].text


def contrasting(label_of):
    """A judge that profiles, writes one check, and answers it by the picture."""

    def says(question):
        if "List what holds" in question.text:
            return findings("pass" if question.images[0][0].mean() > 0.5 else "fail")
        if "Two pictures" in question.text:
            return checks("Is it red?")
        return verdicts([label_of(question.images[0])])

    return Scripted(says)


def by_red(picture):
    return "yes" if picture[0].mean() > 0.5 else "no"


def test_a_rubric_is_kept_only_if_judging_by_it_finds_the_preferred_picture():
    right = contrasted(contrasting(by_red), "a red thing", RED, BLUE)
    wrong = contrasted(contrasting(by_red), "a red thing", BLUE, RED)
    tied = contrasted(contrasting(lambda picture: "yes"), "a red thing", RED, BLUE)
    assert (right.scores, right.kept) == ((1.0, 0.0), True)
    assert (wrong.scores, wrong.kept) == ((0.0, 1.0), False)
    assert (tied.scores, tied.kept) == ((1.0, 1.0), False)
    assert right.rubric.prompt == "a red thing"


def test_the_writer_of_a_contrast_sees_the_same_whichever_is_preferred():
    asked = []
    for preferred, other in ((RED, BLUE), (BLUE, RED)):
        judge = contrasting(by_red)
        contrasted(judge, "a red thing", preferred, other)
        asked.append([q.text for q in judge.asked if "question" not in q.text or "Two pictures" in q.text])
        assert all(len(q.images) == 1 for q in judge.asked if "List what holds" in q.text)
        assert [q.images for q in judge.asked if "Two pictures" in q.text] == [()]
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "no",
        '[{"criterion": "a"}]',
        '[{"criterion": "a", "status": "good", "severity": 0}]',
        '[{"criterion": "a", "status": "pass", "severity": 4}]',
        '[{"criterion": "a", "status": "pass", "severity": true}]',
        '[{"criterion": "", "status": "pass"}]',
        '[{"criterion": "a", "status": ["pass"]}]',
        '[{"criterion": "a", "status": "pass", "evidence": 3}]',
    ],
)
def test_a_profile_that_cannot_be_read_gives_no_rubric(text):
    assert profile(Scripted(lambda q: text), "a cat", [RED])[0][0] is None
    found = contrasted(Scripted(lambda q: text), "a cat", RED, BLUE)
    assert (found.rubric, found.scores, found.kept) == (None, None, False)


def test_a_writer_is_told_apart_by_its_settings_too():
    judges = [Scripted(lambda q: ""), Scripted(lambda q: ""), Scripted(lambda q: "")]
    judges[0].options, judges[1].options = {"pixels": 64}, {"pixels": 128}
    judges[2].options = {"pixels": 64}
    marks = [RubricWriter(lambda judge=judge: judge).mark() for judge in judges]
    assert marks[0] == marks[2] != marks[1]
