from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.train import overoptimisation as over

PROMPTS = torch.arange(6).repeat_interleave(4)
seeds = st.integers(0, 2**31)
moderate = st.floats(-10, 10)


def drawn(seed: int, rows: int = 24) -> Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed))


def test_the_frontier_of_the_worked_example() -> None:
    assert over.frontier_auc([0, 1, 2, 4], [0, 0.5, 0.8, 0.6], 4) == pytest.approx(0.525)


@given(st.lists(st.tuples(st.floats(0, 5), moderate), min_size=1, max_size=6), st.floats(0, 5), moderate)
def test_a_dominated_point_changes_no_frontier(points: list[tuple[float, float]], kl: float, gain: float) -> None:
    assume(any(k <= kl and g >= gain for k, g in points) or gain <= 0)
    kls, gains = zip(*points, strict=True)
    whole = over.frontier_auc([*kls, kl], [*gains, gain], 4)
    assert whole == pytest.approx(over.frontier_auc(kls, gains, 4))


def test_a_frontier_without_a_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="budget above 0"):
        over.frontier_auc([1], [1], 0)


def test_the_hypervolume_of_the_worked_example() -> None:
    assert over.hypervolume([(0.5, 0.9), (0.8, 0.6)]) == pytest.approx(0.63)
    assert over.hypervolume([(0.5, 0.9), (0.8, 0.6), (0.4, 0.5), (-1, 2)]) == pytest.approx(0.63)


def test_the_scaling_curves_peak_where_the_paper_says() -> None:
    chosen, trained = over.Gao(1, 0.05, "best_of_n"), over.Gao(2, 0.5, "rl")
    assert (chosen.peak, chosen(chosen.peak)) == pytest.approx((10, 5))
    assert (trained.peak, trained(trained.peak)) == pytest.approx((20.0855, 10.0428), abs=1e-4)
    assert trained(0) == 0
    assert over.Gao(1, 0).peak == math.inf


@pytest.mark.parametrize("form", ["rl", "best_of_n"])
@given(alpha=st.floats(0.1, 3), beta=st.floats(-0.5, 0.5))
def test_a_fit_returns_the_curve_that_made_the_points(form: over.Form, alpha: float, beta: float) -> None:
    curve, kls = over.Gao(alpha, beta, form), [0.5, 1.0, 4.0, 9.0, 30.0]
    fitted = over.fit_gao([*kls, 50.0], [*(curve(math.sqrt(k)) for k in kls), math.nan], form)
    assert (fitted.alpha, fitted.beta) == pytest.approx((alpha, beta), abs=1e-6)


def test_a_fit_of_one_point_is_refused() -> None:
    with pytest.raises(ConfigError, match="two different KL"):
        over.fit_gao([1, 1], [0.1, 0.2])


@given(seeds)
def test_nothing_has_happened_at_the_base_model(seed: int) -> None:
    base, gold = drawn(seed), drawn(seed + 1)
    assert over.standardised_gain(base, base, PROMPTS) == over.Gain(0, 0)
    assert over.panel_gain({"a": gold}, {"a": gold}, PROMPTS).value == 0
    gap = over.gap_interval((base, base), [(gold, gold)], PROMPTS, draws=10)
    assert gap is not None
    assert gap.mean == 0
    assert over.path_kl(torch.zeros(3, 4), torch.ones(4)) == 0


@given(seeds, st.floats(0.1, 50), moderate)
def test_gains_and_the_gap_do_not_see_the_scale_of_a_scorer(seed: int, scale: float, shift: float) -> None:
    base, now = drawn(seed), drawn(seed + 1) + 1
    plain, rescaled = (over.standardised_gain(a, b, PROMPTS) for a, b in ((now, base), (now * scale, base * scale)))
    assert rescaled.value == pytest.approx(plain.value, abs=1e-4)
    panel = over.panel_gain({"a": now * scale + shift, "b": base}, {"a": base * scale + shift, "b": now}, PROMPTS)
    same = over.panel_gain({"a": now, "b": base}, {"a": base, "b": now}, PROMPTS)
    assert panel.value == pytest.approx(same.value, abs=1e-3)
    gap = over.hacking_gap(plain.value, panel.value)
    assert gap == pytest.approx(over.hacking_gap(plain.value, same.value), abs=1e-3)


def test_a_gain_is_in_deviations_within_a_prompt() -> None:
    base = torch.tensor([0.0, 2, 100, 102])
    prompts = torch.tensor([7, 7, 3, 3])
    assert over.pooled_std(base, prompts) == 1
    gain = over.standardised_gain(base + torch.tensor([1.0, 1, 3, 3]), base, prompts)
    assert (gain.value, gain.se) == pytest.approx((2, 1))


def test_one_image_per_prompt_is_measured_against_all() -> None:
    assert over.pooled_std(torch.tensor([0.0, 2]), torch.tensor([0, 1])) == 1
    assert math.isnan(over.standardised_gain(torch.ones(4), torch.zeros(4), torch.tensor([0, 0, 1, 1])).value)


def test_invalid_rewards_are_left_out_with_their_partner() -> None:
    base, now = torch.tensor([0.0, 2, math.nan, 102]), torch.tensor([1.0, 3, 500, math.nan])
    prompts = torch.tensor([0, 0, 1, 1])
    assert over.mean_change(now, base, prompts).value == 1
    assert math.isnan(over.mean_change(now * math.nan, base, prompts).value)


def test_the_share_that_transfers_waits_for_a_gain() -> None:
    assert over.transfer(2, 0.5) == 0.25
    assert math.isnan(over.transfer(0.1, 0.5))


