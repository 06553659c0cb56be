from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign import shaping
from diffalign.calibration import measure, write_tables
from diffalign.cases import Case
from diffalign.cli.verb import read_config
from diffalign.errors import ConfigError, NotDifferentiable
from diffalign.scoring import Reward, Score, ScoreCache, make_reward, require_gradient, score


class Channel:
    """Mean of one colour channel times `scale` plus `shift`; NaN where it is darker than `dark`."""

    modality, differentiable = "image", True

    def __init__(
        self, name: str, channel: int, *, scale: float = 1.0, shift: float = 0.0, dark: float = 0.0, version: str = "1"
    ) -> None:
        self.name, self.version, self.range = name, version, None
        self.options = {"channel": channel, "scale": scale, "shift": shift, "dark": dark}

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        light = media[:, int(self.options["channel"])].mean((1, 2))
        return torch.where(
            light < self.options["dark"], torch.nan, light * self.options["scale"] + self.options["shift"]
        )


PROMPTS = ("a", "b")
fresh = itertools.count()


def media_of(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


def cases_of(rows: int) -> list[Case]:
    return [Case(prompt=PROMPTS[k % len(PROMPTS)]) for k in range(rows)]


def calibrated(folder: Path, *rewards: Reward, images: int = 40) -> str:
    """The path of a table of these rewards on random images."""
    media, cases = media_of(images, seed=99), cases_of(images)
    path = folder / f"table-{next(fresh)}.json"
    write_tables(path, [measure(r, {"model": "noise"}, cases, score(r, media, cases)) for r in rewards])
    return str(path)


def mixture(rewards: Any, **options: Any) -> Any:
    return make_reward({"mixture": {"rewards": rewards, **options}})


RED, GREEN, BLUE = Channel("red", 0), Channel("green", 1), Channel("blue", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def references(folder: Path) -> str:
    return calibrated(folder, RED, GREEN, BLUE)


@pytest.mark.parametrize("cdf", ["empirical", "smooth"])
@pytest.mark.parametrize(("scale", "shift"), [(100.0, -3.0), (10_000.0, 5.0), (0.01, 1.0)])
def test_scaling_and_shifting_a_reward_changes_no_total_once_it_is_calibrated_again(
    folder: Path, references: str, scale: float, shift: float, cdf: str
) -> None:
    moved = Channel("red", 0, scale=scale, shift=shift)
    media, cases, stages = media_of(12), cases_of(12), [{"cdf": cdf}, "mean"]
    plain = score(mixture([RED, GREEN], table=references, stages=stages), media, cases)
    other = score(mixture([moved, GREEN], table=calibrated(folder, moved, GREEN), stages=stages), media, cases)
    assert torch.allclose(other.total, plain.total, atol=0 if cdf == "empirical" else 1e-4)
    assert torch.allclose(other.parts["red"], plain.parts["red"] * scale + shift)


def test_by_default_the_total_is_the_weighted_mean_of_win_rates(references: str) -> None:
    found = score(mixture([(RED, 2.0), GREEN], table=references), media_of(6), cases_of(6))
    assert torch.allclose(found.total, (2 * found.parts["red/cdf"] + found.parts["green/cdf"]) / 3)
    base = score(mixture([RED, GREEN], table=references), media_of(40, seed=99), cases_of(40))
    assert float(base.total.mean()) == pytest.approx(0.5)  # the references themselves


def test_each_prompt_has_its_own_references(folder: Path) -> None:
    media, cases = media_of(4), cases_of(4)
    media[::2] *= 0.1  # images for "a" are dark
    path = folder / "own.json"
    write_tables(path, [measure(RED, {}, cases, score(RED, media, cases))])
    dark = media[:1].expand(3, -1, -1, -1)
    asked = [Case(prompt=prompt) for prompt in ("a", "b", "unseen")]
    found = score(mixture(RED, table=str(path)), dark, asked).total
    assert found[0] > found[2] > found[1]
    assert score(mixture(RED, table=str(path), unseen="invalid"), dark, asked).valid.tolist() == [True, True, False]
    with pytest.raises(ConfigError, match="'unseen'"):
        score(mixture(RED, table=str(path), unseen="error"), dark, asked)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("zscore", lambda r, refs, mean, std: (r - mean) / std),
        ("par", lambda r, refs, mean, std: shaping.par(r, refs, 1 / std)),
        ({"par": {"k": 3}}, lambda r, refs, mean, std: shaping.par(r, refs, 3)),
        ("centred", lambda r, refs, mean, std: shaping.centred(r, refs)),
        ({"lsc": 0.6}, lambda r, refs, mean, std: shaping.lsc(r, refs, 0.6)),
        ({"cdf": "smooth"}, lambda r, refs, mean, std: shaping.smooth_cdf(r, refs)),
    ],
)
def test_calibrations_are_those_of_the_formulas(references: str, stage: Any, expected: Any) -> None:
    base = score(RED, media_of(40, seed=99), cases_of(40)).total
    media = media_of(6)
    name = stage if isinstance(stage, str) else next(iter(stage))
    found = score(mixture(RED, table=references, stages=[stage, "mean"]), media, cases_of(6))
    refs = torch.stack([base[k % 2 :: 2] for k in range(6)])
    assert torch.allclose(found.total, expected(found.parts["red"], refs, base.mean(), base.std(correction=0)))
    assert torch.equal(found.total, found.parts[f"red/{name}"])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sum", lambda z: 2 * z[:, 0] + z[:, 1] + z[:, 2]),
        ("mean", lambda z: (2 * z[:, 0] + z[:, 1] + z[:, 2]) / 4),
        ("min", lambda z: z.amin(-1)),
        ("median", lambda z: z[:, [0, 0, 1, 2]].sort(-1).values[:, 1:3].mean(-1)),
        ({"uncertainty": 0.5}, lambda z: shaping.uwo(z[:, [0, 0, 1, 2]], 0.5)),
        ({"lcb": {"k": 2}}, lambda z: shaping.lcb(z[:, [0, 0, 1, 2]], 2)),
        ({"softmin": 3}, lambda z: shaping.softmin(z[:, [0, 0, 1, 2]], 3)),
    ],
)
def test_rules_combine_members_by_their_weights(rule: Any, expected: Any) -> None:
    found = score(mixture([(RED, 2.0), GREEN, BLUE], stages=[rule]), media_of(5), cases_of(5))
    z = torch.stack([found.parts[name] for name in ("red", "green", "blue")], -1)
    assert torch.allclose(found.total, expected(z))


