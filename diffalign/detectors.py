"""Detectors behind one protocol: the shapes world, models of transformers, any object; and how colours are named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign import loading
from diffalign.clip_tower import ClipTower
from diffalign.detector_models import EMBEDDED, TransformersDetector
from diffalign.errors import ConfigError, ModelError
from diffalign.rules.geneval import COLOURS, Detection

__all__ = [
    "EMBEDDED",
    "ColourNamer",
    "Detector",
    "ShapesDetector",
    "TransformersDetector",
    "detect_rows",
    "find_detector",
]
ANY = "shape"  # the class of every object of the shapes world
GREY = 0.6  # #999, what surrounds an object whose colour is asked for


@runtime_checkable
class Detector(Protocol):
    """Finds objects of the classes asked for in each picture of (B, 3, H, W) in [0, 1]; boxes are in its pixels."""

    @property
    def version(self) -> str | None: ...  # which weights; None: scores are not cached

    def detect(self, media: Tensor, labels: Sequence[Sequence[str]]) -> list[list[Detection]]: ...


def find_detector(spec: Any, *, revision: str | None = None, floor: float = 0.05) -> Detector:
    """`shapes`, a folder or hub id of transformers, `file.py:name`, or an object; models drop what is under `floor`."""
    if not isinstance(spec, str):
        return _checked(spec, repr(spec))
    if spec == EMBEDDED:
        return ShapesDetector()
    if ":" in spec and not Path(spec).expanduser().is_dir():
        module, name = loading.load_address(spec)
        found = loading.find_in(module, name, "detector")
        return _checked(found() if isinstance(found, type) else found, spec)
    return TransformersDetector(spec, revision=revision, floor=floor)


def detect_rows(
    detector: Detector, media: Tensor, labels: Sequence[Sequence[str] | None]
) -> list[list[Detection] | None]:
    """What is in each row; None where nothing is asked for or the picture is not finite."""
    finite = media.isfinite().flatten(1).all(1).tolist()
    asked = [k for k, row in enumerate(labels) if row and finite[k]]
    rows: list[list[Detection] | None] = [None] * len(labels)
    if asked:
        found = detector.detect(media[asked].detach(), [tuple(labels[k] or ()) for k in asked])
        if len(found) != len(asked):
            raise ModelError(
                f"the detector answered {len(found)} lists for {len(asked)} pictures. Return one list each."
            )
        for k, row in zip(asked, found, strict=True):
            rows[k] = list(row)
    return rows


class ShapesDetector:
    """The shapes world read from pixels, with colours; a class is `circle`, `red circle`, or `shape` for any."""

    version = "1"

    def detect(self, media: Tensor, labels: Sequence[Sequence[str]]) -> list[list[Detection]]:
        from diffalign.world.scenes import CANVAS
        from diffalign.world.see import see

        scale = max(media.shape[-2:]) / CANVAS
        found = []
        for sight, asked in zip(see(media), labels, strict=True):
            row = []
            for label in asked:
                colour, kind = _as_shape(label)
                for shape in sight.shapes:
                    if kind in (ANY, shape.kind) and colour in (None, shape.colour):
                        left, top, right, bottom = (scale * side for side in shape.box)
                        row.append(Detection(label, 1.0, (left, top, right, bottom), shape.colour))
            found.append(row)
        return found


class ColourNamer:
    """The colour of an object in CLIP: its mask on grey, cut to its box, against three phrasings of each colour."""

    def __init__(self, model: str = "ViT-L-14:openai", *, revision: str | None = None) -> None:
        self.tower = ClipTower(model, revision=revision)

    @property
    def version(self) -> str:
        return self.tower.source.version

    @torch.no_grad()
    def name(self, image: Tensor, found: Detection) -> str:
        """One of GenEval's ten colours, for an object of an image (3, H, W)."""
        texts = self._texts(found.label, image.device)  # (C, D)
        return COLOURS[int((texts @ self.tower.images(_cut_out(image, found)[None])[0]).argmax())]

    def _texts(self, label: str, device: torch.device) -> Tensor:
        prompts = [f"a photo of a {c}{rest}" for c in COLOURS for rest in (f" {label}", f"-colored {label}", " object")]
        texts = self.tower.texts(prompts, device)  # (3 C, D), the phrasings of a colour side by side
        return F.normalize(texts.view(len(COLOURS), 3, -1).mean(1), dim=-1)


def _cut_out(image: Tensor, found: Detection) -> Tensor:
    if found.mask is not None:
        image = torch.where(found.mask.to(image.device), image, GREY)
    height, width = image.shape[-2:]
    left, top, right, bottom = (round(side) for side in found.box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return image[:, top : max(min(bottom, height), top + 1), left : max(min(right, width), left + 1)]


def _checked(found: Any, name: str) -> Detector:
    if not callable(getattr(found, "detect", None)):
        raise ConfigError(
            f"{name} is no detector: it needs `detect(media, labels)` that returns a list of Detection per row."
        )
    if not hasattr(found, "version"):
        found.version = None
    detector: Detector = found
    return detector


def _as_shape(label: str) -> tuple[str | None, str]:
    """Colour and shape of `red circle`, `circle` or `shape`."""
    from diffalign.world.scenes import COLOURS as PALETTE
    from diffalign.world.scenes import SHAPES

    colour, _, kind = label.strip().rpartition(" ")
    if kind not in (*SHAPES, ANY) or (colour and colour not in PALETTE):
        raise ConfigError(
            f"the detector '{EMBEDDED}' does not know the class '{label}': it sees {', '.join(SHAPES)} in "
            f"{', '.join(PALETTE)}. For photographs give detector: facebook/mask2former-swin-small-coco-instance"
        )
    return colour or None, kind
