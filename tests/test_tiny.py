"""The tiny pipelines run, repeat, take batches and listen to what they are asked."""

import socket
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny

CORE = ("sd15", "sdxl", "sdxl_img2img", "sd3", "flux", "flux_kontext", "wan21", "wan_image2video")  # others: -m slow
ALL = [name for name, family in tiny.FAMILIES.items() if not family.broken]


def some(names: list[str]) -> list[Any]:
    """Families, of which all but a few run with the slow tests: what uses them tries them too."""
    return [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in names]


WORKING = some(ALL)
BATCHED = some([name for name in ALL if tiny.FAMILIES[name].batch])
SHOWN = some([name for name in ALL if {"image", "control_image"} & tiny.call(name).keys()])


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at once if a build or a call reaches for the network."""

    def refuse(*args: Any) -> None:
        raise AssertionError(f"a tiny pipeline opened a connection to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def run(name: str, pipe: Any = None, batch: int = 1, **changes: Any) -> Tensor:
    """Run a family from fixed seeds, the global one too, for the stock calls that draw from it."""
    generators = [torch.Generator().manual_seed(3 + i) for i in range(batch)]
    generator = generators if batch > 1 else generators[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = pipe or tiny.build(name)
        return pipe(**tiny.call(name, batch) | changes, generator=generator, output_type="pt")[0]


@pytest.mark.parametrize("name", WORKING)
def test_a_tiny_family_makes_finite_media_that_vary_and_repeat(name: str) -> None:
    media = run(name)
    assert media.ndim == (5 if tiny.FAMILIES[name].video else 4)
    assert media.isfinite().all()
    assert media.std() > 0.02
    assert torch.equal(media, run(name))


@pytest.mark.parametrize("name", BATCHED)
def test_a_case_looks_the_same_alone_and_in_a_batch(name: str) -> None:
    pipe = tiny.build(name)
    pair = run(name, pipe, batch=2)
    assert len(pair) == 2
    if not tiny.FAMILIES[name].stray_noise:
        torch.testing.assert_close(pair[:1], run(name, pipe), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", WORKING)
def test_another_prompt_makes_other_media(name: str) -> None:
    pipe = tiny.build(name)
    assert (run(name, pipe, prompt=["zebra 9"]) - run(name, pipe)).abs().max() > 1e-3


@pytest.mark.parametrize("name", SHOWN)
def test_another_picture_makes_other_media(name: str) -> None:
    pipe, others = tiny.build(name), tiny.call(name, 2)
    change = {key: others[key][1:] for key in ("image", "control_image") if key in others}
    assert (run(name, pipe, **change) - run(name, pipe)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name", [name for name in ALL if tiny.FAMILIES[name].batch and tiny.FAMILIES[name].stray_noise]
)
def test_a_family_said_to_draw_stray_noise_does(name: str) -> None:
    pipe = tiny.build(name)
    first, second = (
        pipe(**tiny.call(name), generator=torch.Generator().manual_seed(3), output_type="pt")[0] for _ in range(2)
    )
    assert not torch.equal(first, second)
