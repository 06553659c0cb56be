"""CLIP-FlanT5: T5 that reads a picture among its words; pictures and token ids in, the likelihood of an answer out.

Zhiqiu Lin et al.: "Evaluating Text-to-Visual Generation with Image-to-Text Generation", 2024 (arXiv 2404.01291). CLIP's
patch tokens, taken before the last layer and without the class token, go through a two-layer projector and stand among
the embeddings of T5's encoder; the answer is given to the decoder. Frozen, loaded at the first use.

Where we differ:
- A gradient can reach the pixels; the published code switches it off. Pictures are then padded and resized as tensors.
- Marks of the tokenizer inside a text, such as </s>, are left out.
- Weights that lack a name, or have one too many, are an error; the published code loads the picture tower from CLIP's
  own repository whatever the checkpoint holds, and so do we only where it holds none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diffalign import weights
from diffalign.errors import ConfigError, ModelError
from diffalign.vision import Preprocess, Route, pad_to

HUB, SMALL_HUB = "zhiqiulin/clip-flant5-xxl", "zhiqiulin/clip-flant5-xl"
TOKENIZER, VISION = "google/flan-t5-xxl", "openai/clip-vit-large-patch14-336"
SETTINGS = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
WORDS = ("tokenizer.json", "spiece.model")  # either is a tokenizer
STATES = ("model.safetensors", "pytorch_model.bin")  # each alone, or in shards with an index
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GROUND = tuple(int(value * 255) / 255 for value in MEAN)  # what a picture is padded with: an 8-bit level
HEAD = 64  # width of one attention head in every released CLIP
LONGEST = 2048  # tokens of a text that count
TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # other names of T5's shared.weight


class ClipT5Tower:
    """`model` is a hub id, a checkpoint or a folder with one or its shards, and config.json beside it."""

    def __init__(
        self,
        model: str = HUB,
        *,
        revision: str | None = None,
        tokenizer: str = TOKENIZER,  # for a checkpoint that comes without one
        vision: str = VISION,  # for a checkpoint that comes without its picture tower
        dtype: torch.dtype = torch.bfloat16,
        path: Route = "auto",
        checkpointing: bool = False,
    ) -> None:
        self.model, self.revision, self.words, self.vision = model, revision, tokenizer, vision
        self.dtype, self.path, self.checkpointing = dtype, path, checkpointing

    @cached_property  # of what is loaded: a file that changes later does not change it
    def version(self) -> str:
        """What tells these weights and settings from others."""
        told = [*self.files, *(self.folder / name for name in SETTINGS if (self.folder / name).is_file())]
        own = any((self.folder / name).is_file() for name in WORDS)
        beside = [_mark(self.vision, STATES)] if own else [_mark(self.vision, STATES), _mark(self.words, SETTINGS)]
        return " ".join([*(weights.digest(file) for file in told), *beside])

    @cached_property
    def folder(self) -> Path:
        """Of the settings and the weights."""
        here = Path(self.model).expanduser()
        if here.is_file():
            return here.parent
        return here if here.is_dir() else _download(self.model, self.revision, STATES, "model")

    @cached_property
    def files(self) -> list[Path]:
        """The checkpoint, or its shards."""
        here = Path(self.model).expanduser()
        return [here] if here.is_file() else _states(self.folder, "model")

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import T5Tokenizer

        folder = self.folder
        if not any((folder / name).is_file() for name in WORDS):
            folder = Path(self.words).expanduser()
            folder = folder if folder.is_dir() else _download(self.words, None, (), "tokenizer")
        try:
            return T5Tokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise ModelError(f"'{folder}' has no tokenizer that we can read: {e}. Fetch it again.") from e

    @cached_property
    def parts(self) -> Parts:
        """The loaded model; every name of the checkpoint has its place."""
        from transformers import T5Config

        settings = weights.read_settings(self.folder / "config.json")
        with torch.inference_mode(False):
            state: dict[str, Tensor] = {}
            for file in self.files:
                state |= weights.renamed(weights.read(file), ours)
            if "t5.shared.weight" not in state:
                raise ModelError(
                    f"the weights of '{self.model}' have no 'shared.weight', so they are not those of a T5."
                )
            if not any(name.startswith("vision.") for name in state):
                state |= self._vision_state()
            state |= {f"t5.{name}": state["t5.shared.weight"] for name in TIED}
            own = {name: value for name, value in settings.items() if name != "model_type"}
            language = T5Config.from_dict(own | {"vocab_size": len(state["t5.shared.weight"]), "dropout_rate": 0.0})
            made = Parts(language, vision_settings(state, self.model))
            weights.fit(made, state, f"'{self.model}'")
            weights.frozen(made, self.dtype)
            if self.checkpointing:  # transformers does it in training mode only; there is no dropout to wake up
                for part in (made.t5, made.vision):
                    part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                    part.train()
            return made

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text as T5 reads it: its words without the tokenizer's marks, and the end of sequence."""
        words = self.tokenizer
        marks, end = set(words.all_special_ids) - {words.unk_token_id}, words.eos_token_id
        whole = [text.encode("utf-8", "replace").decode() for text in texts]  # half a surrogate is no text
        found = words(whole, add_special_tokens=False, verbose=False)["input_ids"]
        return [[*(token for token in ids if token not in marks), end] for ids in found]

    def look(self, media: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> what the encoder reads of each, (B, N, D)."""
        parts = self.parts.to(media.device)
        side = parts.vision.config.image_size
        see = Preprocess(size=(side, side), mean=MEAN, std=STD, fit="squash", path=self.path)
        with torch.autocast(media.device.type, enabled=False):
            found: Tensor = parts.look(see(squared(media.float())).to(self.dtype))
        return found

    def likelihood(self, seen: Tensor, before: str, after: Sequence[str], answer: str) -> Tensor:
        """Looked-at pictures (B, N, D), words before and after each -> (B,) float32: exp(-mean CE of the answer)."""
        parts, device = self.parts.to(seen.device), seen.device
        first, *rest = self.ids([before, *after])
        room = max(LONGEST - len(first) - 1, 0)
        ends = pad_sequence([torch.tensor(ids[:room], device=device) for ids in rest], batch_first=True)  # (B, T)
        lengths = torch.tensor([min(len(ids), room) for ids in rest], device=device)
        said = torch.tensor(self.ids([answer])[0], device=device)  # (n,)
        with torch.autocast(device.type, enabled=False):
            logits = parts(seen, torch.tensor(first, device=device), ends, lengths, said)  # (B, n, V)
        return answer_likelihood(logits, said)

    def _vision_state(self) -> dict[str, Tensor]:
        """CLIP's picture tower from its own repository."""
        here = Path(self.vision).expanduser()
        folder = here if here.is_dir() else _download(self.vision, None, STATES, "vision")
        state: dict[str, Tensor] = {}
        for file in _states(folder, "vision"):
            state |= weights.renamed(weights.read(file), _of_clip)
        return state


class Parts(nn.Module):
    """The stock models and the projector; the parameters have no memory until weights are put in."""

    def __init__(self, language: Any, vision: Any) -> None:
        from accelerate import init_empty_weights
        from transformers import CLIPVisionModel, T5ForConditionalGeneration

        super().__init__()
        with torch.random.fork_rng(devices=[]), init_empty_weights():
            self.t5: Any = T5ForConditionalGeneration(language)
            self.vision: Any = CLIPVisionModel(vision)
            widths = vision.hidden_size, language.d_model
            self.projector = nn.Sequential(nn.Linear(*widths), nn.GELU(), nn.Linear(widths[1], widths[1]))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = True) -> Any:
        """The tensors themselves become the parameters: no second copy."""
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def look(self, pixels: Tensor) -> Tensor:
        """The patch tokens before the last layer, as wide as T5's words."""
        hidden = self.vision(pixels, output_hidden_states=True).hidden_states[-2]
        found: Tensor = self.projector(hidden[:, 1:])
        return found

    def forward(self, seen: Tensor, before: Tensor, after: Tensor, lengths: Tensor, answer: Tensor) -> Tensor:
        """Pictures (B, N, D), ids before (P,) and after (B, T), of which `lengths` count, and (n,) -> (B, n, V)."""
        words, rows = self.t5.shared, len(after)
        read = torch.cat([words(before).expand(rows, -1, -1), seen, words(after)], 1)
        filled = read.shape[1] - after.shape[1] + lengths  # (B,)
        mask = torch.arange(read.shape[1], device=read.device) < filled[:, None]
        told = self.t5(
            inputs_embeds=read, attention_mask=mask.long(), labels=answer.expand(rows, -1).clone(), use_cache=False
        )
        logits: Tensor = told.logits
        return logits


