from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffalign import vision
from diffalign.errors import MediaError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
sides = st.integers(9, 70)


def picture(height: int, width: int, seed: int = 0, levels: tuple[int, int] = (0, 256)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(*levels, (height, width, 3), dtype=np.uint8))


@given(height=sides, width=sides, fit=st.sampled_from(["shortest", "longest", "squash"]))
def test_preprocessing_is_within_8_bit_rounding_of_the_reference(height: int, width: int, fit: str) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    image = picture(height, width, levels=(80, 176))  # bicubic overshoot stays inside 8 bits, where PIL would cut it
    reference = image_transform_v2(PreprocessCfg(size=32, mean=MEAN, std=STD, resize_mode=fit), is_train=False)(image)  # type: ignore[arg-type]
    ours = vision.Preprocess(size=(32, 32), mean=MEAN, std=STD, fit=fit)(vision.to_tensor(image))  # type: ignore[arg-type]
    levels = (ours[0] - reference) * torch.tensor(STD)[:, None, None] * 255
    assert levels.abs().max() < 1.6  # PIL rounds after each axis


@given(height=sides, width=sides, fit=st.sampled_from(["shortest", "longest", "squash"]))
def test_the_reference_path_is_the_reference_also_where_bicubic_overshoots(height: int, width: int, fit: str) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    image = picture(height, width)
    reference = image_transform_v2(PreprocessCfg(size=32, mean=MEAN, std=STD, resize_mode=fit), is_train=False)(image)  # type: ignore[arg-type]
    ours = vision.Preprocess(size=(32, 32), mean=MEAN, std=STD, fit=fit)(vision.to_tensor(image))  # type: ignore[arg-type]
    assert torch.allclose(ours[0], reference, atol=1e-5)


def test_the_path_follows_the_gradient_unless_it_is_named() -> None:
    media = torch.rand(1, 3, 20, 20) * 0.5 + 0.25
    made = {
        path: vision.Preprocess(size=(8, 8), mean=MEAN, std=STD, path=path) for path in ("auto", "reference", "tensor")
    }  # type: ignore[arg-type]
    assert torch.equal(made["auto"](media), made["reference"](media))
    assert not torch.equal(made["auto"](media), made["tensor"](media))
    graded = media.clone().requires_grad_()
    assert torch.equal(made["auto"](graded), made["tensor"](media))
    assert not made["reference"](graded).requires_grad
    with torch.no_grad():
        assert torch.equal(made["auto"](graded), made["reference"](media))


@pytest.mark.parametrize("path", ["reference", "tensor"])
def test_a_picture_that_is_not_finite_stays_so_and_leaves_its_neighbours_alone(path: str) -> None:
    media = torch.rand(3, 3, 20, 20)
    spoilt = media.clone()
    spoilt[1, 0, 3, 3] = torch.nan
    for size in (8, 20):
        seen = vision.Preprocess(size=(size, size), mean=MEAN, std=STD, path=path)  # type: ignore[arg-type]
        assert seen(spoilt)[1].isnan().any()
        assert torch.equal(seen(spoilt)[[0, 2]], seen(media)[[0, 2]])


@given(
    short=st.integers(1, 5),
    long=st.integers(1, 600),
    upright=st.booleans(),
    path=st.sampled_from(["reference", "tensor"]),
)
def test_a_very_long_picture_looks_the_same_without_the_ends_that_no_crop_shows(
    short: int, long: int, upright: bool, path: str
) -> None:
    waves = (torch.arange(long) / short).mul(1.7).sin().mul(0.4).add(0.5).expand(1, 3, short, long)
    media = waves.mT.contiguous() if upright else waves.contiguous()
    seen = vision.Preprocess(size=(8, 8), mean=MEAN, std=STD, path=path)  # type: ignore[arg-type]
    resized = vision.resize if path == "tensor" else vision.resize_as_pil
    pixels = media if path == "tensor" else vision.quantise(media)
    whole = vision.centre_crop(vision.resize_short_side(pixels, (8, 8), "bicubic", resized), (8, 8))
    assert torch.allclose(seen(media), vision.normalise(whole, MEAN, STD), atol=0.05)  # three of 255 levels


