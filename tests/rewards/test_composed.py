"""`router`, `hybrid`, `masked`, and what holds for them and `partial` alike: rewards made of others."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.cases import Case
from diffalign.errors import ConfigError, InvalidReward, NotDifferentiable, UnknownName
from diffalign.scoring import ScoreCache, leaves, make_reward, require_gradient, score
from tests.rewards.told import NAN, Told, cases_of, media_of, rated, same


def test_a_router_asks_each_reward_for_its_own_rows_only() -> None:
    a, b = Told("a"), Told("b")
    router = make_reward({"router": {"routes": {"text": a, "count": b}}})
    cases = cases_of(kind=["count", "text", "other", "text"], a=[9, 0.25, 9, NAN], b=[0.5, 9, 9, 9])
    found = rated(router, cases)
    assert same(found.total, 0.5, 0.25, NAN, NAN)
    assert same(found.parts["text"], NAN, 0.25, NAN, NAN)
    assert same(found.parts["count/twice"], 1.0, NAN, NAN, NAN)
    assert (a.seen, b.seen) == (["p1", "p3"], ["p0"])


def test_a_router_may_have_a_default_and_its_own_key_and_kinds_that_are_numbers() -> None:
    router = make_reward({"router": {"routes": {"1": Told("a")}, "by": "stage", "default": Told("b")}})
    cases = [
        Case(prompt="", metadata={"stage": 1, "a": 0.1}),
        *[Case(prompt="", metadata={"stage": s, "b": 0.2}) for s in (2, None)],
    ]
    found = rated(router, [*cases, Case(prompt="", metadata={"b": 0.3})])
    assert same(found.total, 0.1, 0.2, 0.2, 0.3)
    assert same(found.parts["default"], NAN, 0.2, 0.2, 0.3)


def test_a_router_without_any_route_that_fits_is_an_error_and_not_a_0() -> None:
    router = make_reward({"router": {"routes": {"text": Told("a")}}})
    with pytest.raises(InvalidReward, match="'router' is NaN for all 1 rows"):
        score(router, media_of(1), [Case(prompt="", metadata={"kind": "other"})])


def test_what_a_router_is_follows_from_its_routes() -> None:
    router = make_reward({"router": {"routes": {"a": Told("a"), "b": Told("b", False, (-1.0, 0.5))}}})
    assert (router.differentiable, router.range, router.modality) == (False, (-1.0, 1.0), "image")
    assert [leaf.name for leaf in leaves(router)] == ["a", "b"]
    assert make_reward({"router": {"routes": {"a": Told("a", ends=None)}}}).range is None
    with pytest.raises(NotDifferentiable, match="reward 'b' has none"):
        require_gradient(router, "noise optimisation")


@pytest.mark.parametrize("options", [{"routes": {}}, {"routes": {"default": "brightness"}, "default": "brightness"}])
def test_routes_that_lead_nowhere_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="maps each kind to a reward"):
        make_reward({"router": options})


def test_a_router_sends_rows_of_a_video() -> None:
    router = make_reward({"router": {"routes": {"light": "brightness"}}})
    cases = [Case(prompt="", metadata={"kind": "light"}), Case(prompt="")]
    video = torch.full((2, 3, 3, 4, 4), 0.5)
    assert same(score(router, video, cases).total, 0.5, NAN)


def test_a_hybrid_blends_by_a_part_of_the_rule_and_trusts_the_model_where_the_rule_fails() -> None:
    rule, model = Told("rule"), Told("model")
    hybrid = make_reward({"hybrid": {"rule": rule, "model": model, "confidence": "sure"}})
    found = rated(
        hybrid,
        cases_of(rule=[1, 1, NAN, 1, 1, 1], model=[0, 0, 0.3, NAN, 0.6, NAN], sure=[0.75, 0, 1, 1, NAN, 0.5]),
    )
    assert same(found.total, 0.75, 0, 0.3, 1, 0.6, NAN)
    assert model.seen == ["p0", "p1", "p2", "p4", "p5"]  # a rule that is sure needs no model
    assert same(found.parts["confidence"], 0.75, 0, 1, 1, NAN, 0.5)
    assert {"rule", "model", "confidence", "rule/sure", "model/twice"} <= set(found.parts)


def test_a_constant_confidence_of_1_is_a_rule_with_a_model_behind_it() -> None:
    hybrid = make_reward({"hybrid": {"rule": Told("rule"), "model": Told("model")}})
    assert same(rated(hybrid, cases_of(rule=[0.2, NAN], model=[0.9, 0.9])).total, 0.2, 0.9)
    assert same(rated(hybrid, cases_of(rule=[0.2], model=[0.9])).total, 0.2)


def test_a_confidence_has_to_exist_and_to_lie_in_0_to_1() -> None:
    sides = {"rule": Told("rule"), "model": Told("model", ends=(-2.0, 0.0))}
    with pytest.raises(ConfigError, match=r"'certainty'.*shows only sure, twice"):
        rated(make_reward({"hybrid": {**sides, "confidence": "certainty"}}), cases_of(rule=[1], model=[1]))
    with pytest.raises(ConfigError, match=r"from 0.5 to 87"):
        rated(make_reward({"hybrid": {**sides, "confidence": "sure"}}), cases_of(rule=[1, 1], sure=[0.5, 87]))
    with pytest.raises(ConfigError, match=r"confidence is 1.5"):
        make_reward({"hybrid": {**sides, "confidence": 1.5}})
    assert make_reward({"hybrid": sides}).range == (-2, 1)


def test_a_masked_reward_counts_inside_the_window_bounds_included() -> None:
    reward, monitor = Told("reward"), Told("size")
    masked = make_reward({"masked": {"inner": reward, "monitor": monitor, "target": "usual"}})
    cases = cases_of(reward=[0.7] * 6, size=[5, 20, 4.9, 20.1, NAN, 9], usual=[10, 10, 10, 10, 10, NAN])
    found = rated(masked, cases)
    assert same(found.total, 0.7, 0.7, 0, 0, NAN, NAN)
    assert same(found.parts["kept"], 1, 1, 0, 0, NAN, NAN)
    assert same(found.parts["ratio"], 0.5, 2, 0.49, 2.01, NAN, NAN)
    assert reward.seen == ["p0", "p1"]


def test_a_part_may_be_monitored_against_a_number() -> None:
    masked = make_reward(
        {"masked": {"inner": "brightness", "monitor": "jpeg_size", "part": "kilobytes", "target": 0.6, "high": 1.5}}
    )
    media = torch.cat([torch.full((1, 3, 8, 8), 0.5), media_of(1)])
    found = score(masked, media, [Case(prompt="")] * 2)
    kilobytes = score(make_reward("jpeg_size"), media, [Case(prompt="")] * 2).parts["kilobytes"]
    assert torch.allclose(found.parts["ratio"], kilobytes / 0.6)
    assert masked.differentiable
    with pytest.raises(ConfigError, match=r"masked.part is 'bytes'.*shows only kilobytes"):
        rated(
            make_reward({"masked": {"inner": "brightness", "monitor": "jpeg_size", "part": "bytes", "target": 1.0}}),
            [Case(prompt="")],
        )


@pytest.mark.parametrize("options", [{"target": 0.0}, {"target": 1.0, "low": 3.0}])
def test_windows_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="low is at most high"):
        make_reward({"masked": {"inner": "brightness", "monitor": "brightness", **options}})


def test_a_target_of_0_or_no_number_gives_no_score() -> None:
    masked = make_reward({"masked": {"inner": Told("reward"), "monitor": Told("size"), "target": "usual"}})
    assert not rated(masked, cases_of(reward=[1], size=[1], usual=[0])).valid.any()
    assert not rated(masked, cases_of(reward=[1], size=[1], usual=[None])).valid.any()


@pytest.mark.parametrize("target", ["big", "12", True, [1.0], {}, 10**400])
def test_a_target_that_is_no_number_is_named(target: Any) -> None:
    masked = make_reward({"masked": {"inner": Told("reward"), "monitor": Told("size"), "target": "usual"}})
    with pytest.raises(ConfigError, match=f"the metadata 'usual' of 'p0' is {re.escape(repr(target)[:60])}, not a num"):
        rated(masked, cases_of(reward=[1], size=[1], usual=[target]))


ALL: dict[str, Any] = {
    "router": {"routes": {"light": "brightness", "colour": "colourfulness"}},
    "hybrid": {"rule": "psnr", "model": "brightness", "confidence": 0.5},
    "masked": {"inner": "brightness", "monitor": "colourfulness", "target": "usual"},
    "partial": {"terms": {"light": "brightness", "colour": {"colourfulness": {}}}, "gates": {"colour": ["light", 0.4]}},
}


def real_cases() -> list[Case]:
    image = Image.new("RGB", (8, 8), (90, 120, 150))
    kinds = ["light", "colour", "light", "none"]
    return [
        Case(prompt=f"p{k}", reference=image if k % 2 else None, metadata={"kind": kind, "usual": 20.0 + 40 * k})
        for k, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("name", ALL)
def test_a_batch_equals_single_calls_and_chunks(name: str) -> None:
    reward, media, cases = make_reward({name: ALL[name]}), media_of(4), real_cases()
    whole = score(reward, media, cases)
    for chunk in (1, 3):
        found = score(reward, media, cases, chunk=chunk)
        assert torch.allclose(found.total, whole.total, atol=1e-5, equal_nan=True)
        for part, column in whole.parts.items():
            assert torch.allclose(found.parts[part], column, atol=1e-4, equal_nan=True), part


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_reaches_the_pixels_of_valid_rows(name: str) -> None:
    reward, media = make_reward({name: ALL[name]}), media_of(4).requires_grad_()
    assert reward.differentiable
    found = score(reward, media, real_cases())
    (gradient,) = torch.autograd.grad(found.total[found.valid].sum(), media)
    counted = found.valid & (found.parts["kept"] == 1 if name == "masked" else found.valid)
    assert gradient.isfinite().all()
    assert torch.equal(gradient.flatten(1).any(1), counted)


@pytest.mark.parametrize("rule", ["psnr", "ssim"])
@pytest.mark.parametrize("name", ["hybrid", "router"])
def test_a_row_that_cannot_be_judged_spoils_no_gradient_that_rows_share(name: str, rule: str) -> None:
    masked = {rule: {"mask": "edit"}}
    specs: dict[str, Any] = {
        "hybrid": {"rule": masked, "model": "brightness", "confidence": 0.5},
        "router": {"routes": {"light": "brightness"}, "default": masked},
    }
    image, shared = Image.new("RGB", (12, 12), (90, 120, 150)), torch.tensor(0.5, requires_grad=True)
    cases = [Case(prompt="", reference=image, metadata={"edit": torch.full((12, 12), k)}) for k in (0.0, 1.0)]
    found = score(make_reward({name: specs[name]}), shared * torch.ones(2, 3, 12, 12), cases)
    assert found.valid.tolist() == [True, name == "hybrid"]
    found.total[found.valid].sum().backward()
    assert shared.grad is not None
    assert shared.grad.isfinite()


@pytest.mark.parametrize("name", ALL)
def test_parts_are_cached_one_by_one(name: str, tmp_path: Path) -> None:
    reward, media, cases = make_reward({name: ALL[name]}), media_of(4), real_cases()
    cache = ScoreCache(tmp_path / "scores.sqlite")
    first = score(reward, media, cases, cache=cache)
    stored = len(cache)
    assert stored > 0
    again = score(reward, media, cases, cache=cache)
    assert len(cache) == stored
    assert torch.allclose(first.total, again.total, atol=1e-6, equal_nan=True)


def test_a_part_that_does_not_exist_is_named() -> None:
    with pytest.raises(UnknownName, match="no reward called 'clp'"):
        make_reward({"hybrid": {"rule": "clp", "model": "brightness"}})


class Counted(Told):
    """Has an identity, so that equal ones are one reward."""

    version = "1"


def twice_over(rule: Told, term: Told) -> Any:
    """One reward as a monitor and what it watches, as a term, and as the rule of a hybrid."""
    masked = {"masked": {"inner": rule, "monitor": rule, "target": 1.0, "low": 0.0}}
    hybrid = {"hybrid": {"rule": term, "model": Told("model")}}
    return make_reward({"partial": {"terms": {"a": masked, "b": term, "c": hybrid}}})


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_reward_in_several_places_is_asked_once_a_row_within_one_call(chunk: int | None) -> None:
    alone, twin = Counted("rule"), Counted("rule")
    reward, media = twice_over(alone, twin), media_of(4)
    cases = cases_of(rule=[0.25, 1.5, NAN, 0.5], model=[0.1, 0.2, 0.3, 0.4])
    found = score(reward, media, cases, chunk=chunk)
    assert sorted(alone.seen + twin.seen) == ["p0", "p1", "p2", "p3"]
    assert same(found.total, 0.75, 4.5, NAN, 1.5)
    assert same(found.parts["c"], 0.25, 1.5, 0.3, 0.5)
    score(reward, media, cases)
    assert len(alone.seen + twin.seen) == 8  # nothing is kept from call to call


def test_rewards_without_an_identity_are_one_only_where_they_are_the_same_object() -> None:
    one, two = Told("rule"), Told("rule")
    rated(twice_over(one, one), cases_of(rule=[0.25, 0.5]))
    assert one.seen == ["p0", "p1"]
    rated(twice_over(two, Told("rule")), cases_of(rule=[0.25, 0.5]))
    assert two.seen == ["p0", "p1"]


def test_equal_pictures_of_two_cases_are_two_rows_and_frames_are_rows_too() -> None:
    reward = Counted("rule")
    media = media_of(1).expand(2, -1, -1, -1)
    assert same(score(twice_over(reward, reward), media, cases_of(rule=[0.25, 0.5])).total, 0.75, 1.5)
    video = torch.rand(2, 3, 3, 8, 8)
    light = make_reward({"partial": {"terms": {"a": "brightness", "b": "brightness"}}})
    expected = 2 * score(make_reward("brightness"), video, [Case(prompt="")] * 2).total
    assert torch.allclose(score(light, video, [Case(prompt="")] * 2).total, expected)


def test_a_gradient_reaches_every_place_and_every_row() -> None:
    reward = make_reward({"partial": {"terms": {"a": "brightness", "b": {"masked": {
        "inner": "brightness", "monitor": "brightness", "target": 1.0, "low": 0.0}}}}})  # fmt: skip
    media = media_of(1).repeat(2, 1, 1, 1).requires_grad_()
    score(reward, media, [Case(prompt="")] * 2).total.sum().backward()
    assert media.grad is not None
    assert torch.allclose(media.grad.sum((1, 2, 3)), torch.tensor([2.0, 2.0]), atol=1e-4)


def test_a_route_of_edits_asks_a_source_of_its_own_rows_only() -> None:
    edits = Told("edits")
    edits.modality = "edit"
    router = make_reward({"router": {"routes": {"edit": edits, "draw": Told("draw")}}})
    cases = cases_of(kind=["draw", "edit"], draw=[0.5, 9], edits=[9, 0.25])
    with pytest.raises(ConfigError, match="'edits' judges edits, but a case has no source image"):
        rated(router, cases)
    cases[1] = replace(cases[1], source=Image.new("RGB", (8, 8)))
    assert same(rated(router, cases).total, 0.5, 0.25)
    assert router.modality == "image"
    assert make_reward({"router": {"routes": {"edit": edits}}}).modality == "edit"
    both = make_reward([edits, Told("draw")])
    assert both.modality == "edit"
    with pytest.raises(ConfigError, match="no source image"):
        rated(both, cases[:1])
