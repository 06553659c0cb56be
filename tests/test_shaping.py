from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import fmean, pstdev

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from diffalign import shaping
from diffalign.errors import ConfigError
from diffalign.shaping import Running

Against = Callable[[Tensor, Tensor], Tensor]
AGAINST: dict[str, Against] = {
    "par": shaping.par,
    "steep par": lambda r, refs: shaping.par(r, refs, 40.0),
    "centred": shaping.centred,
    "lsc": shaping.lsc,
    "cdf": shaping.calibrate_cdf,
    "plain cdf": lambda r, refs: shaping.calibrate_cdf(r, refs, smoothing=False),
    "smooth cdf": shaping.smooth_cdf,
}
RUNNING = {"mean_std": shaping.mean_std, "minmax": shaping.minmax, "running_clip": shaping.running_clip}
RULES: dict[str, Callable[..., Tensor]] = {
    "mean": shaping.mean,
    "worst": shaping.worst,
    "uwo": shaping.uwo,
    "lcb": shaping.lcb,
    "softmin": shaping.softmin,
    "median": shaping.median,
    "trimmed": shaping.trimmed,
}
against = pytest.mark.parametrize("shape", AGAINST.values(), ids=AGAINST)
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
moderate = st.floats(-100, 100, width=32)
anything = st.floats(-1e4, 1e4, width=32)


def lists(of: st.SearchStrategy[float], least: int = 1, most: int = 12) -> st.SearchStrategy[list[float]]:
    return st.lists(of, min_size=least, max_size=most)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_par_has_the_published_values() -> None:
    assert float(shaping.par(double(1), double(0))) == pytest.approx(0.7310586)
    assert float(shaping.par(double(1), double(2))) == pytest.approx(0.2689414)
    assert float(shaping.par(double(3), double(0, 2))) == pytest.approx(0.8418164)


@given(anything, st.floats(0.01, 50))
def test_par_against_itself_is_one_half(r: float, k: float) -> None:
    assert float(shaping.par(double(r), double(r), k)) == 0.5


@given(moderate, lists(moderate))
def test_par_of_the_negative_is_the_complement(r: float, refs: list[float]) -> None:
    both = shaping.par(double(r), double(*refs)) + shaping.par(double(-r), -double(*refs))
    assert float(both) == pytest.approx(1)


@given(moderate, lists(moderate), moderate)
def test_par_lsc_and_centred_do_not_see_a_common_shift(r: float, refs: list[float], shift: float) -> None:
    for shape in (shaping.par, shaping.lsc, shaping.centred):
        moved = shape(double(r + shift), double(*refs) + shift)
        assert torch.allclose(moved, shape(double(r), double(*refs)), atol=1e-9)


@given(moderate, lists(moderate), st.floats(0.1, 20))
def test_the_slope_of_par_is_at_most_a_quarter_of_k(r: float, refs: list[float], k: float) -> None:
    reward = double(r).requires_grad_()
    (slope,) = torch.autograd.grad(shaping.par(reward, double(*refs), k).sum(), reward)
    assert 0 <= float(slope) <= k / 4 + 1e-12


def test_lsc_has_the_published_value() -> None:
    spread = 2**-0.5  # std1 of (-spread, spread) is 1
    assert float(shaping.lsc(double(0), double(-spread, spread))) == pytest.approx(-1.340034, abs=1e-6)


def test_centred_is_the_mean_gap() -> None:
    assert shaping.centred(double(1, 4), torch.tensor([[0.0, 2.0], [1.0, 3.0]])).tolist() == [0, 2]


def test_the_cdf_counts_ties_as_one_half() -> None:
    refs = double(0.1, 0.2, 0.2, 0.9)
    assert float(shaping.calibrate_cdf(double(0.2), refs, smoothing=False)) == 0.5
    assert float(shaping.calibrate_cdf(double(0.9), refs, smoothing=False)) == 1 - 1 / (2 * 4)
    assert float(shaping.calibrate_cdf(double(0.9), refs)) == 4 / 5
    assert shaping.calibrate_cdf(double(0, 1), refs).tolist() == [0.1, 0.9]


