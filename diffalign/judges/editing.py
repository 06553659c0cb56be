"""Edits as a judge sees them: the source, the edited picture at its size, and whether anything changed at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffalign import vision
from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.judges.asking import Judgement
from diffalign.judges.protocols import require_images
from diffalign.judges.rewarding import JudgeReward


class EditReward(JudgeReward):
    """A judge of edits; with `unedited_above`, a PSNR in dB, an edit that near its source is 0 and is not judged."""

    modality = "edit"
    reads_prompt = True
    reads = ("source", "instruction")
    at_source_size = True  # whether the edited picture is resized to the size of its source first
    unedited_above: float | None = None

    @property
    def edit_options(self) -> dict[str, Any]:
        return {**self.judge_options, "at_source_size": self.at_source_size, "unedited_above": self.unedited_above}

    def judge(self, media: Tensor, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement per row; the judge is asked about those that were edited."""
        pairs = edit_pairs(media, cases, self.name, resize=self.at_source_size)
        found = [self._unedited(*pair) for pair in pairs]
        rows = [k for k, known in enumerate(found) if known is None]
        if rows:
            require_images(self.backend, 2, self.name)
            told = self.judge_edits([pairs[k] for k in rows], [cases[k] for k in rows])
            for k, judgement in zip(rows, told, strict=True):
                found[k] = judgement
        return [one or Judgement() for one in found]

    def judge_edits(self, pairs: Sequence[tuple[Tensor, Tensor]], cases: Sequence[Case]) -> list[Judgement]:
        """One judgement per source and edited picture."""
        raise NotImplementedError

    def untouched(self) -> dict[str, float]:
        """The parts of an edit that changed nothing."""
        raise NotImplementedError

    def _unedited(self, source: Tensor, edited: Tensor) -> Judgement | None:
        if self.unedited_above is None:
            return None
        decibel = likeness(source, edited)
        if not decibel > self.unedited_above:
            return None
        return Judgement(0.0, self.untouched(), (f"not asked: the edit is its source ({decibel:.1f} dB)",))


def edit_pairs(media: Tensor, cases: Sequence[Case], who: str, *, resize: bool = True) -> list[tuple[Tensor, Tensor]]:
    """Source and edited picture (3, H, W) of each row of media (B, 3, H, W), in 8-bit levels."""
    if media.ndim != 4:
        raise ConfigError(f"{who} judges edited pictures (B, 3, H, W), but media has shape {tuple(media.shape)}.")
    edited = vision.quantise(media)
    found = []
    for picture, case in zip(edited, cases, strict=True):
        if case.source is None:
            raise ConfigError(
                f"{who} judges edits, but the case of '{case.prompt[:60]}' has no source image. Give each case the "
                "picture that was edited: Case(prompt=..., source=...)."
            )
        source = vision.to_tensor(case.source)[0].to(edited.device)  # (3, H, W)
        size = source.shape[-2], source.shape[-1]
        found.append((source, vision.resize_as_pil(picture[None], size)[0] if resize else picture))
    return found


def likeness(source: Tensor, edited: Tensor) -> float:
    """PSNR in dB of two pictures (3, H, W), infinite where they are equal; the second is resized to the first."""
    wanted = vision.resize(edited[None].float(), (source.shape[-2], source.shape[-1]))[0].clamp(0, 1)
    error = float((source - wanted).double().square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)
