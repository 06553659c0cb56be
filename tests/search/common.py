"""What the tests of several searches share: plain rewards, the plain walk, and the rewards a judge has seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.search.judge import Judge
from diffalign.search.stepwise import stepped
from tests.search.toys import ToyChain


def total(media: Tensor, rows: Sequence[int]) -> Tensor:
    return media.sum(1)


def flat(media: Tensor, rows: Sequence[int]) -> Tensor:
    return torch.zeros(len(rows))


def rewards_of(judge: Judge, row: int = 0) -> list[float]:
    return [leaf.reward for leaf in judge.leaves[row]]


def plain(chain: ToyChain) -> Tensor:
    """Final latents (B, ...) of the plain walk of every case."""
    x = chain.first(chain.seeds, range(len(chain.seeds)))
    for i in range(chain.length):
        x = stepped(chain, x, chain.denoise(x, *chain.levels.at(i)), i, chain.seeds)
    return x
