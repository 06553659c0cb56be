"""A T5 that says nothing: stock pipelines without T5 append zeros, but diffusers cannot load one whose T5 is missing.

The tokenizer maps every text to the end token and the encoder's last norm has zero weight, so its output is exactly 0.
"""

from __future__ import annotations

from typing import Any

END, PAD = "</s>", "<pad>"


def silent_encoder(width: int) -> Any:
    """A T5EncoderModel whose output (B, N, width) is zero whatever it reads."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=2, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1, pad_token_id=0, eos_token_id=1
    )
    model = T5EncoderModel(config)
    model.encoder.final_layer_norm.weight.data.zero_()
    return model


def silent_tokenizer() -> Any:
    """A tokenizer that reduces every text to its end token, so that no length is ever too short for it."""
    from tokenizers import Regex, Tokenizer, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel({PAD: 0, END: 1}, unk_token=END))
    tokens.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    tokens.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token=END, pad_token=PAD, unk_token=END, model_max_length=512
    )
