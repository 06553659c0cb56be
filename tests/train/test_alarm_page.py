from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.train import alarm_page
from diffalign.train.watch import Alarm

ALARM = Alarm("flat_high", 40, 0.2, 0.1, "Blank.", (5, 3))
MEDIA = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_an_alarm_leaves_a_sheet_and_its_words(tmp_path: Path) -> None:
    rewards = (torch.arange(8.0), torch.tensor([0.5] * 7 + [torch.nan]))
    place = alarm_page.write_alarm(ALARM, tmp_path, MEDIA, MEDIA, prompts=["a red square"] * 8, rewards=rewards)
    assert place == tmp_path / "alarms" / "step-40-flat_high"
    assert json.loads((place / "alarm.json").read_text()) == ALARM.json()
    with Image.open(place / "sheet.png") as sheet:
        assert min(sheet.size) > 250


def test_an_alarm_of_no_picture_shows_the_first_and_videos_show_one_frame(tmp_path: Path) -> None:
    videos = MEDIA.reshape(4, 2, 3, 32, 32)
    place = alarm_page.write_alarm(replace(ALARM, images=(), value=torch.nan), tmp_path, videos, videos)
    assert (place / "sheet.png").exists()
    assert json.loads((place / "alarm.json").read_text())["value"] is None


@pytest.mark.parametrize(
    "more", [{}, {"truth": 0.4, "truth_lo": 0.3, "truth_hi": 0.5}, {"proxy_gain": 1.0, "heldout_gain": 0.2, "kl": 3.0}]
)
def test_a_run_is_drawn_whatever_is_known_of_it(tmp_path: Path, more: dict[str, Any]) -> None:
    judged = [{"step": 10 * k, "proxy": 0.1 * k, "diversity": 1.0, "alarms": float(k), **more} for k in range(3)]
    rows = [{"step": 0, "loss": 1.0}, {"step": 5, "proxy": 0.1, "truth": None}, *judged]
    with Image.open(alarm_page.plot(rows, tmp_path / "deep" / "plot.png")) as picture:
        assert min(picture.size) > 500


def test_a_run_without_evaluations_is_drawn_empty(tmp_path: Path) -> None:
    assert alarm_page.plot([], tmp_path / "plot.png").exists()
