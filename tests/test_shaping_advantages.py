"""Advantages: published numbers, and what must not change them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign import shaping
from diffalign.errors import ConfigError

Formula = Callable[[Tensor, Tensor], Tensor]


def one_task(r: Tensor, gid: Tensor, **options: float | bool) -> Tensor:
    return shaping.tmn(r, gid, torch.zeros_like(gid), **options)


FORMULAS: dict[str, Formula] = {
    "grpo": shaping.adv_grpo,
    "grpo sample std": partial(shaping.adv_grpo, ddof=1),
    "dr": shaping.adv_dr,
    "rloo": shaping.adv_rloo,
    "global": shaping.adv_global_std,
    "pooled": partial(shaping.adv_global_std, pooled=True),
    "tmn": partial(one_task, reweight=False),
}
WEIGHTED: dict[str, Formula] = {
    "tmn weighted": one_task,
    "trimmed": partial(shaping.adv_grpo, trim=(0.25, 0.25)),
    "trimmed dr": partial(shaping.adv_dr, trim=(0.34, 0)),
    "floor": partial(shaping.adv_grpo, floor=0.5),
    "gdpo": lambda r, gid: shaping.gdpo(r.unsqueeze(-1), torch.ones(1), gid),
    "joint": lambda r, gid: shaping.joint(r.unsqueeze(-1), torch.ones(1), gid),
}
formulas = pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
everything = pytest.mark.parametrize("formula", (FORMULAS | WEIGHTED).values(), ids=FORMULAS | WEIGHTED)
value = st.integers(-400, 400).map(lambda k: k / 4)
rows = st.lists(st.tuples(value, st.integers(-3, 3)), min_size=1, max_size=24)
holes = st.lists(st.tuples(st.one_of(value, st.just(float("nan"))), st.integers(-3, 3)), min_size=1, max_size=24)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def split(pairs: list[tuple[float, int]]) -> tuple[Tensor, Tensor]:
    return double(*(r for r, _ in pairs)), torch.tensor([g for _, g in pairs])


def same(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def near(found: Tensor, *expected: float, atol: float = 1e-6) -> bool:
    return torch.allclose(found.double().flatten(), double(*expected), atol=atol, rtol=0)


def test_dr_and_rloo_have_the_published_values() -> None:
    r = double(1, 2, 3, 6)
    assert near(shaping.adv_dr(r, same(4)), -2, -1, 0, 3)
    assert near(shaping.adv_rloo(r, same(4)), -8 / 3, -4 / 3, 0, 4)


@pytest.mark.parametrize(
    ("successes", "size", "weight"), [(12, 24, 2.0), (6, 24, 2.309401), (3, 24, 3.023716), (1, 24, 5.003788)]
)
def test_grpo_weighs_a_prompt_by_the_inverse_deviation_of_its_success(successes: int, size: int, weight: float) -> None:
    r = double(*[1] * successes, *[0] * (size - successes))
    found = shaping.adv_grpo(r, same(size), eps=0)
    p = successes / size
    assert float(found[0] - found[-1]) == pytest.approx((p * (1 - p)) ** -0.5)
    assert float(found[0]) == pytest.approx(((1 - p) / p) ** 0.5)
    assert float(found[0] - found[-1]) == pytest.approx(weight, rel=0.03)  # the table of the specification rounds 5.00


def test_grpo_divides_by_the_deviation_plus_eps() -> None:
    r = double(1, 2, 3, 6)
    assert near(shaping.adv_grpo(r, same(4)), *((r - 3) / (3.5**0.5 + 1e-4)).tolist())
    assert near(shaping.adv_grpo(r, same(4), ddof=1, eps=1e-6), *((r - 3) / ((14 / 3) ** 0.5 + 1e-6)).tolist())
    assert near(shaping.adv_grpo(r, same(4), eps=0, floor=10), *((r - 3) / 10).tolist())


def test_the_global_deviation_sees_the_distance_between_prompts_and_the_pooled_one_does_not() -> None:
    r, gid = double(0, 2, 10, 12), torch.tensor([4, 4, 9, 9])
    assert near(shaping.adv_global_std(r, gid, eps=0), -(26**-0.5), 26**-0.5, -(26**-0.5), 26**-0.5)
    assert near(shaping.adv_global_std(r, gid, pooled=True, eps=0), -1, 1, -1, 1)


@given(rows)
def test_the_pooled_deviation_is_that_of_one_task(pairs: list[tuple[float, int]]) -> None:
    r, gid = split(pairs)
    pooled = shaping.adv_global_std(r, gid, pooled=True, ddof=1, eps=1e-6)
    assert torch.allclose(pooled, one_task(r, gid, reweight=False))


def test_trimming_leaves_out_the_ends_of_the_statistics_only() -> None:
    r = double(-100, 1, 2, 3, 100)
    assert near(shaping.adv_dr(r, same(5), trim=(0.2, 0.2)), -102, -1, 0, 1, 98)
    assert near(shaping.adv_grpo(r, same(5), trim=(0.2, 0.2), eps=0)[1:4], -(1.5**0.5), 0, 1.5**0.5)
    assert near(shaping.adv_dr(r, same(5), trim=(0.2, 0)), *(r - 26.5).tolist())
    assert torch.equal(shaping.adv_dr(r, same(5), trim=(0.19, 0)), shaping.adv_dr(r, same(5)))
    with pytest.raises(ConfigError, match="below 1"):
        shaping.adv_dr(r, same(5), trim=(0.5, 0.5))


@formulas
@given(pairs=holes)
def test_advantages_of_each_group_add_up_to_zero(formula: Formula, pairs: list[tuple[float, int]]) -> None:
    r, gid = split(pairs)
    found = formula(r, gid)
    for g in gid.unique():
        assert abs(float(found[gid == g].sum())) < 1e-6 * (1 + float(found.abs().max()))


@everything
@given(pairs=holes, data=st.data())
def test_order_of_rows_and_names_of_groups_do_not_matter(
    formula: Formula, pairs: list[tuple[float, int]], data: st.DataObject
) -> None:
    r, gid = split(pairs)
    order = torch.tensor(data.draw(st.permutations(range(len(r)))))
    names = torch.tensor(data.draw(st.lists(st.integers(-(2**62), 2**62), min_size=7, max_size=7, unique=True)))
    assert torch.allclose(formula(r[order], names[gid[order] + 3]), formula(r, gid)[order], atol=1e-9)


@everything
@given(pairs=holes)
def test_nan_counts_nowhere_and_gets_zero(formula: Formula, pairs: list[tuple[float, int]]) -> None:
    r, gid = split(pairs)
    known, found = ~r.isnan(), formula(r, gid)
    assert (found[~known] == 0).all()
    assert torch.allclose(found[known], formula(r[known], gid[known]), atol=1e-9)


@everything
@given(level=st.floats(-1e4, 1e4, width=32), size=st.integers(1, 9))
def test_equal_rewards_and_lone_ones_have_the_advantage_zero(formula: Formula, level: float, size: int) -> None:
    assert (formula(torch.full((size,), level), same(size)) == 0).all()
    assert (formula(torch.full((size,), level), torch.arange(size)) == 0).all()


@everything
def test_advantages_keep_the_float_type_and_leave_the_rewards_alone(formula: Formula) -> None:
    for dtype, expected in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        r = torch.tensor([1, 2, 5, 0], dtype=dtype)
        assert formula(r, same(4)).dtype == expected
        assert r.tolist() == [1, 2, 5, 0]
    assert formula(torch.zeros(0), same(0)).shape == (0,)


@pytest.mark.parametrize("name", ["grpo", "grpo sample std", "global", "pooled", "tmn"])
@given(pairs=rows, a=st.floats(0.1, 10), b=value)
def test_a_common_affine_change_leaves_scaled_advantages(
    name: str, pairs: list[tuple[float, int]], a: float, b: float
) -> None:
    r, gid = split(pairs)
    formula = partial(FORMULAS[name], eps=1e-12)
    assert torch.allclose(formula(a * r + b, gid), formula(r, gid), atol=1e-6)


@given(rows, st.floats(0.1, 10), st.lists(value, min_size=7, max_size=7))
def test_dr_and_rloo_scale_with_the_reward_and_forget_what_a_prompt_adds(
    pairs: list[tuple[float, int]], a: float, shifts: list[float]
) -> None:
    r, gid = split(pairs)
    for formula in (shaping.adv_dr, shaping.adv_rloo):
        assert torch.allclose(formula(a * r + double(*shifts)[gid + 3], gid), a * formula(r, gid), atol=1e-6)


def test_large_group_ids_stay_apart() -> None:
    gid = torch.tensor([2**24, 2**24, 2**24 + 1, 2**24 + 1])
    assert near(shaping.adv_dr(double(0, 2, 10, 14), gid), -1, 1, -2, 2)
    with pytest.raises(ConfigError, match=r"2\*\*24"):
        shaping.adv_dr(double(0, 2), torch.tensor([0.0, 0.0]))
    with pytest.raises(ConfigError, match="3 rewards and 2 group ids"):
        shaping.adv_dr(double(0, 2, 4), same(2))


def test_columns_are_groups_of_their_own() -> None:
    r, gid = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    for formula in FORMULAS.values():
        assert torch.allclose(formula(r, gid), torch.stack([formula(c, gid) for c in r.unbind(1)], 1))


def test_a_hundred_thousand_rows_take_no_loop() -> None:
    draw = torch.Generator().manual_seed(0)
    r, gid = torch.rand(100_000, generator=draw), torch.randint(0, 6000, (100_000,), generator=draw)
    for formula in (shaping.adv_grpo, shaping.win_rate, one_task):
        assert torch.equal(formula(r, gid), formula(r, gid))


def test_win_rates_count_ties_as_one_half() -> None:
    assert near(shaping.win_rate(double(1, 2, 2, 7, 0), torch.tensor([1, 1, 1, 1, 5]))[:4], 0, 0.5, 0.5, 1)
    assert shaping.win_rate(double(3, torch.nan, 3, 4), torch.tensor([0, 0, 0, 1])).isnan().tolist() == [0, 1, 0, 1]


@given(st.lists(value, min_size=2, max_size=12), st.integers(1, 3))
def test_win_rates_are_means_of_duels_and_add_up_to_half_the_group(values: list[float], groups: int) -> None:
    r = double(*values)
    n = len(r)
    duels = (r.unsqueeze(1) > r).double() + (r.unsqueeze(1) == r).double() / 2
    expected = (duels.sum(1) - 0.5) / (n - 1)
    found = shaping.win_rate(r.repeat(groups), torch.arange(groups).repeat_interleave(n))
    assert torch.allclose(found, expected.repeat(groups))
    assert float(found.sum()) == pytest.approx(groups * n / 2)


@given(st.lists(st.integers(-50, 50).map(float), min_size=2, max_size=9))
def test_judged_pairs_give_the_same_win_rates_as_numbers(values: list[float]) -> None:
    r = double(*values)
    pairs = torch.combinations(torch.arange(len(r)))
    a, b = r[pairs[:, 0]], r[pairs[:, 1]]
    verdict = torch.where(a == b, torch.nan, (a > b).double())
    assert torch.allclose(shaping.win_rate_judged(pairs, verdict, len(r)), shaping.win_rate(r, same(len(r))))


def test_a_row_that_nobody_judged_has_no_win_rate() -> None:
    found = shaping.win_rate_judged(torch.tensor([[0, 2]]), double(1), 3)
    assert found.isnan().tolist() == [False, True, False]
    with pytest.raises(ConfigError, match="outside"):
        shaping.win_rate_judged(torch.tensor([[0, 2]]), double(2), 3)


def test_the_filter_drops_equal_groups_and_keeps_one_that_differs() -> None:
    r, gid = double(1, 1, 1, 0, 0, 1, torch.nan, 1), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    assert shaping.group_filter(r, gid).tolist() == [False] * 3 + [True] * 3 + [False] * 2
    assert not shaping.group_filter(r, gid, 0.5).any()
    assert shaping.frac_zero_std(r, gid) == pytest.approx(2 / 3)


def test_one_reward_that_differs_is_enough_if_it_has_a_weight() -> None:
    r, gid = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), same(2)
    assert shaping.group_filter(r, gid).all()
    assert not shaping.group_filter(r, gid, weights=torch.tensor([1.0, 0.0])).any()
    assert not shaping.group_filter(r, gid, torch.tensor([0.0, 0.6])).any()


@given(rows, st.floats(0, 30))
def test_filtering_then_grpo_is_grpo_on_the_groups_that_are_kept(pairs: list[tuple[float, int]], tau: float) -> None:
    r, gid = split(pairs)
    kept = shaping.group_filter(r, gid, tau)
    assert torch.allclose(shaping.adv_grpo(r[kept], gid[kept]), shaping.adv_grpo(r, gid)[kept])
