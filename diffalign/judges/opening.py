"""Opens image-text-to-text models of transformers: from a folder or hub id to a model and its processor.

Only safetensors are read, and no code that lies beside them is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffalign import weights
from diffalign.errors import ConfigError, HubError, ModelError

INSTEAD = (
    "Give the folder or hub id of an image-text-to-text model such as Qwen/Qwen2.5-VL-3B-Instruct, 'shapes-vlm', "
    "or the address of a server (http://127.0.0.1:8000/v1#model)."
)
_SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")


def find_folder(model: str, revision: str | None = None) -> Path:
    """The folder of a model or adapter: itself, or what the hub has under the id, settings first."""
    here = Path(model).expanduser()
    if here.is_dir():
        if revision is not None:
            raise ConfigError(
                f"revision '{revision}' picks a commit on the hub, but '{model}' is a folder. Leave it out."
            )
        return here
    weights.require_hub_id(model, INSTEAD)
    folder = weights.fetch_folder(model, _SETTINGS, revision, instead=INSTEAD)
    if not (folder / "adapter_config.json").is_file():
        require_kind(folder)
    return weights.fetch_folder(model, [*_SETTINGS, "*.safetensors"], revision, instead=INSTEAD)


def version_of(folder: Path, model: str) -> str:
    """A hub id with its commit, or the digest of a folder's weights, settings and chat template."""
    if not Path(model).expanduser().is_dir():
        return f"{model}@{folder.name}"
    return " ".join(weights.digest(path) for path in (folder, *sorted(folder.glob("*.jinja"))))


def require_kind(folder: Path) -> None:
    """Refuse a folder that is no image-text-to-text model."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    if not (folder / "config.json").is_file():
        raise ConfigError(f"'{folder}' has no config.json, so it is no model of transformers. {INSTEAD}")
    with _told(f"the settings of '{folder}'"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ConfigError(f"'{folder}' is a '{config.model_type}', which does not answer about pictures. {INSTEAD}")


def open_processor(folder: Path) -> Any:
    """What makes pictures and chats into tensors; rows are filled up on the left."""
    from transformers import AutoProcessor

    require_kind(folder)
    with _told(f"the processor of '{folder}'"):
        found = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not hasattr(found, "tokenizer") or not hasattr(found, "image_processor"):
        raise ConfigError(
            f"'{folder}' has no processor for pictures and text, only a {type(found).__name__}. "
            "Fetch preprocessor_config.json or processor_config.json and the tokenizer too."
        )
    if not (getattr(found, "chat_template", None) or getattr(found.tokenizer, "chat_template", None)):
        raise ConfigError(f"'{folder}' has no chat template (chat_template.jinja), so it cannot be asked. {INSTEAD}")
    found.tokenizer.padding_side = "left"
    if found.tokenizer.pad_token is None:
        found.tokenizer.pad_token = found.tokenizer.eos_token
    return found


def open_model(folder: Path, adapter: Path | None, dtype: str | torch.dtype) -> nn.Module:
    """The model, with the adapter merged in; it samples as it is told and in no way of its own."""
    from transformers import AutoModelForImageTextToText, GenerationConfig

    require_kind(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"'{folder}' has no .safetensors weights, and others are not read. {INSTEAD}")
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), _told(f"the model '{folder}'"), _silence():
        made, told = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    if lacking := sorted(told["missing_keys"]) + sorted(map(str, told.get("mismatched_keys", ()))):
        raise ModelError(f"the weights of '{folder}' lack {lacking[0]} and {len(lacking) - 1} more. Fetch them again.")
    if adapter is not None:
        made = _merged(made, adapter)
    own = made.generation_config
    ends = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    made.generation_config = GenerationConfig(do_sample=False, **ends)
    found: nn.Module = made.requires_grad_(False).eval()
    return found


def _merged(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    if not (adapter / "adapter_config.json").is_file() or not (adapter / "adapter_model.safetensors").is_file():
        raise ConfigError(f"'{adapter}' is no adapter: it needs adapter_config.json and adapter_model.safetensors.")
    told = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if told.get("peft_type") != "LORA":
        raise ConfigError(f"the adapter '{adapter}' is a '{told.get('peft_type')}'; only LORA can be merged.")
    with _told(f"the adapter '{adapter}'"):
        return PeftModel.from_pretrained(model, adapter, local_files_only=True).merge_and_unload()


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Say what cannot be read, whatever the libraries raise."""
    try:
        yield
    except (HubError, ConfigError, ModelError):
        raise
    except Exception as e:
        reason = str(e).strip().partition("\n")[0]
        if "trust_remote_code" in str(e):
            reason = "it asks to run code of its own (trust_remote_code), or transformers is too old for it"
        raise ModelError(f"cannot read {what}: {type(e).__name__}: {reason}. {INSTEAD}") from e


@contextmanager
def _silence() -> Iterator[None]:
    """Without the bar that transformers draws while it loads."""
    from transformers.utils import logging

    shown: Callable[[], None] = (
        logging.enable_progress_bar if logging.is_progress_bar_enabled() else logging.disable_progress_bar
    )
    logging.disable_progress_bar()
    try:
        yield
    finally:
        shown()
