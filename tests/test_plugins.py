"""A reward package of somebody else, really built and installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "their-rewards"
version = "1.0"
[project.entry-points."diffalign.rewards"]
redness = "their_rewards:Redness"
registered = "their_rewards"
broken = "their_broken:Reward"
[tool.setuptools]
py-modules = ["their_rewards", "their_broken"]
"""
MODULE = """
from diffalign.registry import register_reward

@register_reward("redness", differentiable=True, version="1.0", range=(0, 1))
class Redness:
    def __init__(self, power: float = 1.0):
        self.power = power
    def __call__(self, media, cases):
        return media[:, 0].mean((1, 2)) ** self.power

@register_reward("registered")
def anything(media, cases):
    return media.mean((1, 2, 3))
"""
USE = """
import json, warnings, torch
from diffalign import registry
from diffalign.cases import Case
from diffalign.scoring import make_reward, score
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    rows = {info.name: info for info in registry.rewards()}
    registry.rewards()
media = torch.full((2, 3, 4, 4), 0.5)
found = score(make_reward({"redness": {"power": 2}, "registered": 1, "brightness": 0}), media, [Case(prompt="a")] * 2)
print(json.dumps({
    "rows": sorted(rows), "source": rows["redness"].source, "range": rows["redness"].range,
    "warned": [str(w.message) for w in caught], "total": found.total.tolist(), "parts": sorted(found.parts),
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder the package is installed to."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "their_rewards.py").write_text(MODULE)
    (source / "their_broken.py").write_text("import a_package_nobody_has\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", str(wheels), str(source)], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", str(target), str(wheel)], check=True)
    return target


def test_an_installed_reward_is_found_and_its_broken_neighbour_only_warns(installed: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(installed)}
    ran = subprocess.run(
        [sys.executable, "-c", USE], capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert {"redness", "registered", "clip", "brightness"} <= set(told["rows"])
    assert "broken" not in told["rows"]
    assert (told["source"], told["range"]) == ("their-rewards", [0, 1])
    (warning,) = told["warned"]
    assert "'broken' of the package 'their-rewards' does not load" in warning
    assert "a_package_nobody_has" in warning
    assert told["total"] == pytest.approx([0.75, 0.75])
    assert told["parts"] == ["brightness", "redness", "registered"]


def test_the_command_line_lists_an_installed_reward(installed: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(installed)}
    code = "from diffalign.cli import main; raise SystemExit(main(['ls', 'rewards', '--json', 'rows.json']))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "a_package_nobody_has" in ran.stderr
    (row,) = [row for row in json.loads((tmp_path / "rows.json").read_text()) if row["name"] == "redness"]
    told = {"name": "redness", "modality": "image", "differentiable": True, "range": [0, 1], "installable": True}
    assert row.items() >= told.items()
