from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.cases import Case
from diffalign.scoring import make_reward, score
from diffalign.vision import to_pil

seeds = st.integers(0, 999)


def media_of(rows: int, seed: int = 0, side: int = 12) -> torch.Tensor:
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def cases_of(rows: int) -> list[Case]:
    return [Case(prompt="any")] * rows


def plain(*colour: float) -> torch.Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 8, 8)


@pytest.mark.parametrize("name", ["brightness", "colourfulness", "jpeg_size"])
@given(seed=seeds)
def test_a_batch_equals_single_calls(name: str, seed: int) -> None:
    reward, media = make_reward(name), media_of(3, seed)
    singles = [score(reward, media[k : k + 1], cases_of(1)).total for k in range(3)]
    assert torch.allclose(score(reward, media, cases_of(3)).total, torch.cat(singles), rtol=1e-5)


@pytest.mark.parametrize("name", ["brightness", "colourfulness"])
@given(seed=seeds)
def test_the_gradient_matches_a_directional_difference(name: str, seed: int) -> None:
    reward, media = make_reward(name), media_of(1, seed).requires_grad_()
    direction = media_of(1, seed + 1) - 0.5
    (gradient,) = torch.autograd.grad(score(reward, media, cases_of(1)).total.sum(), media)
    step = 1e-2
    ends = [float(score(reward, media.detach() + s * direction, cases_of(1)).total) for s in (step, -step)]
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("name", ["brightness", "colourfulness"])
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_a_plain_grey_picture_has_a_finite_gradient(name: str, level: float) -> None:
    media = plain(level, level, level).clone().requires_grad_()
    found = score(make_reward(name), media, cases_of(1)).total
    (gradient,) = torch.autograd.grad(found.sum(), media)
    assert gradient.isfinite().all()
    assert float(found.detach()) == pytest.approx(level if name == "brightness" else 0.0, abs=2e-4)


@given(st.tuples(*[st.floats(0, 1, width=32)] * 6), seeds)
def test_colourfulness_stays_in_its_range(colours: tuple[float, ...], seed: int) -> None:
    share = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) > 0.5
    media = torch.where(share, plain(*colours[:3]), plain(*colours[3:]))
    assert -1e-3 <= float(score(make_reward("colourfulness"), media, cases_of(1)).total) <= 298


def test_colourfulness_of_two_colours_is_the_formula() -> None:
    media = torch.cat([plain(1.0, 0.0, 0.0), plain(0.0, 1.0, 0.0)], dim=2)  # rg is +-255, yb is 127.5 everywhere
    expected = 255 + 0.3 * 127.5
    assert float(score(make_reward("colourfulness"), media, cases_of(1)).total) == pytest.approx(expected, rel=1e-4)


def test_colourfulness_does_not_depend_on_where_the_colours_are() -> None:
    media = media_of(1)
    moved = media.flatten(2)[..., torch.randperm(144, generator=torch.Generator().manual_seed(1))].view_as(media)
    assert torch.allclose(
        *[score(make_reward("colourfulness"), m, cases_of(1)).total for m in (media, moved)], rtol=1e-5
    )


def test_jpeg_rewards_are_the_published_scales_of_the_bytes_at_quality_95() -> None:
    media = media_of(2, side=32)
    sizes = []
    for image in to_pil(media):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()))
    small = score(make_reward("jpeg_size"), media, cases_of(2))
    large = score(make_reward({"jpeg_size": {"goal": "incompressible"}}), media, cases_of(2))
    assert torch.allclose(small.total, -torch.tensor(sizes) / 500_000)
    assert torch.allclose(large.total, torch.tensor(sizes) / 1000)
    assert torch.equal(small.parts["kilobytes"], large.parts["kilobytes"])


def test_a_plain_picture_is_more_compressible_than_noise() -> None:
    media = torch.cat([torch.full((1, 3, 64, 64), 0.5), media_of(1, side=64)])
    found = score(make_reward("jpeg_size"), media, cases_of(2)).total
    assert found[0] > found[1]


@pytest.mark.parametrize("name", ["brightness", "colourfulness", "jpeg_size"])
def test_a_picture_with_nan_is_invalid(name: str) -> None:
    media = media_of(2)
    media[1, 0, 0, 0] = torch.nan
    assert score(make_reward(name), media, cases_of(2)).valid.tolist() == [True, False]
