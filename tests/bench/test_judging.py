"""What the bench of judges counts: order, ties, gains and candidates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.bench import judging
from diffalign.bench.judging import JudgeBench, agreement, paired_gain, told_apart
from diffalign.cli.bench_judges import lines
from diffalign.errors import ConfigError
from diffalign.reward_kinds import FunctionReward
from diffalign.world.edit_sets import OUTCOMES, verify_edits
from diffalign.zoo.vlm_measure import attempts, correlation, spearman


def test_a_judge_in_order_tells_every_pair_apart_and_a_constant_one_half() -> None:
    truth = [0.0, 0.5, 0.5, 1.0]
    assert told_apart([1, 2, 3, 4], truth) == 1
    assert told_apart([4, 3, 2, 1], truth) == 0
    assert told_apart([7, 7, 7, 7], truth) == 0.5


def test_agreement_counts_valid_rows_and_leaves_the_others_out() -> None:
    found = agreement([1.0, math.nan, 3.0, 4.0], [0.0, 0.9, 0.5, 1.0], 0)
    assert found["valid"]["mean"] == 0.75
    assert found["spearman"]["mean"] == pytest.approx(1)
    assert "spearman" not in agreement([math.nan] * 4, [0.0, 0.9, 0.5, 1.0], 0)


def test_the_rank_correlation_lies_in_its_interval_and_turns_with_its_sign() -> None:
    a, b = torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist(), list(range(50))
    found = correlation(a, b)
    assert found.lo <= found.mean <= found.hi
    assert spearman([-x for x in a], b) == pytest.approx(-found.mean)


def test_passes_that_say_the_same_gain_nothing() -> None:
    same = [0.1, 0.5, 0.2, 0.9]
    gain = paired_gain(same, same, [0.0, 0.4, 0.3, 1.0], 0)
    assert (gain.mean, gain.lo, gain.hi) == (0, 0, 0)
    assert math.isnan(paired_gain([math.nan] * 4, same, same, 0).mean)


def test_attempts_have_every_outcome_in_turn_and_their_exact_quality() -> None:
    tried = attempts(20, 0)
    assert [one.outcome for one in tried[:5]] == list(OUTCOMES)
    assert all(one.quality == 1 for one in tried if one.outcome == "exact")
    assert all(one.quality == 0 for one in tried if one.outcome == "none")
    seen = verify_edits(torch.stack([one.media for one in tried]), [one.case for one in tried])
    assert sum(abs(a.quality - b.quality) < 0.01 for a, b in zip(seen, tried, strict=True)) >= 18


def test_an_exact_reward_picks_the_best_edit_and_a_constant_one_the_first() -> None:
    def exact(media: Tensor, cases: Any) -> Tensor:
        return torch.tensor([verdict.quality for verdict in verify_edits(media, cases)])

    candidates = judging._made_candidates(JudgeBench(choices=6, candidates=4))
    best = judging._chosen(FunctionReward(exact, {}), candidates, 0)
    assert best["best by editscore"]["mean"] == pytest.approx(best["truly best"]["mean"], abs=0.05)
    plain = judging._chosen(FunctionReward(lambda media, cases: torch.zeros(len(cases)), {}), candidates, 0)
    assert plain["best by editscore"] == plain["first"]
    assert plain["gain"]["mean"] == 0


def test_figures_are_printed_one_a_line() -> None:
    found = {"a": {"n": 3, "share": {"mean": 0.5, "lo": 0.25, "hi": 0.75}}, "b": 0.12345}
    assert lines(found) == ["a / n: 3", "a / share: 0.500 [0.250, 0.750]", "b: 0.123"]


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ConfigError, match="edits is 0"):
        JudgeBench(edits=0)
