from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import ConfigError, HubError
from diffalign.scoring import make_reward, score
from tests.rewards import clips
from tests.rewards.clips import PROMPTS, cases_of, media_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.transformers_folder(tmp_path_factory.mktemp("pickscore"), eos=2)


def made(folder: Path, **options: Any) -> Any:
    return make_reward({"pickscore": {"model": str(folder), **options}})


def test_the_score_is_the_scaled_cosine_and_divided_by_its_scale_the_part(folder: Path) -> None:
    reward = made(folder)
    found = score(reward, media_of(4), cases_of(PROMPTS))
    scale = reward.tower.encoders.module.logit_scale.exp().item()
    assert scale == pytest.approx(14.2848, abs=1e-3)  # exp(2.6592), where CLIPs start
    assert torch.allclose(found.total / scale, found.parts["cosine"], atol=1e-6)
    assert found.parts["cosine"].abs().max() <= 1


def test_the_score_is_the_diagonal_of_the_models_own_logits(folder: Path) -> None:
    from transformers import CLIPModel

    from diffalign.clip_tower import ClipTower

    tower = ClipTower(str(folder))
    pixels, (tokens, _) = tower.encoders.preprocess(media_of(4)), tower.encoders.tokenise(PROMPTS)
    with torch.no_grad():
        logits = CLIPModel.from_pretrained(folder).eval()(input_ids=tokens, pixel_values=pixels).logits_per_image
    assert torch.allclose(score(made(folder), media_of(4), cases_of(PROMPTS)).total, logits.diagonal(), atol=1e-4)


def test_a_softmax_over_candidates_is_the_published_preference(folder: Path) -> None:
    found = score(made(folder), media_of(3), cases_of(PROMPTS[:1] * 3))
    chances = found.total.softmax(0)
    assert chances.sum().item() == pytest.approx(1)
    assert chances.argmax() == found.parts["cosine"].argmax()


def test_the_unit_scale_divides_by_26(folder: Path) -> None:
    logits, unit = (score(made(folder, scale=s), media_of(4), cases_of(PROMPTS)) for s in ("logits", "unit"))
    assert torch.allclose(unit.total * 26, logits.total, atol=1e-5)
    assert torch.equal(unit.parts["cosine"], logits.parts["cosine"])


def test_another_scale_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'logits', 'unit'"):
        made(folder, scale="percent")


def test_without_network_the_hub_id_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match="cannot fetch 'yuvalkirstain/PickScore_v1' from the hub: there is no network"):
        score(make_reward("pickscore"), media_of(1), cases_of(["a"]))