@pytest.mark.parametrize("name", ["cdf", "plain cdf", "smooth cdf"])
@given(refs=lists(anything, most=30))
def test_the_mean_of_a_cdf_over_its_references_is_one_half(name: str, refs: list[float]) -> None:
    assert float(AGAINST[name](double(*refs), double(*refs)).mean()) == pytest.approx(0.5, abs=1e-12)


@given(lists(st.integers(-50, 50).map(float)), lists(st.integers(-50, 50).map(float)))
def test_the_cdf_does_not_see_an_increasing_map(rewards: list[float], refs: list[float]) -> None:
    r, known = double(*rewards), double(*refs)
    for bent in (lambda x: 100 * x + 7, lambda x: x**3, lambda x: (x / 50).exp()):
        assert torch.equal(shaping.calibrate_cdf(bent(r), bent(known)), shaping.calibrate_cdf(r, known))


@given(lists(moderate), lists(moderate))
def test_cdfs_of_the_negative_are_the_complement(rewards: list[float], refs: list[float]) -> None:
    for shape in (shaping.calibrate_cdf, shaping.smooth_cdf):
        both = shape(double(*rewards), double(*refs)) + shape(-double(*rewards), -double(*refs))
        assert torch.allclose(both, torch.ones_like(both))


@given(lists(anything), lists(anything))
def test_a_smoothed_cdf_stays_inside_its_ends_and_follows_the_plain_one(
    rewards: list[float], refs: list[float]
) -> None:
    plain = shaping.calibrate_cdf(double(*rewards), double(*refs), smoothing=False)
    found = shaping.calibrate_cdf(double(*rewards), double(*refs))
    assert ((found > 0) & (found < 1)).all()
    assert torch.allclose(found, (len(refs) * plain + 0.5) / (len(refs) + 1))


def test_the_cdf_ranks_like_the_reward_where_there_are_many_references() -> None:
    r = torch.randn(50, generator=torch.Generator().manual_seed(0))
    refs = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(shaping.calibrate_cdf(r, refs).argsort(), r.argsort())


@given(lists(anything, most=20))
def test_the_smooth_cdf_meets_the_empirical_one_at_every_reference(refs: list[float]) -> None:
    known = double(*refs)
    assert torch.allclose(shaping.smooth_cdf(known, known), shaping.calibrate_cdf(known, known))


@given(moderate, st.lists(moderate, min_size=2, max_size=12, unique=True))
def test_the_gradient_of_the_smooth_cdf_is_its_difference_and_never_zero_in_range(r: float, refs: list[float]) -> None:
    known = double(*refs)
    spread = float(known.max() - known.min())
    assume(spread > 1e-2 and min(abs(r - ref) for ref in refs) > 1e-4)  # not at a corner
    reward, step = double(r).requires_grad_(), 1e-5
    (slope,) = torch.autograd.grad(shaping.smooth_cdf(reward, known).sum(), reward)
    ends = [float(shaping.smooth_cdf(double(r + s), known)) for s in (-step, step)]
    assert float(slope) == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-3, abs=1e-8)
    assert min(refs) > r or r > max(refs) or float(slope) > 0


def test_beyond_the_range_the_smooth_cdf_still_rises() -> None:
    reward = double(-1, 2).requires_grad_()
    (slope,) = torch.autograd.grad(shaping.smooth_cdf(reward, double(0, 0.5, 1)).sum(), reward)
    assert (slope > 0).all()


def test_the_empirical_cdf_has_no_gradient() -> None:
    assert not shaping.calibrate_cdf(double(1).requires_grad_(), double(0, 2)).requires_grad


