"""Tiny CLIPs and heads with random weights, in the layouts in which the real ones are published."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign import weights
from diffalign.cases import Case
from diffalign.own_rewards import TrainedCard, write_card

SIDE = 32
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TINY_H = "tiny-H"  # an architecture that open_clip knows after `know_tiny_h`
NAMES = ["clip", "clip_hf", "vlm_rm", "aesthetic", "pickscore", "hpsv2"]  # of the specs of `spec`
PROMPTS = ["two red circles", "a blue square", "", "a green triangle above a red circle"]


def media_of(rows: int, side: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def cases_of(prompts: list[str]) -> list[Case]:
    return [Case(prompt=p) for p in prompts]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights far from their start, so that pictures and prompts are told apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return module


def open_clip_folder(folder: Path, seed: int = 0, preprocess: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with seeded(seed):
        model = shaken(open_clip.model.CLIP(**OPEN_CLIP), seed)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    told = {"model_cfg": OPEN_CLIP, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    return folder


def transformers_model(dimensions: int = 16, context: int = 12, eos: int = 49407, seed: int = 0) -> Any:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**text, "max_position_embeddings": context, "eos_token_id": eos, "hidden_act": "gelu"},
        vision_config={**text, "image_size": SIDE, "patch_size": 8, "hidden_act": "gelu"},
        projection_dim=dimensions,
    )
    with seeded(seed):
        return shaken(CLIPModel(config), seed).eval()


def transformers_folder(folder: Path, **settings: Any) -> Path:
    model = transformers_model(**settings)
    model.save_pretrained(folder)
    return folder


def know_tiny_h(folder: Path) -> None:
    """Make the architecture `tiny-H` known to open_clip for the rest of the process."""
    if TINY_H not in open_clip.list_models():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{TINY_H}.json").write_text(json.dumps(OPEN_CLIP))
        open_clip.add_model_config(folder)


def hps_folder(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Both versions, each with different weights, as the published checkpoints nest them."""
    folder.mkdir(parents=True, exist_ok=True)
    for shift, name in enumerate(["HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"]):
        with seeded(seed + shift):
            state = shaken(open_clip.model.CLIP(**OPEN_CLIP), seed + shift).to(dtype).state_dict()
        torch.save({"epoch": 1, "state_dict": dict(state)}, folder / name)
    return folder


def aesthetic_head(file: Path, seed: int = 0) -> Path:
    """The published file: a bare state dict of five matrices."""
    widths, generator = [768, 1024, 128, 64, 16, 1], torch.Generator().manual_seed(seed)
    state = {}
    for place, have, give in zip([0, 2, 4, 6, 7], widths[:-1], widths[1:], strict=True):
        state[f"layers.{place}.weight"] = torch.randn(give, have, generator=generator) / have**0.5
        state[f"layers.{place}.bias"] = torch.randn(give, generator=generator)
    torch.save(state, file)
    return file


def every_place(folder: Path) -> dict[str, Path]:
    """What `spec` reads."""
    know_tiny_h(folder / "architectures")
    return {
        "open_clip": open_clip_folder(folder / "open_clip"),
        "transformers": transformers_folder(folder / "transformers"),
        "wide": transformers_folder(folder / "wide", dimensions=768),
        "hps": hps_folder(folder / "hps"),
        "head": aesthetic_head(folder / "sac+logos+ava1-l14-linearMSE.pth"),
    }


def spec(name: str, places: dict[str, Path], **options: Any) -> dict[str, Any]:
    """One reward at a tiny size, as a user writes it."""
    own: dict[str, Any] = {
        "clip": {"model": str(places["open_clip"])},
        "clip_hf": {"reward": "clip", "model": str(places["transformers"])},
        "vlm_rm": {"model": str(places["open_clip"]), "baseline": ["a picture", "a photo of {prompt}"]},
        "aesthetic": {"model": str(places["wide"]), "head": str(places["head"])},
        "pickscore": {"model": str(places["transformers"])},
        "hpsv2": {"model": str(places["hps"]), "architecture": TINY_H},
    }[name]
    return {name: {**own, **options}}


def trained_folder(folder: Path) -> Path:
    """A reward as a training leaves it."""
    open_clip_folder(folder / "clip")
    told = {"base_version": "none", "weights": weights.digest_of_tensors(folder), "mean": 1.0, "deviation": 2.0}
    card = TrainedCard(name="taste", tower="clip", base="none", temperature=1.0, loss="pick", **told)  # type: ignore[arg-type]
    write_card(folder, card)
    return folder
