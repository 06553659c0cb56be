"""Rewards with one habit each, named in settings as `fake_rewards.py:name`."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.cases import Case

seen: list[int] = []  # how many pictures each call of `Listwise` was given


def brightness(media: Tensor, cases: Sequence[Case]) -> Tensor:
    return media.flatten(1).mean(1)


def large(media: Tensor, cases: Sequence[Case]) -> Tensor:
    """Of another scale than its neighbours."""
    return 1000 * media[:, 0].flatten(1).mean(1)


def constant(media: Tensor, cases: Sequence[Case]) -> Tensor:
    return torch.zeros(len(media))


def blind(media: Tensor, cases: Sequence[Case]) -> Tensor:
    """Judges nothing."""
    return torch.full((len(media),), torch.nan)


def fails(media: Tensor, cases: Sequence[Case], *, one_in: int = 8) -> Tensor:
    """Raises where a picture's seed is a multiple of `one_in`."""
    for case in cases:
        if case.seed % one_in == 0:
            raise RuntimeError("the judge is out")
    return brightness(media, cases)


class Listwise:
    """How many of the other pictures of a prompt are darker, as a pairwise judge would say."""

    name, version, differentiable, modality, range, listwise = "listwise", "1", False, "image", None, True

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        seen.append(len(media))
        value, found = brightness(media, cases), []
        for k, case in enumerate(cases):
            others = [j for j, other in enumerate(cases) if other.prompt == case.prompt and j != k]
            found.append(float((value[k] > value[others]).float().mean()) if others else 0.5)
        return torch.tensor(found)


def random(media: Tensor, cases: Sequence[Case]) -> Tensor:
    """Draws from the global generator."""
    return brightness(media, cases) + 0.01 * torch.rand(len(media))


calls = 0


def interrupts(media: Tensor, cases: Sequence[Case], *, at: int = 3, number: int = signal.SIGINT) -> Tensor:
    """Send its own process a signal at one of its calls."""
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), number)
    return brightness(media, cases)


judged = 0


def late(media: Tensor, cases: Sequence[Case]) -> Tensor:
    """The same for the first pictures."""
    global judged
    judged += len(media)
    return torch.zeros(len(media)) if judged <= 4 else brightness(media, cases)
