"""Rankings: accuracy, format, swapped comparisons, win rates and GCPO."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.rules.ranking import (
    accuracy,
    arrangement,
    flip_rate,
    format_reward,
    gcpo_advantages,
    gcpo_rewards,
    is_ranked,
    orders,
    symmetrised,
    win_rates,
)

TRUTH = {"a": 5.0, "b": 3.0, "c": 1.0}
SCORES = st.lists(st.integers(1, 5), min_size=1, max_size=8).map(lambda s: torch.tensor(s, dtype=torch.float32))
NAMED = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 5), min_size=2)


def test_accuracy_of_the_worked_example():
    assert accuracy(TRUTH, TRUTH) == 1
    assert accuracy({"a": 1, "b": 3, "c": 5}, TRUTH) == 0
    assert accuracy(dict.fromkeys(TRUTH, 2), TRUTH) == 0.5
    assert accuracy({"a": 3, "b": 5, "c": 1}, TRUTH) == pytest.approx(0.727273, abs=1e-6)  # 1 - 3 / 11


@given(NAMED, NAMED, st.integers(-50, 50))
def test_a_constant_added_to_the_predictions_changes_nothing(predicted, truth, more):
    shifted = {name: score + more for name, score in predicted.items()}
    assert accuracy(shifted, truth) == accuracy(predicted, truth)
    assert 0 <= accuracy(predicted, truth) <= 1


def test_true_ties_cost_nothing_but_weigh_and_fewer_than_two_names_are_right():
    assert accuracy({"a": 5, "b": 1}, {"a": 3, "b": 3}) == 1
    assert accuracy({"a": 5, "b": 1, "c": 1}, {"a": 3, "b": 3, "c": 5}) == pytest.approx(1 - 4.5 / 7)
    assert accuracy({"a": 1}, TRUTH) == accuracy({}, TRUTH) == 1


def reply(scores, order, thought="x" * 60):
    said = json.dumps({"scores": scores, "best-to-worst": order})
    return f"<think>{thought}</think>{said}" if thought is not None else said


NAMES = ("picture-1", "picture-2")
GOOD = {"picture-1": 2, "picture-2": 4}


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        (reply(GOOD, ["picture-2", "picture-1"]), 1.0),
        (reply(GOOD, ["picture-2", "picture-1"], "short"), 0.95),
        (reply(GOOD, ["picture-2", "picture-1"], None), 0.8),
        ("</think>" + reply(GOOD, ["picture-2", "picture-1"], None), 0.85),
        (reply(GOOD, ["picture-1", "picture-2"]), 0.8),
        (reply({"picture-1": 2}, ["picture-1"]), 0.9),
        (reply(GOOD, ["picture-2", "picture-1"]) + " That is all.", 0.95),
        (reply({"picture-1": True, "picture-2": "4"}, []), 0.6),
        ('{"scores": {"picture-1": 2}}', 0.2 + 0.1 + 0.1 + 0.0),
        ("", 0.0),
        ("{" * 5000, 0.0),
        ("[1, 2]", 0.0),
    ],
)
def test_format_reward_by_what_the_reply_holds(text, worth):
    assert format_reward(text, NAMES) == pytest.approx(worth)


@given(st.text())
def test_any_text_has_a_format_reward_between_0_and_1(text):
    assert 0 <= format_reward(text, NAMES) <= 1


def test_a_ranking_names_everyone_once_and_never_rises():
    assert is_ranked({"a": 2, "b": 2, "c": 1}, ["b", "a", "c"])
    for order in (["a", "b"], ["a", "b", "b"], ["c", "a", "b"], "abc", None, ["a", "b", 3]):
        assert not is_ranked({"a": 2, "b": 2, "c": 1}, order)


@given(st.integers(1, 6), st.integers(0, 20), st.text(max_size=5))
def test_shuffling_and_putting_back_gives_the_first_order(count, turn, about):
    order = arrangement(count, turn, about)
    things = [f"thing {k}" for k in range(count)]
    shown = [things[k] for k in order]
    back = dict(zip(order, shown, strict=True))
    assert [back[k] for k in range(count)] == things


def test_as_many_turns_as_candidates_put_each_in_each_place_once():
    for count in range(1, 6):
        turns = [arrangement(count, turn, "a prompt") for turn in range(count)]
        for place in range(count):
            assert sorted(order[place] for order in turns) == list(range(count))


def test_an_arrangement_depends_on_what_it_is_about_and_leaves_the_global_generator_alone():
    random.seed(7)
    before = random.getstate()
    firsts = Counter(arrangement(4, 0, f"prompt {k}")[0] for k in range(400))
    assert random.getstate() == before
    assert min(firsts.values()) > 60
    assert arrangement(4, 0, "x") == arrangement(4, 0, "x")


def test_agreement_is_kept_and_disagreement_is_a_tie():
    assert symmetrised(1, 0) == 1
    assert symmetrised(0, 1) == 0
    assert symmetrised(1, 1) == symmetrised(0, 0) == 0.5  # the place decided
    assert symmetrised(0.7, 0.2) == 1
    assert symmetrised(0.5, 0.5) == symmetrised(0.5, 0.2) == 0.5
    assert math.isnan(symmetrised(math.nan, 1))


@given(st.floats(0, 1), st.floats(0, 1))
def test_what_one_side_gets_the_other_lacks(ab, ba):
    assert symmetrised(ab, ba) + symmetrised(ba, ab) == 1


def test_a_judge_that_prefers_the_first_place_has_every_pair_flipped_and_everyone_at_one_half():
    shown = dict.fromkeys(orders(4), 1.0)
    assert win_rates(shown, 4) == [0.5] * 4
    assert flip_rate([(1.0, 1.0)] * 3) == 1
    assert flip_rate([(1.0, 0.0), (1.0, 1.0), (math.nan, 1.0)]) == 0.5
    assert math.isnan(flip_rate([]))


@given(st.integers(2, 6), st.data())
def test_win_rates_of_a_group_sum_to_half_its_size(count, data):
    shown = {pair: data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])) for pair in orders(count)}
    assert sum(win_rates(shown, count)) == pytest.approx(count / 2)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=6, unique=True))
def test_a_fair_judge_gives_win_rates_in_the_order_of_the_truth(truth):
    shown = {(a, b): float(truth[a] > truth[b]) for a, b in orders(len(truth))}
    rates = win_rates(shown, len(truth))
    assert rates == pytest.approx([sum(other < own for other in truth) / (len(truth) - 1) for own in truth])


def test_a_comparison_that_could_not_be_read_counts_for_neither():
    shown = {(0, 1): 1.0, (1, 0): 0.0, (0, 2): math.nan, (2, 0): 1.0}
    rates = win_rates(shown, 3)
    assert rates[:2] == [1.0, 0.0]
    assert math.isnan(rates[2])


def test_gcpo_of_the_worked_example():
    winner, loser = torch.tensor([8.0, 6.0]), torch.tensor([7.0, 5.0])
    assert [r.tolist() for r in gcpo_rewards(winner, loser)] == [[1.0, 0.5], [0.5, 1.0]]
    assert [a.tolist() for a in gcpo_advantages(winner, loser)] == [[0.25, -0.25], [-0.25, 0.25]]


@given(SCORES, SCORES)
def test_gcpo_identities(winner, loser):
    own, other = gcpo_rewards(winner, loser)
    wins = (winner[:, None] > loser[None, :]).float().mean()
    assert float(own.mean()) == pytest.approx(float(wins), abs=1e-6)
    assert float(other.mean()) == pytest.approx(float(wins), abs=1e-6)
    for advantages in gcpo_advantages(winner, loser):
        assert float(advantages.sum()) == pytest.approx(0, abs=1e-5)
        if wins in (0, 1):
            assert not advantages.any()


def test_ties_earn_nothing_and_unread_traces_count_nowhere():
    tied = torch.tensor([5.0, 5.0])
    assert not torch.cat(gcpo_rewards(tied, tied)).any()
    own, other = gcpo_rewards(torch.tensor([8.0, torch.nan, 6.0]), torch.tensor([7.0, 5.0]))
    assert own[[0, 2]].tolist() == [1.0, 0.5]
    assert own[1].isnan()
    assert other.tolist() == [0.5, 1.0]
    assert gcpo_advantages(torch.tensor([8.0, torch.nan, 6.0]), torch.tensor([7.0, 5.0]))[0][2] == -0.25