@against
@given(rewards=lists(anything, least=2), refs=lists(anything))
def test_shapes_keep_the_order_and_stay_finite(shape: Against, rewards: list[float], refs: list[float]) -> None:
    found = shape(torch.tensor(rewards).sort().values, torch.tensor(refs))
    assert found.isfinite().all()
    assert (found.diff() >= -1e-6 * found.abs().max().clamp(min=1)).all()


@against
def test_rows_have_their_own_references_and_nan_counts_nowhere(shape: Against) -> None:
    r = double(0.3, torch.nan, 0.3, 0.3)
    refs = torch.tensor([[0.1, 0.5, torch.nan], [0.1, 0.5, 0.9], [torch.nan] * 3, [0.2, 0.6, 0.9]], dtype=torch.float64)
    before = refs.clone()
    found = shape(r, refs)
    assert found.isnan().tolist() == [False, True, True, False]
    assert float(found[0]) == float(shape(r[:1], refs[0, :2]))
    assert float(found[3]) == float(shape(r[:1], refs[3]))
    assert torch.equal(refs.nan_to_num(), before.nan_to_num())
    assert shape(r[:1], r[:0]).isnan().all()


@against
def test_a_row_without_references_spoils_no_gradient(shape: Against) -> None:
    reward = double(0.3, 0.3).requires_grad_()
    found = shape(reward, double(0.1, 0.5, torch.nan, torch.nan).view(2, 2))
    if found.requires_grad:
        (slope,) = torch.autograd.grad(found[:1].sum(), reward)
        assert slope.isfinite().all()


@against
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_results_are_float32_at_least(shape: Against, dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert shape(torch.ones(2, dtype=dtype), torch.zeros(3)).dtype == expected


@given(st.floats(-60, 60), lists(st.floats(0, 1), least=2))
def test_tilt_rises_from_0_to_1_for_both_signs(t: float, shares: list[float]) -> None:
    for normalise in (True, False):
        assert (shaping.tilt(double(*shares).sort().values, t, normalise=normalise).diff() >= -1e-12).all()
    assert shaping.tilt(double(0, 1), t).tolist() == pytest.approx([0, 1])


@given(st.floats(-30, 30).filter(lambda t: abs(t) > 1e-3), st.floats(0, 1))
def test_tilt_is_the_published_exponential_brought_to_the_unit_interval(t: float, u: float) -> None:
    raw = shaping.tilt(double(0, u, 1), t, normalise=False)
    assert float(raw[1]) == pytest.approx(math.copysign(math.exp(t * u), t))
    scaled = float((raw[1] - raw[0]) / (raw[2] - raw[0]))
    assert float(shaping.tilt(double(u), t)) == pytest.approx(scaled, abs=1e-9)


def test_tilt_by_nothing_is_nothing_and_a_strong_tilt_is_finite() -> None:
    assert shaping.tilt(double(0.3), 0).tolist() == [0.3]
    assert shaping.tilt(torch.tensor([0.3]), 1e-9).tolist() == pytest.approx([0.3])
    assert shaping.tilt(torch.tensor([-1e4, 0.5, 1e4]), 500).tolist() == pytest.approx([0, 0, 1])
    assert shaping.tilt(double(torch.nan), 5).isnan().all()


@given(st.lists(lists(moderate, least=0), min_size=1, max_size=5))
def test_running_statistics_are_those_of_all_rewards_at_once(batches: list[list[float]]) -> None:
    running = Running()
    for batch in batches:
        running = running.update(torch.tensor([*batch, torch.nan]))
    every = list(itertools.chain(*batches))
    assert running.count == len(every)
    if every:
        assert (running.mean, running.std) == pytest.approx((fmean(every), pstdev(every)), abs=1e-6)
        assert (running.low, running.high) == (min(every), max(every))


def test_running_shapes_count_a_batch_before_they_transform_it() -> None:
    r = double(0, 2, torch.nan, 4)
    std = math.sqrt(8 / 3)
    found, running = shaping.mean_std(r, Running())
    assert found.tolist() == pytest.approx([-2 / std, 0, math.nan, 2 / std], nan_ok=True)
    assert shaping.minmax(r, Running())[0].tolist() == pytest.approx([0, 0.5, math.nan, 1], nan_ok=True)
    assert shaping.running_clip(r, Running())[0].tolist() == pytest.approx([2 - std, 2, math.nan, 2 + std], nan_ok=True)
    assert shaping.minmax(double(8), running)[0].tolist() == [1]
    assert running.count == 3


@pytest.mark.parametrize("shape", RUNNING.values(), ids=RUNNING)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, -1e4])
def test_one_distinct_value_divides_by_nothing(shape: Callable[..., tuple[Tensor, Running]], value: float) -> None:
    running = Running()
    for _ in range(3):
        found, running = shape(torch.full((3,), value), running)
    assert running.std == 0
    expected = {"mean_std": 0.0, "minmax": 0.5, "running_clip": value}[shape.__name__]
    assert found.tolist() == pytest.approx([expected] * 3, abs=1e-6)