def test_a_picture_of_one_row_needs_no_memory_of_its_length() -> None:
    assert vision.without_ends(torch.rand(1, 3, 1, 5000)).shape[-1] <= 33


@given(height=st.integers(1, 60), width=st.integers(1, 60), size=st.integers(1, 40))
def test_every_shape_comes_out_at_the_size_asked_for(height: int, width: int, size: int) -> None:
    media = torch.rand(1, 3, height, width)
    for fit in ("shortest", "longest", "squash"):
        assert vision.Preprocess(size=(size, size), mean=MEAN, std=STD, fit=fit)(media).shape == (1, 3, size, size)  # type: ignore[arg-type]


def test_a_picture_twice_as_wide_as_high_gets_a_quarter_of_black_above_and_below() -> None:
    media = torch.ones(1, 3, 224, 448)
    padded = vision.pad_to(vision.resize_long_side(media, (224, 224)), (224, 224))
    black = (padded == 0).all(dim=(0, 1, 3))
    assert black.nonzero().flatten().tolist() == [*range(56), *range(168, 224)]


def test_the_right_size_passes_untouched() -> None:
    media = torch.rand(1, 3, 8, 8)
    assert vision.resize(media, (8, 8)) is media


def test_the_gradient_of_a_plain_white_picture_survives_resizing() -> None:
    media = torch.ones(1, 3, 20, 20, requires_grad=True)
    vision.resize(media, (8, 8)).sum().backward()
    assert media.grad is not None
    assert torch.isclose(media.grad.sum(), torch.tensor(3 * 64.0), rtol=1e-4)


@given(height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_pictures_survive_the_way_to_tensors_and_back(height: int, width: int, seed: int) -> None:
    image = picture(height, width, seed)
    assert np.array_equal(np.asarray(vision.to_pil(vision.to_tensor(image))[0]), np.asarray(image))


def test_values_outside_the_range_and_nan_become_valid_levels() -> None:
    media = torch.tensor([-1.0, 2.0, torch.nan]).view(1, 3, 1, 1)
    assert vision.to_pil(media)[0].getpixel((0, 0)) == (0, 255, 0)


def test_pictures_of_two_sizes_are_no_batch() -> None:
    with pytest.raises(MediaError, match=r"\(4, 3\) and \(5, 3\)"):
        vision.to_tensor([picture(3, 4), picture(3, 5)])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "I"])
def test_every_mode_reads_as_rgb(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (3, 2)).save(tmp_path / "x.tiff")
    assert vision.read_images([tmp_path / "x.tiff"])[0].shape == (1, 3, 2, 3)


def test_transparent_pixels_show_white_and_16_bits_keep_their_scale(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((2, 2), 32896, dtype=np.uint16)).save(tmp_path / "deep.png")
    clear, deep = vision.read_images([tmp_path / "clear.png", tmp_path / "deep.png"])
    assert torch.equal(clear, torch.ones(1, 3, 2, 2))
    assert torch.allclose(deep, torch.full((1, 3, 2, 2), 128 / 255))


def test_a_turned_photograph_is_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(2, 4).save(tmp_path / "x.png", exif=exif)
    assert vision.read_image(tmp_path / "x.png").size == (2, 4)


@pytest.mark.parametrize("kind", ["absent", "empty", "text", "truncated.png", "truncated.jpg", "folder"])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind.startswith("truncated"):
        picture(64, 64).save(path)
        path.write_bytes(path.read_bytes()[:1500])
    elif kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.write_text("" if kind == "empty" else "words")
    with pytest.raises(MediaError, match=kind):
        vision.read_image(path)


@given(
    data=st.binary(max_size=200),
    head=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"II*\x00"]),
)
def test_garbage_is_never_more_than_a_media_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, head: bytes
) -> None:
    path = tmp_path_factory.mktemp("garbage") / "x.png"
    path.write_bytes(head + data)
    with pytest.raises(MediaError):
        vision.read_image(path)
