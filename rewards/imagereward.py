"""ImageReward: how much people like a picture for its prompt; on the authors' data the mean is 0 and the deviation 1.

Jiazheng Xu et al.: "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", 2023
(arXiv 2304.05977). A ViT-L/16 makes tokens of the picture; BLIP's text encoder reads the prompt and looks at them
through cross-attention; five matrices without activations turn its first token, [CLS], into one number.

Where we differ:
- All pictures of a call go through the towers together; the published library takes one at a time.
- Marks of the tokenizer inside a prompt, such as [SEP], are read as plain text.
- Where a gradient is asked for, pictures are resized as tensors and not rounded to 8 bits; `path` fixes one way.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffalign import weights
from diffalign.cases import Case
from diffalign.errors import ConfigError, ModelError
from diffalign.registry import register_reward
from diffalign.vision import ROUNDED, Preprocess, Route

HUB, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"  # BLIP adds [DEC] and [ENC] to it; scoring uses neither
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score on the authors' data
CONTEXT = 35  # tokens of a prompt, with both end marks
HEAD_WIDTH = 64  # of an attention head, in both encoders
WIDTHS = (1024, 128, 64, 16, 1)
COLOUR_MEAN, COLOUR_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
INSTEAD = f"Give `model` the path of {FILE}, or a folder with it."


@register_reward("imagereward", differentiable=True)
class ImageReward:
    """Comparable between prompts, unlike a CLIP's cosine; `model` is a hub id, a folder or a checkpoint file."""

    reads_prompt = True

    def __init__(
        self,
        model: str = HUB,
        revision: str | None = None,
        tokenizer: str = TOKENIZER,  # a hub id, or a folder with vocab.txt or tokenizer.json
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        path: Route = "auto",
    ) -> None:
        self.options = {"model": model, "revision": revision, "tokenizer": tokenizer, "dtype": dtype, "path": path}
        self.differentiable, self.no_gradient = path != "reference", ROUNDED
        self.model, self.revision, self.place, self.path = model, revision, tokenizer, path
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.truncated = 0  # prompts so far that were longer than the model reads

    @cached_property  # of what is loaded: a file that changes later does not change it
    def version(self) -> str:
        words = sorted(p for p in self.folder.iterdir() if p.name == "vocab.txt" or p.name.startswith("tokenizer"))
        return " ".join(["1", *(weights.digest(file) for file in (self.file, *words))])

    @cached_property
    def file(self) -> Path:
        return weights.find(self.model, FILE, self.revision, instead=INSTEAD)

    @cached_property
    def folder(self) -> Path:
        """Of the tokenizer."""
        here = Path(self.place).expanduser()
        instead = f"Give `tokenizer` a folder with the vocab.txt of {TOKENIZER}."
        if not here.is_dir():
            weights.require_hub_id(self.place, instead)
            here = weights.fetch_folder(self.place, ["vocab.txt", "tokenizer*.json"], instead=instead)
        if not any((here / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
            raise ConfigError(f"'{here}' has neither vocab.txt nor tokenizer.json. {instead}")
        return here

    @cached_property
    def scorer(self) -> Scorer:
        with torch.inference_mode(False):
            state = weights.renamed(weights.read(self.file), ours)
            made = Scorer.like(state, f"'{self.file}'")
            weights.fit(made, state, f"'{self.file}'")
            for part, dtype in ((made.vision, self.dtype), (made.text, self.dtype), (made.head, torch.float32)):
                weights.frozen(part, dtype)
        return made.eval()

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import BertTokenizer

        try:
            found = BertTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as e:
            raise ModelError(f"'{self.folder}' has no tokenizer that BERT reads: {e}. Give `tokenizer` another.") from e
        words = self.scorer.text.get_input_embeddings().num_embeddings
        if max(found.get_vocab().values()) >= words:
            raise ModelError(
                f"the tokenizer '{self.place}' knows {len(found)} tokens, and the model {words}. Use '{TOKENIZER}'."
            )
        return found

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        sound = media.isfinite().flatten(1).all(1)  # (B,)
        pixels = media.float().where(sound[:, None, None, None], 0.0)
        ids, mask = self.tokens([case.prompt for case in cases])
        scorer = self.scorer.to(media.device)
        with torch.autocast(media.device.type, enabled=False):
            seen = self.preprocess(pixels).to(self.dtype)
            raw = scorer(seen, ids.to(media.device), mask.to(media.device))  # (B,)
        return normalised(raw).where(sound, torch.nan)

    @cached_property
    def preprocess(self) -> Preprocess:
        side = int(self.scorer.vision.config.image_size)
        return Preprocess(size=(side, side), mean=COLOUR_MEAN, std=COLOUR_STD, path=self.path)

    def tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """B prompts -> ids and mask, each (B, 35); prompts that do not fit are counted."""
        plain = {"split_special_tokens": True, "verbose": False}
        prompts = [prompt.encode("utf-8", "replace").decode() for prompt in prompts]  # half a surrogate is no text
        lengths = [len(ids) for ids in self.tokenizer(prompts, **plain)["input_ids"]]
        if cut := [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > CONTEXT]:
            self.truncated += len(cut)
            warnings.warn(
                f"'{self.model}' reads {CONTEXT} tokens, so the end of {len(cut)} of {len(prompts)} prompts does not "
                f"count ({self.truncated} so far), first: '{cut[0][:60]}...'",
                stacklevel=3,
            )
        frame = {"padding": "max_length", "truncation": True, "max_length": CONTEXT, "return_tensors": "pt"}
        found = self.tokenizer(prompts, **plain, **frame)
        return found["input_ids"], found["attention_mask"]


class Scorer(nn.Module):
    """Both encoders in transformers' classes, and the head; its parameters have no memory before they are loaded."""

    def __init__(self, vision: dict[str, int], text: dict[str, int]) -> None:
        from accelerate import init_empty_weights
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        with torch.random.fork_rng(devices=[]), init_empty_weights():
            self.vision = BlipVisionModel(BlipVisionConfig(layer_norm_eps=1e-6, **vision))
            unused = {"bos_token_id": None, "sep_token_id": None}
            config = BlipTextConfig(is_decoder=True, encoder_hidden_size=vision["hidden_size"], **unused, **text)
            self.text = BlipTextModel(config, add_pooling_layer=False)  # only a decoder has cross-attention
            made = [nn.Linear(have, give) for have, give in pairwise((text["hidden_size"], *WIDTHS))]
            gaps = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]  # they only hold the published numbers
            self.head = nn.Sequential(made[0], gaps[0], made[1], gaps[1], made[2], gaps[2], made[3], made[4])

    @classmethod
    def like(cls, state: Mapping[str, Tensor], who: str) -> Scorer:
        """Of the sizes that a checkpoint has; it comes without settings."""
        first_layer = "vision.encoder.layers.0.mlp.fc1.weight", "text.encoder.layer.0.intermediate.dense.weight"
        try:
            _, places, width = state["vision.embeddings.position_embedding"].shape
            patch = state["vision.embeddings.patch_embedding.weight"].shape[-1]
            words, text_width = state["text.embeddings.word_embeddings.weight"].shape
            context = state["text.embeddings.position_embeddings.weight"].shape[0]
            inner, text_inner = (state[name].shape[0] for name in first_layer)
        except (KeyError, ValueError, IndexError) as e:
            raise ModelError(
                f"the weights of {who} do not fit: {e} is missing or of another shape. They are not ImageReward's."
            ) from e
        vision = _sizes(width, inner, state, "vision.encoder.layers.")
        vision |= {"image_size": math.isqrt(places - 1) * patch, "patch_size": patch}
        text = _sizes(text_width, text_inner, state, "text.encoder.layer.")
        return cls(vision, text | {"vocab_size": words, "max_position_embeddings": context})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = True) -> Any:
        """The tensors themselves become the parameters."""
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Pixels (B, 3, S, S), prompts (B, T) -> raw scores (B,) in float32."""
        seen = self.vision(pixel_values=pixels).last_hidden_state  # (B, 1 + patches, D)
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        found: Tensor = self.head(read[:, 0].float()).squeeze(-1)
        return found


def normalised(raw: Tensor) -> Tensor:
    """Raw scores on the scale of the paper."""
    return (raw - MEAN) / STD


def ours(name: str) -> str | None:
    """Where a published entry goes in `Scorer`; None for what scoring does not use."""
    if name.startswith(("blip.vision_proj.", "blip.text_proj.")) or name.endswith(".position_ids"):
        return None
    for theirs, own in _NAMES.items():
        name = name.replace(theirs, own)
    return name


_NAMES = {
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "blip.visual_encoder.norm.": "vision.post_layernorm.",
    "blip.visual_encoder.blocks.": "vision.encoder.layers.",
    ".attn.qkv.": ".self_attn.qkv.",  # fused in both
    ".attn.proj.": ".self_attn.projection.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    "blip.text_encoder.": "text.",
    "mlp.layers.": "head.",
}


def _sizes(width: int, inner: int, state: Mapping[str, Tensor], layers: str) -> dict[str, int]:
    numbers = [int(found[1]) for name in state if (found := re.match(rf"{re.escape(layers)}(\d+)\.", name))]
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": max(numbers) + 1,
        "num_attention_heads": max(1, width // HEAD_WIDTH),
    }