@pytest.mark.parametrize("shape", RUNNING.values(), ids=RUNNING)
@given(rewards=lists(anything, least=2))
def test_running_shapes_keep_the_order_within_a_batch(
    shape: Callable[..., tuple[Tensor, Running]], rewards: list[float]
) -> None:
    r = torch.tensor(rewards).sort().values
    found, _ = shape(r, Running())
    assert found.isfinite().all()
    assert (found.diff() >= 0).all()
    if shape is shaping.minmax:
        assert ((found >= 0) & (found <= 1)).all()


def test_a_batch_without_a_valid_reward_changes_no_statistic() -> None:
    for shape in RUNNING.values():
        found, running = shape(torch.tensor([torch.nan]), Running())
        assert found.isnan().all()
        assert running == Running()


def test_ensembles_have_the_published_values() -> None:
    z = double(1, 2, 3).view(1, 3)
    expected = {"mean": 2, "worst": 1, "uwo": 1.666667, "lcb": 1.183503, "softmin": 1.691006, "median": 2, "trimmed": 2}
    assert {name: float(rule(z)) for name, rule in RULES.items()} == pytest.approx(expected, abs=1e-6)


@rules
@given(value=anything, members=st.integers(3, 6))
def test_equal_members_give_that_value(rule: Callable[..., Tensor], value: float, members: int) -> None:
    assert float(rule(torch.full((1, members), value))) == pytest.approx(value, rel=1e-5, abs=1e-5)


@rules
@given(z=lists(moderate, least=3, most=6), seed=st.integers(0, 99))
def test_the_order_of_members_is_of_no_account(rule: Callable[..., Tensor], z: list[float], seed: int) -> None:
    shuffled = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    members = double(*z).view(1, -1)
    assert torch.allclose(rule(members[:, shuffled]), rule(members), atol=1e-9)


@pytest.mark.parametrize("name", ["mean", "worst", "softmin", "median", "trimmed"])
@given(z=lists(moderate, least=3, most=6), raised=st.floats(0, 50), at=st.integers(0, 2))
def test_raising_a_member_never_lowers_the_total(name: str, z: list[float], raised: float, at: int) -> None:
    higher = [v + raised * (k == at) for k, v in enumerate(z)]
    assert float(RULES[name](double(*higher)[None])) >= float(RULES[name](double(*z)[None])) - 1e-9


def test_raising_the_top_member_can_lower_uwo_and_lcb() -> None:
    z, higher = double(0, 0, 1)[None], double(0, 0, 9)[None]
    assert float(shaping.uwo(higher)) < float(shaping.uwo(z))
    assert float(shaping.lcb(higher)) < float(shaping.lcb(z))


