from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from diffalign.cases import Case
from diffalign.errors import ConfigError, HubError, ModelError
from diffalign.scoring import make_reward, score
from tests.rewards import clips
from tests.rewards.clips import cases_of, media_of


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("aesthetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFALIGN_CACHE", str(folder / "cache"))
        head = clips.aesthetic_head(folder / "sac+logos+ava1-l14-linearMSE.pth")
        return {"model": str(clips.transformers_folder(folder / "clip", dimensions=768)), "head": str(head)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def reward(places: dict[str, str]) -> Any:
    return make_reward({"aesthetic": {**places, "path": "tensor"}})


def units(seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(4, 768, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_five_matrices_collapsed_into_one_give_the_same_score(reward: Any, places: dict[str, str]) -> None:
    state = torch.load(places["head"], weights_only=True)
    matrix, offset = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for place in (0, 2, 4, 6, 7):
        weight = state[f"layers.{place}.weight"].double()
        matrix, offset = weight @ matrix, weight @ offset + state[f"layers.{place}.bias"].double()
    embedded = reward.tower.images(media_of(3)).double()
    expected = (embedded @ matrix.T + offset).squeeze(-1).float()
    assert torch.allclose(score(reward, media_of(3), cases_of(["a"] * 3)).total, expected, atol=1e-4)


@given(seed=st.integers(0, 99), share=st.floats(0, 1))
def test_the_head_is_affine(shared: Any, seed: int, share: float) -> None:
    a, b = units(seed), units(seed + 1)
    mixed = shared.head(share * a + (1 - share) * b)
    assert torch.allclose(mixed, share * shared.head(a) + (1 - share) * shared.head(b), atol=1e-4)


@pytest.fixture(scope="module")
def shared(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        found: Any = make_reward({"aesthetic": places})
        found.head  # noqa: B018  loads it into this cache
        return found


def test_no_prompt_is_read(reward: Any) -> None:
    found = score(reward, media_of(1).expand(2, -1, -1, -1), [Case(prompt="a"), Case(prompt="b " * 500)]).total
    assert found[0] == found[1]


def test_the_head_loads_from_a_folder_too_and_stays_in_float32(places: dict[str, str], tmp_path: Path) -> None:
    clips.aesthetic_head(tmp_path / "aesthetic-model.pth")  # the name of the copy on the hub
    found: Any = make_reward({"aesthetic": {**places, "head": str(tmp_path), "dtype": "bfloat16"}})
    assert next(found.head.parameters()).dtype == torch.float32
    assert score(found, media_of(1), cases_of(["a"])).total.dtype == torch.float32


def test_a_tower_of_another_width_is_one_clear_error(places: dict[str, str], tmp_path: Path) -> None:
    narrow = clips.transformers_folder(tmp_path / "narrow")
    reward = make_reward({"aesthetic": {**places, "model": str(narrow)}})
    with pytest.raises(ConfigError, match=r"the head reads 768 dimensions, and '.*narrow' gives 16\. .*ViT-L/14"):
        score(reward, media_of(1), cases_of(["a"]))


def test_a_head_of_another_layout_is_one_clear_error(places: dict[str, str], tmp_path: Path) -> None:
    torch.save({"layers.0.weight": torch.ones(1, 768), "layers.0.bias": torch.ones(1)}, tmp_path / "linear.pth")
    reward = make_reward({"aesthetic": {**places, "head": str(tmp_path / "linear.pth")}})
    with pytest.raises(ModelError, match=r"'layers\.0\.weight' is \(1, 768\), not \(1024, 768\)"):
        score(reward, media_of(1), cases_of(["a"]))


def test_without_network_the_head_names_the_published_file(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    reward = make_reward({"aesthetic": {"model": places["model"]}})
    with pytest.raises(HubError, match=r"Give `head` the path of sac\+logos\+ava1-l14-linearMSE\.pth"):
        score(reward, media_of(1), cases_of(["a"]))
