"""Which token comes next, row by row: each row draws from a generator of its own, so its text is the same in any batch.

The largest of log p + Gumbel noise is a sample of p. The noise is added here and the likeliest token is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.judges.asking import Question


class Draws:
    """Turns logits (B, V) into ones whose largest is a sample; a row of temperature 0 keeps its own."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = questions
        self.generators = [torch.Generator().manual_seed(q.seed % 2**63) for q in questions]
        self.broken = [False] * len(questions)  # rows in which the model gave NaN

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        found = scores.to(torch.float64, copy=True)  # float32 noise has ties among 100,000 tokens
        for k, (question, generator) in enumerate(zip(self.questions, self.generators, strict=True)):
            if found[k].isnan().any():
                self.broken[k] = True
                found[k] = 0.0
            elif question.temperature > 0:
                wait = torch.empty(found.shape[1], dtype=torch.float64).exponential_(generator=generator)
                noise = -wait.clamp_min(torch.finfo(wait.dtype).tiny).log()
                found[k] = kept(found[k] / question.temperature, question.top_k, question.top_p) + noise.to(found)
        return found


class Forced:
    """Makes every row say these tokens, whatever the logits are."""

    def __init__(self, answers: Tensor, before: int) -> None:
        self.answers, self.before = answers, before  # (B, N), and how many tokens the questions have

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.before
        found = torch.full_like(scores, -torch.inf)
        return found.scatter(1, self.answers[:, step, None], 0.0)


def kept(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (V,) with all but the `top_k` likeliest cut, then all but the fewest that hold the mass `top_p`."""
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        ranked, order = logits.sort(descending=True, stable=True)
        before = ranked.softmax(0).cumsum(0) - ranked.softmax(0)  # mass of likelier tokens
        logits = logits.masked_fill((before >= top_p).scatter(0, order, before >= top_p), -torch.inf)
    return logits


def shares(logits: Tensor, starts: Sequence[Sequence[int]], least: float | None) -> tuple[float, ...] | None:
    """The probability of each label from logits (V,) and the tokens it may begin with, of all labels together.

    None where they have less than `least` together or the logits are not finite; without `least` it is of all words.
    """
    spread = logits.log_softmax(0)
    each = torch.stack([spread[list(ids)].logsumexp(0) for ids in starts])
    if not bool(each.isfinite().all()) or (least is not None and float(each.exp().sum()) < least):
        return None
    return tuple((each if least is None else each.log_softmax(0)).exp().tolist())
