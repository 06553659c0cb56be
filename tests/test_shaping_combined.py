"""Several rewards, tasks and hardness: published numbers, and what must not change them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign import shaping
from diffalign.errors import ConfigError

value = st.integers(-400, 400).map(lambda k: k / 4)
rows = st.lists(st.tuples(value, st.integers(-3, 3)), min_size=1, max_size=24)
holes = st.lists(st.tuples(st.one_of(value, st.just(float("nan"))), st.integers(-3, 3)), min_size=1, max_size=24)


def one_task(r: Tensor, gid: Tensor, **options: float | bool) -> Tensor:
    return shaping.tmn(r, gid, torch.zeros_like(gid), **options)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def split(pairs: list[tuple[float, int]]) -> tuple[Tensor, Tensor]:
    return double(*(r for r, _ in pairs)), torch.tensor([g for _, g in pairs])


def same(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def near(found: Tensor, *expected: float, atol: float = 1e-6) -> bool:
    return torch.allclose(found.double().flatten(), double(*expected), atol=atol, rtol=0)


# z = 1 / (sqrt(2)/2 * 2) per reward of a pair: 0.70711; the batch deviation of (-+.70711, -+1.41421) is 1.290994
def test_gdpo_has_the_published_values() -> None:
    members = torch.tensor([[0, 0], [1, 0], [0, 0], [1, 1]], dtype=torch.float64)
    w, gid = torch.ones(2), torch.tensor([0, 0, 1, 1])
    before = shaping.gdpo(members, w, gid, eps=1e-12, batch_norm=False)
    assert near(before, -0.70711, 0.70711, -1.41421, 1.41421, atol=1e-5)
    assert float(before.std()) == pytest.approx(1.290994, abs=1e-6)
    assert near(shaping.gdpo(members, w, gid, eps=1e-12), -0.547723, 0.547723, -1.095445, 1.095445)
    assert near(shaping.joint(members, w, gid, eps=1e-12), -0.70711, 0.70711, -0.70711, 0.70711, atol=1e-5)


def test_opposed_rewards_cancel_unless_their_weights_differ() -> None:
    members = torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.float64)
    assert near(shaping.gdpo(members, torch.ones(2), same(3)), 0, 0, 0, atol=1e-12)
    assert shaping.gdpo(members, double(1, 2), same(3))[2] > 1


members = st.lists(st.tuples(value, value, st.integers(0, 3)), min_size=2, max_size=20)


@given(members, st.lists(st.tuples(st.floats(0.1, 10), value), min_size=8, max_size=8))
def test_gdpo_forgets_the_unit_of_every_reward_in_every_group(
    triples: list[tuple[float, float, int]], maps: list[tuple[float, float]]
) -> None:
    r, gid = double(*(x for t in triples for x in t[:2])).view(-1, 2), torch.tensor([t[2] for t in triples])
    a, b = (double(*column).view(4, 2)[gid] for column in zip(*maps, strict=True))
    gdpo = partial(shaping.gdpo, weights=double(1, 0.3), gid=gid, eps=1e-12)
    found, plain = gdpo(a * r + b), gdpo(r, batch_norm=False)
    if float(plain.abs().max()) < 1e-6:  # opposed rewards cancel up to rounding
        return
    assert torch.allclose(found, gdpo(r), atol=1e-5)
    assert torch.equal(found[plain.abs() > 1e-6].sign(), plain[plain.abs() > 1e-6].sign())


def test_joint_grpo_does_not_forget_units() -> None:
    r = torch.tensor([[0.0, 1], [1, 0], [2, 5]])
    scaled = r * torch.tensor([1, 100])
    assert not torch.allclose(shaping.joint(r, torch.ones(2), same(3)), shaping.joint(scaled, torch.ones(2), same(3)))


@given(rows)
def test_gdpo_of_one_reward_is_grpo_up_to_one_factor(pairs: list[tuple[float, int]]) -> None:
    r, gid = split(pairs)
    plain = shaping.adv_grpo(r, gid, ddof=1)
    found = shaping.gdpo(r.unsqueeze(-1), torch.ones(1), gid)
    at = int(plain.abs().argmax())
    factor = float(found[at] / plain[at]) if plain[at] != 0 else 1.0
    assert torch.allclose(found, factor * plain, atol=1e-9)


def test_a_floor_keeps_a_nearly_constant_reward_small() -> None:
    r = torch.tensor([[0, 0.500], [1, 0.501]], dtype=torch.float64)
    gdpo = partial(shaping.gdpo, weights=torch.ones(2), gid=same(2), batch_norm=False)
    assert float(gdpo(r)[1]) == pytest.approx(0.5 / (0.5**0.5 + 1e-4) + 0.0005 / (0.0005 * 2**0.5 + 1e-4))
    assert float(gdpo(r, floor=double(0, 0.1))[1]) == pytest.approx(2**0.5 / 2, abs=6e-3)


def test_a_reward_that_does_not_apply_leaves_its_weight_to_the_others() -> None:
    r = torch.tensor([[0, 5], [1, torch.nan], [torch.nan, torch.nan]], dtype=torch.float64)
    w = double(1, 3)
    assert near(shaping.combine(r, w)[:2], 15, 4)
    assert near(shaping.combine(r, w, "zero"), 15, 1, 0)
    assert shaping.combine(r, w)[2].isnan()
    assert shaping.combine(r, w, "invalid").isnan().tolist() == [False, True, True]
    assert shaping.combine(r, double(1, 0), "invalid").isnan().tolist() == [False, False, True]
    with pytest.raises(ConfigError, match="2 rewards and 3 weights"):
        shaping.combine(r, torch.ones(3))


def test_gdpo_excludes_what_does_not_apply_and_can_call_it_zero() -> None:
    r = torch.tensor([[0, 1], [1, torch.nan], [5, 3]], dtype=torch.float64)
    gdpo = partial(shaping.gdpo, weights=torch.ones(2), gid=same(3), eps=0, batch_norm=False)
    first = shaping.adv_grpo(r[:, 0], same(3), ddof=1, eps=0)
    second = shaping.adv_grpo(r[:, 1], same(3), ddof=1, eps=0)
    assert near(gdpo(r), *(first + second + torch.tensor([0, 1, 0]) * first).tolist())
    assert torch.equal(gdpo(r, missing="zero"), gdpo(torch.where(r.isnan(), 0, r)))
    assert (gdpo(torch.full((3, 2), torch.nan)) == 0).all()


# S = 0.5; the bars are .8 (.25, .75) + .2 (.5), the pass rates (.25, .75), the weights e^(+-.25)
def test_tmn_has_the_published_values() -> None:
    r, gid = double(1, 0, 0, 0, 1, 1, 1, 0), torch.arange(8) // 4
    assert near(one_task(r, gid, reweight=False, eps=0), 1.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.5, -1.5)
    hard, easy = (1.926038, -0.389400, -0.389400, -0.389400), (0.389400, 0.389400, 0.389400, -1.926038)
    assert near(one_task(r, gid, eps=0), *hard, *easy)
    assert abs(float(one_task(r, gid, eps=0)[:4].sum())) > 0.7


def test_a_task_may_have_any_scale_but_a_prompt_may_not() -> None:
    draw = torch.Generator().manual_seed(0)
    r, gid = torch.rand(24, generator=draw, dtype=torch.float64), torch.arange(24) // 4
    tid = gid % 2
    found = shaping.tmn(r, gid, tid, eps=0)
    assert torch.allclose(shaping.tmn(torch.where(tid == 1, 100 * r, r), gid, tid, eps=0), found)
    louder = shaping.tmn(torch.where(gid == 0, 100 * r, r), gid, tid, eps=0)
    assert not torch.allclose(louder[:4] / louder[8], found[:4] / found[8])


@given(holes, st.floats(0, 3))
def test_weights_of_tmn_stay_in_their_range(pairs: list[tuple[float, int]], gamma: float) -> None:
    r, gid = split(pairs)
    plain, found = one_task(r, gid, reweight=False), one_task(r, gid, gamma=gamma)
    share = (found / plain)[plain != 0].log()
    assert (share.abs() <= gamma / 2 + 1e-9).all()


def test_a_prompt_has_one_task() -> None:
    with pytest.raises(ConfigError, match=r"the task ids \[8, 9\]"):
        shaping.tmn(double(1, 2), same(2), torch.tensor([9, 8]))


def test_data_hardness_has_the_published_values() -> None:
    assert near(shaping.data_hardness(double(0.1, 0.2, 0.6), same(3)), 0.913893, 0.957161, 1.123970)
    assert near(shaping.data_hardness(double(0.4, 0.4), same(2)), 1, 1)
    ends = shaping.data_hardness(double(0, 1), same(2))  # any mean of numbers in [0, 1]
    assert ends[0] >= 0.684
    assert ends[1] <= 1.462


gaps = st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), min_size=1, max_size=20)


@given(gaps)
def test_responsiveness_without_outliers_is_one_by_prompt(pairs: list[tuple[float, int]]) -> None:
    gap, gid = split(pairs)
    assert (shaping.responsiveness(gap, gid) == 1).all()


@given(gaps, st.floats(0, 4), st.sampled_from(["prompt", "batch"]))
def test_hardness_never_flips_a_sign(pairs: list[tuple[float, int]], tau: float, denominator: str) -> None:
    gap, gid = split(pairs)
    a = torch.linspace(-1, 1, len(gap))
    found = shaping.hardness_scale(a, gid, delta=gap.sigmoid(), gap=gap, denominator=denominator, tau=tau)
    assert torch.equal(found.sign(), a.sign())
    assert torch.equal(shaping.hardness_scale(a, gid), a)


def test_responsiveness_leaves_outliers_out_above_the_line() -> None:
    gap = double(0, 0, 0, 4)
    found = shaping.responsiveness(gap, same(4), tau=2)
    assert near(found, *[0.5 / float(double(1).sigmoid())] * 4)
    assert near(shaping.responsiveness(gap, torch.tensor([0, 0, 0, 1]), denominator="batch")[:3], *found[:3].tolist())
    assert near(shaping.responsiveness(double(torch.nan, -4, 4), same(3), tau=1), 1, 1, 1)