def test_the_order_of_stages_is_what_happens(references: str) -> None:
    def total(*stages: Any) -> Tensor:
        return score(mixture([RED, GREEN], table=references, stages=list(stages)), media_of(9), cases_of(9)).total

    shares = score(mixture([RED, GREEN], table=references), media_of(9), cases_of(9)).parts
    z = torch.stack([shares["red/cdf"], shares["green/cdf"]], -1)
    assert torch.equal(total("cdf", "min"), z.amin(-1))
    assert not torch.allclose(total("cdf", "min"), total("zscore", "min"))
    assert torch.allclose(total("cdf", {"tilt": 8}, "mean"), shaping.tilt(z, 8).mean(-1))
    assert torch.allclose(total("cdf", "mean", {"tilt": 8}), shaping.tilt(z.mean(-1), 8))
    assert torch.allclose(total("zscore", "mean", {"clip": {"low": 0}}), total("zscore", "mean").clamp(min=0))


def test_a_clip_before_a_calibration_clips_the_references_too(references: str) -> None:
    low = {"clip": {"low": 0.55}}
    found = score(mixture(RED, table=references, stages=[low, "cdf", "mean"]), media_of(9), cases_of(9))
    base = score(RED, media_of(40, seed=99), cases_of(40)).total.clamp(min=0.55)
    refs = torch.stack([base[k % 2 :: 2] for k in range(9)])
    assert torch.equal(found.total, shaping.calibrate_cdf(found.parts["red"].clamp(min=0.55), refs))
    scaled = score(mixture(RED, table=references, stages=[low, "zscore", "mean"]), media_of(9), cases_of(9))
    expected = (found.parts["red"].clamp(min=0.55) - base.mean()) / base.std(correction=0)
    assert torch.allclose(scaled.total, expected, atol=1e-5)