def answer_likelihood(logits: Tensor, answer: Tensor) -> Tensor:
    """Logits (B, n, V) at the places of an answer (n,) -> (B,): the geometric mean of its tokens' probabilities."""
    chances = logits.float().log_softmax(-1)  # (B, n, V)
    return chances.gather(-1, answer.expand(len(logits), -1)[..., None]).squeeze(-1).mean(-1).exp()


def squared(media: Tensor) -> Tensor:
    """The picture in the middle of a square of CLIP's mean colour."""
    side = max(media.shape[-2:])
    if media.shape[-2] == media.shape[-1]:
        return media
    ground = media.new_tensor(GROUND)[:, None, None]
    return pad_to(media - ground, (side, side)) + ground


def ours(name: str) -> str | None:
    """Where an entry of the published checkpoint goes in `Parts`; second names of one tensor are dropped."""
    if name.endswith(("embed_tokens.weight", "position_ids")):
        return None
    if name.startswith("mm_projector."):
        return name.removeprefix("mm_")
    if name.startswith("vision_tower."):
        return "vision." + name.removeprefix("vision_tower.").removeprefix("vision_tower.").removeprefix(
            "vision_model."
        )
    return f"t5.{name}"


def vision_settings(state: Mapping[str, Tensor], who: str) -> Any:
    """CLIP's settings, read off the shapes of its weights: the checkpoint says no more than its name."""
    from transformers import CLIPVisionConfig

    try:
        width, _, patch, _ = state["vision.embeddings.patch_embedding.weight"].shape
        places = len(state["vision.embeddings.position_embedding.weight"])
        inner = len(state["vision.encoder.layers.0.mlp.fc1.weight"])
    except (KeyError, ValueError) as e:
        raise ModelError(f"the weights of '{who}' have no picture tower that we know: {e} is missing.") from e
    layers = {name.split(".")[3] for name in state if name.startswith("vision.encoder.layers.")}
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=len(layers),
        num_attention_heads=max(width // HEAD, 1),
        patch_size=patch,
        image_size=round((places - 1) ** 0.5) * patch,
    )


