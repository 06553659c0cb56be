from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.scoring import make_reward, score

CASES = [Case(prompt="any")]


class Constant:
    """The same for every picture, whatever its pixels; NaN where they are."""

    name, differentiable, modality, version, range = "constant", True, "image", None, (-1.0, 1.0)

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        return 0 * media.mean((1, 2, 3)) + self.value


def made(value: float = 0.5, **options: Any) -> Any:
    return make_reward({"relevance": {"similarity": Constant(value), **options}})


def noise(seed: int = 0, side: int = 32) -> Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_the_score_is_the_product_of_its_parts() -> None:
    found = score(made(0.5), noise(), CASES)
    assert float(found.total) == pytest.approx(0.5, abs=1e-6)  # four patches of noise, all different and busy
    assert float(found.parts["variety"]) == 1
    assert float(found.parts["complexity"]) > 0.1
    tiled = noise(side=16).repeat(1, 1, 2, 2)
    again = score(made(0.5), tiled, CASES)
    assert float(again.parts["variety"]) == 0.25
    assert float(again.total) == pytest.approx(0.125, abs=1e-6)


def test_a_plain_picture_is_worth_nothing_and_floors_say_what_is_enough() -> None:
    plain = torch.full((1, 3, 32, 32), 0.3)
    assert float(score(made(), plain, CASES).total) == 0
    faint = torch.full((1, 3, 32, 32), 0.5)
    faint[..., ::2] += 0.01
    reward = made(complexity_floor=0.02, variety_floor=0.25)
    parts = score(reward, faint, CASES).parts
    share = float(parts["complexity"]) / 0.02
    assert float(score(reward, faint, CASES).total) == pytest.approx(0.5 * share, rel=1e-4)
    assert float(parts["complexity"]) == pytest.approx(0.005, rel=1e-3)  # across yes, down no


def test_a_negative_similarity_is_not_made_better_by_an_empty_picture() -> None:
    assert float(score(made(-0.5), torch.zeros(1, 3, 32, 32), CASES).total) == -0.5
    assert made(-0.5).range == (-1, 1)


@given(seed=st.integers(0, 99), value=st.floats(-1, 1))
def test_factors_never_raise_a_score(seed: int, value: float) -> None:
    found = score(made(value), noise(seed, side=40), CASES)
    assert float(found.total) <= value + 1e-6
    assert all(0 <= float(found.parts[name]) <= 1 for name in ("complexity", "variety"))


def test_the_default_similarity_is_clip_and_shows_its_parts() -> None:
    media = torch.cat([noise(0), noise(1)])
    cases = [Case(prompt="a red circle"), Case(prompt="two blue squares")]
    found = score(make_reward({"relevance": {"complexity_floor": 0.01, "variety_floor": 0.1}}), media, cases)
    assert torch.allclose(found.parts["similarity"], score(make_reward("clip"), media, cases).total, atol=1e-6)
    assert torch.allclose(found.total, found.parts["similarity"], atol=1e-6)  # both factors at their floors
    singles = [score(make_reward("relevance"), media[k : k + 1], cases[k : k + 1]).total for k in range(2)]
    assert torch.allclose(score(make_reward("relevance"), media, cases).total, torch.cat(singles), atol=1e-5)


def test_the_gradient_matches_a_directional_difference() -> None:
    reward = made(complexity_floor=1.0)
    media, direction = noise().requires_grad_(), noise(1) - 0.5
    (gradient,) = torch.autograd.grad(score(reward, media, CASES).total.sum(), media)
    ends = [float(score(reward, media.detach() + s * direction, CASES).total) for s in (1e-3, -1e-3)]
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=2e-2, abs=1e-3)
    assert reward.differentiable
    assert not make_reward({"relevance": {"similarity": "jpeg_size"}}).differentiable


def test_a_picture_that_is_not_finite_is_invalid() -> None:
    broken = noise()
    broken[0, 0, 0, 0] = torch.nan
    both = score(made(), torch.cat([noise(), broken]), CASES * 2)
    assert both.valid.tolist() == [True, False]


def test_the_factors_of_a_video_are_means_over_its_frames() -> None:
    video = torch.stack([noise()[0], torch.zeros(3, 32, 32)])[None]  # (1, 2, 3, H, W)
    found = score(made(), video, CASES)
    assert float(found.parts["variety"]) == pytest.approx((1 + 0.25) / 2)


@pytest.mark.parametrize(
    "options",
    [{"complexity_floor": 0.0}, {"tolerance": -1.0}, {"patch": 3}, {"variety_floor": 0.0}, {"tolerance": torch.nan}],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="above 0, and a patch has 4 pixels or more"):
        made(**options)
