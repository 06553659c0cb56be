"""What the exact verifier says, and progress on long work."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.cases import Case


def passes(pixels: Sequence[Tensor], cases: Sequence[Case]) -> list[bool] | None:
    """Whether the first image of each case shows exactly what its prompt says; None if some prompt is no scene."""
    import torch

    from diffalign import world

    verdicts = world.verify(torch.stack([p[0] for p in pixels]), list(cases))
    return [verdict.strict for verdict in verdicts] if all(verdict.applies for verdict in verdicts) else None


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; silent where nobody watches."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, disable=not sys.stderr.isatty(), leave=False) as bar:
        yield lambda n: bar.update(n) and None
