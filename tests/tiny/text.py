"""Character-level tokenizers of the real classes and the text encoders that read them."""

from __future__ import annotations

import string
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from .family import seeded

WIDTH = 16
LENGTH = 77
BYTES = sorted(ByteLevel.alphabet())
LETTERS = [*string.ascii_letters, *string.digits, *string.punctuation, "\u2581", "\n"]
QWEN_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ids(*tokens: str) -> dict[str, int]:
    """Number the tokens in order, each once."""
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's: bytes, and bytes that end a word."""
    vocab = ids("<|startoftext|>", "<|endoftext|>", *BYTES, *(byte + "</w>" for byte in BYTES))
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """T5's and UMT5's: a unigram model whose pieces are letters."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=specials + [(letter, -2.0) for letter in LETTERS], extra_ids=0, model_max_length=LENGTH)


def gemma_tokenizer() -> GemmaTokenizer:
    return GemmaTokenizer(vocab=ids("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *LETTERS), merges=[])


def llama_tokenizer() -> LlamaTokenizer:
    """Llama's, padded on the right as HunyuanVideo wants it."""
    vocab = ids("<unk>", "<s>", "</s>", *LETTERS)
    return LlamaTokenizer(vocab=vocab, merges=[], pad_token="</s>", padding_side="right")


def bert_tokenizer() -> BertTokenizer:
    letters = [*LETTERS, *("##" + letter for letter in LETTERS)]
    return BertTokenizer(vocab=ids("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters), model_max_length=LENGTH)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's: bytes, its chat marks as single tokens, and a plain chat template."""
    return Qwen2Tokenizer(
        vocab=ids("<|endoftext|>", *BYTES),
        merges=[],
        additional_special_tokens=list(QWEN_MARKS),
        chat_template=QWEN_CHAT,
        padding_side="right",
    )


def qwen_processor() -> Qwen2VLProcessor:
    """Qwen's reader of text with pictures; a picture becomes a handful of patches."""
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 64, "max_pixels": 256}
    images, videos = Qwen2VLImageProcessor(**patches), Qwen2VLVideoProcessor(**patches)
    return Qwen2VLProcessor(images, qwen_tokenizer(), videos, chat_template=QWEN_CHAT)


def sizes(**extra: Any) -> dict[str, Any]:
    """Names that most text configs of transformers share."""
    return {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2} | extra


def clip(projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPTextConfig(
        **sizes(), **marks, projection_dim=WIDTH, vocab_size=2 * len(BYTES) + 2, max_position_embeddings=LENGTH
    )
    return seeded(cls, config)


def t5(width: int = 32) -> T5EncoderModel:
    config = T5Config(vocab_size=len(LETTERS) + 3, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return seeded(T5EncoderModel, config)


def umt5(width: int = 32) -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=len(LETTERS) + 3, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return seeded(UMT5EncoderModel, config)


def gemma() -> Gemma2Model:
    return seeded(Gemma2Model, Gemma2Config(**sizes(), num_key_value_heads=1, head_dim=8, vocab_size=len(LETTERS) + 5))


def glm() -> GlmModel:
    config = sizes(num_key_value_heads=1, head_dim=8, vocab_size=len(LETTERS) + 5, pad_token_id=0)
    return seeded(GlmModel, GlmConfig(**config))


def llama() -> LlamaModel:
    return seeded(LlamaModel, LlamaConfig(**sizes(), vocab_size=len(LETTERS) + 3))


def bert() -> BertModel:
    return seeded(BertModel, BertConfig(**sizes(), vocab_size=2 * len(LETTERS) + 5, max_position_embeddings=LENGTH))


def qwen3() -> Qwen3Model:
    config = Qwen3Config(**sizes(), num_key_value_heads=1, head_dim=8, vocab_size=len(qwen_tokenizer()))
    return seeded(Qwen3Model, config)


def qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    """A vision-language encoder: four-pixel patches, merged two by two."""
    tokenizer = qwen_tokenizer()
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(QWEN_MARKS[2:]))
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = sizes(num_key_value_heads=1, vocab_size=len(tokenizer), rope_scaling=rope, rope_parameters=rope)
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16}
    config = Qwen2_5_VLConfig(
        text_config=text | {"bos_token_id": 0, "eos_token_id": 0},
        vision_config=vision | {"fullatt_block_indexes": [0]},
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )
    return seeded(Qwen2_5_VLForConditionalGeneration, config)
