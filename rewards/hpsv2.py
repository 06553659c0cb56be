"""HPSv2 and HPSv2.1: the cosine of picture and prompt in a CLIP-H fine-tuned on choices between generated pictures.

Xiaoshi Wu et al.: "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
Synthesis", 2023 (arXiv 2306.09341), section 4. The longest side becomes 224, and black fills the rest of the square
before the colours are normalised; the score is the raw cosine, of which the paper's benchmark prints the hundredfold.

Where we differ:
- The default is version 2.1; the published package takes 2.0 unless told otherwise.
- A picture whose longest side is 224 already is padded too; the published transform then leaves it oblong.
- The published code resizes tensors, with antialias from torchvision 0.17 on and without before; we always do.
- The model is read once, not at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from diffalign import weights
from diffalign.cases import Case
from diffalign.clip_tower import ClipTower, Dtype, Source, checkpoint_source
from diffalign.errors import ConfigError
from diffalign.registry import register_reward
from diffalign.vision import ROUNDED, Preprocess, Route

HUB = "xswu/HPSv2"
FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


@register_reward("hpsv2", differentiable=True, range=(-1.0, 1.0))
class HPSv2:
    """Comparable within one prompt and one version; `model` is a hub id, a folder or a checkpoint file."""

    reads_prompt = True

    def __init__(
        self,
        version: Literal["2.1", "2.0"] = "2.1",
        model: str = HUB,
        architecture: str = "ViT-H-14",
        revision: str | None = None,
        dtype: Dtype = "float32",
        path: Route = "auto",
        checkpointing: bool = False,
    ) -> None:
        self.options: dict[str, str | None] = {"version": version, "model": model, "architecture": architecture}
        self.options |= {"revision": revision, "dtype": dtype, "path": path}

        def source() -> Source:
            file = weights.find(model, FILES[version], revision, instead="Give `model` the file, or a folder with it.")
            for other, name in FILES.items():
                if other != version and file.stem == Path(name).stem:
                    raise ConfigError(
                        f"'{file}' is version {other}, but hpsv2.version is '{version}', and the scores of two "
                        f"versions cannot be compared. Ask for version '{other}', or give the other file."
                    )
            return checkpoint_source(architecture, file, entry="state_dict")

        self.differentiable, self.no_gradient = path != "reference", ROUNDED
        self.tower = ClipTower(source, dtype=dtype, path=path, checkpointing=checkpointing, adapt=padded)

    @property
    def version(self) -> str:
        return f"1 {self.tower.source.version}"

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        return self.tower.cosines(media, [case.prompt for case in cases])  # (B,)


def padded(preprocess: Preprocess) -> Preprocess:
    """The whole picture in the square, on black."""
    return replace(preprocess, fit="longest", fill=0.0, published="torch")
