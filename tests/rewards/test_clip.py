from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from diffalign import clip_tower
from diffalign.cases import Case
from diffalign.errors import ConfigError, DiffalignError, HubError, ModelError, UnknownName
from diffalign.scoring import Reward, ScoreCache, make_reward, score

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PROMPTS = ["two red circles", "a blue square", "", "a green triangle above a red circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(**CONFIG)
        save_file(
            {k: torch.randn_like(v) * 0.3 if v.ndim > 1 else v for k, v in model.state_dict().items()},
            path / "open_clip_model.safetensors",
        )
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    return path


@pytest.fixture(scope="module")
def reward(folder: Path) -> Any:
    return make_reward({"clip": {"model": str(folder), "path": "tensor"}})


def media_of(rows: int, side: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def cases_of(prompts: list[str]) -> list[Case]:
    return [Case(prompt=p) for p in prompts]


@given(picks=st.lists(st.integers(0, 3), min_size=1, max_size=6), side=st.integers(16, 48))
def test_a_batch_equals_single_calls_in_any_order(reward: Reward, picks: list[int], side: int) -> None:
    media, cases = media_of(4, side)[picks], [cases_of(PROMPTS)[k] for k in picks]
    singles = [score(reward, media[k : k + 1], cases[k : k + 1]).total for k in range(len(picks))]
    assert torch.allclose(score(reward, media, cases).total, torch.cat(singles), atol=1e-5)


def test_the_score_is_the_cosine_of_the_models_own_embeddings(reward: Reward, folder: Path) -> None:
    name = f"local-dir:{folder}"
    model = open_clip.create_model(name).eval()
    media, texts = media_of(4, 32), open_clip.get_tokenizer(name)(PROMPTS)
    pixels = (media - torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]) / torch.tensor(
        open_clip.OPENAI_DATASET_STD
    )[:, None, None]
    with torch.no_grad():
        expected = torch.cosine_similarity(model.encode_image(pixels), model.encode_text(texts))
        logits = model.get_logits(pixels, texts)[0].diagonal() / model.logit_scale.exp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score(reward, media, cases_of(PROMPTS)).total
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(found, logits, atol=1e-5)
    assert found.std() > 1e-3  # the fixture tells pictures apart


@given(seed=st.integers(0, 99))
def test_the_gradient_reaches_the_pixels_and_matches_a_directional_difference(reward: Reward, seed: int) -> None:
    media, cases = media_of(1, 40, seed).mul(0.5).add(0.25).requires_grad_(), cases_of(PROMPTS[:1])
    (gradient,) = torch.autograd.grad(score(reward, media, cases).total.sum(), media)
    direction = gradient / gradient.norm()
    step = 4e-3
    ends = [float(score(reward, media.detach() + s * direction, cases).total) for s in (step, -step)]
    assert gradient.isfinite().all()
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=5e-2)


def test_logits_are_the_cosine_times_the_models_own_scale(folder: Path, reward: Any) -> None:
    logits: Any = make_reward({"clip": {"model": str(folder), "scale": "logits", "path": "tensor"}})
    cosines = score(reward, media_of(4), cases_of(PROMPTS)).total
    found = score(logits, media_of(4), cases_of(PROMPTS)).total
    assert torch.allclose(found, logits.tower.encoders.module.logit_scale.exp() * cosines, rtol=1e-5)
    assert (reward.range, logits.range) == ((-1.0, 1.0), None)


def test_the_weights_get_no_gradient(reward: Any) -> None:
    score(reward, media_of(2).requires_grad_(), cases_of(PROMPTS[:2])).total.sum().backward()
    weights = list(reward.tower.encoders.module.parameters())
    assert weights
    assert all(w.grad is None and not w.requires_grad for w in weights)


def test_loading_under_inference_mode_leaves_later_gradients_and_the_random_state_alone(folder: Path) -> None:
    fresh = make_reward({"clip": {"model": str(folder)}})
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        score(fresh, media_of(1), cases_of(PROMPTS[:1]))
    assert torch.equal(torch.random.get_rng_state(), before)
    media = media_of(1).requires_grad_()
    assert score(fresh, media, cases_of(PROMPTS[:1])).total.requires_grad


def test_the_score_is_float32_also_inside_autocast_and_for_half_media(reward: Reward) -> None:
    media = media_of(2).half()
    plain = score(reward, media.float(), cases_of(PROMPTS[:2])).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(score(reward, media, cases_of(PROMPTS[:2])).total, plain, atol=1e-5)


def test_a_long_prompt_is_counted_and_named_once(folder: Path) -> None:
    fresh: Any = make_reward({"clip": {"model": str(folder)}})
    with pytest.warns(UserWarning, match="reads 12 tokens, so the end of 1 of 2 prompts does not count"):
        score(fresh, media_of(2), cases_of(["short", "word " * 2000]))
    score(fresh, media_of(1), cases_of(["word " * 2000]))
    assert fresh.truncated == 1
    edge = cases_of([" ".join(["circle"] * 10)])  # with both end marks exactly 12
    score(fresh, media_of(1), edge)
    assert fresh.truncated == 1


def test_scores_of_a_folder_are_cached_by_the_content_of_its_weights(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    cache = ScoreCache(tmp_path / "c.sqlite")
    for path in (folder, folder, copy):
        score(make_reward({"clip": {"model": str(path)}}), media_of(1), cases_of(PROMPTS[:1]), cache=cache)
    rows = len(cache)
    weights = {k: v.flip(0) for k, v in load_file(copy / "open_clip_model.safetensors").items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, copy / "open_clip_model.safetensors")
    score(make_reward({"clip": {"model": str(copy)}}), media_of(1), cases_of(PROMPTS[:1]), cache=cache)
    assert len(cache) == rows + 1


@pytest.mark.parametrize(
    "model", ["laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "hf-hub:org/name", "ViT-B-32:laion2b_s34b_b79k"]
)
def test_without_network_a_hub_id_says_so_and_offers_the_embedded_model(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match=r"cannot fetch .* Give a local folder, or 'shapes-clip'"):
        score(make_reward({"clip": {"model": model}}), media_of(1), cases_of(["a"]))


@pytest.mark.parametrize(
    ("model", "kind", "says"),
    [
        ("ViT-B-23:openai", UnknownName, r"Did you mean 'ViT-B-32'\?"),
        ("ViT-B-32:openia", UnknownName, r"Did you mean 'openai'\?"),
        ("ViT-B-32", UnknownName, "no weights of 'ViT-B-32' called ''"),
        ("local-dir:/nowhere", ConfigError, "needs open_clip_config.json"),
    ],
)
def test_a_wrong_model_name_is_one_clear_error(model: str, kind: type[DiffalignError], says: str) -> None:
    with pytest.raises(kind, match=says):
        score(make_reward({"clip": {"model": model}}), media_of(1), cases_of(["a"]))


def test_a_damaged_folder_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "open_clip_model.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(ModelError, match="open_clip cannot load"):
        score(make_reward({"clip": {"model": str(copy)}}), media_of(1), cases_of(["a"]))


def test_a_tag_trained_with_quick_gelu_is_loaded_with_it() -> None:
    assert clip_tower.find_source("ViT-B-32:openai", None).quick_gelu
    assert not clip_tower.find_source("ViT-B-32:laion2b_s34b_b79k", None).quick_gelu
