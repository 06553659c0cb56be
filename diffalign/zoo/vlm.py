"""`shapes-vlm`: a judge of 4 M parameters in a stock InternVL class, which looks, tells, answers and rates edits.

InternVL3: Exploring Advanced Training and Test-Time Recipes for Open-Source Multimodal Models (Zhu et al., 2025, arXiv
2504.10479), from which the class is.
Where we differ: everything is trained together from nothing, on lessons with exact answers (`lessons.py`); in a first
round the picture tower also names, for each of its patches, the object whose middle lies there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from diffalign.world.rendering import render
from diffalign.world.scenes import CANVAS, COLOURS, SHAPES, Scene
from diffalign.zoo.curriculum import LATER_LONG, LATER_SHORT, LONG, SHORT, draw
from diffalign.zoo.fit import FitConfig, Loss, fit
from diffalign.zoo.lessons import Lesson, Pupil
from diffalign.zoo.vlm_model import PATCH, SIDE, Sizes, blank, write
from diffalign.zoo.vlm_words import END, END_IMAGE, IMAGE, START_IMAGE, tokenizer
from diffalign.zoo.wear import worn

STEP = 16  # tokens and pictures are padded to multiples of it: CPUs prepare anew for every new shape, which is slow
LOOKS = 1 + len(SHAPES) + len(COLOURS) + 3  # whether an object's middle lies there, and of which looks it is


Mix = Mapping[Callable[[Pupil], Lesson], float]


@dataclass(frozen=True, kw_only=True)
class Round:
    """One cosine of training."""

    fit: FitConfig
    short: int = 48  # lessons a step with answers of a few tokens
    long: int = 20  # lessons a step with answers of a sentence or more
    mixes: tuple[Mix, Mix] = (SHORT, LONG)


@dataclass(frozen=True, kw_only=True)
class VLMConfig(Sizes):
    """Sizes, data and training of the judge."""

    seeing: FitConfig = field(
        default_factory=lambda: FitConfig(steps=600, matrix_rate=2e-3, warmup=40, ema=0.99, save_every=100)
    )
    seen: int = 96  # pictures a step of the first round
    rounds: tuple[Round, ...] = (  # each from the averaged weights of the one before
        Round(fit=FitConfig(steps=2400, matrix_rate=2e-3, warmup=80, ema=0.995, save_every=100)),
        Round(
            fit=FitConfig(steps=700, matrix_rate=1.5e-3, warmup=30, ema=0.99, save_every=100),
            short=24,
            long=32,
            mixes=(LATER_SHORT, LATER_LONG),
        ),
    )
    shares: tuple[float, ...] = (0.75, 0.15, 0.1)  # of the lessons in each forward pass, the shortest first


DEFAULT = VLMConfig()
FACTS = {
    "class": "InternVLForConditionalGeneration",
    "data": "rendered scenes and edits with exact answers, drawn anew at every step",
    "method": "next-token prediction on answers, after a round in which patches name objects",
    "call": {},
}


class Looker(nn.Module):
    """The picture tower with a head that names what lies at each patch."""

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.tower, self.head = tower, nn.Linear(width, LOOKS)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, SIDE * SIDE, LOOKS)."""
        found: Tensor = self.head(self.tower(pixel_values=pixels).last_hidden_state[:, 1:])
        return found


def spots(scenes: Sequence[Scene]) -> Tensor:
    """(B, SIDE * SIDE, 5): whether a middle lies in the patch; kind, colour and size of its object, -100 without."""
    out = torch.full((len(scenes), SIDE * SIDE, 4), -100)
    out[..., 0] = 0
    for row, scene in enumerate(scenes):
        for shape in scene.shapes:
            place = min(int(shape.y / PATCH), SIDE - 1) * SIDE + min(int(shape.x / PATCH), SIDE - 1)
            size = ("small", None, "large").index(shape.size)
            traits = [1, SHAPES.index(shape.kind), list(COLOURS).index(shape.colour), size]
            out[row, place] = torch.tensor(traits)
    return out


def look_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """How badly patches name their objects."""
    logits = logits.float()
    found = binary_cross_entropy_with_logits(logits[..., 0], truth[..., 0].float(), pos_weight=torch.tensor(6.0))
    start = 1
    for k, size in enumerate((len(SHAPES), len(COLOURS), 3), 1):
        part = logits[..., start : start + size].flatten(0, 1)
        found = found + 0.3 * cross_entropy(part, truth[..., k].flatten())
        start += size
    return found


def prepare(images: Sequence[Tensor]) -> Tensor:
    """Pixels as the image processor gives them."""
    return torch.stack(list(images)) * 2 - 1 if images else torch.zeros(0, 3, int(CANVAS), int(CANVAS))


