"""The reward `principle`: pictures rated beside each other, in shuffled orders, under neutral names."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.rewards.principle import PrincipleReward, read_reply
from diffalign.scoring import ScoreCache, score
from tests.judges.scripted_rubrics import Scripted


def pictures(*levels: float) -> torch.Tensor:
    return torch.stack([torch.full((3, 4, 4), level) for level in levels])


def cases(count: int, prompt: str = "a cat") -> list[Case]:
    return [Case(prompt=prompt, seed=k) for k in range(count)]


def replied(scores: list[Any], order: list[str] | None = None) -> str:
    named = {f"picture-{k + 1}": value for k, value in enumerate(scores)}
    ranked = sorted(named, key=lambda name: -named[name]) if order is None else order
    return json.dumps({"scores": named, "best-to-worst": ranked})


def rating(question):
    """1 + 4 times the brightness."""
    return replied([1 + 4 * float(picture.mean()) for picture in question.images])


def by_place(question):
    """5 for the first picture, 1 for the others."""
    return replied([5] + [1] * (len(question.images) - 1))


def test_each_picture_gets_its_own_score_back_whatever_the_order():
    levels = [0.0, 0.2, 0.4, 1.0]
    judge = Scripted(rating)
    found = PrincipleReward(judge, orders=3)(pictures(*levels), cases(4))
    assert found.total.tolist() == pytest.approx([1 + 4 * level for level in levels], abs=1e-5)
    assert found.parts["consistent"].tolist() == [1.0] * 4
    assert found.parts["orders"].tolist() == [3.0] * 4
    assert len(judge.asked) == 3
    shown = [tuple(float(p.mean()) for p in question.images) for question in judge.asked]
    assert len(set(shown)) == 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=9), st.integers(1, 4), st.integers(1, 4))
def test_a_judge_that_rates_each_by_itself_gives_what_it_would_give_alone(levels, group, orders):
    media = pictures(*(level / 255 for level in levels))
    beside = PrincipleReward(Scripted(rating), group=group, orders=orders)(media, cases(len(levels)))
    alone = PrincipleReward(Scripted(rating), group=1)(media, cases(len(levels)))
    assert beside.total.tolist() == pytest.approx(alone.total.tolist(), abs=1e-5)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_with_as_many_orders_as_pictures_a_judge_of_places_gives_ties(count):
    found = PrincipleReward(Scripted(by_place), orders=count)(pictures(*[0.1] * count), cases(count))
    assert len(set(found.total.tolist())) == 1


def test_two_orders_undo_the_place_for_a_pair():
    found = PrincipleReward(Scripted(by_place))(pictures(0.1, 0.9), cases(2))
    assert found.total.tolist() == [3.0, 3.0]


def test_names_are_neutral_and_the_principle_is_said():
    judge = Scripted(rating)
    PrincipleReward(judge, principle="more red is better")(pictures(0.1, 0.2, 0.3), cases(3))
    for question in judge.asked:
        assert "picture-1, picture-2, picture-3" in question.text
        assert "more red is better" in question.text
        assert '"a cat"' in question.text


def test_the_global_generators_are_left_alone_and_the_order_is_that_of_prompt_and_principle():
    def shown(prompt: str, principle: str) -> list[tuple[float, ...]]:
        judge = Scripted(rating)
        PrincipleReward(judge, principle=principle)(pictures(0.1, 0.2, 0.3, 0.4), cases(4, prompt))
        return [tuple(float(p.mean()) for p in question.images) for question in judge.asked]

    state, drawn = random.getstate(), torch.get_rng_state()
    assert shown("a cat", "x") == shown("a cat", "x")
    assert len({str(shown(f"prompt {k}", "x")) for k in range(12)}) > 4
    assert len({str(shown("a cat", f"principle {k}")) for k in range(12)}) > 4
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize(
    ("count", "group", "most", "sizes"),
    [(4, 4, 4, [4]), (5, 4, 4, [2, 3]), (9, 4, 4, [3, 3, 3]), (4, 4, 1, [1] * 4), (4, 2, 8, [2, 2]), (1, 4, 4, [1])],
)
def test_a_group_is_split_evenly_into_what_fits_one_question(count, group, most, sizes):
    judge = Scripted(rating, most_images=most)
    found = PrincipleReward(judge, group=group, orders=1)(pictures(*[0.5] * count), cases(count))
    assert sorted(len(question.images) for question in judge.asked) == sizes
    assert sorted(found.parts["beside"].tolist()) == sorted(float(size) for size in sizes for _ in range(size))


def test_pictures_of_other_prompts_are_not_beside_each_other():
    judge = Scripted(rating)
    found = PrincipleReward(judge)(pictures(0.0, 1.0, 0.5), [*cases(1, "a"), *cases(1, "b"), *cases(1, "a")])
    assert found.total.tolist() == pytest.approx([1.0, 5.0, 3.0], abs=0.02)
    assert sorted(len(question.images) for question in judge.asked) == [1, 2, 2]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "picture-1 is best",
        "[]",
        '{"scores": [1, 2]}',
        '{"scores": {"picture-1": 3}}',
        '{"scores": {"picture-1": 3, "picture-2": 6}}',
        '{"scores": {"picture-1": 3, "picture-2": 0}}',
        '{"scores": {"picture-1": 3, "picture-2": true}}',
        '{"scores": {"picture-1": 3, "picture-2": "4"}}',
        '{"scores": {"picture-1": 3, "picture-2": NaN}}',
        '{"scores": {"picture-1": 3, "picture-2": null}}',
        '{"scores": {"picture-1": 3, "picture-2": 4, "picture-3": 4}}',
        '{"scores": {"picture-1": 3, "picture-2": 4',
    ],
)
def test_a_malformed_reply_is_asked_once_more_and_then_invalid(text):
    assert read_reply(text, 2) is None
    judge = Scripted(lambda question: text)
    reward = PrincipleReward(judge, orders=2)
    assert reward(pictures(0.1, 0.2), cases(2)).valid.tolist() == [False, False]
    assert len(judge.asked) == 4
    assert reward.judgements[0][1].problem
    assert text in reward.judgements[0][1].raw


def test_an_order_that_could_not_be_read_is_left_out():
    judge = Scripted(lambda q: "?" if float(q.images[0].mean()) > 0.5 else rating(q))
    found = PrincipleReward(judge, orders=2)(pictures(0.0, 1.0), cases(2))
    assert found.total.tolist() == pytest.approx([1.0, 5.0])
    assert found.parts["orders"].tolist() == [1.0, 1.0]


def test_a_ranking_that_contradicts_the_scores_shows_in_a_part():
    judge = Scripted(lambda q: replied([1, 5], ["picture-1", "picture-2"]))
    assert PrincipleReward(judge)(pictures(0.1, 0.2), cases(2)).parts["consistent"].tolist() == [0.0, 0.0]
    assert read_reply('{"scores": {"picture-1": 3.5}}', 1).scores == (3.5,)


def test_only_a_picture_by_itself_is_cached(tmp_path):
    cache, judge = ScoreCache(tmp_path / "c.sqlite"), Scripted(rating)
    beside, alone = PrincipleReward(judge), PrincipleReward(judge, group=1)
    assert beside.version is None
    assert beside.listwise
    assert alone.version is not None
    assert not alone.listwise
    for _ in range(2):
        score(alone, pictures(0.1, 0.2), cases(2), cache=cache)
    assert len(judge.asked) == 2
    assert alone.version != PrincipleReward(judge, group=1, principle="x").version
    for _ in range(2):
        score(beside, pictures(0.1, 0.2), cases(2), cache=cache)
    assert len(judge.asked) == 6


def test_a_principle_from_a_file_is_named_with_its_version(tmp_path):
    (tmp_path / "few.yaml").write_text("version: 3\nprinciple: fewer objects are better\n")
    judge = Scripted(rating)
    reward = PrincipleReward(judge, principle=str(tmp_path / "few.yaml"))
    reward(pictures(0.1), cases(1))
    assert "fewer objects are better" in judge.asked[0].text
    assert reward.judgements[0][1].raw[0].startswith("principle few version 3 (")


@pytest.mark.parametrize("options", [{"group": 0}, {"orders": 0}, {"temperature": -1.0}, {"principle": " "}])
def test_a_wrong_option_is_one_clear_error(options):
    with pytest.raises(ConfigError, match="principle"):
        PrincipleReward(Scripted(rating), **options)


def test_edits_of_two_sources_are_not_beside_each_other():
    sources = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "red")]
    judge = Scripted(rating)
    edits = [Case(prompt="make it bright", source=source) for source in sources]
    PrincipleReward(judge, orders=1)(pictures(0.1, 0.2, 0.3), edits)
    assert sorted(len(question.images) for question in judge.asked) == [1, 2]


def test_seeds_are_those_that_servers_take_at_the_second_try_too():
    judge = Scripted(lambda question: "")
    for k in range(64):
        PrincipleReward(judge)(pictures(0.5), cases(1, f"a cat {k}"))
    assert len(judge.asked) == 128
    assert all(0 <= question.seed < 2**31 for question in judge.asked)


def test_an_object_may_be_the_only_entry_of_a_list():
    assert read_reply(f"[{replied([3, 4])}]", 2) == read_reply(replied([3, 4]), 2)
    assert read_reply(f"[{replied([3, 4])}, {replied([3, 4])}]", 2) is None
