"""EditScore as a reward: what it asks, what it makes of the replies, and what a bench says of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.judges.asking import LARGEST_SEED, SECOND_TRY, Judgement, Question, ask
from diffalign.judges.protocols import Sampling
from diffalign.rewards.editscore import EditScore
from diffalign.scoring import ScoreCache, make_reward, rate, score
from tests.rewards.scripted import Scripted, edit, level, plain

GOLDEN = {2: (20, 10), 1: (25, 15)}  # by the number of pictures shown
NONSENSE = ("", "I cannot judge this.", '{"score": [3', '{"score": [1, 2, 3]}', '{"score": ["9", 9]}', "[true, true]")
NONSENSE += ('{"score": [26, 3]}', '{"score": [-1, 3]}', '{"score": [NaN, 3]}', '{"score": [1e400, 3]}', "12.5")


def said(scores: Any, reasoning: str = "as asked") -> str:
    return json.dumps({"reasoning": reasoning, "score": list(scores)})


def golden(question: Question) -> str:
    return said(GOLDEN[len(question.images)])


def lights(question: Question) -> str:
    """The brighter the edit, the better it followed; all else is the same."""
    return said((round(25 * level(question.images[1])), 20)) if len(question.images) == 2 else said((20, 25))


def asked(says: Callable[[Question], str], **options: Any) -> EditScore:
    return EditScore(Scripted(says), **options)


def test_the_worked_example_from_the_reply_to_the_reward() -> None:
    found = score(asked(golden), plain(0.7), [edit()])
    assert float(found.total) == pytest.approx(0.48990, abs=5e-6)
    told = {"prompt_following": 8, "consistency": 4, "perceptual_quality": 6, "naturalness": 10, "artefacts": 6}
    assert {name: found.parts[name].item() for name in told} == told
    assert float(found.parts["overall"]) == pytest.approx(math.sqrt(24))
    assert float(found.parts["accepted"]) == 0


def test_two_questions_a_pass_and_the_look_is_judged_from_the_edit_alone() -> None:
    reward = asked(golden, passes=3)
    rate(reward, plain(0.7, 0.2), [edit("a"), edit("b")])
    questions = reward.backend.questions
    assert [len(q.images) for q in questions] == [2, 1] * 6
    assert [q.seed for q in questions] == [42, 42, 43, 43, 44, 44] * 2
    for q in questions:
        assert (q.temperature, q.top_p, q.top_k, q.max_tokens) == (0.7, 0.9, 20, 512)
    for q, edited, instruction in ((questions[0], 0.7, "a"), (questions[6], 0.2, "b")):
        assert [level(image) for image in q.images] == pytest.approx([0.5, edited], abs=0.003)
        assert f"The instruction was: {instruction}\n" in q.text
    looks = questions[1]
    assert level(looks.images[0]) == pytest.approx(0.7, abs=0.003)
    assert "instruction" not in looks.text
    assert all("25" in q.text for q in questions)


def test_one_pass_is_asked_as_published_too() -> None:
    reward = asked(golden)
    rate(reward, plain(0.7), [edit()])
    assert {(q.temperature, q.top_p, q.top_k, q.max_tokens, q.seed) for q in reward.backend.questions} == {
        (0.7, 0.9, 20, 512, 42)
    }


def test_the_scale_of_the_judge_does_not_matter() -> None:
    def tenth(question: Question) -> str:
        return said(value * 10 / 25 for value in GOLDEN[len(question.images)])

    found = rate(asked(tenth, scale=10), plain(0.7), [edit()])
    assert float(found.total) == pytest.approx(0.48990, abs=5e-6)


def test_equal_passes_are_one_pass() -> None:
    one, four = (rate(asked(golden, passes=k), plain(0.7), [edit()]) for k in (1, 4))
    assert torch.equal(one.total, four.total)
    assert float(four.parts["spread"]) == 0
    assert math.isnan(float(one.parts["spread"]))
    assert float(four.parts["valid_passes"]) == 4


def test_passes_break_ties_by_their_mean() -> None:
    def wavering(question: Question) -> str:
        return (
            said((20 + (question.seed == 43), 10 + (question.seed == 43))) if len(question.images) == 2 else "[16, 16]"
        )

    one, two = (float(rate(asked(wavering, passes=k), plain(0.7), [edit()]).total) for k in (1, 2))
    assert two > one


@pytest.mark.parametrize("text", NONSENSE)
def test_a_malformed_reply_is_asked_once_more_and_then_the_row_is_invalid(text: str) -> None:
    reward = asked(lambda q: text if len(q.images) == 2 else golden(q))
    found = rate(reward, plain(0.7), [edit()])
    assert not found.valid.any()
    assert found.total.isnan().all()
    assert [q.seed for q in reward.backend.questions] == [42, 42, 42 + SECOND_TRY]
    (_, judgement), *rest = reward.judgements
    assert not rest
    assert "0 of 1 passes" in judgement.problem
    assert judgement.raw[:2] == (text, text)


def test_a_reply_that_can_be_read_the_second_time_counts() -> None:
    found = rate(asked(lambda q: golden(q) if q.seed > 1000 else "well ..."), plain(0.7), [edit()])
    assert float(found.total) == pytest.approx(0.48990, abs=5e-6)


@pytest.mark.parametrize("text", NONSENSE)
def test_malformed_replies_never_change_the_mean_of_a_group(text: str) -> None:
    def broken(question: Question) -> str:
        return text if level(question.images[-1]) < 0.3 else lights(question)

    media, cases = plain(0.4, 0.6, 0.9), [edit()] * 3
    alone = rate(asked(lights), media, cases)
    joined = rate(asked(broken), torch.cat([plain(0.1), media, plain(0.2)]), [edit()] * 5)
    assert joined.valid.tolist() == [False, True, True, True, False]
    assert torch.equal(joined.total.nanmean(), alone.total.nanmean())


def test_a_pass_that_cannot_be_read_is_dropped_and_the_others_count() -> None:
    def half(question: Question) -> str:
        return "hm" if question.seed % SECOND_TRY in (43, 44) and len(question.images) == 1 else golden(question)

    found = rate(asked(half, passes=4), plain(0.7), [edit()])
    assert float(found.total) == pytest.approx(0.48990, abs=5e-6)
    assert float(found.parts["valid_passes"]) == 2
    assert not rate(asked(half, passes=4, min_passes=3), plain(0.7), [edit()]).valid.any()


def test_a_score_outside_the_scale_is_clamped_where_that_is_asked_for() -> None:
    def bold(question: Question) -> str:
        return said((27, 25)) if len(question.images) == 2 else said((25, -3))

    assert not rate(asked(bold), plain(0.7), [edit()]).valid.any()
    found = rate(asked(bold, out_of_range="clamp"), plain(0.7), [edit()])
    assert [float(found.parts[name]) for name in ("prompt_following", "artefacts", "overall")] == [10, 0, 0]
    for wild in ("[1e300, 3]", '{"score": [NaN, 3]}', '{"score": [1, 2, 3]}'):
        assert not rate(asked(lambda q, text=wild: text, out_of_range="clamp"), plain(0.7), [edit()]).valid.any()


def test_the_edit_is_judged_at_the_size_of_its_source() -> None:
    for keep, sizes in ((True, [(12, 20), (12, 20), (12, 20)]), (False, [(12, 20), (8, 8), (8, 8)])):
        reward = asked(golden, at_source_size=keep)
        rate(reward, plain(0.7), [edit(size=(12, 20))])
        shown = [tuple(image.shape[-2:]) for q in reward.backend.questions for image in q.images]
        assert shown == sizes


def test_an_edit_that_is_its_source_is_zero_and_the_judge_is_not_asked() -> None:
    cases, media = [edit(), edit()], plain(0.5, 0.9)
    reward = asked(lights, unedited_above=50.0)
    found = rate(reward, media, cases)
    assert float(found.total[0]) == 0 < float(found.total[1])
    assert len(reward.backend.questions) == 2
    assert float(found.parts["overall"][0]) == 0
    unguarded = asked(lights)
    assert float(rate(unguarded, media, cases).total[0]) > 0
    assert len(unguarded.backend.questions) == 4
    near = plain(0.5) + 1 / 255  # 48 dB
    assert float(rate(asked(lights, unedited_above=50.0), near, cases[:1]).total) > 0
    assert float(rate(asked(lights, unedited_above=45.0), near, cases[:1]).total) == 0


def test_the_instruction_of_the_metadata_counts_over_the_prompt() -> None:
    reward = asked(golden)
    rate(reward, plain(0.7, 0.2), [edit("a cat", instruction="add a {hat}"), edit("\ud800")])
    assert "The instruction was: add a {hat}\n" in reward.backend.questions[0].text
    assert len(reward.backend.questions) == 2  # half a character is no prompt


def test_a_published_wording_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "published.yaml"
    file.write_text('semantics: "Do {instruction}? {x} {\\"score\\": [0, {scale}]}"\nlooks: Nice?\n')
    reward = asked(golden, wording=str(file))
    rate(reward, plain(0.7), [edit("it")])
    assert [q.text for q in reward.backend.questions] == ['Do it? {x} {"score": [0, 25]}', "Nice?"]
    assert reward.version != asked(golden).version
    for content, message in (
        ("semantics: Rate it.", "no {instruction}"),
        ("semantic: '{instruction}'", "Did you mean"),
        ("[]", "no texts"),
        ("looks: 3", "is a text"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            asked(golden, wording=str(file))
    with pytest.raises(ConfigError, match="neither 'ours' nor a file"):
        asked(golden, wording="theirs")


@pytest.mark.parametrize(
    "options", [{"passes": 0}, {"min_passes": 2}, {"scale": 0}, {"divide": 0.0}, {"divide": math.nan}]
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="editscore has"):
        asked(golden, **options)


def test_sampling_that_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="top_p"):
        make_reward({"editscore": {"judge": Scripted(golden), "sampling": {"top_p": 0.0}}})
    reward: Any = make_reward({"editscore": {"judge": Scripted(golden), "sampling": {"temperature": 0.0}}})
    assert reward.sampling.temperature == 0


def test_a_judge_of_one_picture_is_refused() -> None:
    backend = Scripted(golden)
    backend.most_images = 1
    with pytest.raises(ConfigError, match="shows 2 pictures"):
        rate(EditScore(backend), plain(0.7), [edit()])


def test_a_case_without_a_source_is_refused() -> None:
    for refused in (
        lambda: score(asked(golden), plain(0.7), [Case(prompt="a")]),
        lambda: asked(golden)(plain(0.7), [Case(prompt="a")]),
    ):
        with pytest.raises(ConfigError, match="no source image"):
            refused()


def test_rows_do_not_depend_on_their_neighbours() -> None:
    media, cases = plain(0.2, 0.5, 0.9), [edit("a"), edit("b"), edit("c")]
    reward = asked(lights, passes=2)
    whole = rate(reward, media, cases).total
    assert torch.equal(whole, torch.cat([rate(reward, media[k : k + 1], cases[k : k + 1]).total for k in range(3)]))
    order = torch.tensor([2, 0, 1])
    assert torch.equal(rate(reward, media[order], [cases[k] for k in order]).total, whole[order])


def test_known_edits_are_not_asked_about_again(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores.db")
    media, cases = plain(0.2, 0.9), [edit("a"), edit("b")]
    for _ in range(2):
        reward = asked(lights)
        found = score(reward, media, cases, cache=cache)
        assert found.valid.all()
    assert reward.backend.questions == []
    score(asked(lights, passes=2), media, cases, cache=cache)
    assert cache.answered["editscore"] == 2


def test_the_log_holds_every_word_and_invalid_rows(tmp_path: Path) -> None:
    log = tmp_path / "log" / "judge.jsonl"
    reward = asked(lambda q: "no" if level(q.images[-1]) < 0.5 else golden(q), log=str(log))
    rate(reward, plain(0.2, 0.9), [edit("a"), edit("b")])
    bad, good = map(json.loads, log.read_text().splitlines())
    assert (bad["valid"], bad["total"], bad["prompt"]) == (False, None, "a")
    assert "passes" in bad["problem"]
    assert good["valid"]
    assert len(good["raw"]) == 2


def test_sources_of_every_mode_are_shown(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "1", "LA"):
        source = Image.new(mode, (8, 8))
        assert rate(asked(golden), plain(0.7), [Case(prompt="a", source=source)]).valid.all()


def test_the_schema_has_the_scale_of_the_scores() -> None:
    reward = asked(golden, scale=10)
    reward(plain(0.7), [edit()])
    for question in reward.backend.questions:  # type: ignore[attr-defined]
        assert question.schema is not None
        items = question.schema["properties"]["score"]["items"]
        assert (items["minimum"], items["maximum"]) == (0, 10)


def test_a_score_may_name_its_scale_where_it_is_clamped_too() -> None:
    reply = '{"reasoning": "", "score": [20/25, 10/25]}'
    plainly = rate(asked(lambda q: said((20, 10))), plain(0.7), [edit()])
    for how in ("invalid", "clamp"):
        assert torch.equal(rate(asked(lambda q: reply, out_of_range=how), plain(0.7), [edit()]).total, plainly.total)


@pytest.mark.parametrize("options", [{"divide": math.inf}, {"divide": math.nan}, {"unedited_above": math.nan}])
def test_numbers_that_mean_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        asked(golden, **options)


def test_a_judge_is_not_sampled_at_an_infinite_temperature() -> None:
    for temperature in (math.inf, math.nan, -1.0):
        with pytest.raises(ConfigError, match="temperature"):
            Sampling(temperature=temperature)


def test_the_log_is_json_where_a_part_is_nan(tmp_path: Path) -> None:
    log = tmp_path / "judge.jsonl"
    reward = asked(golden, log=str(log))
    reward._keep([edit()], [Judgement(0.5, {"spread": math.nan, "overall": 5.0})])

    def refuse(name: str) -> None:
        raise ValueError(name)

    (row,) = (json.loads(line, parse_constant=refuse) for line in log.read_text().splitlines())
    assert row["parts"] == {"spread": None, "overall": 5.0}


def test_a_seed_stays_one_that_servers_take() -> None:
    largest = Sampling(seed=LARGEST_SEED)
    backend = Scripted(lambda q: "")
    ask(backend, [largest.question("?", ())], lambda text: None)
    assert [question.seed for question in backend.questions] == [LARGEST_SEED, SECOND_TRY - 1]
