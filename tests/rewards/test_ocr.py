"""`ocr`: the rule around a fake engine, then real letters through the program tesseract."""

from __future__ import annotations

import math
import random
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError, DiffalignError, InvalidReward, MissingExtra, ModelError
from diffalign.intervals import wilson
from diffalign.rewards.ocr import OCR, Reading, Tesseract, prepared
from diffalign.rules.text import normal
from diffalign.scoring import ScoreCache, make_reward, score
from diffalign.vision import to_tensor

tesseract = pytest.mark.skipif(shutil.which("tesseract") is None, reason="apt-get install tesseract-ocr")
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
WORDS = """harvest lantern Kingdom velvet Picnic thunder Sunset puzzle Journey whisper MAGIC Tunnel copper Violin
RADIO meadow Canvas butter Gallery orchid HELLO Compass wizard Ladder ocean Marble Number queen ZEBRA jungle Winter
Fabric sugar Oyster north Yellow keep calm and carry on Grand Opening closed Today only free parking""".split()  # noqa: SIM905
FIGURES = "7 12 48 2025 360 75% 6:45 2.50 No.9 $15 88 1,200".split()  # noqa: SIM905
COLOURS = [  # letters on ground
    ("black", "white"),
    ("white", "black"),
    ("#c02020", "#fff4d0"),
    ("#ffe000", "#102060"),
    ("white", "#207040"),
    ("#ff0000", "#008200"),  # of one luminance
    ("#505050", "#d8d8d8"),
    ("#ff80c0", "#200030"),
    ("#0050c8", "#ffd870"),
]
STYLES = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSans-Oblique"]


def render(seed: int) -> tuple[Image.Image, str]:
    """One to four words in some font, size, colour and place, and what they say."""
    rng = random.Random(seed)
    words = [rng.choice(WORDS) if rng.random() < 0.85 else rng.choice(FIGURES) for _ in range(rng.randint(1, 4))]
    words = [w + rng.choice("!?.:,") if w[-1].isalpha() and rng.random() < 0.15 else w for w in words]
    breaks = len(words) > 2 and rng.random() < 0.5
    text = " ".join(words[:2]) + "\n" + " ".join(words[2:]) if breaks else " ".join(words)
    width, height, size = (
        rng.choice([192, 256, 384, 512]),
        rng.choice([192, 256, 384, 512]),
        rng.choice([16, 24, 32, 48, 64]),
    )
    style, (ink, ground) = rng.choice(STYLES), rng.choice(COLOURS)
    while True:
        font = ImageFont.truetype(str(FONTS / f"{style}.ttf"), size)
        image = Image.new("RGB", (width, height), ground)
        draw = ImageDraw.Draw(image)
        left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font)
        if right - left <= width - 16 and bottom - top <= height - 16:
            break
        size -= 1
    x = rng.randint(8, int(width - 8 - (right - left))) - left
    y = rng.randint(8, int(height - 8 - (bottom - top))) - top
    draw.multiline_text((x, y), text, font=font, fill=ink)
    return image, text


