"""CLIP-type models as two differentiable encoders of one space, frozen, loaded at the first use."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffalign import weights
from diffalign.clip_sources import (
    EMBEDDED,
    INSTEAD,
    Source,
    checkpoint_source,
    find_source,
    preprocess_of,
    preprocess_of_folder,
)
from diffalign.errors import ConfigError, DiffalignError, HubError, ModelError
from diffalign.vision import Preprocess, Route

__all__ = ["EMBEDDED", "ClipTower", "Dtype", "Source", "checkpoint_source", "find_source"]
Dtype = Literal["float32", "float16", "bfloat16"]
VOCABULARY = 49408  # of the byte-pair code that all released CLIPs share; open_clip carries it
REMEMBERED = 4096  # prompts whose embeddings are kept


class Encoders(Protocol):
    """A loaded model: pictures and tokens to embeddings of one space, of whatever length."""

    module: nn.Module
    preprocess: Preprocess
    context: int  # tokens it reads
    scale: float  # exp(logit_scale), before the weights are rounded to a smaller type

    def image(self, pixels: Tensor) -> Tensor: ...
    def text(self, tokens: Tensor) -> Tensor: ...
    def tokenise(self, prompts: Sequence[str]) -> tuple[Tensor, list[bool]]: ...  # (B, context), and which were cut
    def checkpoint_images(self) -> None: ...  # keep one activation per block for the backward pass, recompute the rest


class ClipTower:
    """Unit embeddings of pictures and prompts, on the device of the pictures.

    `model` is what `find_source` takes, or a function that finds the source; `adapt` changes its preprocessing.
    """

    def __init__(
        self,
        model: str | Callable[[], Source],
        *,
        revision: str | None = None,
        dtype: Dtype = "float32",
        path: Route = "auto",
        checkpointing: bool = False,
        adapt: Callable[[Preprocess], Preprocess] = lambda preprocess: preprocess,
    ) -> None:
        self.model, self.revision, self.path, self.adapt = model, revision, path, adapt
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.checkpointing = checkpointing
        self.truncated = 0  # prompts that were longer than the model reads
        self._texts: dict[tuple[str, torch.device], Tensor] = {}

    @cached_property
    def source(self) -> Source:
        return find_source(self.model, self.revision) if isinstance(self.model, str) else self.model()

    @cached_property
    def encoders(self) -> Encoders:
        found = load(self.source, self.dtype)
        if self.checkpointing:
            found.checkpoint_images()
        return found

    @property
    def label(self) -> str:
        """The model as the user wrote it."""
        return self.model if isinstance(self.model, str) else self.source.name

    @property
    def scale(self) -> float:
        """What multiplies the cosine in the model's logits: exp(logit_scale)."""
        return self.encoders.scale

    def images(self, media: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) float32 of length 1; on the tensor path the gradient reaches the pixels."""
        self.encoders.module.to(media.device)
        with torch.autocast(media.device.type, enabled=False):
            features = self.encoders.image(self._preprocess(media.float()).to(self.dtype))
        return F.normalize(features.float(), dim=-1)

    def texts(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """B prompts -> (B, D) float32 of length 1; each is encoded once."""
        new = [p for p in dict.fromkeys(prompts) if (p, device) not in self._texts]
        if len(self._texts) + len(new) > REMEMBERED:
            self._texts.clear()
            new = list(dict.fromkeys(prompts))
        if new:
            self.encoders.module.to(device)
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                features = self.encoders.text(self._tokens(new).to(device))
                for prompt, feature in zip(new, F.normalize(features.float(), dim=-1), strict=True):
                    self._texts[prompt, device] = feature
        return torch.stack([self._texts[p, device] for p in prompts])

    def cosines(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """Pictures (B, 3, H, W) and their prompts -> (B,) float32."""
        texts = self.texts(prompts, media.device)  # (B, D)
        return (self.images(media) * texts).sum(-1)

    @cached_property
    def _preprocess(self) -> Preprocess:
        return replace(self.adapt(self.encoders.preprocess), path=self.path)

    def _tokens(self, prompts: list[str]) -> Tensor:
        # half of a surrogate pair is no character, and tokenizers stop at one
        tokens, cut = self.encoders.tokenise([p.encode("utf-8", "replace").decode("utf-8") for p in prompts])
        if any(cut):
            self.truncated += sum(cut)
            warnings.warn(
                f"'{self.label}' reads {self.encoders.context} tokens, so the end of {sum(cut)} of {len(prompts)} "
                f"prompts does not count ({self.truncated} so far), first: '{prompts[cut.index(True)][:60]}...'",
                stacklevel=2,
            )
        return tokens


def load(source: Source, dtype: torch.dtype) -> Encoders:
    """The frozen model in eval mode; the caller's random state and grad mode stay as they are."""
    made = TransformersEncoders if source.library == "transformers" else OpenClipEncoders
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        try:
            return made(source, dtype)
        except DiffalignError:
            raise
        except Exception as e:
            what, reason = f"'{source.name}{f':{source.tag}' if source.tag else ''}'", str(e).partition("\n")[0]
            if "download" in reason or "connect to" in reason:
                raise HubError(f"cannot fetch the CLIP weights {what}: {reason}. {INSTEAD}") from e
            raise ModelError(f"{source.library} cannot load {what}: {reason}. {INSTEAD}") from e


