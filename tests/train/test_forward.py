"""Objectives of the forward process: closed forms of crd, nft and sft, and what they share on tiny pipelines."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.noise import Levels
from diffalign.train import preflight
from diffalign.train.objectives.crd import CRDConfig, group_sums, implicit, matched, pulls
from diffalign.train.objectives.nft import NFTConfig, two_sided
from diffalign.train.objectives.sft import best_of
from diffalign.train.renoised import AnchorConfig, FollowConfig, mean_error, scale_of, stratified
from tests.train import jobs

FOUR = ("sd15_ddim", "sd3", "flux", "wan21")
FAST: dict[str, dict[str, Any]] = {"crd": {"draws": 2}, "nft": {"draws": 2}, "sft": {"draws": 2}}
every = pytest.mark.parametrize("name", FAST)
FLOW = Levels(torch.tensor([0.0, 0.3, 0.8, 1.0]).double(), torch.tensor([1.0, 0.7, 0.2, 0.0]).double(), "flow")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def crd_loss(prediction: Tensor, old: Tensor, target: Tensor, share: Tensor, groups: Tensor, beta: float) -> Tensor:
    """The matching loss (B,) of one place, times 5 / beta."""
    pull = pulls(share, groups, torch.ones(len(share)), None)
    wanted = share[:, None] - group_sums(pull * share[:, None], groups)
    gain = implicit(prediction, old, target)[:, None]
    centred = gain - group_sums(pull * gain.detach(), groups)
    return matched(centred, wanted, beta, "square")[:, 0] * 5 / beta


# crd


@pytest.mark.parametrize("beta", [0.1, 1.0, 7.0])
def test_at_the_old_weights_crd_is_advantage_weighted_denoising_whatever_beta(beta: float) -> None:
    old, target = draw(4, 3, 5), draw(4, 3, 5, seed=1)
    prediction = old.clone().requires_grad_()
    advantage = torch.tensor([1.5, -0.5, -1.5, 0.5]).double()
    share, groups = advantage / 10 + 0.5, torch.zeros(4, dtype=torch.long)
    loss = crd_loss(prediction, old, target, share, groups, beta)
    torch.testing.assert_close(loss.mean(), (advantage / 10).square().mean() * 5 / beta)
    loss.mean().backward()
    scale = scale_of(old, target)[:, None, None]
    closed = 2 * advantage[:, None, None] * (old - target) / (15 * scale * 4)
    torch.testing.assert_close(prediction.grad, closed)


@given(st.floats(-3, 3), st.integers(0, 100))
def test_crd_does_not_see_what_all_images_of_a_prompt_have_in_common(shift: float, seed: int) -> None:
    gain, share = draw(6, 1, seed=seed), torch.rand(6, generator=torch.Generator().manual_seed(seed)).double()
    groups = torch.tensor([0, 0, 0, 4, 4, 4])
    pull = pulls(share, groups, torch.ones(6), None)

    def loss(gain: Tensor, share: Tensor) -> Tensor:
        wanted = share[:, None] - group_sums(pull * share[:, None], groups)
        return matched(gain - group_sums(pull * gain, groups), wanted, 1.3, "square")

    moved = torch.where(groups == 4, shift, 0.0).double()
    torch.testing.assert_close(loss(gain + moved[:, None], share), loss(gain, share), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(loss(gain, share + moved), loss(gain, share), atol=1e-9, rtol=1e-9)


def test_a_prompt_whose_rewards_are_all_alike_asks_for_nothing() -> None:
    old, target = draw(3, 4), draw(3, 4, seed=1)
    share, groups = torch.full((3,), 0.5).double(), torch.zeros(3, dtype=torch.long)
    assert not crd_loss(old, old, target, share, groups, 1.0).any()


@given(st.floats(0.05, 5), st.integers(0, 50))
def test_sharp_centres_go_to_the_best_and_the_worst_and_dull_ones_to_the_mean(temperature: float, seed: int) -> None:
    share = torch.rand(5, generator=torch.Generator().manual_seed(seed)).double()
    groups, valid = torch.tensor([1, 1, 1, 0, 0]), torch.tensor([1, 1, 0, 1, 1])
    pull = pulls(share, groups, valid, temperature)
    torch.testing.assert_close(group_sums(pull, groups), torch.ones(5, 2).double())
    assert float(pull[2].abs().sum()) == 0
    good, bad = (pull * share[:, None])[:2].sum(0)
    assert good >= share[:2].mean() - 1e-12 >= bad - 2e-12
    torch.testing.assert_close(
        pulls(share, groups, valid, 1e6)[:, 0], pulls(share, groups, valid, None)[:, 0], atol=1e-5, rtol=0
    )


def test_bce_has_its_optimum_where_the_square_has_its_zero() -> None:
    wanted = torch.tensor([[0.3], [-0.3]]).double()
    gain = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    matched(gain + wanted / 2.0, wanted, 2.0, "bce").sum().backward()
    torch.testing.assert_close(gain.grad, torch.zeros(2, 1).double())
    assert not matched(wanted / 2.0, wanted, 2.0, "square").any()


# nft


@pytest.mark.parametrize("i", [0, 1, 2])
def test_nft_has_t_times_the_gradient_of_crd_at_the_old_weights(i: int) -> None:
    clean, noise, old = draw(4, 3, 5), draw(4, 3, 5, seed=1), draw(4, 3, 5, seed=2)
    advantage = torch.tensor([2.0, -1.0, -2.0, 1.0]).double()
    share, groups = advantage / 10 + 0.5, torch.zeros(4, dtype=torch.long)
    noisy, target = FLOW.noised(clean, noise, i), FLOW.target(clean, noise, i)
    slopes = []
    for kind in ("crd", "nft"):
        prediction = old.clone().requires_grad_()
        if kind == "crd":
            loss = crd_loss(prediction, old, target, share, groups, 0.7)
        else:
            ends = [FLOW.denoised(noisy, old + sign * 0.7 * (prediction - old), i) for sign in (1, -1)]
            loss = 5 * two_sided(ends[0], ends[1], clean, share, 0.7)
        loss.mean().backward()
        slopes.append(prediction.grad)
    torch.testing.assert_close(slopes[1], slopes[0] * float(FLOW.sigma[i]), rtol=1e-4, atol=1e-7)  # latents are float32


@given(st.floats(0.1, 1), st.floats(0, 1))
def test_one_sample_of_nft_is_minimised_where_its_paper_says(beta: float, share: float) -> None:
    old, target = draw(1, 6), draw(1, 6, seed=1)
    best = (old + (2 * share - 1) / beta * (target - old)).requires_grad_()
    loss = two_sided(
        old + beta * (best - old),
        old - beta * (best - old),
        target,
        torch.tensor([share], dtype=torch.float64),
        beta,
        adaptive=False,
    )
    loss.sum().backward()
    torch.testing.assert_close(best.grad, torch.zeros_like(old), atol=1e-9, rtol=0)


def test_an_average_image_teaches_nft_nothing_at_the_old_weights() -> None:
    old, target = draw(2, 6), draw(2, 6, seed=1)
    prediction = old.clone().requires_grad_()
    two_sided(prediction, 2 * old - prediction, target, torch.full((2,), 0.5).double(), 1.0).sum().backward()
    torch.testing.assert_close(prediction.grad, torch.zeros_like(old), atol=1e-12, rtol=0)


def test_the_optimum_of_nft_on_many_images_is_the_old_model_and_twice_the_direction_to_the_good() -> None:
    """Images of two kinds behind one noisy latent: share r of the first kind is good, none of the second."""
    first, second, chance, beta = 1.0, -0.5, 0.3, 0.5  # targets, and how often the first is what was there
    targets = torch.where(
        torch.rand(20000, generator=torch.Generator().manual_seed(0)) < chance, first, second
    ).double()
    share = torch.where(targets == first, 0.9, 0.2).double()
    old = targets.mean()  # what a trained model predicts
    good = (share * targets).mean() / share.mean()  # what one trained on the good would
    model = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        v = model.expand(len(targets), 1)
        ends = [old + sign * beta * (v - old) for sign in (1, -1)]
        loss = two_sided(ends[0], ends[1], targets[:, None], share, beta, adaptive=False).mean()
        (slope,) = torch.autograd.grad(loss, model)
        with torch.no_grad():
            model -= 0.5 / beta * slope
    alpha = share.mean()
    assert float(model.detach()) == pytest.approx(float(old + 2 / beta * alpha * (good - old)), abs=1e-6)


# sft


def test_the_best_of_each_group_are_kept_and_a_group_without_any_teaches_nothing() -> None:
    advantage = torch.tensor([0.1, 3.0, 2.0, 0.0, 0.0, 0.0, 5.0, 1.0, 2.0])
    kept = torch.tensor([1, 1, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    groups = torch.tensor([7, 7, 7, 2, 2, 2, 4, 4, 4])
    assert best_of(advantage, kept, groups, 1).nonzero().flatten().tolist() == [1, 8]
    assert best_of(advantage, kept, groups, 2).nonzero().flatten().tolist() == [1, 2, 7, 8]


# what they share


def test_earlier_weights_follow_as_published() -> None:
    first, second, nft = CRDConfig().old, CRDConfig().drawing, NFTConfig().old
    assert [first.at(k) for k in (0, 149, 150)] == pytest.approx([0.25, 0.995, 0.999])
    assert [second.at(k) for k in (0, 74, 75, 100)] == pytest.approx([0, 0, 0, 0.1875])
    assert [nft.at(k) for k in (0, 100, 500, 900)] == pytest.approx([0, 0.1, 0.5, 0.5])


def test_an_anchor_holds_good_images_more_where_it_is_asked_to() -> None:
    share, reward = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([7.0, math.nan, 0.5])
    asked = {by: AnchorConfig(weight=0.1, by=by).weights(share, reward).tolist() for by in ("none", "share", "reward")}
    assert asked["none"] == pytest.approx([0.1] * 3)
    assert asked["share"] == pytest.approx([1e-4, (0.1 + 1e-4) / 2, 0.1])
    assert asked["reward"] == pytest.approx([0.1, 1e-4, (0.1 + 1e-4) / 2])


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 9))
def test_levels_are_drawn_one_from_each_stratum(count: int, draws: int, seed: int) -> None:
    found = torch.stack(stratified(count, draws, torch.rand(3, draws, generator=torch.Generator().manual_seed(seed))))
    assert found.shape == (draws, 3)
    assert int(found.min()) >= 0
    assert int(found.max()) < count
    assert (found.diff(dim=0) >= 0).all()
    if draws == count:
        assert torch.equal(found[:, 0], torch.arange(count))
    lowest = (torch.arange(draws) * count // draws)[:, None]
    assert (found >= lowest).all()
    assert (found <= lowest + -(-count // draws)).all()


@pytest.mark.parametrize("bad", [{"first": -1.0}, {"last": 1.5}, {"slope": -0.1}, {"start": -1}])
def test_a_share_of_earlier_weights_that_is_none_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="earlier weights"):
        FollowConfig(**bad)


@pytest.mark.parametrize("family", FOUR)
@every
def test_nothing_has_moved_before_the_first_update(name: str, family: str) -> None:
    with jobs.job(family, {name: FAST[name]}) as (job, chosen):
        found = chosen.collect(job, 0)
        told = jobs.learn(job, chosen, found.micros)
        assert told.get("implicit", 0.0) == told.get("moved", 0.0) == told.get("anchor", 0.0) == 0
        assert float(jobs.gradients(job).norm()) > 0
        if name == "crd":
            share = torch.cat([micro.share for micro in found.micros]).view(-1, 3)
            expected = (share - share.mean(1, keepdim=True)).square().mean() * 5
            assert told["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_an_anchor_with_guidance_is_the_guided_base_model() -> None:
    asked = {"draws": 1, "anchor": {"weight": 1.0, "guidance": 3.0}}
    with jobs.job("sd3", {"nft": asked}, call={"guidance_scale": 1.0}) as (job, chosen):
        micro = chosen.collect(job, 0).micros[0]
        told = jobs.learn(job, chosen, [micro])
        place = next(iter(chosen.visited(job, micro)))
        with torch.no_grad():
            plain, guided = (
                job.driver(micro.cases, guidance_scale=scale).select(place.rows.tolist()).predict(place.noisy, place.i)
                for scale in (1.0, 2.0)
            )
        gap = (2 * (guided - plain)).square().flatten(1).mean(1)  # (w - 1)(v_c - v_u), with w = 3
        assert told["anchor"] == pytest.approx(float(gap.mean()), rel=1e-3)
        assert told["anchor"] > 0


@every
def test_the_gradient_does_not_depend_on_micro_batches(name: str) -> None:
    """Groups that span several batches among them."""
    slopes = []
    for micro_batch in (8, 4, 3, 1):
        asked = {"groups": 2, "group_size": 4, "micro_batch": micro_batch}
        with jobs.job("sd3", {name: FAST[name]}, **asked) as (job, chosen):
            chosen.collect(job, 0)  # where the old weights are those of the start
            jobs.touched(job)
            found = chosen.collect(job, 0)
            if hasattr(chosen, "refresh"):
                chosen.refresh(job, found.micros)
            jobs.learn(job, chosen, found.micros)
            slopes.append(jobs.gradients(job))
    assert float(slopes[0].norm()) > 0
    for slope in slopes[1:]:
        torch.testing.assert_close(slope, slopes[0], rtol=2e-3, atol=2e-4 * float(slopes[0].abs().max()))


@every
def test_the_preflight_tries_a_step_and_leaves_nothing_behind(name: str) -> None:
    with jobs.job("sd3", {name: FAST[name]}) as (job, chosen):
        before = jobs.weights(job)
        found = preflight.fly(job, chosen)
        assert found.ratio_off is None
        assert found.spread > 0
        assert found.reached > 0
        assert jobs.equal(before, jobs.weights(job))
        assert not jobs.gradients(job).any()
        assert chosen.state() == {}


def test_the_preflight_counts_the_rows_that_a_step_will_cost() -> None:
    with jobs.job("sd3", {"crd": {"draws": 2}}, call={"guidance_scale": 1.0}) as (job, chosen):
        told = preflight.fly(job, chosen).nfe_per_step
        before = job.budget.nfe
        jobs.learn(job, chosen, chosen.collect(job, 0).micros)
        assert told == job.budget.nfe - before == 6 * (3 + 2 * (3 + 1 + 1))
    with jobs.job("sd3", {"crd": {"draws": 2}}, call={"guidance_scale": 4.0}, passes=2) as (job, chosen):
        told = preflight.fly(job, chosen).nfe_per_step  # drawn with guidance, learnt without, and remembered once
        assert told == 6 * (2 * 3 + 2 * 2 * (3 + 1 + 1))


def test_an_image_without_a_reward_is_in_no_mean() -> None:
    class Picky(jobs.Brightness):
        def __call__(self, media: Tensor, cases: Any) -> Tensor:
            found = super().__call__(media, cases)
            return torch.where(torch.tensor([case.seed % 3 == 0 for case in cases]), torch.nan, found)

    with jobs.job("sd3", {"crd": {"draws": 1}}, reward=Picky(), groups=4, micro_batch=12, invalid_limit=0.9) as (
        job,
        chosen,
    ):
        micro = chosen.collect(job, 0).micros[0]
        lost = micro.reward.isnan()
        assert bool(lost.any())
        assert not bool(lost.all())
        assert not micro.weight[lost].any()
        assert (micro.weight[~lost] == 1).all()
        assert not micro.notes["pull"][lost].any()


def test_levels_without_enough_noise_and_pure_noise_of_noise_models_are_left_out() -> None:
    with jobs.job("sd3", {"nft": {"draws": 9, "least_noise": 0.5}}) as (job, chosen):
        sigma = job.levels.sigma
        assert chosen.places(job) == [i for i in range(3) if sigma[i] >= 0.5]
    with pytest.raises(ConfigError, match="least_noise"), jobs.job("sd15_ddim", {"nft": {"least_noise": 0.999}}):
        pass


def test_an_old_model_moves_as_its_schedule_says_and_is_kept_for_a_resumed_run() -> None:
    with jobs.job("sd3", {"nft": {"draws": 1, "old": {"first": 0.25, "slope": 0.0, "last": 0.25}}}) as (job, chosen):
        chosen.collect(job, 0)
        start = {name: value.clone() for name, value in chosen.state()["old"].items()}
        jobs.touched(job)
        chosen.collect(job, 1)
        kept = chosen.state()
        for name, parameter in job.trained.named_parameters():
            expected = 0.25 * start[name] + 0.75 * parameter.detach()
            torch.testing.assert_close(kept["old"][name], expected, atol=1e-6, rtol=1e-5)
        chosen.restore(kept)
        with chosen.old(job, "old"):
            assert jobs.equal(jobs.weights(job), kept["old"])


def test_errors_are_of_one_image_each() -> None:
    a, b = draw(3, 2, 4), draw(3, 2, 4, seed=1)
    torch.testing.assert_close(mean_error(a, b), ((a - b) ** 2).view(3, -1).mean(1))
    torch.testing.assert_close(scale_of(a, b), (a - b).abs().view(3, -1).mean(1))
    assert scale_of(a, a).tolist() == pytest.approx([1e-5] * 3)


def test_a_guided_job_learns_the_prediction_for_the_prompt_alone() -> None:
    slopes = []
    for scale, asked in ((1.0, {}), (5.0, {}), (5.0, {"guided": True})):
        with jobs.job("sd3", {"sft": {"draws": 1, **asked}}, call={"guidance_scale": scale}) as (job, chosen):
            found = chosen.collect(job, 0)
            for micro in found.micros:  # the same images whatever drew them
                micro.latents = torch.ones_like(micro.latents)
                micro.weight = torch.ones(len(micro))
            jobs.learn(job, chosen, found.micros)
            slopes.append(jobs.gradients(job))
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(slopes[2], slopes[0], rtol=1e-2)


@every
def test_a_step_without_anything_to_learn_tells_the_same_figures(name: str) -> None:
    """Processes exchange them one by one, whatever each of them has found."""
    with jobs.job("sd3", {name: FAST[name]}) as (job, chosen):
        micros = chosen.collect(job, 0).micros
        names = set(chosen.learn(job, micros[0], 1.0))
        micros[1].weight = torch.zeros(len(micros[1]))
        assert set(chosen.learn(job, micros[1], 1.0)) == names


def test_a_part_of_an_anchor_or_a_schedule_keeps_the_objectives_own_rest() -> None:
    from diffalign import config

    told = config.build(CRDConfig, {"anchor": {"guidance": 4.5}, "old": {"slope": 0.01}, "drawing": {"last": 0.5}})
    assert (told.anchor.weight, told.anchor.by, told.anchor.guidance) == (0.1, "share", 4.5)
    assert (told.old.first, told.old.slope, told.old.last) == (0.25, 0.01, 0.999)
    assert (told.drawing.start, told.drawing.last) == (75, 0.5)


def test_a_very_low_temperature_compares_with_the_best_and_the_worst_alone() -> None:
    share, groups = torch.tensor([0.1, 0.5, 0.9, 0.3]).double(), torch.tensor([0, 0, 0, 1])
    pull = pulls(share, groups, torch.ones(4), 1e-6)
    assert pull.tolist() == [[0, 1], [0, 0], [1, 0], [1, 1]]


@pytest.mark.parametrize("name", ["crd", "prdp"])
def test_updates_that_would_tear_a_prompt_apart_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="multiple of 3"), jobs.job("sd3", name, micro_batch=2, updates=2):
        pass