def written(text: str, size: int = 32, side: int = 256) -> Tensor:
    image = Image.new("RGB", (side, side), "white")
    font = ImageFont.truetype(str(FONTS / "DejaVuSans.ttf"), size)
    ImageDraw.Draw(image).text((20, side // 3), text, font=font, fill="black")
    return to_tensor(image)


class Told:
    """Reads what it was told for the grey level of the picture, and remembers which threads asked."""

    version = "told 1"

    def __init__(self, *texts: str, fails: bool = False) -> None:
        self.texts, self.fails = texts, fails
        self.options = {"texts": texts, "fails": fails}
        self.threads: set[str] = set()

    def read(self, image: Image.Image) -> Reading:
        self.threads.add(threading.current_thread().name)
        if self.fails:
            raise ModelError("the engine broke down")
        return Reading(self.texts[round(float(np.asarray(image).mean()) / 10)], 0.5)


def levels(*rows: int) -> Tensor:
    """Plain pictures that `Told` tells apart."""
    return torch.tensor(rows).view(-1, 1, 1, 1).expand(-1, 3, 8, 8) * (10 / 255)


def told(*texts: str, **options: Any) -> Any:
    return make_reward({"ocr": {"engine": Told(*texts), "upscale": 0, **options}})


def cases_of(*prompts: str) -> list[Case]:
    return [Case(prompt=prompt) for prompt in prompts]


def test_the_published_examples_through_the_reward() -> None:
    reward = told("helo", "xxhelloyy", "", "zzzzzzzzzz")
    found = score(reward, levels(0, 1, 2, 3), cases_of(*['a sign "Hello"'] * 4))
    assert found.total.tolist() == pytest.approx([0.8, 1, 0, 0])
    assert found.parts["distance"].tolist() == [1, 0, 5, 5]
    assert found.parts["length"].tolist() == [4, 9, 0, 10]
    assert found.parts["confidence"].tolist() == [0.5] * 4


def test_nothing_recognised_is_a_sound_0_and_a_prompt_without_text_is_invalid() -> None:
    found = score(told(""), levels(0, 0, 0), cases_of('"Hi"', "no quotes", '""'))
    assert found.valid.tolist() == [True, False, False]
    assert float(found.total[0]) == 0
    with pytest.raises(InvalidReward, match="'ocr' is NaN for all 1 rows"):
        score(told(""), levels(0), cases_of("no quotes"))


def test_an_engine_that_fails_is_an_error_and_never_a_0() -> None:
    reward = make_reward({"ocr": {"engine": Told(fails=True)}})
    with pytest.raises(ModelError, match="the engine broke down"):
        score(reward, levels(0), cases_of('"Hi"'))


def test_pictures_that_are_not_finite_are_invalid_and_never_read() -> None:
    media = levels(0, 0).clone()
    media[1, 0, 0, 0] = torch.nan
    assert score(told("hi"), media, cases_of('"hi"', '"hi"')).valid.tolist() == [True, False]


def test_walls_of_text_pay_less_with_precision_and_all_strings_may_count() -> None:
    cases = cases_of('"one" and "two"')
    assert float(score(told("one" * 10), levels(0), cases).total) == 1
    assert float(score(told("one" * 10, precision=True), levels(0), cases).total) == pytest.approx(0.1)
    both = score(told("one", which="all"), levels(0), cases)
    assert float(both.total) == 0.5
    assert float(both.parts["distance"]) == 3
    assert float(score(told("onetwo", which="all", precision=True), levels(0), cases).total) == 1


def test_the_target_may_stand_in_the_metadata() -> None:
    cases = [Case(prompt="a shop sign", metadata={"text": text}) for text in ("Open", ["Open", "Now"], "", [])]
    cases += [Case(prompt='ignored "Open"'), Case(prompt="", metadata={"text": None})]
    found = score(told("open", text="text"), levels(*[0] * 6), cases)
    assert found.valid.tolist() == [True, True, False, False, False, False]
    assert found.total[:2].tolist() == [1, 1]


@pytest.mark.parametrize("target", [2024, {"a": "b"}, ["Open", 7], True, 1.5, b"Open"])
def test_a_target_that_is_no_text_is_named_and_not_guessed(target: Any) -> None:
    with pytest.raises(ConfigError, match=rf"'text' of 'a sign' is {re.escape(repr(target))}, but .* a text"):
        score(told("open", text="text"), levels(0), [Case(prompt="a sign", metadata={"text": target})])


@given(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=6), st.integers(1, 4))
def test_a_batch_equals_single_calls_with_any_number_of_threads(rows: list[int], workers: int) -> None:
    prompts = ['"one"', "none", '"three" "four"', '"two"']
    media, cases = levels(*rows), cases_of(*[prompts[row] for row in rows])
    whole = score(told("one", "two", "three", "four", workers=workers), media, cases, all_invalid=True)
    for k in range(len(rows)):
        alone = score(told("one", "two", "three", "four"), media[k : k + 1], cases[k : k + 1], all_invalid=True)
        assert torch.equal(alone.total.nan_to_num(-1), whole.total[k : k + 1].nan_to_num(-1))
        assert alone.parts["length"].nan_to_num(-1)[0] == whole.parts["length"].nan_to_num(-1)[k]


@given(prompt=st.one_of(st.text(max_size=60), st.text(alphabet='"“”\0😀é ', max_size=40)), read=st.text(max_size=60))
def test_no_prompt_and_no_reading_is_an_error(prompt: str, read: str) -> None:
    found = score(told(read), levels(0), cases_of(prompt), all_invalid=True)
    total = float(found.total)
    assert math.isnan(total) or 0 <= total <= 1


def test_the_score_is_cached_under_the_engine_and_the_options(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores.sqlite")
    for reward in (told("hi"), told("hi"), told("hi", precision=True)):
        score(reward, levels(0), cases_of('"hi"'), cache=cache)
    assert len(cache) == 2
    assert "told 1" in told("hi").version


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytesseract", None)
    with pytest.raises(MissingExtra, match=r'reward \'ocr\' needs pytesseract.*pip install "diffalign\[ocr\]"'):
        make_reward("ocr")


def test_a_missing_program_names_the_apt_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytesseract = pytest.importorskip("pytesseract")
    monkeypatch.setattr(pytesseract.pytesseract, "tesseract_cmd", "no-such-program")
    with pytest.raises(MissingExtra, match=r"needs the program tesseract.*apt-get install tesseract-ocr"):
        score(make_reward("ocr"), written("Hello"), cases_of('"Hello"'))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"psm": 14}, "psm 14"),
        ({"upscale": -1}, "upscale -1"),
        ({"engine": "paddle"}, "'paddle'"),
        ({"which": "last"}, "'first', 'all'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_reward({"ocr": options})


@given(ink=st.tuples(*[st.integers(0, 255)] * 3), ground=st.tuples(*[st.integers(0, 255)] * 3))
def test_prepared_letters_are_dark_on_light_whatever_their_colours(
    ink: tuple[int, ...], ground: tuple[int, ...]
) -> None:
    image = Image.new("RGB", (30, 20), ground)
    image.paste(ink, (5, 5, 10, 10))
    values = np.asarray(prepared(image, 60, contrast=True))
    assert values.shape == (60 + 40, 90 + 40)
    if max(abs(a - b) for a, b in zip(ink, ground, strict=True)) > 2:
        assert (values[0, 0], values[20 + 22, 20 + 22]) == (255, 0)


@tesseract
def test_real_letters_are_read_and_wrong_ones_cost() -> None:
    media = torch.cat([written("Hello World"), written("Hello Word"), written("")])
    found = score(make_reward("ocr"), media, cases_of(*['a sign that says "Hello World"'] * 3))
    assert found.total.tolist() == pytest.approx([1, 0.9, 0], abs=1e-6)
    assert (found.parts["confidence"][:2] > 0.8).all()
    assert float(found.parts["confidence"][2]) == 0
    assert make_reward("ocr").version.startswith("1 tesseract ")


@tesseract
def test_an_unknown_language_is_an_error_that_says_what_to_install() -> None:
    with pytest.raises(DiffalignError, match=r"language 'xyz'.*apt-get install tesseract-ocr-"):
        score(make_reward({"ocr": {"language": "xyz"}}), written("Hello"), cases_of('"Hello"'))


def agreement(seeds: range) -> tuple[int, list[tuple[str, str]]]:
    """How many renderings are read as they were written, and which are not."""
    reward, found = OCR(), [render(seed) for seed in seeds]
    assert isinstance(reward.engine, Tesseract)
    with ThreadPoolExecutor(reward.workers) as pool:
        readings = [reading.text for reading in pool.map(reward.read, [image for image, _ in found])]
    wrong = [(text, read) for (_, text), read in zip(found, readings, strict=True) if normal(read) != normal(text)]
    return len(found) - len(wrong), wrong


@tesseract
def test_clean_renderings_are_read_as_they_were_written() -> None:
    right, wrong = agreement(range(1000, 1040))
    assert right >= 39, wrong


@pytest.mark.slow
@tesseract
def test_four_hundred_renderings_are_read_as_they_were_written() -> None:
    right, wrong = agreement(range(2000, 2400))
    print(f"{right} of 400, {wilson(right, 400)}: {wrong}")
    assert right >= 392, wrong
