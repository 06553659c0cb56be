"""The protocols behind published accuracies, by their tables and laws."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.data.accuracy import (
    PROTOCOLS,
    Judged,
    inversion_credit,
    item_credit,
    measure,
    pairs_of,
    pick_threshold,
    tie_credit,
    ties_score,
)
from diffalign.errors import ConfigError

NAN = math.nan


def one(ranks: tuple[float, ...], scores: tuple[float, ...], group: str = "g", kind: str = "") -> Judged:
    return Judged(ranks=ranks, scores=scores, group=group, kind=kind)


def value(protocol: str, *judged: Judged, **more: float) -> float:
    found = measure(protocol, judged, **more).accuracy
    assert found is not None
    return found.mean


RANKINGS = st.lists(st.integers(1, 4), min_size=2, max_size=5)


@st.composite
def judgements(draw: st.DrawFn) -> list[Judged]:
    found = []
    for k in range(draw(st.integers(1, 4))):
        ranks = draw(RANKINGS)
        scores = draw(st.lists(st.integers(-3, 3).map(float), min_size=len(ranks), max_size=len(ranks)))
        found.append(one(tuple(ranks), tuple(scores), str(k), draw(st.sampled_from(["x", "y"]))))
    return found


@pytest.mark.parametrize(
    ("label", "said", "credit"),
    [(1, 1, 1), (1, 0, 0.5), (1, -1, 0), (0, 1, 0.5), (0, 0, 1), (0, -1, 0.5), (-1, 1, 0), (-1, 0, 0.5), (-1, -1, 1)],
)
def test_half_credit_is_for_just_one_tie(label, said, credit):
    assert tie_credit(label, said) == credit


def test_equal_scores_are_half_right_or_wrong_by_protocol():
    tie = one((1, 2), (0.5, 0.5))
    assert value("half", tie) == 0.5
    assert value("hpdv2", tie) == 0.5
    assert value("pickapic", tie) == 0.5
    assert value("strict", tie) == value("editreward", tie) == value("imagereward", tie) == 0
    assert value("rewardbench2", tie) == 0.5


@pytest.mark.parametrize(("scores", "credit"), [((3, 2, 1), 1), ((3, 1, 2), 2 / 3), ((1, 2, 3), 0), ((1, 1, 1), 0.5)])
def test_inversions_of_three_pictures(scores, credit):
    assert value("hpdv2", one((1, 2, 3), scores)) == pytest.approx(credit)


def test_what_people_rank_alike_is_never_an_inversion():
    assert value("hpdv2", one((1, 1, 1), (5, 1, 3))) == 1
    assert inversion_credit(pairs_of(one((1, 1, 2), (1, 9, 0)))) == 1


def test_the_two_ranking_conventions_differ_on_the_same_scores():
    judged = one((1, 1, 2), (1.0, 3.0, 2.0))  # one of two unequal pairs is right, of three pairs one is inverted
    assert value("imagereward", judged) == 0.5
    assert value("hpdv2", judged) == pytest.approx(2 / 3)


@given(judgements())
def test_a_constant_reward_gets_half_under_half_credit_and_nothing_under_strict(judged):
    flat = [one(tuple(j.ranks), (0.0,) * len(j.ranks), j.group) for j in judged]
    if any(len(set(j.ranks)) > 1 for j in judged):
        assert value("half", *flat) == 0.5
        assert value("strict", *flat) == 0


@given(judgements())
def test_minus_the_rank_is_always_right(judged):
    oracle = [one(tuple(j.ranks), tuple(-float(r) for r in j.ranks), j.group, j.kind) for j in judged]
    for protocol in PROTOCOLS:
        found = measure(protocol, oracle)
        assert found.accuracy is None or found.accuracy.mean == pytest.approx(1)
        assert found.label_ties == found.score_ties


@given(judgements(), st.floats(0.1, 10), st.integers(-5, 5))
def test_only_the_order_counts_where_no_threshold_does(judged, scale, shift):
    moved = [one(tuple(j.ranks), tuple(s * scale + shift for s in j.scores), j.group, j.kind) for j in judged]
    for protocol in PROTOCOLS:
        assert measure(protocol, moved) == measure(protocol, judged)


@given(judgements())
def test_a_swap_of_the_pictures_changes_nothing(judged):
    swapped = [one(tuple(j.ranks)[::-1], tuple(j.scores)[::-1], j.group, j.kind) for j in judged]
    for protocol in PROTOCOLS:
        a, b = measure(protocol, judged), measure(protocol, swapped)
        assert (a.pairs, a.score_ties, a.label_ties) == (b.pairs, b.score_ties, b.label_ties)
        assert (a.accuracy is None) == (b.accuracy is None)
        assert a.accuracy is None or a.accuracy.mean == pytest.approx(b.accuracy.mean)


def test_a_swap_of_the_preference_turns_a_strict_win_into_a_loss_and_leaves_ties_wrong():
    assert (value("strict", one((1, 2), (2, 1))), value("strict", one((2, 1), (2, 1)))) == (1, 0)
    assert (value("strict", one((1, 2), (1, 1))), value("strict", one((2, 1), (1, 1)))) == (0, 0)


def test_invalid_scores_are_counted_and_never_zero():
    found = measure("half", [one((1, 2), (NAN, 5), "a"), one((1, 2), (-1, -2), "b"), one((1, 2, 3), (NAN, 2, 1), "c")])
    assert (found.pairs, found.invalid) == (2, 3)
    assert found.accuracy.mean == 1
    assert measure("rewardbench2", [one((1, 2, 2), (3, NAN, 1))]).accuracy is None
    assert measure("strict", [one((1, 2), (NAN, NAN))]).accuracy is None


def test_pickapic_calls_a_tie_what_is_within_the_threshold():
    near = one((1, 1), (0.0, 0.2))  # shares .45 and .55
    assert value("pickapic", near) == 0.5
    assert value("pickapic", near, threshold=0.1) == 1
    assert value("pickapic", near, threshold=0.1, scale=100) == 0.5


def test_the_threshold_is_picked_on_validation_data_and_is_the_smallest_of_equals():
    ties = [one((1, 1), (0.0, 0.5), str(k)) for k in range(3)]  # share gap .245
    clear = [one((1, 2), (2.0, 0.0), "clear")]  # share gap .76
    assert pick_threshold(ties + clear) == 0.3
    assert pick_threshold(clear) == 0
    with pytest.raises(ConfigError, match="validation"):
        pick_threshold([one((1, 2), (NAN, 0))])


def test_rewardbench_gives_a_constant_a_quarter_of_four_and_an_oracle_all():
    ranks = (1, 2, 2, 2)
    assert item_credit(ranks, (0, 0, 0, 0)) == [0.25]
    assert item_credit(ranks, (1, 0, 0, 0)) == [1]
    assert item_credit(ranks, (1, 1, 0, 0)) == [0.5]
    assert item_credit(ranks, (0, 1, 1, 0)) == [0]


def test_kinds_count_alike_however_many_prompts_they_have():
    judged = [one((1, 2), (1, 0), f"r{k}", "right") for k in range(9)] + [one((1, 2), (0, 1), "w", "wrong")]
    assert value("strict", *judged) == 0.9
    found = measure("editreward", judged)
    assert found.accuracy.mean == pytest.approx(0.5)
    assert found.by_kind == {"right": 1, "wrong": 0}
    assert value("rewardbench2", *judged) == pytest.approx(0.5)


def test_pairs_are_averaged_over_pairs_and_rankings_over_prompts():
    many, few = one((1, 2, 3), (3, 2, 1), "many"), one((1, 2), (1, 2), "few")
    assert value("half", many, few) == 0.75
    assert value("imagereward", many, few) == 0.5


def test_the_interval_resamples_prompts_and_not_pairs():
    def width(groups: int) -> float:
        judged = [one((1, 2), (k % 2, 0.5), str(k % groups)) for k in range(200)]
        found = measure("half", judged).accuracy
        return found.hi - found.lo

    assert width(2) > 0.9  # one prompt is all right, the other all wrong
    assert width(200) < 0.2


def test_ties_of_rewardbench():
    same, other = [((0.0,) * 3, (0.0,) * 2)], [((0.0,), (0.0, 0.0))]
    assert ties_score(same, other) == 0
    tied, reference = [((1.0, 1.0), (0.0, 0.0))], [((1.0,), (0.0,))]
    assert ties_score(tied, reference) == pytest.approx(1.01)
    # spread 2, margins 1 and 3: both accurate, neither margin of tied exceeds the spread; tanh(1/2 - 1) = -.46212
    apart = ties_score([((3.0, 1.0), (0.0,))], [((3.0,), (0.0,))])
    assert apart == pytest.approx(0.6 + 0.01 * math.tanh(-0.5))
    with pytest.raises(ConfigError, match="references"):
        ties_score(tied, [])


def test_a_score_for_every_rank_and_a_known_protocol_are_required():
    with pytest.raises(ConfigError, match="fit"):
        measure("half", [one((1, 2), (1, 2, 3))])
    with pytest.raises(ConfigError, match="rewardbench2"):
        measure("halves", [])
