"""What the exact verifier says, and progress on long work."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.cases import Case
    from diffalign.world import Verdict


def verdicts(pixels: Sequence[Tensor], cases: Sequence[Case]) -> list[Verdict]:
    """What the verifier says of the first image of each case."""
    import torch

    from diffalign import world

    return world.verify(torch.stack([p[0] for p in pixels]), list(cases))


def passes(pixels: Sequence[Tensor], cases: Sequence[Case]) -> list[bool] | None:
    """Whether each first image shows exactly what its prompt says; None if some prompt describes no scene."""
    found = verdicts(pixels, cases)
    return [verdict.strict for verdict in found] if all(verdict.applies for verdict in found) else None


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; silent where nobody watches."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, disable=not sys.stderr.isatty(), leave=False) as bar:
        yield lambda n: bar.update(n) and None
