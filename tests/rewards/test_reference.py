from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError, InvalidReward
from diffalign.scoring import make_reward, score
from diffalign.vision import to_pil, to_tensor

NAMES = ["psnr", "ssim", "patch_similarity"]
SIDE = 20
seeds = st.integers(0, 99)


def media_of(rows: int, seed: int = 0, side: int = SIDE) -> Tensor:
    """On 8-bit levels, as a reference is."""
    return to_tensor(to_pil(torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))))


def cases_for(reference: Tensor, **metadata: Any) -> list[Case]:
    return [Case(prompt="", reference=image, metadata=metadata) for image in to_pil(reference)]


def made(name: str, **options: Any) -> Any:
    return make_reward({name: {"patch": 5, **options} if name == "patch_similarity" else options})


def plain(*levels: int) -> Tensor:
    return (torch.tensor(levels) / 255).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE).clone()


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds)
def test_equal_pictures_get_the_top_of_the_range_and_others_less(name: str, seed: int) -> None:
    media = media_of(2, seed)
    top = made(name).range[1]
    assert score(made(name), media, cases_for(media)).total.tolist() == pytest.approx([top] * 2, rel=1e-6)
    assert (score(made(name), media, cases_for(media.flip(0))).total < top - 1e-3).all()


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds)
def test_a_batch_equals_single_calls_and_leaves_rows_without_a_reference_invalid(name: str, seed: int) -> None:
    media, cases = media_of(4, seed), cases_for(media_of(4, seed + 1))
    cases[2] = Case(prompt="no reference")
    media[3, 0, 0, 0] = torch.nan
    whole = score(made(name), media, cases)
    singles = [score(made(name), media[k : k + 1], cases[k : k + 1], all_invalid=True).total for k in range(4)]
    assert torch.allclose(whole.total, torch.cat(singles), atol=1e-5, equal_nan=True)
    assert whole.valid.tolist() == [True, True, False, False]
    low, high = made(name).range
    assert all(low <= value <= high for value in whole.total[:2].tolist())


