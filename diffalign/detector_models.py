"""Detection models of transformers, frozen: instance segmentation, object detection and zero-shot detection.

Where we differ from GenEval's Mask2Former: the model and its post-processing are those of transformers, so the same
picture gets other boxes and confidences, and scores are not GenEval's to the digit. Boxes of a segmentation model are
those of its masks, as there. From Grounding DINO: a box belongs to the phrase with the likeliest token, special tokens
excluded, so it has exactly one of the labels asked for; a full stop in a label is asked as a blank, since it ends a
phrase. Boxes are not cut to the picture.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign import weights
from diffalign.errors import ConfigError, ModelError
from diffalign.rules.geneval import Box, Detection
from diffalign.vision import to_pil

EMBEDDED = "shapes"
INSTEAD = f"Give a local folder, or leave `detector` out for the embedded '{EMBEDDED}', which sees the shapes world."
SAME = (  # names of one class in COCO, in GenEval, and in checkpoints that follow VOC
    {"mouse", "computer mouse"},
    {"remote", "tv remote"},
    {"keyboard", "computer keyboard"},
    {"tv", "tvmonitor", "television"},
    {"couch", "sofa"},
    {"potted plant", "pottedplant"},
    {"dining table", "diningtable"},
    {"motorcycle", "motorbike"},
    {"airplane", "aeroplane"},
    {"hair drier", "hair dryer"},
)
KINDS = {  # kind: the mapping of transformers that lists its classes, and the class that loads them
    "zero-shot": ("MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES", "AutoModelForZeroShotObjectDetection"),
    "boxes": ("MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", "AutoModelForObjectDetection"),
    "masks": ("MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES", "AutoModelForUniversalSegmentation"),
}


class TransformersDetector:
    """A frozen model of transformers that finds masks, boxes, or whatever it is asked for, as its config says."""

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        floor: float = 0.05,
        dtype: torch.dtype = torch.float32,
        batch: int = 8,
    ) -> None:
        self.model, self.revision, self.floor, self.dtype, self.batch = model, revision, floor, dtype, batch

    @cached_property
    def folder(self) -> Path:
        given = Path(self.model).expanduser()
        return given if given.is_dir() else _download(self.model, self.revision)

    @property
    def version(self) -> str | None:
        """Our revision of the computation, and which weights it uses."""
        return f"2 {weights.digest(self.folder)}"

    @cached_property
    def kind(self) -> str:
        """`masks`, `boxes` or `zero-shot`."""
        return _kind(self.config)

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        return _loaded(self.folder, AutoConfig, local_files_only=True)

    @cached_property
    def module(self) -> nn.Module:
        import transformers

        loader = getattr(transformers, KINDS[self.kind][1])
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            made, told = _loaded(self.folder, loader, local_files_only=True, output_loading_info=True)
        if missing := sorted(told["missing_keys"]):
            raise ModelError(f"the weights of '{self.folder}' lack {missing[0]} and {len(missing) - 1} more. {INSTEAD}")
        return weights.frozen(made, self.dtype)

    @cached_property
    def processor(self) -> Any:
        import transformers

        loader = transformers.AutoProcessor if self.kind == "zero-shot" else transformers.AutoImageProcessor
        return _loaded(self.folder, loader, local_files_only=True)

    @torch.no_grad()
    def detect(self, media: Tensor, labels: Sequence[Sequence[str]]) -> list[list[Detection]]:
        found: list[list[Detection]] = [[] for _ in labels]
        self.module.to(media.device)
        find = {"masks": self._masks, "boxes": self._boxes, "zero-shot": self._zero_shot}[self.kind]
        for asked in dict.fromkeys(tuple(row) for row in labels):  # rows with one list of classes go together
            rows = [k for k, row in enumerate(labels) if tuple(row) == asked]
            for start in range(0, len(rows), self.batch):
                part = rows[start : start + self.batch]
                for k, row in zip(part, find(media[part], asked), strict=True):
                    found[k] = row
        return found

    def _masks(self, media: Tensor, labels: Sequence[str]) -> list[list[Detection]]:
        names = self._names(labels)
        read = self.processor.post_process_instance_segmentation
        if "return_binary_maps" not in inspect.signature(read).parameters:
            raise ConfigError(f"'{self.model}' gives no mask per object. Give a Mask2Former or MaskFormer checkpoint.")
        sizes = [tuple(media.shape[-2:])] * len(media)
        outputs = self._run(media)
        rows = read(outputs, threshold=self.floor, target_sizes=sizes, return_binary_maps=True)
        found = []
        for row in rows:
            segments = row["segments_info"]
            masks = row["segmentation"].bool() if segments else []
            named = [(s, mask) for s, mask in zip(segments, masks, strict=True) if s["label_id"] in names]
            found.append(
                [
                    Detection(label, float(s["score"]), _box_of(mask), mask=mask.cpu())
                    for s, mask in named
                    for label in names[s["label_id"]]
                ]
            )
        return found

    def _boxes(self, media: Tensor, labels: Sequence[str]) -> list[list[Detection]]:
        names = self._names(labels)
        outputs = self._run(media)
        sizes = torch.tensor([media.shape[-2:]] * len(media), device=media.device)
        rows = self.processor.post_process_object_detection(outputs, threshold=self.floor, target_sizes=sizes)
        return [_detections(row, names) for row in rows]

    def _zero_shot(self, media: Tensor, labels: Sequence[str]) -> list[list[Detection]]:
        read = self.processor.post_process_grounded_object_detection
        names = {k: [label] for k, label in enumerate(labels)}
        sizes = torch.tensor([media.shape[-2:]] * len(media), device=media.device)
        if "input_ids" in inspect.signature(read).parameters:
            phrases = [label.lower().replace(".", " ") for label in labels]  # a full stop ends a phrase
            texts = [". ".join(phrases) + "."] * len(media)
            inputs = self._inputs(media, text=texts, padding=True)
            outputs = self.module(**inputs)
            stop = self.processor.tokenizer.convert_tokens_to_ids(".")
            special = self.processor.tokenizer.all_special_ids
            rows = _by_phrase(outputs, inputs["input_ids"][0], stop, special, sizes, self.floor)
        elif self.config.model_type in ("owlv2", "owlvit"):
            outputs = self._run(media, text=[[f"a photo of a {label}" for label in labels]] * len(media))
            rows = read(outputs, threshold=self.floor, target_sizes=sizes)
        else:
            raise ConfigError(f"'{self.model}' ({self.config.model_type}) is no detector we know how to ask. {INSTEAD}")
        return [_detections(row, names) for row in rows]

    def _run(self, media: Tensor, **more: Any) -> Any:
        return self.module(**self._inputs(media, **more))

    def _inputs(self, media: Tensor, **more: Any) -> dict[str, Tensor]:
        made = self.processor(images=to_pil(media), return_tensors="pt", **more)
        return {k: v.to(media.device, self.dtype if v.is_floating_point() else None) for k, v in made.items()}

    def _names(self, labels: Sequence[str]) -> dict[int, list[str]]:
        """The model's classes that are asked for, each with the names it is asked by."""
        own = {_plain(name): int(k) for k, name in self.config.id2label.items()}
        names: dict[int, list[str]] = {}
        for label in labels:
            known = next((own[name] for name in _synonyms(label) if name in own), None)
            if known is None:
                near = get_close_matches(_plain(label), own, n=1, cutoff=0.5)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise ConfigError(
                    f"the detector '{self.model}' does not know the class '{label}'; it has {len(own)} others.{hint} "
                    "A zero-shot detector such as OWLv2 finds any class."
                )
            names.setdefault(known, []).append(label)
        return names


