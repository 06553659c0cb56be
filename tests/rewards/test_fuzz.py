"""Nonsense put to every reward that runs here: an answer of the right shape or a message, never a 0 for no answer."""

from __future__ import annotations

import contextlib
import inspect
import io
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign import registry
from diffalign.cases import Case
from diffalign.errors import DiffalignError
from diffalign.scoring import Composite, Reward, make_reward, score
from diffalign.vision import read_image, to_tensor
from tests.rewards import clips
from tests.rewards.test_hpsv3 import folder as hpsv3_folder
from tests.rewards.test_hpsv3 import model
from tests.rewards.test_imagereward import folder as imagereward_folder

__all__ = ["hpsv3_folder", "imagereward_folder", "model"]

PROMPTS = (
    *("two red circles", "a blue square left of a green triangle", "", " ", "\0", "\n\n", "red " * 5000, "=1+1", "NaN"),
    *("'; DROP TABLE scores; --", "🟥" * 80, "\u202eelcric der", "\ud800", 'a sign that says "HELLO"', 'a "', '""'),
    *("<|Reward|><|im_end|>", "[SEP][CLS]", "{prompt} {0} %s %(x)s", "../../etc/passwd", "ﷺ" * 40, "a\u0301" * 300),
)
VALUES: tuple[Any, ...] = (
    *(None, 0, -1, 1e308, float("nan"), "", "x", [], {}, [[]], [{}], {"class": 3}, True, b"\0"),
    [{"class": "dog", "count": 10**9}],
    [{"class": "circle", "count": 1, "color": "red", "position": ["left of", 7]}],
    [{"label": "circle", "box": [1, 2]}],
)
KEYS = (
    "tag",
    "include",
    "exclude",
    "kind",
    "category",
    "boxes",
    "layout",
    "objects",
    "text",
    "mask",
    "goal",
    "reference",
    "instruction",
    "rubric",
    "key_facts",
    "edit",
)
DTYPES = (
    *(torch.float32,) * 6,
    *(torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool, torch.complex64),
)


@pytest.fixture(scope="module")
def pack(
    tmp_path_factory: pytest.TempPathFactory,
    hpsv3_folder: Path,
    imagereward_folder: Path,
) -> Iterator[dict[str, Reward]]:
    place = tmp_path_factory.mktemp("pack")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFALIGN_CACHE", str(place / "cache"))
        clips.know_tiny_h(place / "tiny")
        wide = clips.transformers_folder(place / "wide", dimensions=768)
        clip = str(clips.open_clip_folder(place / "clip"))
        hpsv3 = {"model": str(hpsv3_folder), "base": str(hpsv3_folder), "dtype": "float32"}
        told: dict[str, Any] = {name: {name: {}} for name in registry.cards()}
        told |= {
            "clip": {"clip": {"model": clip}},
            "pickscore": {"pickscore": {"model": str(clips.transformers_folder(place / "pick"))}},
            "vlm_rm": {"vlm_rm": {"model": clip, "baseline": ["a picture"]}},
            "aesthetic": {"aesthetic": {"model": str(wide), "head": str(clips.aesthetic_head(place / "head.pth"))}},
            "hpsv2": {"hpsv2": {"model": str(clips.hps_folder(place / "hps")), "architecture": clips.TINY_H}},
            "imagereward": {"imagereward": {"model": str(imagereward_folder)}},
            "hpsv3": {"hpsv3": {**hpsv3, "instruction": "rate {text_prompt}", "pixels": 28 * 28 * 4}},
            "relevance": {"relevance": {"similarity": {"clip": {"model": clip}}}},
            "router": {"router": {"routes": {"counting": "shapes", "x": "brightness"}, "default": "colourfulness"}},
            "hybrid": {"hybrid": {"rule": "shapes", "model": "brightness", "confidence": 0.5}},
            "masked": {"masked": {"inner": "brightness", "monitor": "colourfulness", "target": 20.0}},
            "partial": {
                "partial": {
                    "terms": {"right": "shapes", "light": "brightness"},
                    "weights": {"right": 1.0, "light": 0.2},
                }
            },
            "mixture": {"mixture": {"rewards": {"brightness": 1.0, "colourfulness": 0.01}, "stages": ["sum"]}},
            "likelihood_ratio": {"likelihood_ratio": {"micro_batch": 4}},
            "trained": {"trained": {"model": str(clips.trained_folder(place / "trained"))}},
        }
        yield {name: make_reward(spec) for name, spec in told.items()}


SPEED_ONLY = {"micro_batch", "batch", "checkpointing", "workers", "log"}  # they change no score
ELSEWHERE = {
    ("layout", "step"),
    ("ocr", "engine"),
    ("partial", "dominance"),
    ("trained", "model"),
    ("trained", "base"),
}  # in the stage, the version, the weights
PARTS = {"rewards", "inner", "monitor", "rule", "model", "terms", "routes", "default", "similarity", "table"}