def test_the_gap_interval_is_around_the_gap() -> None:
    base, gold = drawn(1), drawn(2)
    told = over.gap_interval((base + 1, base), [(gold - 1, gold)], PROMPTS, draws=200)
    assert told is not None
    exact = 1 / over.pooled_std(base, PROMPTS) + 1 / over.pooled_std(gold, PROMPTS)
    assert told.lo - 1e-5 <= exact <= told.hi + 1e-5
    assert told.mean == pytest.approx(exact, abs=1e-5)


def test_there_is_no_gap_without_a_reward_that_varies() -> None:
    flat, gold = torch.ones(24), drawn(2)
    assert over.gap_interval((flat, flat), [(gold, gold)], PROMPTS) is None
    assert over.gap_interval((gold, gold), [(flat, flat)], PROMPTS) is None
    both = over.gap_interval((gold + 1, gold), [(flat, flat), (gold, gold)], PROMPTS, draws=10)
    assert both is not None
    assert both.mean == pytest.approx(1 / over.pooled_std(gold, PROMPTS), abs=1e-5)


def test_the_moves_of_a_panel_have_the_panels_gain() -> None:
    base = {"a": drawn(1), "b": 100 * drawn(2), "flat": torch.ones(24)}
    now = {name: values + k for k, (name, values) in enumerate(base.items(), 1)}
    moves = over.panel_moves(now, base, PROMPTS)
    assert float(moves.mean()) == pytest.approx(over.panel_gain(now, base, PROMPTS).value, abs=1e-5)
    assert over.panel_moves({}, {}, PROMPTS).isnan().all()


def test_a_run_is_summed_up_by_its_evaluations() -> None:
    golds, kls = [0.0, 0.5, 0.8, 0.6], [0.0, 1.0, 2.0, 4.0]
    rows: list[dict[str, Any]] = [
        {"step": 10 * k, "proxy_gain": float(k), "heldout_gain": gold, "kl_base": kl, "diversity": 1.0}
        for k, (gold, kl) in enumerate(zip(golds, kls, strict=True))
    ]
    rows[-1] |= {"transfer": 0.2, "hacking_gap": 2.4, "hacking_gap_lo": 2.0, "hacking_gap_hi": 2.8}
    told = over.of_run([*rows, {"step": 35, "reward": 1.0}])
    assert told["frontier"] == {"gain": pytest.approx(0.525), "kl": 4.0}
    smoothed = over.turn_over([0, 1, 2, 3], golds)
    assert told["turn_over"]["step"] == 10 * smoothed.index
    assert told["turn_over"]["loss"] == smoothed.loss
    assert (told["step"], told["transfer"]) == (30, 0.2)
    assert told["hacking_gap"] == {"mean": 2.4, "lo": 2.0, "hi": 2.8}
    assert told["hypervolume"] == pytest.approx(0.8)


def test_a_run_without_a_panel_or_without_a_kl_says_only_what_it_knows() -> None:
    assert over.of_run([{"step": 0, "proxy_gain": 0.0}]) == {}
    assert over.of_run([]) == {}
    told = over.of_run([{"step": 0, "heldout_gain": 0.0}, {"step": 5, "heldout_gain": 0.1, "kl_base": 0.0}])
    assert "frontier" not in told
    assert "hypervolume" not in told
    assert told["turn_over"] == {"step": 5, "loss": 0.0, "proxy_since": None}


def test_path_kl_is_the_kl_of_two_normals_summed_over_steps() -> None:
    moved, noise = torch.tensor([[0.3, 0.2], [0.1, 0.4]]), torch.tensor([0.5, 2.0])
    normal = torch.distributions.Normal
    exact = [
        sum(
            float(torch.distributions.kl_divergence(normal(m.sqrt(), nu), normal(0.0, nu)))
            for m, nu in zip(row, noise, strict=True)
        )
        for row in moved
    ]
    assert over.path_kl(moved, noise) == pytest.approx(sum(exact) / 2)


def test_the_turn_over_tells_what_was_lost_since() -> None:
    found = over.turn_over([0, 1, 2, 3], [0, 0.5, 0.4, 0.1], weight=0)
    assert found.index == 1
    assert (found.loss, found.proxy_since) == pytest.approx((0.4, 2))
    assert over.turn_over([0, 1, 2], [0, 1, 2]).index == 2
    with pytest.raises(ConfigError, match="NaN at every"):
        over.turn_over([0], [math.nan])


def test_smoothing_repeats_itself_over_a_missing_value() -> None:
    assert over.smooth([1, math.nan, 2]) == [1, 1, 1.5]
    assert over.smooth([1, 5], weight=0) == [1, 5]


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=12))
def test_the_rank_correlation_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import spearmanr

    a, b = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    found = over.spearman(torch.cat([a, torch.tensor([math.nan])]), torch.cat([b, torch.tensor([1.0])]))
    if len(set(a.tolist())) == 1 or len(set(b.tolist())) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(float(spearmanr(a, b).statistic))


def test_agreement_is_judged_within_a_prompt() -> None:
    proxy = torch.tensor([1.0, 2, 11, 12])
    gold = torch.tensor([2.0, 1, 12, 11])
    assert over.spearman(proxy, gold) > 0
    assert over.spearman_within(proxy, gold, torch.tensor([0, 0, 1, 1])).value == pytest.approx(-1)
    assert math.isnan(over.spearman_within(proxy, torch.ones(4), torch.tensor([0, 0, 1, 1])).value)
