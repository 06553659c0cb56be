"""Tiny random judges of real classes: model, processor, tokenizer and chat template, saved as a folder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

KINDS = ("internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "llava")
SAID = (
    'Does the picture show "a red circle"? Answer Yes or No. Yes No Yes No A. B. C. D. E. 0 1 2 3 4 5 6 7 8 9 10\n'
    'Final Score: 3.5\nReply with JSON only: {"reasoning": "the circle is red", "score": [20, 10]}\n'
)
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.25,  # large, so that replies differ
}


def folder(path: str | Path, kind: str = "internvl", seed: int = 0) -> Path:
    """A judge of this kind at `path`: made once for a seed, in under a second or two."""
    place = Path(path)
    if not (place / "config.json").exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, processor = _MAKERS[kind]()
        model.eval().save_pretrained(place)
        processor.save_pretrained(place)
    return place


@functools.cache
def _learnt() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([SAID] * 4, trainers.BpeTrainer(vocab_size=320, initial_alphabet=letters))
    return made.to_str()


def tokenizer(more: dict[str, str] | None = None, plain: tuple[str, ...] = ()) -> Any:
    """Byte-level BPE; `more` are special tokens by their attribute, `plain` those without one."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    named = more or {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_learnt()),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=named,
        padding_side="left",
    )
    made.add_special_tokens({"additional_special_tokens": [*TOKENS, *plain]} if not named else {})
    made.add_tokens([*TOKENS, *plain, *named.values()], special_tokens=True)
    return made


def _internvl() -> tuple[Any, Any]:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    special = {"start_image_token": "<img>", "end_image_token": "</img>"}
    words = tokenizer({**special, "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"})
    vision = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": (16, 16),
        "patch_size": (4, 4),
        "initializer_range": 0.2,
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", "vocab_size": len(words), **LANGUAGE, **_ends(words)},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    seeing = GotOcr2ImageProcessor(size={"height": 16, "width": 16}, crop_to_patches=False)
    processor = InternVLProcessor(
        image_processor=seeing,
        tokenizer=words,
        video_processor=InternVLVideoProcessor(size={"height": 16, "width": 16}),
        image_seq_length=4,
        chat_template=CHAT.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )
    return InternVLForConditionalGeneration(config), processor


def _qwen(kind: str) -> tuple[Any, Any]:
    import transformers as t

    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]
    pads = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = tokenizer(plain=pads)
    start, end, image, video = words.convert_tokens_to_ids(list(pads))
    patch = 8 if kind == "qwen3_vl" else 7
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": patch, "initializer_range": 0.2}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 24, "intermediate_size": 32, "out_hidden_size": 32}
    if kind == "qwen2_5_vl":
        vision |= {"window_size": 28, "fullatt_block_indexes": [1]}
    if kind == "qwen3_vl":
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = {"vocab_size": len(words), "rope_parameters": rope, **LANGUAGE, **_ends(words)}
    config = getattr(t, f"{name}Config")(
        vision_config=vision,
        text_config=text | ({"head_dim": 8} if kind == "qwen3_vl" else {}),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    side = patch * 2
    size = {"shortest_edge": side * side, "longest_edge": 16 * side * side}
    seeing = t.Qwen2VLImageProcessor(patch_size=patch, merge_size=2, size=size)
    film = t.Qwen3VLVideoProcessor if kind == "qwen3_vl" else t.Qwen2VLVideoProcessor
    processor = getattr(t, f"{name}Processor")(
        image_processor=seeing,
        tokenizer=words,
        video_processor=film(patch_size=patch, merge_size=2),
        chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return getattr(t, f"{name}ForConditionalGeneration")(config), processor


def _idefics() -> tuple[Any, Any]:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    words = tokenizer(plain=("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"))
    image = words.convert_tokens_to_ids("<image>")
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "initializer_range": 0.2,
    }
    config = Idefics3Config(
        vision_config=vision,
        text_config={"model_type": "llama", "vocab_size": len(words), **LANGUAGE, **_ends(words)},
        image_token_id=image,
        scale_factor=2,
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=False,
    )
    edges = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(**edges),
        tokenizer=words,
        image_seq_len=4,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    return Idefics3ForConditionalGeneration(config), processor


def _llava() -> tuple[Any, Any]:
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = tokenizer({"image_token": "<image>"})
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 16,
        "initializer_factor": 5.0,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", "vocab_size": len(words), **LANGUAGE, **_ends(words)},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>\n"),
    )
    return LlavaForConditionalGeneration(config), processor


def _ends(words: Any) -> dict[str, int]:
    return {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "bos_token_id": words.pad_token_id}


_MAKERS = {
    "internvl": _internvl,
    "qwen2_vl": functools.partial(_qwen, "qwen2_vl"),
    "qwen2_5_vl": functools.partial(_qwen, "qwen2_5_vl"),
    "qwen3_vl": functools.partial(_qwen, "qwen3_vl"),
    "idefics3": _idefics,
    "llava": _llava,
}
