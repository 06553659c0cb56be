"""A tiny pipeline on disk, and settings that make it run in a blink."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import build

SMALL = ["call.num_inference_steps=2", "call.height=16", "call.width=16"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a saved StableDiffusion3Pipeline with random weights."""
    folder = tmp_path_factory.mktemp("tiny") / "sd3"
    build("sd3").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; modules a test wrote there are forgotten, so that the next test reads its own."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)