@given(lists(moderate, least=2, most=6), st.integers(0, 5), st.floats(0, 9))
def test_up_to_its_bound_lcb_never_falls_with_a_member(z: list[float], at: int, raised: float) -> None:
    k = 1 / math.sqrt(len(z) - 1)
    higher = [v + raised * (i == at % len(z)) for i, v in enumerate(z)]
    assert float(shaping.lcb(double(*higher)[None], k)) >= float(shaping.lcb(double(*z)[None], k)) - 1e-9


@given(lists(moderate, least=2, most=6))
def test_softmin_lies_between_the_mean_and_the_lowest_member(z: list[float]) -> None:
    members = double(*z)[None]
    assert float(shaping.softmin(members, 1e-6)) == pytest.approx(fmean(z), abs=1e-2)
    assert float(shaping.softmin(members, 1e6)) == pytest.approx(min(z), abs=1e-2)


@rules
@given(z=lists(moderate, least=4, most=4))
def test_a_weight_of_two_is_that_member_twice(rule: Callable[..., Tensor], z: list[float]) -> None:
    if rule is shaping.trimmed:  # it drops members, not shares of them
        return
    weighted = rule(double(*z)[None], weights=double(2, 1, 1, 1))
    assert torch.allclose(weighted, rule(double(z[0], *z)[None]), atol=1e-6)


@rules
def test_a_member_without_weight_does_not_count_and_nan_with_weight_does(rule: Callable[..., Tensor]) -> None:
    z = double(1, 2, 3, torch.nan).expand(3, 4)
    found = rule(z, weights=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert found.isnan().tolist() == [False, True, True]
    assert float(found[0]) == pytest.approx(float(rule(z[:1, :3])))
    with pytest.raises(ConfigError, match="negative"):
        rule(z, weights=torch.tensor([1, 1, -1, 1]))


@rules
def test_gradients_of_ensembles_are_finite_where_members_agree(rule: Callable[..., Tensor]) -> None:
    z = double(1, 1, 1)[None].requires_grad_()
    (slope,) = torch.autograd.grad(rule(z).sum(), z)
    assert slope.isfinite().all()
    assert float(slope.sum()) == pytest.approx(1)


def test_trimmed_drops_both_ends_and_has_nothing_left_of_two() -> None:
    assert shaping.trimmed(double(9, 1, 2, -50)[None]).tolist() == [1.5]
    assert shaping.trimmed(double(1, 2)[None]).isnan().all()


def test_disagreement_is_the_difference_of_win_rates() -> None:
    aux = double(0.3, 0.2, 0.1, 0.1, 0.2, 0.3).view(2, 3).T
    assert shaping.disagreement(double(0.1, 0.5, 0.9), aux).tolist() == pytest.approx([-0.5, 0, 0.5])


@given(lists(moderate), st.integers(1, 3))
def test_identical_rankings_agree(r: list[float], members: int) -> None:
    proxy = double(*r)
    assert shaping.disagreement(proxy, torch.stack([proxy] * members, -1)).abs().max() < 1e-12


def test_an_invalid_row_takes_no_part_in_the_win_rates_of_others() -> None:
    found = shaping.disagreement(double(1, 2, torch.nan, 3), double(3, 2, 9, 1)[:, None])
    assert found.tolist() == pytest.approx([-1, 0, math.nan, 1], nan_ok=True)


def test_the_gate_is_on_the_rows_that_disagree_most() -> None:
    assert shaping.gate(double(0.1, torch.nan, 0.9, -1), 0.5).tolist() == [True, False, True, False]
    assert shaping.gate(double(0.1, 0.2)).tolist() == [False, True]
    assert not shaping.gate(double(0.1, 0.2), 0).any()
    assert shaping.gate(double(0.1, 0.2), 1e-9).sum() == 1
    for count in range(1, 101):
        assert shaping.gate(torch.arange(100.0), count / 100).sum() == count  # 0.07 * 100 is a little over 7
    with pytest.raises(ConfigError, match="share"):
        shaping.gate(double(0.1), 1.5)