def _of_clip(name: str) -> str | None:
    """The picture tower of a whole CLIP model."""
    within = name.startswith("vision_model.") and not name.endswith("position_ids")
    return f"vision.{name.removeprefix('vision_model.')}" if within else None


def _mark(given: str, names: Sequence[str]) -> str:
    """A hub id as it is, or the digests of these files and their shards in a folder."""
    folder = Path(given).expanduser()
    if not folder.is_dir():
        return given
    kinds = {name: name.rpartition(".") for name in names}
    files = sorted({file for stem, _, suffix in kinds.values() for file in folder.glob(f"{stem}*.{suffix}*")})
    return " ".join(weights.digest(file) for file in files)


def _states(folder: Path, option: str) -> list[Path]:
    """The weights in a folder: safetensors before pickled ones, one file or the shards of an index."""
    for name in STATES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            try:
                return sorted(
                    {folder / Path(shard).name for shard in weights.read_settings(index)["weight_map"].values()}
                )
            except (KeyError, AttributeError, TypeError) as e:
                raise ModelError(f"'{index}' does not say which shard holds what. Fetch it again.") from e
    raise ConfigError(
        f"'{folder}' has neither {' nor '.join(STATES)}, nor an index of shards. Give `{option}` a folder that does."
    )


def _download(repo: str, revision: str | None, states: Sequence[str], option: str) -> Path:
    """Settings first, then weights: safetensors where there are some."""
    instead = f"Give `{option}` a folder with its files."
    weights.require_hub_id(repo, instead)
    folder = weights.fetch_folder(repo, SETTINGS, revision, instead=instead)
    for state in states:
        stem, _, suffix = state.rpartition(".")
        folder = weights.fetch_folder(repo, [*SETTINGS, f"{stem}*.{suffix}*"], revision, instead=instead)
        if any(folder.glob(f"{stem}*.{suffix}*")):
            break
    return folder
