"""How a trained reward makes a number of what its model sees: the same while it learns and when it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import ModelError
from diffalign.judges.asking import Question
from diffalign.judges.finding import own_judge
from diffalign.judges.local import LocalJudge

HEAD = "head.safetensors"
HOLE = "{prompt}"


def rating_of_clip(seen: Tensor, read: Tensor, scale: Tensor | float, doubt: nn.Module | None) -> Tensor:
    """Unit embeddings (B, D) of pictures and prompts -> (B, 2): scaled cosine, and the log of its deviation."""
    both = seen * read
    rating = scale * both.sum(-1)
    return torch.stack([rating, torch.zeros_like(rating) if doubt is None else doubt(both)[:, 0]], 1)


def doubt_of_clip(width: int) -> nn.Linear:
    """How sure a rating is, from what picture and prompt share; at first a deviation of 1 for all."""
    made = nn.Linear(width, 1)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made


def head(width: int) -> nn.Linear:
    """Rating and log of its deviation from a state (B, width); small at first, from fixed random numbers."""
    made = nn.Linear(width, 2)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.weight.copy_(torch.randn(2, width, generator=draws) * torch.tensor([[1.0], [0.0]]) / width)
        made.bias.zero_()
    return made


def asked(instruction: str, prompt: str) -> str:
    """What a vision language model reads beside the picture."""
    return instruction.replace(HOLE, prompt)


def reader(
    model: str, *, dtype: str, adapter: str | None = None, pixels: int | None = None, device: str | None = None
) -> LocalJudge:
    """A vision language model in this process."""
    made: LocalJudge = own_judge(model=model, adapter=adapter, dtype=dtype, pixels=pixels, device=device)
    return made


def last_states(judge: LocalJudge, questions: Sequence[Question]) -> Tensor:
    """(B, D) what a model holds of each question at its end, with a gradient to weights that have one."""
    module, inputs = judge.read(questions)
    core = getattr(module, "model", None)
    if core is not None:
        found: Tensor = core(**inputs, use_cache=False).last_hidden_state
        return found[:, -1]
    told: Tensor = module(**inputs, use_cache=False, output_hidden_states=True).hidden_states[-1]
    return told[:, -1]


def width(module: Any) -> int:
    """How long the states of a language model are."""
    told = getattr(module.config, "text_config", module.config)
    found = getattr(told, "hidden_size", None)
    if not isinstance(found, int):
        raise ModelError(f"{type(module).__name__} does not say how long its states are (hidden_size).")
    return found
