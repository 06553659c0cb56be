"""Pictures of a call, in whatever they are held."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diffalign import media

LEVEL = np.uint8(100)
COLOUR, GREY = np.full((4, 6, 3), LEVEL), np.full((4, 6), LEVEL)


@pytest.mark.parametrize(
    "given",
    [
        COLOUR,
        COLOUR[None],
        [COLOUR],
        GREY,
        [GREY],
        COLOUR.astype(np.float32) / 255,
        GREY / 255,
        torch.from_numpy(COLOUR).movedim(-1, 0),
        torch.from_numpy(GREY),
        [torch.from_numpy(GREY) / 255],
        torch.from_numpy(GREY)[None] / 127.5 - 1,  # diffusers takes [-1, 1] too
    ],
)
def test_a_picture_has_its_levels_however_it_is_held(given: Any) -> None:
    (found,) = media.pictures(given, 1)
    shown = np.asarray(found)
    assert shown.shape == (4, 6, 3)
    assert np.abs(shown.astype(int) - 100).max() <= 1
