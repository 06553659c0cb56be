"""Pictures of a report are drawn, and refused where there is nothing to draw."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from diffalign.bench.curves import draw_growth, draw_steps
from diffalign.errors import ConfigError
from tests.test_search_pipelines import run


def colours(file: Path) -> set[tuple[int, ...]]:
    image = Image.open(file).convert("RGB")
    return {colour for _, colour in image.getcolors(maxcolors=1 << 24) or []}


def test_the_gains_of_the_steps_are_drawn_for_every_prompt(tmp_path: Path):
    report = run("dense", "sd3", batch=2).report
    file = draw_steps(report, tmp_path / "new" / "steps.png", prompts=["one", "two"])
    assert Image.open(file).size[1] > Image.open(draw_growth(report, tmp_path / "growth.png")).size[1]
    assert {(0x1B, 0x7F, 0x4C), (0xC2, 0x38, 0x2C)} & colours(file)


def test_a_report_without_step_rewards_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="DensePipeline"):
        draw_steps(run("random", "sd3").report, tmp_path / "steps.png")


def test_the_growth_of_the_best_reward_is_drawn(tmp_path: Path):
    assert len(colours(draw_growth(run("tree", "sd3").report, tmp_path / "growth.png"))) > 2
