from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign import vision, world
from diffalign.errors import MediaError
from diffalign.train import signatures

PROMPTS = torch.arange(8).repeat_interleave(2)


def scenes(count: int = 16, size: int = 64) -> Tensor:
    import random

    rng = random.Random(0)
    return world.render_many([world.sample_scene(world.sample_clauses("two", rng), rng) for _ in range(count)], size)


def one(picture: Tensor) -> dict[str, float]:
    return {name: float(values[0]) for name, values in signatures.measure(picture[None]).items()}


def grey(level: float, size: int = 64) -> Tensor:
    return torch.full((3, size, size), level)


def test_every_statistic_has_a_meaning() -> None:
    assert {*signatures.measure(scenes(2)), "nearest"} == set(signatures.SIGNATURES)
    assert all(sign.up or sign.down for sign in signatures.SIGNATURES.values())


def test_a_grey_picture_has_no_colour_no_contrast_and_no_detail() -> None:
    told = one(grey(0.5))
    assert told["saturation"] == told["vividness"] == told["contrast"] == told["clipped"] == 0
    assert told["flat"] == told["dominant"] == 1
    assert told["brightness"] == pytest.approx(0.5)
    assert told["sharpness"] == pytest.approx(math.log(1 / 255**2), abs=1e-3)


def test_pure_colours_are_saturated_and_clipped() -> None:
    red = grey(0)
    red[0] = 1
    told = one(red)
    assert told["saturation"] == told["vividness"] == told["clipped"] == 1
    assert told["brightness"] == pytest.approx(vision.LUMA[0])


def test_half_and_half_has_a_dominant_half_and_a_deviation_of_one_half() -> None:
    picture = grey(0.0)
    picture[:, :, 32:] = 1
    told = one(picture)
    assert told["contrast"] == pytest.approx(0.5)
    assert told["dominant"] == 0.5
    assert told["flat"] == 1


def test_energy_is_that_of_the_frequencies_above_a_quarter() -> None:
    x = torch.arange(64)
    slow, quick = (0.5 + 0.4 * torch.sin(2 * math.pi * f * x / 64).expand(3, 64, 64) for f in (4, 16))
    assert one(slow)["high_frequency"] == pytest.approx(math.log(1 / 255), abs=1e-3)
    assert one(quick)["high_frequency"] == pytest.approx(math.log(0.4 / math.sqrt(2) + 1 / 255), abs=1e-3)


def test_jpeg_bytes_are_those_of_a_file_at_quality_90() -> None:
    picture, file = scenes(1)[0], io.BytesIO()
    vision.to_pil(picture[None])[0].save(file, format="JPEG", quality=90)
    assert one(picture)["jpeg_bytes"] == pytest.approx(math.log(file.tell()))


@given(seed=st.integers(0, 2**31), height=st.integers(16, 48), width=st.integers(16, 48))
def test_every_size_gives_numbers_and_a_picture_is_the_same_in_any_batch(seed: int, height: int, width: int) -> None:
    media = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(seed))
    whole, alone = signatures.measure(media), signatures.measure(media[1:2])
    for name, values in whole.items():
        assert values.isfinite().all(), name
        assert float(alone[name][0]) == pytest.approx(float(values[1]), rel=1e-5), name


def test_more_pictures_than_a_chunk_are_all_looked_at() -> None:
    media = scenes(20)
    assert torch.allclose(signatures.measure(media)["contrast"][17:], signatures.measure(media[17:])["contrast"])


def test_a_video_is_the_mean_of_its_frames() -> None:
    media = scenes(6).reshape(2, 3, 3, 64, 64)
    told, each = signatures.measure(media), signatures.measure(media.flatten(0, 1))
    for name, values in told.items():
        assert torch.allclose(values, each[name].reshape(2, 3).mean(1)), name


def test_a_broken_picture_has_no_statistics() -> None:
    media = scenes(3)
    media[1, 0, 0, 0] = math.nan
    assert all(values.isnan().tolist() == [False, True, False] for values in signatures.measure(media).values())


@pytest.mark.parametrize("shape", [(2, 3, 8, 64), (2, 1, 64, 64), (3, 64, 64)])
def test_what_is_no_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MediaError, match=r"at least 16 pixels"):
        signatures.measure(torch.zeros(shape))


def test_shift_is_in_deviations_and_t_in_standard_errors_over_prompts() -> None:
    base = torch.arange(16).double()
    move = torch.tensor([1.0, 3.0] * 4, dtype=torch.float64).repeat_interleave(2)
    told = signatures.compare(base + move, base, PROMPTS, least=0.1, margin=1)
    assert told.shift == pytest.approx(2 / float(base.std(correction=0)))
    assert told.t == pytest.approx(2 / float(move[::2].std() / math.sqrt(8)))


def test_outside_is_beyond_all_of_the_base_by_the_margin() -> None:
    base = torch.arange(16).double()
    now = base.clone()
    now[:3] = torch.tensor([15.9, 16.1, -1.5], dtype=torch.float64)
    told = signatures.compare(now, base, PROMPTS, least=1, margin=1)
    assert (told.above, told.below) == (1 / 16, 1 / 16)
    assert (told.low[0], told.low[-1]) == (2, 1)


def test_nothing_has_moved_at_the_base_and_a_constant_base_has_a_unit() -> None:
    base = torch.rand(16, generator=torch.Generator().manual_seed(0))
    told = signatures.compare(base, base, PROMPTS, least=0.1, margin=0)
    assert (told.shift, told.t, told.above, told.below) == (0, 0, 0, 0)
    flat = signatures.compare(torch.full((16,), 0.5), torch.zeros(16), PROMPTS, least=0.1, margin=1)
    assert flat.shift == pytest.approx(5)
    assert math.isfinite(flat.t)
    assert math.isnan(signatures.compare(base * math.nan, base, PROMPTS, least=1, margin=1).shift)


@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize(
    ("name", "rises", "spoil"),
    [
        ("saturation", 1, lambda m: (m.mean(1, keepdim=True) + (m - m.mean(1, keepdim=True)) * 3).clamp(0, 1)),
        ("vividness", 1, lambda m: (m.mean(1, keepdim=True) + (m - m.mean(1, keepdim=True)) * 1.5).clamp(0, 1)),
        ("contrast", -1, lambda m: 0.5 + (m - 0.5) * 0.1),
        ("clipped", 1, lambda m: (0.5 + (m - 0.5) * 3).clamp(0, 1)),
        ("sharpness", 1, lambda m: (m + 0.3 * torch.rand(m.shape, generator=torch.Generator().manual_seed(0))) / 1.3),
        ("jpeg_bytes", -1, lambda m: m.mean((2, 3), keepdim=True).expand_as(m)),
        ("flat", 1, lambda m: m.mean((2, 3), keepdim=True).expand_as(m)),
        ("brightness", -1, lambda m: m * 0.3),
    ],
)
def test_a_spoiled_picture_moves_the_statistic_that_names_it(name: str, rises: int, spoil, size: int) -> None:  # type: ignore[no-untyped-def]
    media = scenes(8, size)
    plain, spoiled = signatures.measure(media)[name], signatures.measure(spoil(media))[name]
    assert (rises * (spoiled - plain) > 0).all()