def test_a_clip_on_either_side_of_a_calibration_has_two_meanings_and_two_parts(references: str) -> None:
    stages = [{"clip": {"low": 0.5}}, "zscore", {"clip": {"high": 0.2}}, "mean"]
    found = score(mixture(RED, table=references, stages=stages), media_of(9), cases_of(9))
    assert torch.equal(found.parts["red/clip"], found.parts["red"].clamp(min=0.5))
    assert torch.equal(found.parts["red/clip_2"], found.parts["red/zscore"].clamp(max=0.2))
    assert torch.equal(found.total, found.parts["red/clip_2"])


def test_tilt_and_clip_may_follow_a_calibration_in_either_order(references: str) -> None:
    tilt, clip = {"tilt": 2}, {"clip": {"low": 0.2, "high": 0.7}}
    media, cases = media_of(9), cases_of(9)
    u = score(mixture(RED, table=references), media, cases).total
    one = score(mixture(RED, table=references, stages=["cdf", tilt, clip, "mean"]), media, cases).total
    two = score(mixture(RED, table=references, stages=["cdf", clip, tilt, "mean"]), media, cases).total
    assert torch.allclose(one, shaping.tilt(u, 2).clamp(0.2, 0.7))
    assert torch.allclose(two, shaping.tilt(u.clamp(0.2, 0.7), 2))


def test_a_member_may_have_the_name_of_a_stage() -> None:
    found = score(mixture(Channel("clip", 0), stages=[{"clip": {"low": 0.5}}, "mean"]), media_of(4), cases_of(4))
    assert torch.equal(found.parts["clip/clip"], found.parts["clip"].clamp(min=0.5))


@pytest.mark.parametrize("stage", ["cdf", {"cdf": "smooth"}, "zscore", "par", {"par": {"k": 3}}, "centred", "lsc"])
def test_a_prompt_without_references_is_invalid_where_it_shall_be(references: str, stage: Any) -> None:
    cases = [Case(prompt="a"), Case(prompt="unseen")]
    strict = mixture(RED, table=references, stages=[stage, "mean"], unseen="invalid")
    assert score(strict, media_of(2), cases).valid.tolist() == [True, False]
    alone = score(strict, media_of(1), cases[1:], all_invalid=True)
    assert not alone.valid.any()
    assert score(mixture(RED, table=references, stages=[stage, "mean"]), media_of(2), cases).valid.all()


