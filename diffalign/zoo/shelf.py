"""Where the shipped models lie, what their cards say, and how they are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffalign.errors import UnknownName

MODELS = Path(__file__).parent / "models"
ORDER = ("shapes-sd3", "shapes-turbo", "shapes-clip", "shapes-vlm")


def names() -> list[str]:
    """Every shipped model."""
    return [name for name in ORDER if (MODELS / name / "card.json").exists()]


def folder(name: str) -> Path:
    """The folder that `from_pretrained` (or open_clip's `local-dir:`) takes."""
    if name not in names():
        raise UnknownName.among("model", name, names(), "diffalign zoo list")
    return MODELS / name


def card(name: str) -> dict[str, Any]:
    """Class, data, cost, command, measured accuracy, and `call`: the arguments every verb passes."""
    found: dict[str, Any] = json.loads((folder(name) / "card.json").read_text(encoding="utf-8"))
    return found


def load(name: str, **kwargs: Any) -> Any:
    """A stock pipeline in float32; `shapes-clip` is (model, preprocess, tokenizer), `shapes-vlm` (model, processor)."""
    return load_from(folder(name), **kwargs)


def load_from(path: Path, **kwargs: Any) -> Any:
    """Load a built model from its folder, whichever kind it is."""
    if (path / "open_clip_config.json").exists():
        import open_clip

        where = f"local-dir:{path}"
        model, preprocess = open_clip.create_model_from_pretrained(where, **kwargs)
        return model.eval(), preprocess, open_clip.get_tokenizer(where)
    if not (path / "model_index.json").exists():
        from transformers import AutoModelForImageTextToText, AutoProcessor

        judge = AutoModelForImageTextToText.from_pretrained(str(path), local_files_only=True, **kwargs)
        return judge.eval(), AutoProcessor.from_pretrained(str(path), local_files_only=True)
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # diffusers remarks that the stock class expects a larger autoencoder
    try:
        return DiffusionPipeline.from_pretrained(str(path), **{"local_files_only": True, **kwargs})
    finally:
        logging.set_verbosity(level)
