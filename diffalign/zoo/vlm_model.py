"""The class, processor and files of `shapes-vlm`: a small InternVL that transformers loads and serves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.judges.endpoint_template import FILE as DECISIONS
from diffalign.judges.endpoint_template import decision_template
from diffalign.world.scenes import CANVAS
from diffalign.zoo.vlm_words import END, IMAGE

PATCH = 8
SIDE = int(CANVAS) // PATCH
MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the model is."""

    picture_width: int = 160
    picture_layers: int = 5
    width: int = 192
    layers: int = 6
    heads: int = 6
    inner: int = 544  # of the language model's feed-forward


def blank(config: Sizes, words: Any) -> Any:
    """The model without training."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    picture = InternVLVisionConfig(
        hidden_size=config.picture_width,
        num_hidden_layers=config.picture_layers,
        num_attention_heads=config.picture_width // 32,
        intermediate_size=3 * config.picture_width,
        image_size=int(CANVAS),
        patch_size=PATCH,
        use_mean_pooling=False,
        layer_scale_init_value=1.0,
        attention_bias=True,
    )
    text = Qwen2Config(
        vocab_size=len(words),
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        intermediate_size=config.inner,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        use_cache=True,
    )
    whole = InternVLConfig(
        vision_config=picture.to_dict(),
        text_config=text.to_dict(),
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIDE // 2) ** 2,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return InternVLForConditionalGeneration(whole)


def processor(words: Any) -> Any:
    """What turns chats and pictures into the model's inputs."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    size = {"height": int(CANVAS), "width": int(CANVAS)}
    pictures = GotOcr2ImageProcessor(
        size=size, image_mean=MEAN, image_std=STD, resample=2, crop_to_patches=False, min_patches=1, max_patches=1
    )
    videos = InternVLVideoProcessor(size=size, image_mean=MEAN, image_std=STD, resample=2)
    return InternVLProcessor(
        pictures, words, videos, image_seq_length=(SIDE // 2) ** 2, chat_template=words.chat_template
    )


def write(model: Any, words: Any, target: Path) -> Path:
    """In half precision on disk; loaded in single precision, which CPUs are good at."""
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    processor(words).save_pretrained(target)
    decisions = decision_template("<|user|>", IMAGE, f"{END}<|assistant|>")  # a server then asks in the words it learnt
    (target / DECISIONS).write_text(decisions, encoding="utf-8")
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    model.generation_config.save_pretrained(target)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    told = json.loads((target / "config.json").read_text(encoding="utf-8"))
    told["dtype"] = "float32"
    (target / "config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    half = {name: value.half().contiguous() for name, value in state.items()}
    save_file(half, target / "model.safetensors", metadata={"format": "pt"})
    return target
