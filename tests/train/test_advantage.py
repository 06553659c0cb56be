"""The order of the stages from rewards to advantages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign import config, shaping
from diffalign.errors import ConfigError, InvalidReward
from diffalign.train.advantage import AdvantageConfig, Advantages, Hardness, Tree, advantages

GID = torch.arange(12) // 4
ONE = torch.ones(1)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_one(r: Tensor, gid: Tensor, settings: AdvantageConfig, **more: Any) -> Advantages:
    return advantages(r.unsqueeze(-1), ONE, gid, settings, **more)


PLAIN = {
    "grpo": shaping.adv_grpo,
    "dr": shaping.adv_dr,
    "rloo": shaping.adv_rloo,
    "global_std": shaping.adv_global_std,
    "pooled_std": lambda r, gid: shaping.adv_global_std(r, gid, pooled=True),
    "tmn": lambda r, gid: shaping.tmn(r, gid, gid * 0, eps=1e-4),
    "batch": lambda r, gid: shaping.adv_batch(r),
}


@pytest.mark.parametrize("name", PLAIN)
def test_every_normalisation_is_the_function_of_its_name(name: str) -> None:
    r = draws(12)
    found = of_one(r, GID, AdvantageConfig(normalise=name), tid=GID * 0)
    assert torch.equal(found.values, PLAIN[name](r, GID))
    assert found.kept.all()


def test_a_single_reward_is_flow_grpo_by_default() -> None:
    r = draws(12).float()
    found = of_one(r, GID, AdvantageConfig())
    groups = r.view(3, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-4)
    assert found.values.dtype == torch.float32
    assert torch.allclose(found.values, expected.flatten(), atol=1e-5)
    assert found.stats == pytest.approx(
        {
            "frac_zero_std": 0,
            "within_std": float(groups.std(1, correction=0).mean()),
            "invalid": 0,
            "kept": 1,
            "advantage_std": 1,
            "clipped": 0,
        },
        abs=1e-3,
    )


def test_the_two_orders_are_joint_grpo_and_gdpo() -> None:
    members, weights = draws(12, 3), torch.tensor([1.0, 0.5, 2.0])
    joint = advantages(members, weights, GID, AdvantageConfig(ddof=1))
    assert torch.equal(joint.values, shaping.joint(members, weights, GID))
    apart = AdvantageConfig(order="normalise_combine", ddof=1)
    assert torch.equal(advantages(members, weights, GID, apart).values, shaping.gdpo(members, weights, GID))
    loose = AdvantageConfig(order="normalise_combine", ddof=1, batch_norm=False, clip=math.inf)
    expected = shaping.gdpo(members, weights, GID, batch_norm=False)
    assert torch.equal(advantages(members, weights, GID, loose).values, expected)


def test_the_two_orders_differ_where_units_do() -> None:
    members = draws(12, 2) * torch.tensor([1, 100])
    apart = AdvantageConfig(order="normalise_combine")
    for settings, alike in ((AdvantageConfig(), False), (apart, True)):
        found = [
            advantages(m, torch.ones(2), GID, settings).values for m in (members, members / torch.tensor([1, 100]))
        ]
        assert torch.allclose(*found, atol=1e-2) is alike


def test_a_missing_member_takes_its_row_out_of_a_sum_and_leaves_its_weight_in_gdpo() -> None:
    members = draws(12, 2)
    members[0, 0], members[5] = torch.nan, torch.nan
    joint = advantages(members, torch.ones(2), GID, AdvantageConfig())
    assert (~joint.kept).nonzero().flatten().tolist() == [0, 5]
    assert joint.values[~joint.kept].tolist() == [0, 0]
    assert joint.stats["invalid"] == pytest.approx(2 / 12)
    apart = advantages(members, torch.ones(2), GID, AdvantageConfig(order="normalise_combine", ddof=1))
    assert (~apart.kept).nonzero().flatten().tolist() == [5]
    assert torch.equal(apart.values, shaping.gdpo(members, torch.ones(2), GID))
    zero = advantages(members, torch.ones(2), GID, AdvantageConfig(missing="zero"))
    assert (~zero.kept).nonzero().flatten().tolist() == [5]
    assert torch.equal(
        zero.values, shaping.adv_grpo(torch.where(members.isnan().all(1), torch.nan, members.nan_to_num().sum(1)), GID)
    )


def test_a_member_without_weight_changes_nothing() -> None:
    members = draws(12, 3)
    members[3, 1] = torch.nan
    for order in ("combine_normalise", "normalise_combine"):
        settings = AdvantageConfig(order=order, filter=0.1)
        found = advantages(members, torch.tensor([1.0, 0.0, 2.0]), GID, settings)
        expected = advantages(members[:, ::2], torch.tensor([1.0, 2.0]), GID, settings)
        assert torch.equal(found.values, expected.values)
        assert found.stats == expected.stats


cells = st.one_of(st.integers(0, 3).map(float), st.just(float("nan")))
tables = st.lists(st.tuples(cells, cells, st.integers(0, 3)), min_size=1, max_size=16)


@pytest.mark.parametrize("order", ["combine_normalise", "normalise_combine"])
@pytest.mark.parametrize("name", PLAIN)
@given(table=tables, tau=st.floats(0, 1.5))
def test_filtering_is_as_if_the_groups_had_not_been_sampled(
    order: str, name: str, table: list[tuple[float, float, int]], tau: float
) -> None:
    members, gid = torch.tensor([row[:2] for row in table]), torch.tensor([row[2] for row in table])
    settings = AdvantageConfig(order=order, normalise=name, filter=tau)
    found = advantages(members, torch.ones(2), gid, settings, tid=gid % 2)
    kept = found.kept
    rest = advantages(members[kept], torch.ones(2), gid[kept], settings, tid=gid[kept] % 2)
    assert torch.allclose(found.values[kept], rest.values, atol=1e-6)
    assert (found.values[~kept] == 0).all()
    assert found.values.isfinite().all()


def test_a_filter_of_zero_takes_out_the_groups_that_teach_nothing_and_counts_them() -> None:
    r = torch.tensor([1, 1, 1, 1, 0, 1, 0, 0, 2, 2, 2, torch.nan])
    found = of_one(r, GID, AdvantageConfig(filter=0.0))
    assert found.kept.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert found.stats["frac_zero_std"] == pytest.approx(2 / 3)
    assert found.stats["kept"] == pytest.approx(1 / 3)
    assert found.stats["invalid"] == pytest.approx(1 / 12)


def test_each_member_may_have_its_own_filter_and_floor() -> None:
    members = torch.stack([draws(12), 0.01 * draws(12, seed=1)], 1)
    members[:4, 0] = 1
    settings = AdvantageConfig(order="normalise_combine", filter=(0.0, 0.5), std_floor=(0.0, 0.5))
    found = advantages(members, torch.ones(2), GID, settings)
    assert found.kept.tolist() == [False] * 4 + [True] * 8
    first = advantages(members[:, :1], ONE, GID, AdvantageConfig(order="normalise_combine", filter=0.0))
    assert torch.allclose(found.values, first.values, atol=0.1)
    with pytest.raises(ConfigError, match="2 numbers for 1 rewards"):
        advantages(members[:, :1], ONE, GID, settings)


def test_win_rates_stand_before_the_normalisation() -> None:
    r = draws(12)
    found = of_one(r, GID, AdvantageConfig(win_rate=True))
    assert torch.equal(found.values, shaping.adv_grpo(shaping.win_rate(r, GID), GID))
    assert torch.equal(found.values, of_one((5 * r).exp(), GID, AdvantageConfig(win_rate=True)).values)
    apart = AdvantageConfig(win_rate=True, order="normalise_combine", ddof=1)
    rates = shaping.win_rate(draws(12, 2), GID)
    assert torch.allclose(
        advantages(draws(12, 2), torch.ones(2), GID, apart).values, shaping.gdpo(rates, torch.ones(2), GID)
    )


def test_the_scale_stands_before_the_clip() -> None:
    r = draws(12)
    found = of_one(r, GID, AdvantageConfig(normalise="dr", adv_scale=3, clip=1.5))
    assert torch.equal(found.values, (3 * shaping.adv_dr(r, GID)).clamp(-1.5, 1.5))
    assert 0 < found.stats["clipped"] < 1
    assert float(of_one(r, GID, AdvantageConfig(adv_scale=1e6)).values.abs().max()) == 5


def test_hardness_stands_after_the_normalisation() -> None:
    r, delta, gap = draws(12), draws(12, seed=1).sigmoid(), draws(12, seed=2)
    plain = of_one(r, GID, AdvantageConfig()).values
    found = of_one(r, GID, AdvantageConfig(hardness="data"), hardness=Hardness(delta=delta)).values
    assert torch.allclose(found, plain * shaping.data_hardness(delta, GID))
    both = AdvantageConfig(hardness="both", hardness_denominator="batch", hardness_tau=1.0)
    found = of_one(r, GID, both, hardness=Hardness(delta=delta, gap=gap)).values
    expected = shaping.hardness_scale(plain, GID, delta=delta, gap=gap, denominator="batch", tau=1.0)
    assert torch.equal(found, expected)
    for kind, name in (("data", "delta"), ("responsiveness", "gap"), ("both", "gap")):
        with pytest.raises(ConfigError, match=name):
            of_one(r, GID, AdvantageConfig(hardness=kind), hardness=Hardness(delta=delta if kind == "both" else None))


@pytest.mark.parametrize("over", ["group_step", "group_all", "batch_step"])
def test_step_rewards_are_normalised_over_the_set_of_the_config(over: str) -> None:
    r, steps = draws(12), draws(12, 5, seed=1)
    r[2] = torch.nan
    steps[7, 3] = torch.nan
    steps[9] = torch.nan
    found = of_one(r, GID, AdvantageConfig(step_norm=over), steps=steps)
    known = steps.clone()
    known[2] = torch.nan
    assert torch.equal(found.values, shaping.step_norm(known, GID, over))
    assert (~found.kept).nonzero().flatten().tolist() == [2, 9]


def test_a_terminal_reward_at_every_step_is_flow_grpo() -> None:
    r = draws(12)
    plain = of_one(r, GID, AdvantageConfig()).values
    tree = Tree(ids=torch.zeros(12, 5, dtype=torch.int64))
    settings = AdvantageConfig(step_norm="siblings")
    assert torch.allclose(of_one(r, GID, settings, tree=tree).values, plain.unsqueeze(-1).expand(12, 5))
    found = of_one(r, GID, AdvantageConfig(step_norm="group_step"), steps=r.unsqueeze(-1).expand(12, 5))
    assert torch.allclose(found.values, plain.unsqueeze(-1).expand(12, 5))


def test_renorm_joins_steps_with_the_outcome_and_its_constant_cancels() -> None:
    outcome, steps = draws(12).sigmoid(), draws(12, 5, seed=1).sigmoid()
    found = [
        of_one(outcome, GID, AdvantageConfig(step_norm="group_step", renorm=True, mu=mu, credit="return"), steps=steps)
        for mu in (0.0, 1.0)
    ]
    assert torch.allclose(found[0].values, found[1].values)
    returns = shaping.return_to_go(shaping.renorm(steps, outcome))
    assert torch.equal(found[1].values, shaping.step_norm(returns, GID))
    ranked = AdvantageConfig(step_norm="group_step", renorm=True, win_rate=True)
    expected = shaping.step_norm(shaping.renorm(steps, shaping.win_rate(outcome, GID)), GID)
    assert torch.equal(of_one(outcome, GID, ranked, steps=steps).values, expected)


def test_an_empty_share_of_valid_rows_gives_zeros() -> None:
    found = of_one(torch.full((12,), torch.nan), GID, AdvantageConfig(filter=0.0))
    assert not found.values.any()
    assert found.stats["invalid"] == 1
    assert all(math.isfinite(x) for x in found.stats.values())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"clip": 0.0}, "clip is 0"),
        ({"adv_scale": -1.0}, "adv_scale is -1"),
        ({"adv_scale": math.nan}, "adv_scale is nan"),
        ({"eps": -1e-4}, "eps is -0.0001"),
        ({"filter": -0.1}, "filter is -0.1"),
        ({"tmn_alpha": 2.0}, "tmn_alpha is 2"),
        ({"ddof": 2}, "ddof is 2"),
        ({"trim_low": 0.5, "trim_high": 0.5}, "leaves nothing"),
        ({"filter": (0.1, 0.2)}, "set order to normalise_combine"),
        ({"std_floor": (0.1,)}, "set order to normalise_combine"),
        ({"normalise": "dr", "std_floor": 0.1}, "divides by no std"),
        ({"normalise": "rloo", "trim_low": 0.1}, "use grpo"),
        ({"win_rate": True, "std_floor": 0.1}, "ranks"),
        ({"order": "normalise_combine", "step_norm": "group_step"}, "Set order to combine_normalise"),
        ({"normalise": "tmn", "step_norm": "group_all"}, "Set step_norm to none"),
        ({"normalise": "batch", "step_norm": "group_step"}, "batch_step"),
        ({"win_rate": True, "step_norm": "group_step"}, "Set renorm to true"),
        ({"renorm": True}, "Set step_norm to group_step"),
        ({"credit": "return"}, "Set step_norm to group_step"),
    ],
)
def test_a_config_that_cannot_work_says_what_to_change(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^advantage.*{says}"):
        AdvantageConfig(**settings)


def test_calls_that_do_not_fit_the_config_say_what_to_change() -> None:
    r, steps = draws(12), draws(12, 5)
    with pytest.raises(ConfigError, match="Set it to group_step"):
        of_one(r, GID, AdvantageConfig(), steps=steps)
    with pytest.raises(ConfigError, match="give steps"):
        of_one(r, GID, AdvantageConfig(step_norm="group_step"))
    with pytest.raises(ConfigError, match="Give tid"):
        of_one(r, GID, AdvantageConfig(normalise="tmn"))
    with pytest.raises(ConfigError, match="node that each step starts from"):
        of_one(r, GID, AdvantageConfig(step_norm="siblings"), steps=steps)
    with pytest.raises(ConfigError, match="win_rate"):
        of_one(r, GID, AdvantageConfig(step_norm="siblings", win_rate=True), steps=steps, tree=Tree(ids=steps.long()))
    with pytest.raises(ConfigError, match="not 0"):
        advantages(draws(12, 2), torch.zeros(2), GID, AdvantageConfig())
    with pytest.raises(ConfigError, match="unsqueeze"):
        advantages(r, ONE, GID, AdvantageConfig())
    with pytest.raises(ConfigError, match=r"\(12, T\)"):
        of_one(r, GID, AdvantageConfig(step_norm="group_step"), steps=steps[:5])
    with pytest.raises(InvalidReward, match="infinite"):
        of_one(r / 0, GID, AdvantageConfig())


def test_a_config_survives_yaml() -> None:
    settings = AdvantageConfig(order="normalise_combine", filter=(0.0, 0.1), std_floor=(0.1, 0.2), clip=math.inf)
    text = config.parse(config.dump(settings), "the text")
    assert config.build(AdvantageConfig, text) == settings
    assert config.build(AdvantageConfig, {"filter": 0, "std_floor": 1}).std_floor == 1