def test_every_option_of_a_reward_is_part_of_what_tells_its_scores_apart(pack: dict[str, Reward]) -> None:
    for name, reward in pack.items():
        if not isinstance(registry.find_reward(name), type):
            continue  # options of a function are kept for it
        known = set(inspect.signature(type(reward).__init__).parameters) - {"self"} - SPEED_ONLY
        if isinstance(reward, Composite):
            known -= PARTS
        known -= {option for told, option in ELSEWHERE if told == name}
        assert known <= set(getattr(reward, "options", {})), name


def drawn_media(draw: random.Random) -> Tensor:
    """Mostly pictures; else other numbers of axes, channels, dtypes and values."""
    if draw.random() < 0.75:
        shape = [draw.randint(1, 3), 3, draw.randint(1, 40), draw.randint(1, 40)]
    else:
        shape = [draw.choice([0, 1, 1, 2, 3, 3, 4, 17]) for _ in range(draw.randint(0, 6))]
    media = torch.rand(shape, generator=torch.Generator().manual_seed(draw.getrandbits(30)))
    scale = draw.choice([1, 1, 1, 1, 1, 255, -1, 0, 1e30])
    media = media * scale
    if media.numel() and draw.random() < 0.35:
        for _ in range(draw.randint(1, 3)):
            media.view(-1)[draw.randrange(media.numel())] = draw.choice([torch.nan, torch.inf, -torch.inf])
    return media.to(draw.choice(DTYPES))


def drawn_case(draw: random.Random) -> Case:
    def picture() -> Image.Image | None:
        if draw.random() < 0.6:
            return None
        size = (draw.randint(1, 40), draw.randint(1, 40))
        return Image.new(draw.choice(["RGB", "L", "RGBA", "1", "P"]), size)

    metadata = {key: draw.choice(VALUES) for key in KEYS if draw.random() < 0.3}
    pictures = {slot: picture() for slot in ("source", "reference", "control")}
    return Case(prompt=draw.choice(PROMPTS), seed=draw.getrandbits(20), metadata=metadata, **pictures)


def fuzz(pack: dict[str, Reward], rounds: int, seed: int) -> dict[str, int]:
    """How often each kind of outcome came; anything but an answer or one of our errors is raised."""
    found = {"answered": 0, "refused": 0, "invalid rows": 0}
    draw = random.Random(seed)
    names = sorted(pack)
    for k in range(rounds):
        name, media = names[k % len(names)], drawn_media(draw)
        count = len(media) if media.ndim and draw.random() < 0.9 else draw.randint(0, 3)
        cases = [drawn_case(draw) for _ in range(count)]
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                told = score(pack[name], media, cases, all_invalid=True)
        except DiffalignError as e:
            found["refused"] += 1 if len(str(e)) > 20 else 0
            continue
        except Exception as e:
            shape = tuple(media.shape)
            raise AssertionError(f"{name}, round {k}: {type(e).__name__}: {e} on {shape} {media.dtype} {cases}") from e
        assert told.total.shape == told.valid.shape == (len(cases),), name
        assert told.total.dtype == torch.float32, name
        assert torch.equal(told.valid, ~told.total.isnan()), name
        assert not told.total.isinf().any(), name
        sound = media.isfinite().flatten(1).all(1)
        assert not (told.valid & ~sound).any(), f"{name} scored a picture that is not finite"
        found["answered"] += 1
        found["invalid rows"] += int((~told.valid).sum())
    return found


def test_nonsense_is_answered_or_refused_with_a_message(pack: dict[str, Reward]) -> None:
    found = fuzz(pack, 200, seed=0)
    assert min(found.values()) > 10, found


@pytest.mark.slow
def test_much_more_nonsense_is_answered_or_refused_with_a_message(pack: dict[str, Reward]) -> None:
    found = fuzz(pack, 2000, seed=1)
    assert min(found.values()) > 100, found


def broken_pictures(count: int, seed: int) -> Iterator[bytes]:
    """Files cut short, with bytes changed, or of nothing at all."""
    draw = random.Random(seed)
    for k in range(count):
        file = io.BytesIO()
        size = (draw.randint(1, 50), draw.randint(1, 50))
        noise = Image.effect_noise(size, 90).convert(draw.choice(["RGB", "L"]))
        noise.save(file, format=draw.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
        content = bytearray(file.getvalue())
        if k % 3 == 0:
            content = content[: draw.randrange(len(content))]
        elif k % 3 == 1:
            for _ in range(draw.randint(1, 20)):
                content[draw.randrange(len(content))] = draw.getrandbits(8)
        else:
            content = bytearray(draw.randbytes(draw.randint(0, 400)))
        yield bytes(content)


@pytest.mark.parametrize(("count", "seed"), [(300, 0), pytest.param(2000, 1, marks=pytest.mark.slow)])
def test_broken_files_are_read_or_refused_with_their_name(tmp_path: Path, count: int, seed: int) -> None:
    refused = 0
    for content in broken_pictures(count, seed):
        file = tmp_path / "broken.png"
        file.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                media = to_tensor(read_image(file))
            except DiffalignError as e:
                refused += "broken.png" in str(e)
                continue
        with contextlib.suppress(DiffalignError):
            assert score(make_reward("brightness"), media, [Case(prompt="")]).valid.all()
    assert refused > count // 4
