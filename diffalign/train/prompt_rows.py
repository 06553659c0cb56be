"""Whether a batch of embeddings is made of the rows of single prompts, and putting such batches together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CLOSE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest value; kernels differ between batch sizes


def copied(value: Any) -> Any:
    """Fresh tensors, so that a pipeline which writes into them does not change what is kept."""
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)(map(copied, value)) if type(value) in (tuple, list) else value


def compared(alone: Sequence[Any], both: Any) -> list[str] | None:
    """What each tensor of a batch is, in order: `rows` or `shared`; None where the batch is not made of its rows."""
    layout: list[str] = []
    return layout if _follow(list(alone), both, layout) else None


def _follow(alone: list[Any], both: Any, layout: list[str]) -> bool:
    if isinstance(both, tuple):
        same = all(isinstance(each, tuple) and len(each) == len(both) for each in alone)
        return same and all(_follow([each[k] for each in alone], item, layout) for k, item in enumerate(both))
    if isinstance(both, list):  # one tensor per row, of whatever length
        layout.append("rows")
        items = [item for each in alone if isinstance(each, list) for item in each]
        return len(items) == len(both) and all(map(_close, items, both))
    if not isinstance(both, Tensor):
        layout.append("shared")
        return all(type(each) is type(both) and each == both for each in alone) and not isinstance(both, dict)
    if not all(isinstance(each, Tensor) and each.shape[1:] == both.shape[1:] and each.ndim for each in alone):
        return False
    if both.shape == alone[0].shape:
        layout.append("shared")
        return all(torch.equal(each, both) for each in alone)
    layout.append("rows")
    return _close(torch.cat(alone), both)


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not b.is_floating_point() or not b.numel():
        return torch.equal(a, b)
    largest = b.float().nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(a.float(), b.float(), rtol=0, atol=CLOSE.get(b.dtype, 1e-3) * largest, equal_nan=True)


def joined(parts: Sequence[Any], layout: Sequence[str]) -> Any:
    kinds = iter(layout)

    def join(values: Sequence[Any]) -> Any:
        if isinstance(values[0], tuple):
            return tuple(join([value[k] for value in values]) for k in range(len(values[0])))
        if next(kinds) == "shared":
            return copied(values[0])
        if isinstance(values[0], list):
            return [copied(item) for value in values for item in value]
        return torch.cat(list(values))

    return join(parts)
