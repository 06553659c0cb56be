from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.train import diversity

PROMPTS = torch.arange(4).repeat_interleave(3)
seeds = st.integers(0, 2**31)


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))


def test_the_vendi_score_of_the_worked_examples() -> None:
    pairs = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    half = torch.tensor([[1, 0.5], [0.5, 1]])
    told = [diversity.vendi_of_kernel(kernel) for kernel in (torch.eye(4), torch.ones(4, 4), pairs, half)]
    assert told == pytest.approx([4, 1, 2, 1.754765], abs=1e-6)


@given(seeds, st.floats(0.1, 10))
def test_variety_does_not_see_length_or_order(seed: int, scale: float) -> None:
    features, order = drawn(seed), torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    plain, moved = (
        diversity.measure(f, p) for f, p in ((features, PROMPTS), (features[order] * scale, PROMPTS[order]))
    )
    for name in ("within", "across", "vendi"):
        assert getattr(moved, name) == pytest.approx(getattr(plain, name), abs=1e-5)
    assert torch.allclose(moved.nearest, plain.nearest[order], atol=1e-5)


@given(seeds)
def test_the_vendi_score_lies_between_one_and_all(seed: int) -> None:
    features = drawn(seed)
    assert 1 - 1e-9 <= diversity.vendi(features) <= 12 + 1e-9
    assert diversity.vendi(features.repeat(2, 1)) == pytest.approx(diversity.vendi(features))


def test_the_ratio_to_itself_is_one_and_to_copies_zero() -> None:
    features = drawn(1)
    plain, copies = (diversity.measure(f, PROMPTS) for f in (features, features[:1].expand(12, -1)))
    assert plain.within / plain.within == 1
    assert (copies.within, copies.across, copies.vendi) == pytest.approx((0, 0, 1), abs=1e-6)
    assert float(copies.nearest.max()) == pytest.approx(0, abs=1e-9)


def test_within_and_across_are_the_means_over_pairs() -> None:
    features = torch.tensor([[1.0, 0], [0, 1], [1, 0], [-1, 0]])
    told = diversity.measure(features, torch.tensor([0, 0, 1, 1]))
    assert told.within == pytest.approx((1 + 2) / 2)
    assert told.across == pytest.approx((0 + 2 + 1 + 1) / 4)
    assert told.own.tolist() == pytest.approx([1, 1, 2, 2])
    assert told.others.tolist() == pytest.approx([1, 1, 0.5, 1.5])
    assert told.nearest.tolist() == pytest.approx([0, 1, 0, 1])


def test_prompts_explain_all_where_each_has_one_picture() -> None:
    one_each = torch.eye(4).repeat_interleave(3, 0)
    assert diversity.measure(one_each, PROMPTS).prompt_effect == 1
    assert abs(diversity.measure(torch.eye(12), PROMPTS).prompt_effect) < 1e-12


def test_what_cannot_be_measured_is_not_a_number() -> None:
    alone = diversity.measure(torch.eye(3), torch.arange(3))
    assert math.isnan(alone.within)
    assert alone.own.isnan().all()
    assert math.isnan(diversity.measure(torch.eye(3), torch.zeros(3, dtype=torch.long)).across)


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (128, 64)])
def test_plain_features_have_one_length_for_all_sizes(size: tuple[int, int]) -> None:
    media = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    features = diversity.plain_features(media)
    assert features.shape == (3, 289)
    assert features.dtype == torch.float32
    assert torch.equal(diversity.plain_features(media[1:2]), features[1:2])


def test_plain_features_tell_colour_place_and_drawing_apart() -> None:
    media = torch.full((4, 3, 32, 32), 0.5)
    media[1, 0] = 1
    media[2, :, :16] = 1
    media[3, :, :, ::2] = 0.9
    far = 1 - diversity.cosine_gram(diversity.plain_features(media))
    assert float(far[~torch.eye(4, dtype=torch.bool)].min()) > 0.05


def test_a_video_is_the_mean_of_its_frames() -> None:
    media = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    frames = torch.stack([diversity.plain_features(media[:, k]) for k in range(3)]).mean(0)
    assert torch.allclose(diversity.plain_features(media), frames, atol=1e-6)
