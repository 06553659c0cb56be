"""Models that rate a picture for its prompt, with their weights open to learning."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign import atomic, clip_tower, valued
from diffalign.errors import ConfigError
from diffalign.judges.asking import Question
from diffalign.train.ema import check_names
from diffalign.train.precision import DTYPES
from diffalign.train.reward_models.settings import RewardConfig

BLOCKS = ("resblocks", "layers", "blocks", "layer")  # what lists of equal layers are called
EARLY = ("embed", "conv1", "patch", "ln_pre", "pre_layrnorm")  # what stands before the first of them


class Rater(Protocol):
    """Rates pictures, keeps its weights in one place, and writes them down."""

    version: str  # of what it was made of

    def rate(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Pictures (3, H, W) in [0, 1] of any sizes -> (B, 2): rating, and the log of its deviation."""

    def parameters(self) -> list[nn.Parameter]: ...
    def named_parameters(self) -> list[tuple[str, nn.Parameter]]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...
    def save(self, folder: Path) -> None: ...


class Open:
    """Weights that learn, by name."""

    def __init__(self, named: Iterator[tuple[str, nn.Parameter]]) -> None:
        self._named = [(name, parameter) for name, parameter in named if parameter.requires_grad]

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self._named]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._named)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies, float32, on the CPU."""
        return {name: p.detach().to("cpu", torch.float32, copy=True).contiguous() for name, p in self._named}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over weights; names and shapes must be these."""
        own = dict(self._named)
        check_names(own, state, "the saved weights")
        for name, parameter in own.items():
            parameter.copy_(state[name])


class ClipRater(Open):
    """Two encoders: the rating is their cosine times the learnt scale, as in the model's own logits."""

    def __init__(self, config: RewardConfig, device: torch.device) -> None:
        tower = clip_tower.ClipTower(config.model)
        self.source = tower.source
        self.version = self.source.version
        self.encoders = clip_tower.load(self.source, torch.float32)
        self.module = self.encoders.module.to(device).requires_grad_(True)
        self.device, self.precision = device, config.precision
        uncertain = config.loss.kind == "uncertain"
        self.doubt = valued.doubt_of_clip(_width(self.module)).to(device) if uncertain else None
        if config.freeze:
            freeze(self.module, config.freeze)
        if config.gradient_checkpointing:
            self.encoders.checkpoint_images()
        super().__init__(_with_prefix(model=self.module, **({"doubt": self.doubt} if self.doubt else {})))

    def rate(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        see, unique = self.encoders.preprocess, list(dict.fromkeys(prompts))
        with torch.no_grad():
            pixels = torch.cat([see(image[None].to(self.device)) for image in images])
        with autocast(self.device, self.precision):
            seen = F.normalize(self.encoders.image(pixels).float(), dim=-1)
            tokens, _ = self.encoders.tokenise(unique)
            read = F.normalize(self.encoders.text(tokens.to(self.device)).float(), dim=-1)
        read = read[[unique.index(prompt) for prompt in prompts]]
        scale: Tensor = self.module.logit_scale.float().exp()  # type: ignore[operator]
        return valued.rating_of_clip(seen, read, scale, self.doubt)

    def save(self, folder: Path) -> None:
        """A folder that any program for such models reads, and what tells doubts beside it."""
        place = folder / "clip"
        place.mkdir(parents=True)
        save_clip(self.module, self.source, place)
        if self.doubt is not None:
            save_tensors(self.doubt.state_dict(), folder / valued.HEAD)


class VlmRater(Open):
    """A vision language model that reads picture and question; a linear head rates the state of its last token."""

    def __init__(self, config: RewardConfig, device: torch.device) -> None:
        from peft import LoraConfig, get_peft_model

        self.judge = valued.reader(config.model, dtype="float32", pixels=config.pixels, device=str(device))
        self.version = self.judge.version
        self.instruction, self.device, self.precision = config.instruction, device, config.precision
        probe = Question(
            text=valued.asked(config.instruction, "?"), images=(torch.full((3, 64, 64), 0.5, device=device),)
        )
        module, _ = self.judge.read([probe])
        lora = LoraConfig(
            r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear", init_lora_weights=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in an old way
            self.tuned = get_peft_model(module, lora)
        self.tuned.eval()
        if config.gradient_checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            module.enable_input_require_grads()
            module.train()
        self.head = valued.head(valued.width(module)).to(device)
        super().__init__(_with_prefix(lora=self.tuned, head=self.head))

    def rate(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        asked = [
            Question(text=valued.asked(self.instruction, prompt), images=(image.to(self.device),))
            for image, prompt in zip(images, prompts, strict=True)
        ]
        with autocast(self.device, self.precision):
            state = valued.last_states(self.judge, asked)
        found: Tensor = self.head(state.float())
        return found

    def save(self, folder: Path) -> None:
        """The LoRA in peft's format, and the head."""
        self.tuned.save_pretrained(folder / "adapter", safe_serialization=True)
        save_tensors(self.head.state_dict(), folder / valued.HEAD)


def make(config: RewardConfig, device: torch.device) -> ClipRater | VlmRater:
    """The model of a job with its weights open."""
    made = ClipRater(config, device) if config.tower == "clip" else VlmRater(config, device)
    if not made.parameters():
        raise ConfigError(f"nothing of '{config.model}' learns with freeze {config.freeze}. Lower it.")
    return made


def freeze(module: nn.Module, share: float) -> None:
    """Close the first layers of every tower, and what stands before them."""
    for name, part in module.named_modules():
        layers = list(part.children())
        if name.rpartition(".")[2] in BLOCKS and len(layers) > 1:
            for layer in layers[: round(share * len(layers))]:
                layer.requires_grad_(False)
    for name, parameter in module.named_parameters():
        if any(word in name.lower() for word in EARLY) and not any(f".{word}." in name for word in BLOCKS):
            parameter.requires_grad_(False)


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    dtype = DTYPES.get(precision)
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def save_clip(module: nn.Module, source: clip_tower.Source, place: Path) -> None:
    """The model with its settings and tokenizer, in the layout of its own library."""
    home = Path(source.name.removeprefix("local-dir:"))
    if source.library == "transformers":
        module.save_pretrained(place, safe_serialization=True)  # type: ignore[operator]
    else:
        save_tensors(module.state_dict(), place / "open_clip_model.safetensors")
        if not (home / "open_clip_config.json").is_file():
            _write_open_clip_config(module, source, place)
    for file in sorted(home.iterdir()) if home.is_dir() else []:
        if file.suffix in (".json", ".txt", ".model") and not (place / file.name).exists() and file.name != "card.json":
            shutil.copyfile(file, place / file.name)


def _write_open_clip_config(module: nn.Module, source: clip_tower.Source, place: Path) -> None:
    """What open_clip needs to make an architecture of its own again."""
    import open_clip

    model = dict(open_clip.get_model_config(source.name) or {})
    if source.quick_gelu:
        model["quick_gelu"] = True
    sees = dict(module.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]
    atomic.write_json(place / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": sees})


def save_tensors(state: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}, file)


def _width(module: nn.Module) -> int:
    """How long the embeddings are."""
    found: Any = getattr(module, "text_projection", None)
    if isinstance(found, nn.Linear):
        return int(found.out_features)
    if isinstance(found, Tensor):
        return int(found.shape[1])
    told: Any = getattr(module, "config", None)
    if told is not None:
        return int(told.projection_dim)
    visual: Any = module.visual
    return int(visual.output_dim)


def _with_prefix(**modules: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            yield f"{prefix}.{name}", parameter
