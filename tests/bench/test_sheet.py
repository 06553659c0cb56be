"""A contact sheet fits any prompt and any picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffalign.bench.sheet import Entry, Picture, contact_sheet


def entry(
    prompt: str = "two red circles", size: tuple[int, int] = (64, 64), passed: bool | None = True, sides: int = 2
) -> Entry:
    image = Image.new("RGB", size, "red")
    first, rest = Picture(image=image, passed=False), Picture(image=image, passed=passed, score=0.5)
    return Entry(prompt=prompt, pictures=[first, *[rest] * (sides - 1)])


@pytest.mark.parametrize("count", [1, 3, 8, 9])
@pytest.mark.parametrize("sides", [1, 2, 4])
def test_every_entry_has_its_place(count: int, sides: int):
    sheet = contact_sheet([entry(sides=sides)] * count, title="t", subtitle="s", labels="abcd"[:sides])
    red = (np.asarray(sheet) == (255, 0, 0)).all(axis=2).sum()
    assert red > count * sides * 160 * 160


@pytest.mark.parametrize("prompt", ["", "word " * 200, "x" * 500])
def test_a_prompt_of_any_length_leaves_the_size_alone(prompt: str):
    sizes = {contact_sheet([entry(p)] * 4, title="t", subtitle="s", labels=("a", "b")).size for p in ("short", prompt)}
    assert len(sizes) == 1


@pytest.mark.parametrize("size", [(64, 32), (1024, 1024), (30, 300)])
def test_pictures_keep_their_shape(size: tuple[int, int]):
    sheet = np.asarray(contact_sheet([entry(size=size, passed=None)], title="t", subtitle="s", labels=("a", "b")))
    found = (sheet == (255, 0, 0)).all(axis=2)
    wide, high = found.any(axis=0).sum() / 2, found.any(axis=1).sum()
    assert wide / high == pytest.approx(size[0] / size[1], rel=0.15)
