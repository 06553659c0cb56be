"""Qwen2-VL with a small head on its last token: pictures and token ids in, numbers out; frozen, loaded at first use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diffalign import weights
from diffalign.errors import ConfigError, ModelError
from diffalign.vision import Preprocess, Route

BASE = "Qwen/Qwen2-VL-7B-Instruct"
SETTINGS = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
COLOUR_MEAN, COLOUR_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WORDS = "model.language_model.embed_tokens.weight"


class QwenTower:
    """`model` is a hub id, a checkpoint, or a folder with `file` or shards; `base` has the settings and tokenizer."""

    def __init__(
        self,
        model: str,
        file: str,
        base: str = BASE,
        *,
        revision: str | None = None,
        pixels: int,  # of every picture, whatever its size was
        dtype: torch.dtype,
        path: Route = "auto",
        checkpointing: bool = False,
    ) -> None:
        self.model, self.file, self.base, self.revision = model, file, base, revision
        self.pixels, self.dtype, self.path, self.checkpointing = pixels, dtype, path, checkpointing

    @cached_property  # of what is loaded: a file that changes later does not change it
    def version(self) -> str:
        """What tells these weights and settings from others."""
        files = [*self.files, *(self.folder / name for name in SETTINGS if (self.folder / name).is_file())]
        return " ".join(weights.digest(file) for file in files)

    @cached_property
    def files(self) -> list[Path]:
        """The checkpoint, or its shards."""
        here = Path(self.model).expanduser()
        indices = sorted(here.glob("*.safetensors.index.json")) if here.is_dir() else []
        if not indices or (here / self.file).is_file():
            instead = f"Give `model` the path of {self.file}, or a folder with it or with shards and their index."
            return [weights.find(self.model, self.file, self.revision, instead=instead)]
        try:
            return sorted({here / Path(name).name for name in weights.read_settings(indices[0])["weight_map"].values()})
        except (KeyError, AttributeError, TypeError) as e:
            raise ModelError(f"'{indices[0]}' does not say which shard holds what. Fetch it again.") from e

    @cached_property
    def folder(self) -> Path:
        """Of the settings and the tokenizer."""
        here = Path(self.base).expanduser()
        if not here.is_dir():
            instead = f"Give `base` a folder with config.json and the tokenizer of {BASE}."
            weights.require_hub_id(self.base, instead)
            here = weights.fetch_folder(self.base, SETTINGS, instead=instead)
        kind = weights.read_settings(here / "config.json").get("model_type")
        if kind != "qwen2_vl":
            raise ConfigError(f"'{here}' has the settings of '{kind}', not of a 'qwen2_vl'. Use `base`: {BASE}.")
        return here

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise ModelError(f"'{self.folder}' has no tokenizer that we can read: {e}. Fetch it again.") from e

    @cached_property
    def rater(self) -> Rater:
        from transformers import Qwen2VLConfig

        who = f"'{self.model}'"
        with torch.inference_mode(False):
            state: dict[str, Tensor] = {}
            for file in self.files:
                state |= weights.renamed(weights.read(file, "model"), ours)
            config = Qwen2VLConfig.from_dict(weights.read_settings(self.folder / "config.json"))
            if WORDS in state:  # the published model has as many as the tokenizer, fewer than the base
                config.text_config.vocab_size = len(state[WORDS])
            made = Rater(config)
            weights.fit(made, state, who)
            return self._ready(made)

    def _ready(self, made: Rater) -> Rater:
        # The published model is cast with its rotary frequencies, in training too, so they are bfloat16 in any type.
        for name, buffer in made.model.named_buffers():
            if name.endswith("inv_freq"):
                buffer.copy_(buffer.bfloat16())
        weights.frozen(made.model, self.dtype)
        weights.frozen(made.rm_head, torch.float32)
        made.eval()
        if self.checkpointing:  # transformers does it in training mode only; there is no dropout to wake up
            made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            made.model.train()
        return made

    def __call__(self, media: Tensor, before: Sequence[int], after: Sequence[Sequence[int]]) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], ids that stand before and after each -> (B, 2) float32, read at the end."""
        rater, device = self.rater.to(media.device), media.device
        ends = pad_sequence([torch.tensor(ids, device=device) for ids in after], batch_first=True)  # (B, T)
        lengths = torch.tensor([len(ids) for ids in after], device=device)
        with torch.autocast(device.type, enabled=False):
            patches, grid = self.patches(media.float())
            found: Tensor = rater(patches.to(self.dtype), grid, torch.tensor(before, device=device), ends, lengths)
        return found

    def patches(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """What the picture tower reads: all patches in one column, and for each picture its frames, rows, columns."""
        told = self.rater.model.config.vision_config
        patch, merge = told.patch_size, told.spatial_merge_size
        size = fitted(media.shape[-2], media.shape[-1], self.pixels, patch * merge)
        see = Preprocess(size=size, mean=COLOUR_MEAN, std=COLOUR_STD, fit="squash", path=self.path)
        grid = torch.tensor([[1, size[0] // patch, size[1] // patch]] * len(media), device=media.device)
        return patchified(see(media), patch, merge, told.temporal_patch_size), grid


class Rater(nn.Module):
    """The model in transformers' class without its vocabulary head, and ours; its parameters have no memory yet."""

    def __init__(self, config: Any) -> None:
        from accelerate import init_empty_weights
        from transformers import Qwen2VLModel

        super().__init__()
        config.text_config.attention_dropout = 0.0
        with torch.random.fork_rng(devices=[]), init_empty_weights():
            self.model = Qwen2VLModel(config)
            width = config.text_config.hidden_size
            steps = (
                nn.Linear(width, 1024),
                nn.ReLU(),
                nn.Dropout(0.05),
                nn.Linear(1024, 16),
                nn.ReLU(),
                nn.Linear(16, 2),
            )
            self.rm_head = nn.Sequential(*steps)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = True) -> Any:
        """The tensors themselves become the parameters: no second copy."""
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def forward(self, patches: Tensor, grid: Tensor, before: Tensor, after: Tensor, lengths: Tensor) -> Tensor:
        """Ids before (P,) and after (B, T) the pictures, of which `lengths` (B,) count -> (B, 2)."""
        language, rows = self.model.language_model, len(after)
        words = language.embed_tokens
        seen = self.model.visual(patches, grid_thw=grid)
        seen = getattr(seen, "pooler_output", seen).unflatten(0, (rows, -1))  # (B, N, D)
        read = torch.cat([words(before).expand(rows, -1, -1), seen, words(after)], 1)
        filled = read.shape[1] - after.shape[1] + lengths  # (B,)
        mask = torch.arange(read.shape[1], device=read.device) < filled[:, None]
        # Positions just count: the published forward hands over no ids, so the places in the grid stay unused.
        hidden = language(inputs_embeds=read, attention_mask=mask.long(), use_cache=False).last_hidden_state
        found: Tensor = self.rm_head(hidden[torch.arange(rows, device=read.device), filled - 1].float())
        return found


def ours(name: str) -> str | None:
    """Where an entry goes in `Rater`, by its name in older or newer transformers; the vocabulary head is dropped."""
    if name.startswith("lm_head."):
        return None
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name


def fitted(height: int, width: int, pixels: int, unit: int) -> tuple[int, int]:
    """Sides in whole units, about `pixels` in all, of about the same aspect: rounded down from above, up from below."""
    near = [max(1, round(side / unit)) for side in (height, width)]
    area = near[0] * near[1] * unit * unit
    if area > pixels:
        ratio = math.sqrt(height * width / pixels)
        near = [max(1, math.floor(side / ratio / unit)) for side in (height, width)]
    elif area < pixels:
        ratio = math.sqrt(pixels / (height * width))
        near = [math.ceil(side * ratio / unit) for side in (height, width)]
    return near[0] * unit, near[1] * unit


def patchified(seen: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """(B, C, H, W) -> (B rows columns, C frames patch patch): squares of merge x merge patches, equal frames."""
    rows, columns = (side // (merge * patch) for side in seen.shape[-2:])
    split = seen.reshape(*seen.shape[:2], rows, merge, patch, columns, merge, patch)
    turned = split.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (B, rows, columns, merge, merge, C, patch, patch)
    return turned.unsqueeze(-3).expand(*turned.shape[:-2], frames, patch, patch).flatten(5).flatten(0, 4)