def test_each_case_meets_the_references_of_what_it_asks(folder: Path) -> None:
    class Wanted(Channel):
        reads = ("wanted",)

    reward = Wanted("wanted", 0)
    asked = [Case(prompt="a", metadata={"wanted": k % 2, "index": k}) for k in range(4)]
    media = media_of(4)
    media[::2] *= 0.1
    path = folder / "wanted.json"
    write_tables(path, [measure(reward, {}, asked, score(reward, media, asked))])
    dark = media[:1].expand(2, -1, -1, -1)
    found = score(mixture(reward, table=str(path), unseen="error"), dark, asked[2:]).total
    assert found[0] > found[1]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (["mean", "cdf"], "have cdf after mean"),
        (["cdf"], "combine 0 times"),
        ([], "combine 0 times"),
        (["cdf", "min", "mean"], "combine 2 times"),
        (["cdf", "zscore", "mean"], "calibrate twice"),
        ([{"tilt": 3}, "cdf", "mean"], "tilt before cdf"),
        ([{"clip": {"low": 0}}, {"clip": {"high": 1}}, "mean"], "repeat a stage"),
        (["zscore", {"clip": {"low": 0}}, {"clip": {"high": 1}}, "mean"], "repeat a stage"),
        (["cdf", "mean", {"tilt": 2}, {"tilt": 2}], "repeat a stage"),
        (["cfd", "mean"], "no stage is called 'cfd'"),
        ([{"cdf": "smooth", "tilt": 3}, "mean"], "one name with its options"),
    ],
)
def test_an_order_without_a_meaning_names_the_legal_ones(references: str, stages: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as e:
        mixture([RED, GREEN], table=references, stages=stages)
    assert "For instance [cdf, mean]" in str(e.value)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (["cdf", "tilt", "mean"], "t of the stage tilt is None, but it takes a finite number"),
        ([{"cdf": "smoth"}, "mean"], "kind of the stage cdf is 'smoth'"),
        ([{"par": -1}, "mean"], "k of the stage par is -1"),
        ([{"clip": {"low": 2, "high": 1}}, "mean"], r"\[2, 1\], which is empty"),
        ([{"mean": 3}], "the stage mean has no option 'mean'"),
        ([{"softmin": {"beta": 3}}], "the stage softmin has no option 'beta'. Options: b"),
        (["zscore", {"tilt": 3}, "mean"], r"reads win rates, in \[0, 1\], but gets values in \[-inf, inf\]"),
        (["cdf", "sum", {"tilt": 3}], r"gets values in \[0, 2\]"),
    ],
)
def test_a_wrong_option_is_said_before_anything_is_scored(references: str, stages: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        mixture([RED, GREEN], table=references, stages=stages)


def test_a_mixture_without_its_references_says_which_command_makes_them(folder: Path, references: str) -> None:
    with pytest.raises(ConfigError, match=r"no table.*diffalign score RUN --reward red --reward green --calibrate"):
        mixture([RED, GREEN])
    with pytest.raises(ConfigError, match=r"no references of reward 'pink'.*--reward pink --calibrate"):
        mixture([RED, Channel("pink", 0, scale=2)], table=references)
    with pytest.raises(ConfigError, match=r"reward\.version is \"1\" there and \"2\" here"):
        mixture([Channel("red", 0, version="2"), GREEN], table=references)
    with pytest.raises(ConfigError, match=r"reward\.options\.scale is 1\.0 there and 2\.0 here"):
        mixture([Channel("red", 0, scale=2.0)], table=references)
    path = Path(calibrated(folder, RED))
    path.write_text(path.read_text().replace("0.4", "0.3", 1))
    with pytest.raises(ConfigError, match="edited or damaged"):
        mixture(RED, table=str(path))


def test_references_that_are_all_equal_give_no_scale(folder: Path) -> None:
    flat = Channel("flat", 0, scale=0.0, shift=0.25)
    table = calibrated(folder, flat)
    with pytest.raises(ConfigError, match=r"all 40 references of reward 'flat' are 0\.25"):
        mixture(flat, table=table, stages=["zscore", "mean"])
    assert score(mixture(flat, table=table), media_of(3), cases_of(3)).total.tolist() == [0.5] * 3


def test_a_negative_weight_subtracts_in_a_sum_and_is_refused_as_a_share() -> None:
    found = score(mixture([RED, (GREEN, -2.0)], stages=["sum"]), media_of(3), cases_of(3))
    assert torch.allclose(found.total, found.parts["red"] - 2 * found.parts["green"])
    with pytest.raises(ConfigError, match="weight of 'green' is -2"):
        mixture([RED, (GREEN, -2.0)], stages=["mean"])
    with pytest.raises(ConfigError, match="weight 0"):
        mixture([(RED, 0.0)], stages=["mean"])


@pytest.mark.parametrize("rule", ["mean", "sum", "min"])
def test_an_invalid_member_makes_the_row_invalid_or_is_left_out(folder: Path, rule: str) -> None:
    picky = Channel("picky", 0, dark=0.5)
    table = calibrated(folder, picky, GREEN)
    media, cases = media_of(20), cases_of(20)
    stages = ["cdf", rule]
    strict = score(mixture([picky, GREEN], table=table, stages=stages), media, cases)
    dark = media[:, 0].mean((1, 2)) < 0.5
    assert torch.equal(strict.valid, ~dark)
    lenient = score(mixture([picky, GREEN], table=table, stages=stages, missing="renormalise"), media, cases)
    assert lenient.valid.all()
    assert torch.equal(lenient.total[~dark], strict.total[~dark])
    share = 2 if rule == "sum" else 1  # the other weights take over
    assert torch.allclose(lenient.total[dark], share * lenient.parts["green/cdf"][dark])
    shown = score(mixture([(picky, 0.0), GREEN], table=table, stages=stages), media, cases)
    assert shown.valid.all()
    assert torch.equal(shown.total, shown.parts["green/cdf"])


def test_rows_that_nobody_can_judge_are_invalid_under_either_rule(folder: Path) -> None:
    blind = Channel("blind", 0, dark=2.0)
    for missing in ("invalid", "renormalise"):
        made = mixture([blind, (BLUE, 0.0)], stages=["mean"], missing=missing)
        assert not score(made, media_of(3), cases_of(3), all_invalid=True).valid.any()


def test_the_gradient_through_smooth_cdfs_is_the_difference(references: str) -> None:
    made = mixture([RED, (GREEN, 2.0)], table=references, stages=[{"cdf": "smooth"}, {"tilt": 2}, {"softmin": 2}])
    assert made.differentiable
    require_gradient(made, "a test")
    media, direction = media_of(4).double().requires_grad_(), media_of(4, seed=5).double() - 0.5
    (slope,) = torch.autograd.grad(made(media, cases_of(4)).total.sum(), media)
    step = 1e-3
    ends = [float(made(media.detach() + s * direction, cases_of(4)).total.double().sum()) for s in (step, -step)]
    assert float((slope * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=5e-2)
    assert (slope[:, :2].abs().sum((1, 2, 3)) > 0).all()
    assert (slope[:, 2] == 0).all()


def test_an_invalid_row_sends_no_nan_into_the_gradient(folder: Path) -> None:
    picky = Channel("picky", 0, dark=0.5)
    table = calibrated(folder, picky, GREEN)
    made = mixture([picky, GREEN], table=table, stages=[{"cdf": "smooth"}, "mean"], unseen="invalid")
    media = media_of(20).requires_grad_()
    cases = [*cases_of(19), Case(prompt="unseen")]
    found = score(made, media, cases)
    (slope,) = torch.autograd.grad(found.total[found.valid].sum(), media)
    assert slope.isfinite().all()


def test_a_mixture_has_a_gradient_only_if_every_member_and_stage_has_one(references: str) -> None:
    empirical = mixture([RED, GREEN], table=references)
    assert not empirical.differentiable
    with pytest.raises(NotDifferentiable, match=r"'mixture' has none \(its stage cdf counts.*cdf: smooth"):
        require_gradient(empirical, "noise optimisation")
    with pytest.raises(NotDifferentiable, match="'jpeg_size' has none"):
        require_gradient(mixture({"jpeg_size": 1.0, "brightness": 1.0}, stages=["mean"]), "noise optimisation")


def test_the_range_follows_from_members_and_stages(references: str) -> None:
    assert mixture([RED, GREEN], table=references).range == (0, 1)
    assert mixture([RED, (GREEN, -3.0)], table=references, stages=["cdf", "sum"]).range == (-3, 1)
    assert mixture([RED, GREEN], table=references, stages=["zscore", "mean"]).range is None
    assert mixture([RED], stages=[{"clip": {"low": -1, "high": 4}}, "min"]).range == (-1, 4)
    assert mixture({"brightness": 2.0, "colourfulness": 1.0}, stages=["sum"]).range == (0, 300)


@given(chunk=st.integers(1, 8))
def test_chunks_and_the_order_of_rows_change_no_score(references: str, chunk: int) -> None:
    made = mixture([RED, GREEN, BLUE], table=references, stages=["cdf", {"lcb": 1}])
    media, cases = media_of(7), cases_of(7)
    whole = score(made, media, cases)
    assert torch.equal(score(made, media, cases, chunk=chunk).total, whole.total)
    assert torch.equal(score(made, media.flip(0), cases[::-1]).total, whole.total.flip(0))


def test_members_are_cached_one_by_one_and_a_mixture_may_hold_a_mixture(tmp_path: Path, references: str) -> None:
    cache = ScoreCache(tmp_path / "scores.sqlite")
    inner = {"mixture": {"rewards": [RED, GREEN], "table": references}}
    made = mixture([(inner, 1.0), (BLUE, 1.0)], stages=["mean"])
    found = score(made, media_of(4), cases_of(4), cache=cache)
    assert len(cache) == 3 * 4
    assert torch.allclose(found.total, (found.parts["mixture"] + found.parts["blue"]) / 2)
    assert "mixture/red/cdf" in found.parts


def test_the_shipped_config_builds_once_its_table_is_there(folder: Path) -> None:
    spec = read_config("mixture_shapes")["reward"]
    path, drawn = folder / "shipped.json", Score(torch.linspace(0, 1, 4))
    write_tables(path, [measure(make_reward(n), {}, cases_of(4), drawn) for n in spec["mixture"]["rewards"]])
    made: Any = make_reward({"mixture": {**spec["mixture"], "table": str(path)}})
    assert (made.weights, made.range) == ([2, 1, 1], (0, 1))