@pytest.mark.parametrize("name", NAMES)
def test_no_reference_at_all_is_an_error_and_not_a_0(name: str) -> None:
    with pytest.raises(InvalidReward, match=f"'{name}' is NaN for all 2 rows"):
        score(made(name), media_of(2), [Case(prompt="")] * 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked", [False, True])
@given(seed=seeds)
def test_the_gradient_matches_a_directional_difference(name: str, masked: bool, seed: int) -> None:
    edited = np.zeros((SIDE, SIDE))
    edited[:5, :5] = 1
    options, metadata = ({"mask": "mask"}, {"mask": edited}) if masked else ({}, {})
    reward, cases = made(name, **options), cases_for(media_of(1, seed + 1), **metadata)
    media = media_of(1, seed).requires_grad_()
    (gradient,) = torch.autograd.grad(score(reward, media, cases).total.sum(), media)
    aside = media_of(1, seed + 2) - 0.5
    direction = gradient / gradient.norm() + aside / aside.norm()  # uphill and sideways
    step = 3e-3
    ends = [float(score(reward, media.detach() + s * direction, cases).total) for s in (step, -step)]
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-2)
    assert not masked or name == "ssim" or bool((gradient[..., :5, :5] == 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_finite_on_equal_and_on_plain_pictures(name: str) -> None:
    for media in (media_of(1), plain(128)):
        leaf = media.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score(made(name), leaf, cases_for(media)).total.sum(), leaf)
        assert gradient.isfinite().all()


@given(a=st.integers(0, 255), b=st.integers(0, 255))
def test_plain_pictures_follow_the_closed_forms(a: int, b: int) -> None:
    media, cases = plain(a), cases_for(plain(b))
    x, y = a / 255, b / 255
    psnr = 100.0 if a == b else -20 * math.log10(abs(x - y))
    ssim = (2 * x * y + 1e-4) / (x * x + y * y + 1e-4)  # no variance: the second factor is C2 / C2
    assert float(score(made("psnr"), media, cases).total) == pytest.approx(psnr, abs=1e-3)
    assert float(score(made("ssim"), media, cases).total) == pytest.approx(ssim, abs=1e-4)
    u, v = 2 * x - 1, 2 * y - 1
    cosine = (u * v + 1) / math.sqrt((u * u + 1) * (v * v + 1))
    assert float(score(made("patch_similarity"), media, cases).total) == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize("grey", [False, True])
def test_ssim_is_that_of_gaussian_filters_on_whole_windows(grey: bool) -> None:
    a, b = media_of(1, 3, 24), (0.7 * media_of(1, 3, 24) + 0.3 * media_of(1, 4, 24))
    b = to_tensor(to_pil(b))

    def filtered(x: Any) -> Any:
        return gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]  # a radius of 5

    def index(x: Any, y: Any) -> float:
        mx, my = filtered(x), filtered(y)
        vx, vy, cov = filtered(x * x) - mx**2, filtered(y * y) - my**2, filtered(x * y) - mx * my
        return float(((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean())

    x, y = a[0].double().numpy(), b[0].double().numpy()
    if grey:
        luma = np.array([0.299, 0.587, 0.114])[:, None, None]
        x, y = (x * luma).sum(0, keepdims=True), (y * luma).sum(0, keepdims=True)
    expected = np.mean([index(x[k], y[k]) for k in range(len(x))])
    assert float(score(made("ssim", grey=grey), a, cases_for(b)).total) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_with_a_mask_only_what_lies_outside_it_counts(name: str, tmp_path: Path) -> None:
    reference, edited = media_of(1), media_of(1)
    edited[..., :7, :6] = 1 - edited[..., :7, :6]
    plane = torch.zeros(SIDE, SIDE)
    plane[:7, :6] = 1
    image = to_pil(plane.expand(1, 3, SIDE, SIDE))[0]
    image.save(tmp_path / "mask.png")
    reward, top = made(name, mask="edit"), made(name).range[1]
    assert float(score(made(name), edited, cases_for(reference)).total) < top - 1e-3
    for mask in (image, image.convert("L"), plane, plane.numpy(), plane.tolist(), str(tmp_path / "mask.png")):
        found = score(reward, edited, cases_for(reference, edit=mask)).total
        assert float(found) == pytest.approx(top, rel=1e-6)
    outside = reference.clone()
    outside[..., 15:, 15:] = 1 - outside[..., 15:, 15:]
    assert float(score(reward, outside, cases_for(reference, edit=plane)).total) < top - 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_its_mask_or_without_anything_outside_it_is_invalid(name: str) -> None:
    reward, media = made(name, mask="edit"), media_of(1)
    for metadata in ({}, {"edit": torch.ones(SIDE, SIDE)}, {"edit": None}):
        assert not score(reward, media, cases_for(media, **metadata), all_invalid=True).valid.any()
    with pytest.raises(ConfigError, match="a mask has 1 dimensions"):
        score(reward, media, cases_for(media, edit=[0.0, 1.0]))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_with_nothing_outside_its_mask_spoils_no_gradient_that_rows_share(name: str) -> None:
    shared = torch.tensor(0.5, requires_grad=True)
    cases = [
        *cases_for(media_of(1), edit=torch.zeros(SIDE, SIDE)),
        *cases_for(media_of(1), edit=torch.ones(SIDE, SIDE)),
    ]
    found = score(made(name, mask="edit"), shared * media_of(2, 1), cases)
    assert found.valid.tolist() == [True, False]
    found.total[found.valid].sum().backward()
    assert shared.grad is not None
    assert shared.grad.isfinite()
    assert shared.grad != 0


@pytest.mark.parametrize("mask", [[[0.0, 1.0], [0.0]], {"box": 1}, [["x"]], [[10**400]], [[]], True, b"0"])
def test_a_mask_that_is_no_plane_of_numbers_is_one_clear_error(mask: Any) -> None:
    with pytest.raises(ConfigError, match=r"one (number )?per pixel"):
        score(made("psnr", mask="edit"), media_of(1), cases_for(media_of(1), edit=mask))


@pytest.mark.parametrize("name", NAMES)
def test_another_size_is_refused_unless_it_may_be_resized(name: str) -> None:
    media, cases = plain(200), [Case(prompt="", reference=Image.new("RGB", (41, 30), (200, 200, 200)))]
    with pytest.raises(ConfigError, match=r"20 x 20 and its reference 41 x 30.*resize=true"):
        score(made(name), media, cases)
    assert float(score(made(name, resize=True), media, cases).total) == pytest.approx(made(name).range[1], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_source_of_an_edit_may_be_the_reference(name: str) -> None:
    media = media_of(2)
    cases = [dataclasses.replace(case, reference=None, source=case.reference) for case in cases_for(media)]
    assert score(made(name, against="source"), media, cases).total.tolist() == pytest.approx([made(name).range[1]] * 2)


def test_psnr_counts_decibels_up_to_its_ceiling() -> None:
    assert float(score(made("psnr"), plain(0), cases_for(plain(255))).total) == pytest.approx(0, abs=1e-4)
    assert float(score(made("psnr", ceiling=30.0), plain(9), cases_for(plain(9))).total) == pytest.approx(30, abs=1e-4)
    assert made("psnr", ceiling=30.0).range == (0, 30)


def test_patch_similarity_is_blind_to_the_order_of_patches_and_symmetric() -> None:
    media, other = media_of(1), media_of(1, 1)
    shuffled = media.roll((5, 10), dims=(2, 3))  # whole patches
    assert float(score(made("patch_similarity"), shuffled, cases_for(media)).total) == pytest.approx(1, abs=1e-6)
    for mean in ("arithmetic", "harmonic"):
        reward = made("patch_similarity", mean=mean)
        pair = [float(score(reward, a, cases_for(b)).total) for a, b in ((media, other), (other, media))]
        assert pair[0] == pytest.approx(pair[1], abs=1e-6)


def test_patches_that_do_not_fill_the_picture_are_filled_up() -> None:
    media, other = media_of(1), media_of(1)
    other[..., -1] = 1 - other[..., -1]  # a column that only the filled-up patches hold
    reward = made("patch_similarity", patch=19)
    assert float(score(reward, media, cases_for(media)).total) == pytest.approx(1, abs=1e-6)
    assert float(score(reward, other, cases_for(media)).total) < 1 - 1e-4


def test_pictures_smaller_than_the_window_and_empty_patches_are_refused() -> None:
    media = media_of(1, side=10)
    with pytest.raises(ConfigError, match="window of 11 pixels, and the picture is 10 x 10"):
        score(made("ssim"), media, cases_for(media))
    with pytest.raises(ConfigError, match="at least 1 pixel"):
        made("patch_similarity", patch=0)
