"""The reward `rubric`: whose rubric holds, what is asked, how answers add up, and what is invalid."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.judges.rubric_files import Rubric, read_rubric, write_rubric
from diffalign.rewards.rubric import RubricReward
from diffalign.rules.rubrics import Item
from diffalign.scoring import ScoreCache, score
from tests.judges.scripted_rubrics import Scripted, checks, items_of, verdicts

RED, BLUE = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
RED[0], BLUE[2] = 1.0, 1.0
BOTH = torch.stack([RED, BLUE])
ITEMS = ["Is it red?", {"question": "Is it plain?", "weight": 3.0}]
CASE = Case(prompt="a red thing", metadata={"rubric": ITEMS})


def answered(picture: torch.Tensor, item: str) -> str:
    return "yes" if "red" not in item or picture[0].mean() > 0.5 else "no"


def says(question):
    if not items_of(question):
        return checks("Is it red?", must=True)
    return verdicts([answered(question.images[-1], item) for item in items_of(question)])


def judge(**fields: Any) -> Scripted:
    return Scripted(**{"says": says, "decides": lambda d: (0.75, 0.25), **fields})


def rubric(question: str = "Is it red?", **fields: Any) -> Rubric:
    return Rubric(**{"name": "mine", "any": True, "items": (Item(id="red", question=question, must=True),), **fields})


def test_the_total_is_the_weighted_share_and_every_item_is_a_part():
    found = score(RubricReward(judge()), BOTH, [CASE, CASE])
    assert found.total.tolist() == [1.0, 0.75]
    assert {name: part.tolist() for name, part in found.parts.items()} == {
        "follow": [1.0, 0.75],
        "gate": [1.0, 1.0],
        "item/q1": [1.0, 0.0],
        "item/q2": [1.0, 1.0],
    }


def test_a_violated_must_gates_the_total():
    case = Case(prompt="x", metadata={"rubric": [{"question": "Is it red?", "must": True}, "Is it plain?"]})
    totals = {
        gate: float(RubricReward(judge(), gate=gate, strength=0.2)(BLUE[None], [case]).total)
        for gate in ("hard", "soft", "none")
    }
    assert totals == pytest.approx({"hard": 0, "soft": 0.1, "none": 0.5})


def test_the_sum_grows_with_the_rubric_and_has_no_range():
    reward = RubricReward(judge(), total="sum")
    assert reward.range is None
    assert reward(BOTH, [CASE, CASE]).total.tolist() == [4.0, 3.0]


def test_ask_each_takes_the_probability_of_yes():
    scripted = judge()
    found = RubricReward(scripted, ask="each")(RED[None], [CASE])
    assert found.total.tolist() == [0.75]
    assert len(scripted.decided) == 2
    assert scripted.asked == []


def test_without_a_rubric_it_is_written_once_for_each_prompt():
    scripted = judge()
    reward = RubricReward(scripted)
    cases = [Case(prompt="a red thing"), Case(prompt="a red thing")]
    assert reward(BOTH, cases).total.tolist() == [1.0, 0.0]
    assert reward(BOTH, cases).total.tolist() == [1.0, 0.0]
    assert sum(not items_of(q) for q in scripted.asked) == 1


def test_a_person_may_edit_what_was_written(tmp_path):
    reward = RubricReward(judge(), folder=str(tmp_path))
    assert reward(BLUE[None], [Case(prompt="a red thing")]).total.tolist() == [0.0]
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace("Is it red?", "Is it plain?"))
    again = RubricReward(judge(), folder=str(tmp_path))
    assert again(BLUE[None], [Case(prompt="a red thing")]).total.tolist() == [1.0]
    assert again.options["folder"] != reward.options["folder"] is None


def test_a_file_holds_for_all_and_a_folder_by_prompt(tmp_path):
    write_rubric(rubric(), tmp_path / "mine.yaml")
    scripted = judge()
    assert RubricReward(scripted, rubric=str(tmp_path / "mine.yaml"))(BLUE[None], [Case(prompt="?")]).total == 0
    write_rubric(rubric("Is it plain?", any=False, prompt="a thing"), tmp_path / "thing.yaml")
    found = RubricReward(scripted, rubric=str(tmp_path))(BOTH[[1, 1]], [Case(prompt="a thing"), Case(prompt="?")])
    assert found.total.tolist() == [1.0, 0.0]
    assert all(items_of(q) for q in scripted.asked)


def test_writing_may_be_forbidden(tmp_path):
    reward = RubricReward(judge(), rubric=str(tmp_path), write=False)
    with pytest.raises(ConfigError, match="no rubric for 'a cat', and write is false"):
        reward(RED[None], [Case(prompt="a cat")])


def test_another_judge_may_write():
    writer = judge(says=lambda q: checks("Is it plain?"), name="writer")
    scripted = judge()
    assert RubricReward(scripted, writer=writer)(BLUE[None], [Case(prompt="a red thing")]).total == 1
    assert len(writer.asked) == 1
    assert all(items_of(q) for q in scripted.asked)
    writer.version = None
    assert RubricReward(scripted, writer=writer).version is None


def test_the_version_of_the_rubric_is_recorded_for_every_row(tmp_path):
    path = write_rubric(rubric(version=4), tmp_path / "mine.yaml")
    reward = RubricReward(judge(), rubric=str(path), log=str(tmp_path / "log.jsonl"))
    reward(BOTH, [Case(prompt="a"), Case(prompt="b")])
    label = f"rubric mine version 4 ({read_rubric(path).id})"
    assert [judgement.raw[0] for _, judgement in reward.judgements] == [label, label]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["raw"][0] for row in rows] == [label, label]


def test_rows_of_one_prompt_under_two_rubrics_are_refused():
    other = Case(prompt=CASE.prompt, metadata={"rubric": ["Is it plain?"]})
    with pytest.raises(ConfigError, match="scores of two rubrics do not compare"):
        RubricReward(judge())(BOTH, [CASE, other])
    RubricReward(judge())(BOTH, [CASE, Case(prompt="b", metadata={"rubric": ["Is it plain?"]})])


@pytest.mark.parametrize(
    "text", ["", "yes", "[]", verdicts(["yes"]), verdicts(["yes"] * 3), verdicts(["yes", "maybe"])]
)
def test_a_malformed_answer_is_invalid_and_not_zero(text):
    scripted = judge(says=lambda q: text if q.images[0][0].mean() > 0.5 else says(q))
    reward = RubricReward(scripted)
    found = score(reward, BOTH, [CASE, CASE])
    assert found.valid.tolist() == [False, True]
    assert reward.judgements[0][1].problem
    assert len([q for q in scripted.asked if q.images[0][0].mean() > 0.5]) == 2


def test_a_rubric_that_cannot_be_written_makes_its_rows_invalid():
    reward = RubricReward(judge(says=lambda q: says(q) if items_of(q) else "I cannot."))
    found = reward(BOTH, [Case(prompt="a red thing"), CASE])
    assert found.valid.tolist() == [False, True]
    assert "no list of questions" in reward.judgements[0][1].problem
    assert reward.judgements[0][1].raw == ("I cannot.", "I cannot.")
    assert RubricReward(judge())(RED[None], [Case(prompt=" ")]).valid.tolist() == [False]


SOURCE = Image.new("RGB", (16, 16), "blue")


def test_an_edit_that_changed_nothing_is_0_before_the_judge_is_asked():
    scripted = judge()
    case = Case(prompt="make it red", source=SOURCE)
    reward = RubricReward(scripted)
    assert reward(BLUE[None], [case]).total.tolist() == [0.0]
    assert scripted.asked == []
    assert reward.judgements[0][1].raw[0].startswith("not asked")
    assert reward(RED[None], [case]).total.tolist() == [1.0]
    assert [len(q.images) for q in scripted.asked] == [1, 2]
    unchecked = judge()
    RubricReward(unchecked, unedited_above=None)(BLUE[None], [case])
    assert len(unchecked.asked) == 2


def test_a_judge_of_one_picture_cannot_compare_an_edit():
    with pytest.raises(ConfigError, match="shows 2 pictures"):
        RubricReward(judge(most_images=1))(RED[None], [Case(prompt="make it red", source=SOURCE)])


@pytest.mark.parametrize(
    "value", [7, "red", [], [{}], [7], {"items": []}, {"items": ["a?"], "any": True, "prompt": "x"}]
)
def test_a_wrong_rubric_of_a_case_is_one_clear_error(value):
    with pytest.raises(ConfigError, match=r"the rubric of the case 'x'"):
        RubricReward(judge())(RED[None], [Case(prompt="x", metadata={"rubric": value})])


@pytest.mark.parametrize(
    "options",
    [
        {"ask": "all"},
        {"at_once": 0},
        {"items": 0},
        {"items": 101},
        {"unedited_above": math.nan},
        {"gate": "x"},
        {"strength": 2.0},
        {"total": "max"},
    ],
)
def test_a_wrong_option_is_one_clear_error(options):
    with pytest.raises(ConfigError, match="rubric"):
        RubricReward(judge(), **options)


def test_scores_are_cached_by_judge_options_and_rubric(tmp_path):
    cache, scripted = ScoreCache(tmp_path / "c.sqlite"), judge()
    path = write_rubric(rubric(), tmp_path / "mine.yaml")

    def ask(**options: Any) -> float:
        return float(
            score(RubricReward(scripted, rubric=str(path), **options), RED[None], [Case(prompt="x")], cache=cache).total
        )

    assert ask() == ask() == 1
    assert len(scripted.asked) == 1
    ask(gate="hard")
    write_rubric(rubric("Is it very red?"), path)
    ask()
    assert len(scripted.asked) == 3


def test_written_rubrics_in_a_folder_do_not_make_a_second_run_ask_again(tmp_path):
    cache, scripted = ScoreCache(tmp_path / "c.sqlite"), judge()
    for _ in range(2):
        reward = RubricReward(scripted, folder=str(tmp_path / "rubrics"))
        score(reward, BOTH, [Case(prompt="a red thing")] * 2, cache=cache)
    assert len(scripted.asked) == 3  # one rubric, two pictures


def test_files_are_read_once_until_refreshed(tmp_path):
    path = write_rubric(rubric(), tmp_path / "mine.yaml")
    reward = RubricReward(judge(), rubric=str(path))
    assert reward(BLUE[None], [Case(prompt="x")]).total == 0
    write_rubric(rubric("Is it plain?", version=2), path)
    assert reward(BLUE[None], [Case(prompt="x")]).total == 0
    reward.refresh()
    assert reward(BLUE[None], [Case(prompt="x")]).total == 1


def test_batches_and_orders_do_not_matter():
    reward, cases = RubricReward(judge()), [CASE, CASE]
    whole = score(reward, BOTH, cases).total.tolist()
    assert score(reward, BOTH, cases, chunk=1).total.tolist() == whole
    assert score(reward, BOTH.flip(0), cases).total.tolist() == whole[::-1]
    assert not math.isnan(sum(whole))


def test_the_rubric_of_an_edit_is_for_its_source(tmp_path):
    scripted = judge(
        says=lambda q: (
            says(q)
            if items_of(q)
            else json.dumps([{"question": f"Is {len(scripted.asked)} red?", "category": "follow"}])
        )
    )
    two = [Case(prompt="make it red", source=Image.new("RGB", (16, 16), colour)) for colour in ("blue", "green")]
    for _ in range(2):
        reward = RubricReward(scripted, folder=str(tmp_path))
        assert reward(RED.expand(2, 3, 8, 8), two).valid.all()
        labels = [judgement.raw[0] for _, judgement in reward.judgements]
        assert labels[0] != labels[1]
    assert len(list(tmp_path.iterdir())) == 2
    assert sum(not items_of(q) for q in scripted.asked) == 2


def test_a_wrong_file_is_known_before_a_judge_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the rubric"):
        RubricReward("/nowhere", rubric=str(tmp_path / "absent.yaml"))
    (tmp_path / "bad.yaml").write_text("items: []")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        RubricReward("/nowhere", folder=str(tmp_path))


def test_another_wording_is_another_version(tmp_path):
    (tmp_path / "mine.yaml").write_text("items: |-\n  Check this {picture}:\n  {items}\n")
    scripted = judge()
    reward = RubricReward(scripted, wording=str(tmp_path / "mine.yaml"))
    assert reward(RED[None], [CASE]).total.tolist() == [1.0]
    assert scripted.asked[0].text == "Check this {picture}:\n1. Is it red?\n2. Is it plain?"
    assert reward.version != RubricReward(scripted).version


@pytest.mark.parametrize("text", ["{prompt} {0} %s", "\ud800", "a\nb", 'a "quoted" {"x": 1}', "x" * 5000])
def test_odd_prompts_and_questions_are_asked_as_they_are(text):
    for how in ("together", "each"):
        scripted = judge(says=lambda q: verdicts(["yes"] * len(items_of(q))) if items_of(q) else checks("Is it red?"))
        case = Case(prompt=text, metadata={"rubric": [text]})
        assert RubricReward(scripted, ask=how)(RED[None], [case]).valid.tolist() == [True]
        for asked in (*scripted.asked, *scripted.decided):
            asked.text.encode()
        assert RubricReward(scripted)(RED[None], [Case(prompt=text)]).valid.tolist() == [True]


def test_many_items_are_asked_in_pieces_of_nearly_one_size():
    asked = judge()
    case = Case(prompt="x", metadata={"rubric": [f"Is it {k}?" for k in range(11)]})
    found = RubricReward(asked)(RED[None], [case])
    pieces = sorted((items_of(question) for question in asked.asked), key=len, reverse=True)
    assert [len(piece) for piece in pieces] == [6, 5]
    assert [item for piece in pieces for item in piece] == case.metadata["rubric"]
    assert len([name for name in found.parts if name.startswith("item/")]) == 11


def test_one_item_may_be_answered_without_its_list_and_numbers_say_the_order():
    one = Case(prompt="x", metadata={"rubric": ["Is it red?"]})
    bare = judge(says=lambda question: '{"evidence": "it is", "answer": "yes"}')
    assert RubricReward(bare)(RED[None], [one]).total.tolist() == [1.0]
    turned = judge(says=lambda question: "2. no\n1. yes")
    found = RubricReward(turned)(RED[None], [CASE])
    assert [found.parts[f"item/q{k}"].item() for k in (1, 2)] == [1.0, 0.0]
