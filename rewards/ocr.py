"""Whether the picture shows the text that the prompt quotes, read by an OCR engine.

Jie Liu et al.: "Flow-GRPO: Training Flow Matching Models via Online RL", 2025 (arXiv 2505.05470), its text-rendering
reward: all recognised lines with confidence over 0 run together, r = 1 - distance / len(target). The rule, and where it
differs: diffalign/rules/text.py.

Where we differ:
- The engine is Tesseract, not PaddleOCR; any object with `read(image) -> Reading` takes its place. Scores of one with
  a `version` and `options` are cached.
- Nothing recognised is a sound 0. An engine that fails is an error, never a score; a row without a target is NaN.
- Pictures are prepared: their strongest colour axis as dark on light, enlarged where small, with a margin.
- `text` names a metadata key that holds the target, for prompts that quote nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError, MissingExtra, ModelError
from diffalign.registry import register_reward
from diffalign.rules import text as rules
from diffalign.scoring import Score, engine_version
from diffalign.vision import to_pil

APT = "apt-get install tesseract-ocr"
MARGIN = 20  # pixels around the picture: letters that touch the edge are lost without


@dataclass(frozen=True)
class Reading:
    """What an engine found: its words in reading order, and their mean confidence in [0, 1], 0 without words."""

    text: str
    confidence: float


class Engine(Protocol):
    """Reads the text in a picture; raises where it cannot work, and is asked from several threads."""

    def read(self, image: Image.Image) -> Reading: ...


class Tesseract:
    """The program tesseract through pytesseract; `psm` is its page segmentation mode."""

    def __init__(self, language: str = "eng", psm: int = 3, binarise: Literal["otsu", "sauvola"] = "sauvola") -> None:
        try:
            import pytesseract  # type: ignore[import-untyped]
        except ImportError as e:
            raise MissingExtra.of("reward 'ocr'", "pytesseract", "ocr") from e
        self.engine = pytesseract
        self.options = {"language": language, "psm": psm, "binarise": binarise}
        self.language = language
        self.config = f"--psm {psm} -c thresholding_method={2 if binarise == 'sauvola' else 0}"

    @cached_property
    def version(self) -> str:
        try:
            return f"tesseract {self.engine.get_tesseract_version()}"
        except self.engine.TesseractNotFoundError as e:
            raise _no_program() from e

    def read(self, image: Image.Image) -> Reading:
        try:
            found = self.engine.image_to_data(
                image, lang=self.language, config=self.config, output_type=self.engine.Output.DICT
            )
        except self.engine.TesseractNotFoundError as e:
            raise _no_program() from e
        except self.engine.TesseractError as e:
            raise ModelError(
                f"tesseract failed with the language '{self.language}' and the options {self.config}, so nothing is "
                f"known about the text: {e.message[:300]} A language is a package of its own, for instance: {APT}-deu"
            ) from e
        words = [(word, float(sure)) for word, sure in zip(found["text"], found["conf"], strict=True)]
        words = [(word, sure) for word, sure in words if sure > 0 and word.strip()]
        letters = sum(len(word) for word, _ in words)
        confidence = sum(sure * len(word) for word, sure in words) / (100 * letters) if words else 0.0
        return Reading("".join(word for word, _ in words), confidence)


@register_reward("ocr", range=(0.0, 1.0))
class OCR:
    """Share of the quoted text that is read; parts: `distance` in edits, `length` read in letters, `confidence`.

    `engine` is "tesseract" or an engine object; pictures are enlarged to a short side of `upscale`, and 0 is never.
    """

    reads_prompt = True

    def __init__(
        self,
        which: rules.Which = "first",
        precision: bool = False,
        text: str | None = None,
        language: str = "eng",
        psm: int = 3,
        binarise: Literal["otsu", "sauvola"] = "sauvola",
        upscale: int = 384,
        contrast: bool = True,
        engine: Any = "tesseract",
        workers: int = 0,
    ) -> None:
        if not 0 <= psm <= 13 or upscale < 0 or workers < 0:
            raise ConfigError(
                f"ocr has psm {psm}, upscale {upscale} and workers {workers}; a page segmentation mode is 0 to 13, and "
                "neither of the others is negative. `tesseract --help-psm` lists the modes."
            )
        if isinstance(engine, str) and engine != "tesseract":
            raise ConfigError(f"ocr.engine is '{engine}'; it is 'tesseract' or an object with `read`.")
        self.which, self.precision, self.text = which, precision, text
        self.upscale, self.contrast, self.workers = upscale, contrast, workers or min(8, os.cpu_count() or 1)
        self.engine: Engine = Tesseract(language, psm, binarise) if isinstance(engine, str) else engine
        own = {"language": language, "psm": psm, "binarise": binarise} if isinstance(engine, str) else {}
        self.options = own | {"which": which, "precision": precision, "text": text}
        self.options |= {"upscale": upscale, "contrast": contrast}
        self.reads = (text,) if text else ()
        self._given = engine

    @property
    def version(self) -> str | None:
        """Our revision of the computation, and which engine reads."""
        return engine_version("1", self.engine, self._given)

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        targets = [self._targets(case) for case in cases]
        sound = media.isfinite().flatten(1).all(1).tolist()
        asked = [k for k, (wanted, finite) in enumerate(zip(targets, sound, strict=True)) if wanted and finite]
        rows = [[torch.nan] * 4 for _ in cases]
        if asked:
            with ThreadPoolExecutor(min(self.workers, len(asked))) as pool:  # each thread waits for a process
                readings = pool.map(self.read, to_pil(media[asked]))
                for k, reading in zip(asked, readings, strict=True):
                    rows[k] = self._judged(reading, targets[k])
        total, distance, length, confidence = torch.tensor(rows, device=media.device).unbind(1)
        return Score(total, {"distance": distance, "length": length, "confidence": confidence})

    def read(self, image: Image.Image) -> Reading:
        """What the engine reads in one picture, prepared as the options say."""
        return self.engine.read(prepared(image, self.upscale, self.contrast))

    def _targets(self, case: Case) -> list[str]:
        """The targets that hold a letter."""
        given = case.metadata.get(self.text) if self.text else rules.quoted(case.prompt)
        found = [given] if isinstance(given, str) else [] if given is None else given
        if not isinstance(found, list | tuple) or not all(isinstance(target, str) for target in found):
            raise ConfigError(
                f"the metadata '{self.text}' of '{case.prompt[:60]}' is {repr(given)[:60]}, but what a picture should "
                "say is a text or a list of texts. Put a number in quotes."
            )
        return [target for target in found[: 1 if self.which == "first" else None] if rules.normal(target)]

    def _judged(self, reading: Reading, targets: Sequence[str]) -> list[float]:
        distance = sum(rules.ocr_distance(reading.text, target) for target in targets)
        total = rules.targets_score(reading.text, targets, precision=self.precision)
        return [total, distance, float(len(rules.normal(reading.text))), reading.confidence]


def prepared(image: Image.Image, upscale: int, contrast: bool) -> Image.Image:
    """A picture as the engine reads it best: grey, dark on light, its short side `upscale` or more, with a margin."""
    grey = _strongest_axis(image) if contrast else image.convert("L")
    factor = upscale / min(grey.size)
    if factor > 1:
        size = round(grey.width * factor), round(grey.height * factor)
        grey = grey.resize(size, Image.Resampling.BICUBIC)
    return ImageOps.expand(grey, MARGIN, fill=int(np.median(np.asarray(grey))))


def _strongest_axis(image: Image.Image) -> Image.Image:
    """The principal component of the colours, the common side light: red on green of one luminance stays legible."""
    pixels = np.asarray(image, dtype=np.float32)
    offsets = (pixels - pixels.mean((0, 1))).reshape(-1, 3)
    axis = np.linalg.eigh(offsets.T @ offsets)[1][:, -1]
    values = (offsets @ axis).reshape(pixels.shape[:2])
    spread = float(np.ptp(values))
    if spread < 1:  # less than a level: nothing is written there
        return image.convert("L")
    levels = (values - values.min()) * (255 / spread)
    light = levels if np.median(levels) > 127.5 else 255 - levels
    return Image.fromarray(light.round().astype(np.uint8))


def _no_program() -> MissingExtra:
    return MissingExtra(
        f"reward 'ocr' needs the program tesseract, which is not installed here. Install it with: {APT}"
    )
