from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from diffalign.errors import ConfigError, HubError
from diffalign.rewards.hpsv2 import padded
from diffalign.scoring import make_reward, score
from diffalign.vision import Preprocess
from tests.rewards import clips
from tests.rewards.clips import PROMPTS, cases_of, media_of

FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("hps")
    clips.know_tiny_h(base / "architectures")
    return clips.hps_folder(base / "weights")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))


def made(model: Path, **options: Any) -> Any:
    return make_reward({"hpsv2": {"model": str(model), "architecture": clips.TINY_H, **options}})


@pytest.mark.parametrize("path", ["reference", "tensor"])
def test_a_picture_of_224_by_448_has_56_black_rows_above_and_below(path: str) -> None:
    preprocess = padded(Preprocess(size=(224, 224), mean=MEAN, std=STD, path=path))  # type: ignore[arg-type]
    seen = preprocess(torch.rand(1, 3, 224, 448) * 0.5 + 0.25)
    black = (-torch.tensor(MEAN) / torch.tensor(STD)).view(1, 3, 1, 1)
    rows = ((seen - black).abs() < 1e-6).all(dim=(0, 1, 3)).nonzero().flatten().tolist()
    assert seen.shape == (1, 3, 224, 224)
    assert rows == [*range(56), *range(168, 224)]


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_the_score_is_the_raw_cosine_of_the_version_asked_for(folder: Path, version: str) -> None:
    stock = open_clip.create_model(clips.TINY_H, str(folder / FILES[version])).eval()
    reward = made(folder, version=version)
    pixels, tokens = reward.tower._preprocess(media_of(4, 50)), open_clip.get_tokenizer(clips.TINY_H)(PROMPTS)
    with torch.no_grad():
        images, texts = stock.encode_image(pixels, normalize=True), stock.encode_text(tokens, normalize=True)
    found = score(reward, media_of(4, 50), cases_of(PROMPTS))
    assert torch.allclose(found.total, (images @ texts.T).diagonal(), atol=1e-6)


def test_version_2_1_is_the_default_and_differs_from_2_0(folder: Path) -> None:
    scores = [score(made(folder, **options), media_of(2), cases_of(PROMPTS[:2])).total for options in _VERSIONS]
    assert torch.equal(scores[0], scores[2])
    assert not torch.allclose(scores[0], scores[1], atol=1e-3)


_VERSIONS: list[dict[str, str]] = [{}, {"version": "2.0"}, {"version": "2.1"}]


def test_half_precision_weights_as_published_are_computed_in_float32(tmp_path: Path, folder: Path) -> None:
    half = clips.hps_folder(tmp_path / "half", dtype=torch.float16)
    plain, found = (score(made(place), media_of(2), cases_of(PROMPTS[:2])).total for place in (folder, half))
    assert torch.allclose(plain, found, atol=1e-2)
    assert next(made(half).tower.encoders.module.parameters()).dtype == torch.float32


def test_loading_raises_no_alarm_about_random_weights(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    score(made(folder), media_of(1), cases_of(["a"]))
    assert not caplog.records


def test_the_model_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = made(folder)
    first = score(reward, media_of(1), cases_of(["a"])).total
    monkeypatch.setattr("diffalign.weights.read", None)
    assert torch.equal(score(reward, media_of(1), cases_of(["a"])).total, first)


def test_a_file_of_the_other_version_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"is version 2\.0, but hpsv2\.version is '2\.1'"):
        score(made(folder / FILES["2.0"]), media_of(1), cases_of(["a"]))
    found = score(made(folder / FILES["2.0"], version="2.0"), media_of(1), cases_of(["a"]))
    assert torch.equal(found.total, score(made(folder, version="2.0"), media_of(1), cases_of(["a"])).total)


def test_without_network_the_file_on_the_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match=r"'HPS_v2\.1_compressed\.pt' of 'xswu/HPSv2' .*no network"):
        score(make_reward("hpsv2"), media_of(1), cases_of(["a"]))
