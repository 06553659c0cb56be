"""On the reference path every reward sees what the published preprocessing makes of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.scoring import make_reward
from diffalign.vision import to_pil
from tests.rewards import clips
from tests.rewards.clips import NAMES, spec


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return clips.every_place(tmp_path_factory.mktemp("clips"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(32, 32), (40, 40), (37, 71), (64, 41), (20, 32)])
def test_the_reference_path_is_the_stock_preprocessing(
    places: dict[str, Path], name: str, shape: tuple[int, int]
) -> None:
    reward: Any = make_reward(spec(name, places, path="reference"))
    media = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(3))
    seen = reward.tower._preprocess(media)
    stock = {"clip": _open_clip, "vlm_rm": _squashing, "hpsv2": _hps}.get(name, _transformers)
    assert torch.allclose(seen, torch.stack([stock(picture) for picture in to_pil(media)]), atol=1e-5)


def _open_clip(picture: Any) -> Tensor:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    found: Tensor = image_transform_v2(PreprocessCfg(size=clips.SIDE), is_train=False)(picture)
    return found


def _transformers(picture: Any) -> Tensor:
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Stock
    except ImportError:  # before transformers 5
        from transformers import CLIPImageProcessor as Stock
    sides = {"size": {"shortest_edge": clips.SIDE}, "crop_size": {"height": clips.SIDE, "width": clips.SIDE}}
    found: Tensor = Stock(**sides)(picture, return_tensors="pt")["pixel_values"][0]
    return found


def _squashing(picture: Any) -> Tensor:
    """The published order: to tensor, both sides to the size of the model, normalise."""
    from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

    resize = Resize((clips.SIDE, clips.SIDE), InterpolationMode.BICUBIC, antialias=True)
    found: Tensor = Compose([ToTensor(), resize, Normalize(*_COLOURS)])(picture)
    return found


def _hps(picture: Any) -> Tensor:
    """The published order: to tensor, longest side to the size of the model, zeros around it, normalise."""
    from torchvision.transforms import InterpolationMode, Normalize, ToTensor
    from torchvision.transforms.functional import pad, resize

    ratio = clips.SIDE / max(picture.size)
    height, width = (round(side * ratio) for side in (picture.height, picture.width))
    small = resize(ToTensor()(picture), [height, width], InterpolationMode.BICUBIC, antialias=True)
    rows, columns = clips.SIDE - height, clips.SIDE - width
    around = [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2]
    found: Tensor = Normalize(*_COLOURS)(pad(small, around))
    return found


_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
