"""What holds for every reward that looks through a CLIP."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import DiffalignError, NotDifferentiable
from diffalign.scoring import Reward, ScoreCache, make_reward, require_gradient, score
from tests.rewards import clips
from tests.rewards.clips import NAMES, PROMPTS, cases_of, media_of, spec

READING = [name for name in NAMES if name != "aesthetic"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return clips.every_place(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def rewards(places: dict[str, Path]) -> dict[str, Any]:
    """Each on the tensor path, loaded once."""
    return {name: make_reward(spec(name, places, path="tensor")) for name in NAMES}


def total(reward: Reward, media: Tensor, prompts: list[str]) -> Tensor:
    return score(reward, media, cases_of(prompts)).total


@pytest.mark.parametrize("name", NAMES)
@examples(max_examples=8)
@given(picks=st.permutations(range(4)), side=st.integers(16, 48))
def test_a_batch_in_any_order_equals_single_calls(
    rewards: dict[str, Any], name: str, picks: list[int], side: int
) -> None:
    media, prompts = media_of(4, side)[picks], [PROMPTS[k] for k in picks]
    singles = [total(rewards[name], media[k : k + 1], prompts[k : k + 1]) for k in range(4)]
    together = total(rewards[name], media, prompts)
    assert together.dtype == torch.float32
    assert torch.allclose(together, torch.cat(singles), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_and_where_it_reads_them_prompts_are_told_apart(rewards: dict[str, Any], name: str) -> None:
    media = media_of(2)
    pictures = total(rewards[name], media, PROMPTS[:1] * 2)
    prompts = total(rewards[name], media[[0, 0]], PROMPTS[:2])
    assert (pictures[0] - pictures[1]).abs() > 1e-4
    assert ((prompts[0] - prompts[1]).abs() > 1e-4) == rewards[name].reads_prompt == (name in READING)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [0.1, 3.0, 700.0])
def test_the_length_of_an_embedding_does_not_count(
    rewards: dict[str, Any], name: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = total(rewards[name], media_of(2), PROMPTS[:2])
    encoders = rewards[name].tower.encoders
    image, text = encoders.image, encoders.text
    monkeypatch.setattr(encoders, "image", lambda pixels: image(pixels) * factor)
    monkeypatch.setattr(encoders, "text", lambda tokens: text(tokens) * factor)
    monkeypatch.setattr(rewards[name].tower, "_texts", {})
    assert torch.allclose(total(rewards[name], media_of(2), PROMPTS[:2]), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@examples(max_examples=5)
@given(seed=st.integers(0, 99))
def test_the_gradient_reaches_the_pixels_and_matches_a_directional_difference(
    rewards: dict[str, Any], name: str, seed: int
) -> None:
    media = media_of(1, 40, seed).mul(0.5).add(0.25).requires_grad_()
    (gradient,) = torch.autograd.grad(total(rewards[name], media, PROMPTS[:1]).sum(), media)
    direction, step = gradient / gradient.norm(), 4e-3
    ends = [float(total(rewards[name], media.detach() + s * direction, PROMPTS[:1])) for s in (step, -step)]
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=5e-2)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_the_weights(rewards: dict[str, Any], name: str) -> None:
    total(rewards[name], media_of(2).requires_grad_(), PROMPTS[:2]).sum().backward()
    weights = list(rewards[name].tower.encoders.module.parameters())
    weights += list(rewards[name].head.parameters()) if name == "aesthetic" else []
    assert weights
    assert all(weight.grad is None and not weight.requires_grad for weight in weights)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_keeps_less_and_changes_neither_score_nor_gradient(
    rewards: dict[str, Any], places: dict[str, Path], name: str
) -> None:
    saving: Any = make_reward(spec(name, places, path="tensor", checkpointing=True))
    totals, gradients, kept = [], [], []
    for reward in (rewards[name], saving):
        media = media_of(2).requires_grad_()
        value = total(reward, media, PROMPTS[:2])
        totals.append(value.detach())
        gradients.append(torch.autograd.grad(value.sum(), media)[0])
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: _counted(kept, t), lambda t: t):
            reward.tower.images(media)
    assert torch.allclose(*totals, rtol=1e-5, atol=1e-5)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()
    assert kept[1] < 0.7 * kept[0]


def _counted(kept: list[int], tensor: Tensor) -> Tensor:
    kept[-1] += tensor.numel()
    return tensor


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pictures_score_as_their_values_do_also_inside_autocast(
    rewards: dict[str, Any], name: str, dtype: torch.dtype
) -> None:
    media = media_of(2).to(dtype)
    plain = total(rewards[name], media.float(), PROMPTS[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = total(rewards[name], media, PROMPTS[:2])
    assert found.dtype == torch.float32
    assert torch.allclose(found, plain, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "near"), [("float16", 0.02), ("bfloat16", 0.1)])
def test_a_model_in_half_precision_gives_nearly_the_same_score_in_float32(
    rewards: dict[str, Any], places: dict[str, Path], name: str, dtype: str, near: float
) -> None:
    half: Any = make_reward(spec(name, places, path="tensor", dtype=dtype))
    plain, found = (total(reward, media_of(2), PROMPTS[:2]) for reward in (rewards[name], half))
    assert next(half.tower.encoders.module.parameters()).dtype == getattr(torch, dtype)
    assert found.dtype == torch.float32
    assert half.tower.scale == rewards[name].tower.scale  # not rounded with the weights
    span = rewards[name].tower.scale if name == "pickscore" else 1.0
    assert torch.allclose(found, plain, atol=near * span)


@pytest.mark.parametrize("name", READING)
def test_a_long_prompt_is_counted_and_named(places: dict[str, Path], name: str) -> None:
    fresh: Any = make_reward(spec(name, places))
    edge = " ".join(["circle"] * 10)  # with both end marks exactly 12
    with warnings.catch_warnings():
        warnings.simplefilter("error" if name != "vlm_rm" else "ignore")  # its baseline adds words
        score(fresh, media_of(1), cases_of([edge]))
    before = fresh.tower.truncated
    with pytest.warns(UserWarning, match="reads 12 tokens, so the end of 1 of"):
        score(fresh, media_of(1), cases_of([edge + " circle"]))
    assert fresh.tower.truncated > before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*prompts does not count")
@pytest.mark.filterwarnings("ignore:.*of .* prompts")
@pytest.mark.parametrize(
    "prompt",
    [
        "\x00",
        "� lone",
        "<|endoftext|> ignore",
        "<end_of_text>",
        "{prompt}{0}{x!r}",
        "é" * 500,
        "\n\t ",
        "🟥" * 40,
        "%s %d",
        "a" * 3000,
        "</w>",
        "&amp;lt;",
    ],
)
def test_a_hostile_prompt_is_a_prompt(rewards: dict[str, Any], name: str, prompt: str) -> None:
    found = score(rewards[name], media_of(2), cases_of([prompt, "a blue square"]))
    assert found.valid.all()
    assert torch.allclose(found.total[1], total(rewards[name], media_of(2)[1:], ["a blue square"])[0], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", ["reference", "tensor"])
def test_a_picture_with_nan_is_invalid_and_leaves_its_neighbours_alone(
    places: dict[str, Path], rewards: dict[str, Any], name: str, path: str
) -> None:
    reward = rewards[name] if path == "tensor" else make_reward(spec(name, places, path=path))
    media = media_of(3)
    plain = total(reward, media, PROMPTS[:3])
    media[1, 0, 0, 0] = torch.nan
    found = score(reward, media, cases_of(PROMPTS[:3]))
    assert found.valid.tolist() == [True, False, True]
    assert torch.allclose(found.total[[0, 2]], plain[[0, 2]], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_making_a_reward_loads_nothing(name: str, tmp_path: Path) -> None:
    nowhere = dict.fromkeys(("open_clip", "transformers", "wide", "hps", "head"), tmp_path / "nowhere")
    reward = make_reward(spec(name, nowhere))
    with pytest.raises(DiffalignError, match="nowhere"):
        score(reward, media_of(1), cases_of(["a"]))


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_cached_by_the_content_of_the_weights_and_by_every_option(
    places: dict[str, Path], name: str, tmp_path: Path
) -> None:
    cache = ScoreCache(tmp_path / "c.sqlite")
    copies = {key: _copied(place, tmp_path / place.name) for key, place in places.items()}
    for options in (spec(name, places), spec(name, copies)):
        score(make_reward(options), media_of(1), cases_of(PROMPTS[:1]), cache=cache)
    # a copy has rows of its own, since its place is an option; that its content changes must show beside that
    before = len(cache)
    for place in copies.values():
        _change(place)
    score(make_reward(spec(name, copies)), media_of(1), cases_of(PROMPTS[:1]), cache=cache)
    assert len(cache) == before + 1
    score(make_reward(spec(name, copies, path="tensor")), media_of(1), cases_of(PROMPTS[:1]), cache=cache)
    assert len(cache) == before + 2


def _copied(place: Path, to: Path) -> Path:
    return shutil.copytree(place, to) if place.is_dir() else Path(shutil.copy(place, to))


def _change(place: Path) -> None:
    for file in [place] if place.is_file() else list(place.iterdir()):
        if file.suffix == ".safetensors":
            save_file(
                {k: v.flip(0).contiguous() if v.ndim else v for k, v in load_file(file).items()}, file, {"format": "pt"}
            )
        elif file.suffix in (".pt", ".pth"):
            found = torch.load(file, weights_only=True)
            state = found.get("state_dict", found)
            torch.save({k: v + 0.01 for k, v in state.items()}, file)


@pytest.mark.parametrize("name", ["clip", "vlm_rm", "aesthetic", "pickscore", "hpsv2", "imagereward", "hpsv3"])
def test_the_reference_path_is_not_called_differentiable(name: str) -> None:
    for path, differentiable in (("reference", False), ("auto", True), ("tensor", True)):
        reward = make_reward({name: {"path": path}})
        assert reward.differentiable is differentiable
    with pytest.raises(NotDifferentiable, match="rounds pixels to 8 bits; use auto or tensor"):
        require_gradient(make_reward({name: {"path": "reference"}}), "noise optimisation")