def _kind(config: Any) -> str:
    """Which family the checkpoint's own class belongs to."""
    from transformers.models.auto import modeling_auto

    own = (config.architectures or [None])[0]
    for kind, (mapping, _) in KINDS.items():
        listed = getattr(modeling_auto, mapping).get(config.model_type, ())
        if (own is None and listed) or own in (listed if isinstance(listed, tuple) else (listed,)):
            return kind
    raise ConfigError(f"a model of the type '{config.model_type}' ({own}) finds no objects. {INSTEAD}")


def _loaded(folder: Path, loader: Any, **options: Any) -> Any:
    try:
        return loader.from_pretrained(folder, **options)
    except Exception as e:
        raise ModelError(
            f"transformers cannot load '{folder}': {str(e).strip().partition(chr(10))[0]}. {INSTEAD}"
        ) from e


def _download(hub_id: str, revision: str | None) -> Path:
    """Settings first, then safetensors, then pickled weights where there are no others."""
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise ConfigError(f"there is no folder '{hub_id}', and it is not a hub id (owner/name). {INSTEAD}")
    small = ["*.json", "*.txt", "*.model"]
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        folder = weights.fetch_folder(hub_id, [*small, pattern], revision, instead=INSTEAD)
        if any(path.suffix in (*weights.SAFE, *weights.PICKLED) for path in folder.iterdir()):
            break
    return folder


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _synonyms(label: str) -> list[str]:
    name = _plain(label)
    return [name, *sorted(next((group for group in SAME if name in group), set()) - {name})]


def _box_of(mask: Tensor) -> Box:
    """The smallest box that holds every pixel of a mask (H, W)."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1


def _detections(row: Any, names: dict[int, list[str]]) -> list[Detection]:
    """What a post-processor of transformers found, by the names it was asked for."""
    columns = zip(row["boxes"].tolist(), row["scores"].tolist(), row["labels"].tolist(), strict=True)
    found = []
    for (left, top, right, bottom), confidence, number in columns:
        found += [Detection(label, confidence, (left, top, right, bottom)) for label in names.get(number, ())]
    return found


def _by_phrase(
    outputs: Any, tokens: Tensor, stop: int, special: Sequence[int], sizes: Tensor, floor: float
) -> list[dict[str, Tensor]]:
    """Boxes of a grounding model by the phrase, between full stops, with the likeliest token."""
    ends = tokens == stop
    phrase = ends.cumsum(0).masked_fill(ends | torch.isin(tokens, tokens.new_tensor(list(special))), -1)  # (T,)
    likely = outputs.logits[..., : len(tokens)].float().sigmoid()  # (B, Q, T)
    each = [likely.masked_fill(phrase != k, 0.0).amax(-1) for k in range(int(ends.sum()))]
    scores, labels = torch.stack(each).max(0)  # (B, Q)
    centre, extent = outputs.pred_boxes.float().chunk(2, -1)
    scale = sizes.flip(-1).repeat(1, 2)[:, None]
    boxes = torch.cat([centre - extent / 2, centre + extent / 2], -1) * scale  # (B, Q, 4)
    keep = scores > floor
    return [
        {"boxes": b[k], "scores": s[k], "labels": n[k]} for b, s, n, k in zip(boxes, scores, labels, keep, strict=True)
    ]
