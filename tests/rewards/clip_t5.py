"""CLIP-FlanT5 at a tiny width: the stock parts with random weights, and a folder in the published layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

from tests.tiny.text import LETTERS, t5_tokenizer

State = dict[str, Tensor]
SIDE, PATCH, WIDTH, WORDS = 28, 7, 128, len(LETTERS) + 3
SETTINGS = {  # as the published config.json is laid out
    "model_type": "clip_t5",
    "architectures": ["CLIPT5ForConditionalGeneration"],
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "dropout_rate": 0.1,
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "vocab_size": WORDS + 28,  # more than there are tokens, as in google/flan-t5-xxl
    "mm_hidden_size": WIDTH,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
}


@dataclass
class Stock:
    """The libraries' own models and a projector."""

    t5: Any
    vision: Any
    projector: nn.Module


def stock() -> Stock:
    """Random weights that tell pictures and words apart."""
    own = {name: value for name, value in SETTINGS.items() if name != "model_type"}
    sizes = {"hidden_size": WIDTH, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t5: Any = T5ForConditionalGeneration(T5Config(**own | {"vocab_size": WORDS})).eval()
        t5.lm_head.weight = nn.Parameter(torch.randn(WORDS, 32) * 0.5)  # untied, as in every Flan-T5
        vision = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH)).eval()
        projector = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, 32))
        for module in (t5, vision, projector):
            for name, weight in module.named_parameters():
                if "lm_head" not in name and "shared" not in name:
                    weight.data = torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 1 / weight[0].numel() ** 0.5)
                if weight.ndim == 1 and name.endswith("weight"):
                    weight.data += 1
    return Stock(t5, vision, projector.eval())


def published(model: Stock) -> State:
    """Under the names of the published checkpoint."""
    state = {name: tensor.clone() for name, tensor in model.t5.state_dict().items()}
    state["embed_tokens.weight"] = state["shared.weight"].clone()
    for name, tensor in model.vision.state_dict().items():
        state[f"vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = tensor.clone()
    return state | {f"mm_projector.{name}": tensor.clone() for name, tensor in model.projector.state_dict().items()}


def write(folder: Path, state: State, **changed: Any) -> Path:
    """A folder as the hub has it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    write_settings(folder, **changed)
    return folder


def write_settings(folder: Path, **changed: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    t5_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SETTINGS | changed))


def media_of(rows: int, height: int = 40, width: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(seed))
