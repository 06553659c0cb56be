"""Our modules at full size want exactly the names and shapes of the published weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from diffalign.rewards.aesthetic import Head
from tests.rewards.layouts import layout


def told(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / "layouts" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def module(name: str) -> nn.Module:
    with torch.device("meta"):
        if name == "hpsv2":
            return open_clip.model.CLIP(**open_clip.get_model_config("ViT-H-14"))
        if name == "pickscore":
            from transformers import CLIPConfig, CLIPModel

            return CLIPModel(CLIPConfig(**told(name)["config"]))
        return Head()


@pytest.mark.parametrize("name", ["hpsv2", "pickscore", "aesthetic"])
def test_the_module_wants_the_published_names_and_shapes(name: str) -> None:
    published = layout(name)
    assert {key: tuple(tensor.shape) for key, tensor in module(name).state_dict().items()} == published
    assert sum(math.prod(shape) for shape in published.values()) == told(name)["parameters"]