class OpenClipEncoders:
    """A model of open_clip."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        import open_clip

        made: Any = _bare(source) if source.checkpoint else _pretrained(source)
        self.scale = _scale(made)
        self.preprocess = preprocess_of(made)
        self.module = weights.frozen(made, dtype)
        self.tokenizer: Any = open_clip.get_tokenizer(source.name)
        self.context = int(self.tokenizer([""]).shape[1])

    def image(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.module.encode_image(pixels)  # type: ignore[operator]
        return found

    def text(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.module.encode_text(tokens)  # type: ignore[operator]
        return found

    def tokenise(self, prompts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        return _tokens(self.tokenizer, prompts, self.context)

    def checkpoint_images(self) -> None:
        self.module.visual.set_grad_checkpointing(True)  # type: ignore[operator, union-attr]


class TransformersEncoders:
    """A CLIPModel of transformers."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        from transformers import CLIPModel

        folder = Path(source.name)
        made, told = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        if missing := sorted(told["missing_keys"]) + sorted(map(str, told.get("mismatched_keys", ()))):
            raise ModelError(f"the weights of '{folder}' lack {missing[0]} and {len(missing) - 1} more. {INSTEAD}")
        self.scale = _scale(made)
        self.module = weights.frozen(made, dtype)
        self.preprocess = preprocess_of_folder(folder, int(made.config.vision_config.image_size))
        self.context = int(made.config.text_config.max_position_embeddings)
        self.tokenizer = _tokenizer_of_folder(folder, int(made.config.text_config.vocab_size), self.context)

    def image(self, pixels: Tensor) -> Tensor:
        return _features(self.module.get_image_features(pixel_values=pixels))  # type: ignore[operator]

    def text(self, tokens: Tensor) -> Tensor:
        return _features(self.module.get_text_features(input_ids=tokens))  # type: ignore[operator]

    def tokenise(self, prompts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        if not hasattr(self.tokenizer, "model_max_length"):  # the one of open_clip
            return _tokens(self.tokenizer, prompts, self.context)
        lengths = [len(ids) for ids in self.tokenizer(list(prompts))["input_ids"]]
        found = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.context, return_tensors="pt"
        )
        return found["input_ids"], [length > self.context for length in lengths]

    def checkpoint_images(self) -> None:
        # its own switch works in training mode only, which rewards are never in
        for block in self.module.vision_model.encoder.layers:  # type: ignore[union-attr]
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _pretrained(source: Source) -> nn.Module:
    import open_clip

    made: nn.Module = open_clip.create_model(
        source.name, source.tag, force_quick_gelu=source.quick_gelu, require_pretrained=True
    )
    return made


def _bare(source: Source) -> nn.Module:
    import open_clip

    assert source.checkpoint is not None
    with _without_alarm():
        made: nn.Module = open_clip.create_model(source.name, None, load_weights=False)
    state = weights.renamed(weights.read(source.checkpoint, source.entry), lambda name: name.removeprefix("module."))
    weights.fit(made, state, f"'{source.checkpoint.name}'", ignore=("attn_mask",))
    return made


@contextlib.contextmanager
def _without_alarm() -> Iterator[None]:
    """open_clip warns of random weights, which are on their way."""
    root = logging.getLogger()
    root.addFilter(_expected)
    try:
        yield
    finally:
        root.removeFilter(_expected)


def _expected(record: logging.LogRecord) -> bool:
    return "No pretrained weights loaded" not in record.getMessage()


def _scale(model: Any) -> float:
    return float(model.logit_scale.detach().float().exp())


def _features(found: Any) -> Tensor:
    """The projected embedding; transformers 5 wraps it."""
    pooled: Tensor = getattr(found, "pooler_output", found)
    return pooled


def _tokens(tokenizer: Any, prompts: Sequence[str], context: int) -> tuple[Tensor, list[bool]]:
    """What a tokenizer of open_clip gives; that it cut a prompt shows only in a reading of twice the length."""
    tokens: Tensor = tokenizer(list(prompts), context_length=context)
    longer: Tensor = tokenizer(list(prompts), context_length=2 * context)
    padding = tokenizer([""])[0, -1]
    cut = (longer[:, :context] != tokens).any(1) | (longer[:, context:] != padding).any(1)
    return tokens, cut.tolist()


def _tokenizer_of_folder(folder: Path, vocabulary: int, context: int) -> Any:
    """The folder's own tokenizer, or open_clip's where the vocabulary is the one all released CLIPs share."""
    import open_clip
    from transformers import AutoTokenizer

    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        own = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if len(own) > vocabulary:
            raise ModelError(
                f"the tokenizer of '{folder}' knows {len(own)} tokens, but its model {vocabulary}. {INSTEAD}"
            )
        return own
    if vocabulary == VOCABULARY:
        return open_clip.SimpleTokenizer(context_length=context)
    raise ConfigError(
        f"'{folder}' has no tokenizer, and its {vocabulary} tokens are not the {VOCABULARY} that released CLIPs share. "
        "Put the tokenizer.json of the model beside its weights."
    )
