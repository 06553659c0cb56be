from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.rewards.vlm_rm import along, regularised
from diffalign.scoring import make_reward, score
from tests.rewards import clips
from tests.rewards.clips import media_of

seeds = st.integers(0, 999)
alphas = st.floats(0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.open_clip_folder(tmp_path_factory.mktemp("clip"))


def made(folder: Path, **options: Any) -> Any:
    return make_reward({"vlm_rm": {"model": str(folder), "path": "tensor", **options}})


def units(seed: int, rows: int = 4, width: int = 6) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).double(), dim=-1)


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 0.60), (0.5, 0.63), (1.0, 0.64)])
def test_the_worked_example(alpha: float, expected: float) -> None:
    # by hand: d = (1, -1), x - g = (-0.4, 0.8); its share along d is (-0.6, 0.6)
    g, b, x = (torch.tensor([[*pair]], dtype=torch.float64) for pair in ((1.0, 0.0), (0.0, 1.0), (0.6, 0.8)))
    assert regularised(x, g, b, alpha).item() == pytest.approx(expected, abs=1e-12)


@given(seed=seeds)
def test_the_projection_is_one(seed: int) -> None:
    d = units(seed)[:1] * 0.7
    p = along(torch.eye(6, dtype=torch.float64), d)  # each row is P e, so this is P
    assert torch.allclose(p @ p, p)
    assert torch.allclose(p, p.T)
    assert torch.allclose(p @ d[0], d[0])
    assert p.trace().item() == pytest.approx(1)


@given(seed=seeds, alpha=alphas)
def test_the_goal_itself_gets_one_and_nothing_gets_more(seed: int, alpha: float) -> None:
    g, b, x = units(seed), units(seed + 1), units(seed + 2)
    assert torch.allclose(regularised(g, g, b, alpha), torch.ones(4, dtype=torch.float64))
    assert (regularised(x, g, b, alpha) <= 1).all()
    assert (regularised(x, g, b, alpha) >= -1 - 1e-9).all()


@given(seed=seeds)
def test_alpha_zero_is_the_cosine_and_with_several_goals_half_plus_the_product(seed: int) -> None:
    g, b, x = units(seed), units(seed + 1), units(seed + 2)
    assert torch.allclose(regularised(x, g, b, 0.0), torch.cosine_similarity(x, g))
    mean = (g + units(seed + 3)) / 2
    expected = 0.5 + (x * mean).sum(-1) - mean.square().sum(-1) / 2
    assert torch.allclose(regularised(x, mean, b, 0.0), expected)


@given(seed=seeds)
def test_alpha_one_counts_the_way_from_baseline_to_goal_only(seed: int) -> None:
    g, b, x = units(seed), units(seed + 1), units(seed + 2)
    d = g - b
    expected = 1 - (d * (x - g)).sum(-1).square() / d.square().sum(-1) / 2
    assert torch.allclose(regularised(x, g, b, 1.0), expected)
    sideways = units(seed + 3) - along(units(seed + 3), d)
    assert torch.allclose(regularised(x + sideways, g, b, 1.0), expected)


@given(seed=seeds, alpha=alphas)
def test_it_is_the_formula_with_the_matrix_written_out(seed: int, alpha: float) -> None:
    g, b, x = units(seed), units(seed + 1), units(seed + 2)
    for row in range(4):
        d = g[row] - b[row]
        m = alpha * torch.outer(d, d) / d.square().sum() + (1 - alpha) * torch.eye(6, dtype=torch.float64)
        expected = 1 - (m @ (x[row] - g[row])).square().sum() / 2
        assert torch.allclose(regularised(x, g, b, alpha)[row], expected)


def test_several_prompts_are_averaged_without_renormalising(folder: Path) -> None:
    goal, baseline = ["two red circles", "red circles, two"], ["a picture", "a drawing", "shapes"]
    reward = made(folder, goal=goal, baseline=baseline, alpha=0.3)
    x = reward.tower.images(media_of(2))
    g, b = (reward.tower.texts(prompts, x.device).mean(0, keepdim=True) for prompts in (goal, baseline))
    found = score(reward, media_of(2), [Case(prompt="not read")] * 2)
    assert g.norm() < 0.999
    assert torch.allclose(found.total, regularised(x, g, b, 0.3), atol=1e-6)
    assert torch.allclose(found.parts["goal"], torch.cosine_similarity(x, g), atol=1e-6)
    assert torch.allclose(found.parts["baseline"], torch.cosine_similarity(x, b), atol=1e-6)


def test_without_a_goal_each_case_asks_for_its_own_prompt_and_alpha_zero_is_the_clip_reward(folder: Path) -> None:
    cases = [Case(prompt=p) for p in clips.PROMPTS]
    media = media_of(4, clips.SIDE)  # nothing to resize, so that both rewards see the same
    clip = make_reward({"clip": {"model": str(folder), "path": "tensor"}})
    assert torch.allclose(
        score(made(folder, alpha=0.0), media, cases).total, score(clip, media, cases).total, atol=1e-6
    )


def test_prompt_stands_for_the_prompt_in_goals_and_baselines(folder: Path) -> None:
    written = made(folder, goal=["a photo of a cat {x}"], baseline=["{y} a cat {x}"])
    filled = made(folder, goal=["a photo of {prompt}"], baseline=["{y} {prompt}"])
    case = [Case(prompt="a cat {x}")]
    assert torch.equal(score(written, media_of(1), case).total, score(filled, media_of(1), case).total)


@pytest.mark.parametrize("options", [{"goal": ["a", "b"], "baseline": ["b", "a"]}, {"baseline": ["{prompt}"]}])
def test_the_same_goal_and_baseline_are_refused_before_anything_loads(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"the goal '.*' and the baseline '.*' are the same") as told:
        made(Path("/nowhere"), **options)
    assert all(repr(prompt) in str(told.value) for prompts in options.values() for prompt in prompts)


@pytest.mark.parametrize("prompt", ["a picture", "A  PICTURE"])
def test_a_prompt_that_is_the_baseline_to_the_model_is_refused_with_both_named(folder: Path, prompt: str) -> None:
    with pytest.raises(ConfigError, match=f"the goal '{prompt}' and the baseline 'a picture' are the same"):
        score(made(folder), media_of(2), [Case(prompt="a cat"), Case(prompt=prompt)])


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"vlm_rm\.alpha is"):
        made(Path("/nowhere"), alpha=alpha)


@pytest.mark.parametrize("kind", ["goal", "baseline"])
def test_no_prompt_at_all_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="at least one goal and one baseline"):
        made(Path("/nowhere"), **{kind: []})


def test_a_wide_picture_is_seen_whole_as_in_the_published_code(folder: Path) -> None:
    reward = made(folder)
    seen = reward.tower._preprocess(torch.cat([torch.zeros(1, 3, 64, 32), torch.ones(1, 3, 64, 96)], dim=3))
    assert seen.shape == (1, 3, clips.SIDE, clips.SIDE)
    assert (seen[0, 0, 0, :6] < 0).all()  # the black quarter
    assert (seen[0, 0, 0, 10:] > 0).all()


def test_the_embedded_model_scores_out_of_the_box() -> None:
    found = score(make_reward("vlm_rm"), media_of(2, 64), [Case(prompt="two red circles")] * 2)
    assert found.valid.all()
