"""Engines and detectors of the user are part of what a score is cached under, or nothing is cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor

from diffalign.detectors import ShapesDetector, TransformersDetector
from diffalign.rewards.ocr import Reading, Tesseract
from diffalign.rules.geneval import Detection
from diffalign.score_cache import identity_of
from diffalign.scoring import engine_version, make_reward

SLOTS = {"ocr": "engine", "geneval": "detector", "compbench": "detector", "layout": "detector"}


class Fixed:
    """An engine and a detector at once."""

    version: str | None = "1"

    def __init__(self, **options: Any) -> None:
        self.options = options

    def read(self, image: Image.Image) -> Reading:
        return Reading("", 0.0)

    def detect(self, media: Tensor, labels: Sequence[Sequence[str]]) -> list[list[Detection]]:
        return [[] for _ in labels]


class Other(Fixed):
    """Another class with the same options and version."""


class Silent(Fixed):
    """Does not say what it was told."""

    def __init__(self, text: str = "") -> None:
        self.text = text


class Unversioned(Fixed):
    version = None


def told(name: str, engine: Any) -> str | None:
    return identity_of(make_reward({name: {SLOTS[name]: engine}}))


@pytest.fixture(autouse=True)
def no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffalign.detectors.ColourNamer.version", "colours")


@pytest.mark.parametrize("name", SLOTS)
def test_two_engines_with_one_version_are_two_by_class_and_options(name: str) -> None:
    newer = Fixed()
    newer.version = "2"
    twin = type("Fixed", (Fixed,), {"__module__": "elsewhere", "__qualname__": "Fixed"})()
    found = [told(name, engine) for engine in (Fixed(), Other(), Fixed(text="a"), Fixed(text="b"), newer, twin)]
    assert None not in found
    assert len(set(found)) == len(found)
    assert told(name, Fixed(text="a")) == told(name, Fixed(text="a"))


@pytest.mark.parametrize("name", SLOTS)
def test_an_engine_that_does_not_say_what_it_is_leaves_the_reward_without_a_version(name: str) -> None:
    for engine in (Silent(), Unversioned(), Fixed(model=object())):
        assert make_reward({name: {SLOTS[name]: engine}}).version is None
        assert told(name, engine) is None


@pytest.mark.parametrize("name", [name for name in SLOTS if name != "ocr"])
def test_a_detector_at_an_address_is_held_to_the_same(name: str, tmp_path: Path) -> None:
    head = "class D:\n    def detect(self, media, labels):\n        return [[] for _ in labels]\n"
    said = ["", "    version = '1'\n", *(f"    version, options = '1', {{'k': {k}}}\n" for k in (3, 4))]
    found = []
    for number, rest in enumerate(said):
        (tmp_path / f"{number}.py").write_text(head + rest)
        found.append(make_reward({name: {"detector": f"{tmp_path}/{number}.py:D"}}).version)
    assert found[:2] == [None, None]
    assert None not in found[2:]
    assert found[2] != found[3]


def test_a_class_in_the_place_of_its_object_goes_by_its_own_name() -> None:
    class Static(Fixed):
        options = {"k": 1}  # noqa: RUF012

    assert "Static" in str(make_reward({"layout": {"detector": Static}}).version)


def test_what_ships_is_known_by_its_version_or_by_all_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Sized:
        size: int
        version: str = "1"

    assert make_reward("layout").version == f"1 {ShapesDetector.version}"
    assert engine_version("1", ShapesDetector(), ShapesDetector()) is not None
    monkeypatch.setattr(TransformersDetector, "version", "weights")
    model = TransformersDetector("folder")
    assert engine_version("1", model, "folder") == "1 weights"
    assert engine_version("1", model, model) is None  # it does not tell its floor
    monkeypatch.setattr(Tesseract, "version", "5")
    for engines in ((Tesseract("deu"), Tesseract("fra")), (Sized(1), Sized(2))):
        found = [engine_version("1", engine, engine) for engine in engines]
        assert None not in found
        assert found[0] != found[1]
