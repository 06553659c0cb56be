"""`score` finds prompts where they are, leaves invalid images out of means, and continues from its cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.cli import main

REWARD = """
import torch
seen = []
def redness(media, cases):
    seen.extend(c.prompt for c in cases)
    red = media[:, 0].flatten(1).mean(1)
    return torch.where(red > 0.9, torch.nan, red)
redness.version = "1"
"""


@pytest.fixture
def photos(here: Path) -> Path:
    """Three pictures of two sizes; the brightest cannot be scored."""
    (here / "photos").mkdir()
    for k, red in enumerate((50, 100, 250)):
        Image.new("RGB", (16 + 4 * (k == 1), 16), (red, 0, 0)).save(here / f"photos/{k}.png")
    (here / "mine.py").write_text(REWARD)
    return here


def rows(here: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (here / "out/score/scores.jsonl").read_text().splitlines()]


def test_each_image_gets_a_row_and_invalid_ones_are_counted(photos: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["score", "photos", "-p", "red", "-r", "mine.py:redness", "-r", "brightness", "--json", "s.json"]) == 0
    assert [row["redness"] for row in rows(photos)] == [pytest.approx(50 / 255), pytest.approx(100 / 255), None]
    redness, brightness = json.loads((photos / "s.json").read_text())["rows"]
    assert (redness["n"], redness["invalid"]) == (2, 1)
    assert redness["mean"] == pytest.approx(75 / 255)
    assert brightness["n"] == 3
    assert "redness" in capsys.readouterr().out


def test_prompts_come_from_a_file_or_from_beside_the_image(photos: Path):
    (photos / "p.txt").write_text("a\nb\nc\n")
    assert main(["score", "photos", "--prompts", "p.txt", "-r", "mine.py:redness"]) == 0
    assert [row["prompt"] for row in rows(photos)] == ["a", "b", "c"]
    (photos / "photos/1.txt").write_text("beside\n")
    assert main(["score", "photos", "-r", "mine.py:redness"]) == 0
    assert [row["prompt"] for row in rows(photos)] == ["", "beside", ""]


def test_a_generate_folder_brings_its_prompts(photos: Path):
    result = {"file": "0.png", "prompt": "from the run", "seed": 1}
    (photos / "photos/results.jsonl").write_text(json.dumps(result) + "\n")
    assert main(["score", "photos", "-r", "mine.py:redness"]) == 0
    assert [row["prompt"] for row in rows(photos)] == ["from the run"]


def test_a_second_run_with_a_cache_asks_the_reward_nothing(photos: Path, monkeypatch: pytest.MonkeyPatch):
    ask = ["score", "photos", "-p", "red", "-r", "brightness", "--cache", "c.sqlite"]
    assert main(ask) == 0
    first = rows(photos)
    from diffalign.rewards import brightness

    def fail(*_: object) -> None:
        raise AssertionError("asked again")

    target = next(v for v in vars(brightness).values() if getattr(v, "name", "") == "brightness")
    if isinstance(target, type):
        monkeypatch.setattr(target, "__call__", fail)
    assert main(ask) == 0
    assert rows(photos) == first


def test_a_single_file_can_be_scored(photos: Path):
    assert main(["score", "photos/0.png", "-p", "red", "-r", "brightness"]) == 0
    assert len(rows(photos)) == 1
