"""Edit-R1: checks written once for an instruction and its picture, kept in files, and a reasoned final score."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffalign.errors import ConfigError
from diffalign.judges import wording
from diffalign.judges.asking import Question
from diffalign.judges.principles import CATEGORIES, Check, Principles, key_of, read_principles
from diffalign.rewards.edit_r1 import EditR1
from diffalign.scoring import ScoreCache, rate, score
from tests.rewards.scripted import Scripted, edit, level, plain

CHECKS = [
    {"question": "Is it brighter?", "category": "follow"},
    {"question": "Is the ground the same?", "category": "keep"},
    {"question": "Is nothing else new?", "category": "keep"},
    {"question": "Is it free of noise?", "category": "quality"},
]
BROKEN_LISTS = ("", "[]", "{}", "[1, 2]", json.dumps(CHECKS)[:-4], '[{"question": "a?"}]', '["Is it brighter?"]')
BROKEN_LISTS += ('[{"question": "", "category": "keep"}]', '[{"question": "a?", "category": "style"}]')
BROKEN_VERDICTS = ("", '{"checks": [1, 0], "score": 7}', '{"checks": [1, 0, 1, 0.5], "score": 7}', "[1, 0, 1, 1]")
BROKEN_VERDICTS += ('{"checks": [1, 0, 1, 1]}', '{"checks": [1, 0, 1, 1], "score": 10.5}')
BROKEN_VERDICTS += ('{"checks": [true, false, true, true], "score": 7}', '{"checks": [1, 0, 1, 1], "score": true}')


def verdicts(question: Question) -> str:
    """The final score is ten times the light of the edit; its checks say something else."""
    return json.dumps({"checks": [1, 1, 0, 0], "reasoning": "...", "score": round(10 * level(question.images[1]), 2)})


def said(question: Question) -> str:
    return json.dumps(CHECKS) if len(question.images) == 1 else verdicts(question)


def asked(says: Callable[[Question], str] = said, version: str | None = "1", **options: Any) -> EditR1:
    return EditR1(Scripted(says, version=version), **options)


def written(reward: EditR1) -> int:
    """How often the judge was asked to write checks."""
    return sum(len(question.images) == 1 for question in reward.backend.questions)  # type: ignore[attr-defined]


def test_the_reward_is_the_reasoned_score_and_not_the_mean_of_the_checks() -> None:
    found = rate(asked(), plain(0.8), [edit()])
    assert float(found.total) == pytest.approx(0.8)
    told = {"final": 8.0, "checks": 0.5, "follow": 1.0, "keep": 0.5, "quality": 0.0}
    told |= {f"check/{row['question']}": float(k < 2) for k, row in enumerate(CHECKS)}
    assert {name: found.parts[name].item() for name in found.parts} == pytest.approx(told)


def test_checks_are_written_once_for_a_whole_group() -> None:
    reward = asked()
    rate(reward, plain(0.1, 0.5, 0.9), [edit("a"), edit("a"), edit("b")])
    assert written(reward) == 2
    rate(reward, plain(0.2, 0.3), [edit("a"), edit("b")])
    assert written(reward) == 2
    rate(reward, plain(0.2), [edit("a", source=0.1)])
    assert written(reward) == 3  # another picture


def test_the_writer_sees_the_source_alone_and_the_examiner_both() -> None:
    reward = asked(most=6)
    rate(reward, plain(0.8), [edit("a {b}")])
    first, second = reward.backend.questions  # type: ignore[attr-defined]
    assert [level(image) for image in first.images] == [level(image) for image in plain(0.5)]
    assert "up to 6 yes-or-no questions" in first.text
    assert "The instruction is: a {b}\n" in first.text
    assert [level(image) for image in second.images] == [level(image) for image in plain(0.5, 0.8)]
    assert "1. Is it brighter?\n2. Is the ground the same?" in second.text


@pytest.mark.parametrize("text", BROKEN_LISTS)
def test_checks_that_cannot_be_read_leave_the_row_invalid_and_are_not_kept(text: str) -> None:
    reward = asked(lambda q: text if len(q.images) == 1 else verdicts(q))
    found = rate(reward, plain(0.8, 0.9), [edit(), edit()])
    assert not found.valid.any()
    assert written(reward) == len(reward.backend.questions) == 2  # type: ignore[attr-defined]
    assert {one.problem for _, one in reward.judgements} == {"no checks could be read for this instruction"}
    reward.backend.says = said  # type: ignore[attr-defined]
    assert rate(reward, plain(0.8), [edit()]).valid.all()


@pytest.mark.parametrize("text", BROKEN_VERDICTS)
def test_verdicts_that_cannot_be_read_never_change_the_mean_of_a_group(text: str) -> None:
    def broken(question: Question) -> str:
        return text if len(question.images) == 2 and level(question.images[1]) < 0.3 else said(question)

    alone = rate(asked(), plain(0.4, 0.9), [edit()] * 2)
    joined = rate(asked(broken), plain(0.2, 0.4, 0.9), [edit()] * 3)
    assert joined.valid.tolist() == [False, True, True]
    assert torch.equal(joined.total.nanmean(), alone.total.nanmean())


def test_an_edit_that_is_its_source_is_zero_without_a_question() -> None:
    reward = asked(unedited_above=50.0)
    found = rate(reward, plain(0.5), [edit()])
    assert float(found.total) == float(found.parts["final"]) == 0
    assert reward.backend.questions == []  # type: ignore[attr-defined]


def test_more_checks_than_asked_for_are_cut_and_twins_are_one() -> None:
    many = [{"question": f"Is it {k}?", "category": "Follow "} for k in (1, 1, 2, 3)]
    found = read_principles(json.dumps(many), 2)
    assert found == Principles((Check("Is it 1?", "follow"), Check("Is it 2?", "follow")))


def test_checks_are_kept_in_files_that_the_next_reward_reads(tmp_path: Path) -> None:
    folder = tmp_path / "checks"
    first, second = asked(principles=str(folder)), asked(principles=str(folder))
    rate(first, plain(0.8), [edit("make it brighter!")])
    (file,) = folder.iterdir()
    assert file.name == f"make-it-brighter-{key_of(edit('make it brighter!'))}.yaml"
    told = yaml.safe_load(file.read_text())
    assert told["checks"] == CHECKS
    assert told["instruction"] == "make it brighter!"
    assert told["id"] == Principles(tuple(Check(**row) for row in CHECKS)).id
    rate(second, plain(0.9), [edit("make it brighter!")])
    assert written(second) == 0


def test_an_edited_file_is_judged_by_at_once_and_tells_the_scores_apart(tmp_path: Path) -> None:
    reward = asked(lambda q: said(q).replace("[1, 1, 0, 0]", f"{[1] * q.text.count('?')}"), principles=str(tmp_path))
    rate(reward, plain(0.8), [edit()])
    (file,) = tmp_path.iterdir()
    before = reward.version
    assert before == asked(principles=str(tmp_path / "none")).version  # what the judge wrote itself changes nothing
    told = yaml.safe_load(file.read_text())
    told["checks"] = [{"question": "Is the hat red?", "category": "follow"}]
    file.write_text(yaml.safe_dump(told))
    assert reward.version != before
    found = rate(reward, plain(0.8), [edit()])
    assert "1. Is the hat red?\nThen" in reward.backend.questions[-1].text  # type: ignore[attr-defined]
    assert float(found.parts["follow"]) == 1
    assert "keep" not in found.parts
    assert written(reward) == 1


def test_checks_of_another_writer_tell_the_scores_apart(tmp_path: Path) -> None:
    rate(asked(principles=str(tmp_path)), plain(0.8), [edit()])
    other, same = asked(version="2", principles=str(tmp_path)), asked(principles=str(tmp_path))
    assert "2" in str(other.version)
    alone = asked(version="2", principles=str(tmp_path / "none"))
    assert str(other.version).startswith(str(alone.version))
    assert other.version != alone.version
    assert same.version == asked(principles=str(tmp_path / "none")).version
    assert asked(version=None, principles=str(tmp_path)).version is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", "no list of checks"),
        ("checks: []", "no list of checks"),
        ("checks: [a]", "check 1 of"),
        ("a: [", "YAML"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: str, message: str) -> None:
    reward = asked(principles=str(tmp_path))
    rate(reward, plain(0.8), [edit()])
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        rate(reward, plain(0.8), [edit()])
    assert file.name in str(error.value)


def test_instructions_of_any_letters_have_a_file(tmp_path: Path) -> None:
    told = ("добавь шляпу", "../../etc/passwd", "x" * 500, "\ud800", "a: [1]\n# b", "")
    reward = asked(principles=str(tmp_path))
    cases = [edit("p", instruction=each) if each else edit("") for each in told]
    assert rate(reward, plain(*[0.8] * len(cases)), cases).valid.all()
    assert len(list(tmp_path.iterdir())) == len(cases)
    again = asked(principles=str(tmp_path))
    rate(again, plain(*[0.8] * len(cases)), cases)
    assert written(again) == 0


def test_two_calls_at_once_write_the_checks_once() -> None:
    reward = asked()
    threads = [threading.Thread(target=rate, args=(reward, plain(0.1 * k), [edit()])) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written(reward) == 1
    assert len(reward.judgements) == 8


def test_exemplars_are_shown_to_the_writer(tmp_path: Path) -> None:
    file = tmp_path / "exemplars.yaml"
    rows = [{"instruction": f"edit {k}", "checks": CHECKS[:1]} for k in range(6)]
    file.write_text(yaml.safe_dump(rows))
    reward = asked(exemplars=str(file))
    rate(reward, plain(0.8), [edit()])
    question = reward.backend.questions[0]  # type: ignore[attr-defined]
    assert question.text.count("\nedit ") == 4
    assert question.text.count('"category": "follow"') == 4
    assert question.text.endswith(asked()._asked(edit(), key_of(edit())))
    assert reward.version != asked().version
    file.write_text("a: 1")
    with pytest.raises(ConfigError, match="no list of entries"):
        asked(exemplars=str(file))


def test_known_edits_are_not_asked_about_again(tmp_path: Path) -> None:
    cache, folder = ScoreCache(tmp_path / "scores.db"), str(tmp_path / "checks")
    for _ in range(2):
        reward = asked(principles=folder)
        score(reward, plain(0.2, 0.9), [edit("a"), edit("b")], cache=cache)
    assert reward.backend.questions == []  # type: ignore[attr-defined]


@given(st.lists(st.sampled_from(CATEGORIES), min_size=1, max_size=10), st.data())
def test_the_means_of_the_categories_add_up_to_that_of_all(kinds: list[str], data: st.DataObject) -> None:
    checks = tuple(Check(f"{k}?", kind) for k, kind in enumerate(kinds))
    found = tuple(data.draw(st.lists(st.integers(0, 1), min_size=len(kinds), max_size=len(kinds))))
    means = Principles(checks).means(found)
    whole = math.fsum(means[kind] * kinds.count(kind) for kind in CATEGORIES if kind in means) / len(kinds)
    assert means["checks"] == pytest.approx(whole)


@pytest.mark.parametrize("options", [{"most": 0}, {"shown": 0}, {"divide": 0.0}])
def test_settings_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="all are positive"):
        asked(**options)


def test_the_schema_asks_in_the_order_of_the_wording() -> None:
    reward = asked()
    rate(reward, plain(0.8), [edit()])
    schema = reward.backend.questions[-1].schema  # type: ignore[attr-defined]
    assert list(schema["properties"]) == schema["required"] == ["reasoning", "checks", "score"]
    reply = wording.EDIT_CHECKS.rpartition("JSON only")[2]
    assert sorted(schema["required"], key=reply.index) == schema["required"]


def test_the_writer_is_told_apart_by_its_settings_too() -> None:
    small, large = asked(), asked()
    small.backend.options, large.backend.options = {"pixels": 64}, {"pixels": 128}  # type: ignore[attr-defined]
    assert small.writer != large.writer
    large.backend.options = {"pixels": 64}  # type: ignore[attr-defined]
    assert small.writer == large.writer


@pytest.mark.parametrize("options", [{"divide": math.inf}, {"divide": math.nan}, {"unedited_above": math.nan}])
def test_numbers_that_mean_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        asked(**options)