@dataclass(frozen=True)
class Speller:
    """Lessons as token ids."""

    words: Any

    def ids(self, lesson: Lesson) -> tuple[list[int], list[int]]:
        """Of the question in its chat, and of the answer."""
        picture = START_IMAGE + IMAGE * (SIDE // 2) ** 2 + END_IMAGE
        text = f"<|user|>{picture * len(lesson.scenes)}{lesson.question}{END}<|assistant|>"
        asked: list[int] = self.words(text, add_special_tokens=False)["input_ids"]
        said: list[int] = self.words(lesson.answer + END, add_special_tokens=False)["input_ids"]
        return asked, said

    def batches(self, lessons: Sequence[Lesson], shares: Sequence[float]) -> list[dict[str, Tensor]]:
        """Lessons of like length together, in batches of these shares of their number, the shortest first."""
        spelled = sorted(((*self.ids(lesson), lesson) for lesson in lessons), key=lambda row: len(row[0]) + len(row[1]))
        found, start = list[dict[str, Tensor]](), 0
        for k, share in enumerate(shares):
            end = len(spelled) if k == len(shares) - 1 else start + round(share * len(spelled))
            found += [self.batch(spelled[start:end])] if end > start else []
            start = end
        return found

    def batch(self, rows: Sequence[tuple[list[int], list[int], Lesson]]) -> dict[str, Tensor]:
        """Token ids (B, L) padded at the right, and labels that count answers only."""
        spelled, lessons = [(asked, said) for asked, said, _ in rows], [lesson for _, _, lesson in rows]
        length = -(-max(len(a) + len(s) for a, s in spelled) // STEP) * STEP
        ids = torch.full((len(spelled), length), self.words.pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, (asked, said) in enumerate(spelled):
            ids[row, : len(asked) + len(said)] = torch.tensor(asked + said)
            labels[row, len(asked) : len(asked) + len(said)] = torch.tensor(said)
        images = [worn(render(scene), wear) for lesson in lessons for scene, wear in lesson.scenes]
        return {"input_ids": ids, "labels": labels, "pixel_values": prepare(images)}


def answer_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of answers, each answer weighing with the root of its length; the sum over lessons."""
    ids, labels, pixels = batch["input_ids"], batch["labels"], batch["pixel_values"]
    places = (ids == model.config.image_token_id).unsqueeze(-1)
    words = model.get_input_embeddings()(ids)
    if len(pixels):
        blank = pixels.new_zeros(-len(pixels) % STEP, *pixels.shape[1:])
        seen = model.model.get_image_features(pixel_values=torch.cat([pixels, blank])).pooler_output[: len(pixels)]
        words = words.masked_scatter(places.expand_as(words), seen.to(words.dtype))
    mask = (ids != model.config.text_config.pad_token_id).long()
    hidden = model.model.language_model(inputs_embeds=words, attention_mask=mask, use_cache=False).last_hidden_state
    row, column = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    logits = model.lm_head(hidden[row, column])
    each = cross_entropy(logits.float(), labels[row, column + 1], reduction="none")
    length = (labels != -100).sum(1).float()
    return (each / length[row].sqrt()).sum()


def make(config: VLMConfig, *, work: Path, seed: int, resume: bool) -> Path:
    """Train the judge and write it as a folder that transformers loads and serves."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(seed)
    words = tokenizer(seed)
    model, speller = blank(config, words), Speller(words)
    looker = Looker(model.model.vision_tower, config.picture_width)

    def seeing(step: int, generator: torch.Generator) -> Tensor:
        pupil = Pupil(random.Random(f"see {seed} {step}"))
        scenes = [pupil.asked()[1] for _ in range(config.seen)]
        images = [worn(render(scene), pupil.wear()) for scene in scenes]
        return look_loss(looker(prepare(images)), spots(scenes))

    fit(looker, seeing, config.seeing, folder=work / "seeing", seed=seed, resume=resume, title="shapes-vlm looks")

    for k, stage in enumerate(config.rounds):
        loss = learning(model, speller, config.shares, stage, f"learn {seed}" + f" {k}" * (k > 0))
        title = f"shapes-vlm learns, round {k + 1} of {len(config.rounds)}"
        fit(model, loss, stage.fit, folder=work / f"learning-{k + 1}", seed=seed, resume=resume, title=title)
    return write(model, words, work / "model")


def learning(model: Any, speller: Speller, shares: Sequence[float], stage: Round, stream: str) -> Loss:
    """The loss of a round: lessons drawn anew at every step."""

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rng = random.Random(f"{stream} {step}")
        lessons = [
            draw(mix, rng) for mix, n in zip(stage.mixes, (stage.short, stage.long), strict=True) for _ in range(n)
        ]
        losses = [answer_loss(model, batch) for batch in speller.batches(lessons, shares)]
        return torch.stack(losses).sum() / len(lessons)

    return loss


def measured(target: Path, *, seed: int, n: int) -> dict[str, Any]:
    """What the card says about accuracy."""
    from diffalign.zoo import vlm_measure

    return vlm_measure.measured(target, seed=seed, n=n)
