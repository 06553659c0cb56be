"""A line on the terminal that says what is being timed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def said() -> Iterator[Callable[[str], None]]:
    """What is being timed, with the time so far; it adds nothing while a run lasts."""
    from tqdm.auto import tqdm

    with tqdm(bar_format="{desc} [{elapsed}]", disable=not sys.stderr.isatty(), leave=False) as bar:
        yield bar.set_description_str
