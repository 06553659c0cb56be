"""What holds for every shipped reward: its card, its page, and how little it takes to name one."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from diffalign import registry
from tests.rewards import table

NAMES = sorted(registry.cards())


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_all_that_a_user_has_to_know(name: str) -> None:
    card = registry.cards()[name]
    for field in ("meaning", "licence", "memory", "cost", "misses", "proof"):
        assert getattr(card, field), f"the card of '{name}' has no {field}"
    assert card.differentiable or card.no_gradient, f"the card of '{name}' does not say why there is no gradient"
    assert card.proof.split(",")[0].split(":")[0] in ("exact", "golden", "layout", "measured"), card.proof


@pytest.mark.parametrize("name", NAMES)
def test_a_reward_is_what_its_card_says(name: str) -> None:
    card, found = registry.cards()[name], registry.find_reward(name)
    if card.hub is None or not isinstance(getattr(found, "differentiable", False), property):
        assert bool(getattr(found, "differentiable", False)) == card.differentiable or isinstance(
            getattr(found, "differentiable", None), property
        )
    assert getattr(found, "modality", "image") == card.modality or isinstance(found.modality, property)
    assert found.__doc__, f"'{name}' has no docstring"


def test_importing_every_reward_loads_no_model_library() -> None:
    modules = sorted({card.module for card in registry.cards().values()})
    heavy = {
        "transformers",
        "diffusers",
        "open_clip",
        "torchvision",
        "accelerate",
        "pytesseract",
        "pyarrow",
        "matplotlib",
    }
    code = (
        "import importlib, sys, diffalign.rewards\n"
        f"for module in {modules!r}: importlib.import_module('diffalign.rewards.' + module)\n"
        f"found = {heavy!r} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_rewards_package_loads_no_torch() -> None:
    code = "import sys, diffalign.rewards; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_of_all_rewards_is_made_from_the_cards() -> None:
    content = table.PAGE.read_text(encoding="utf-8")
    assert table.page_with(content, table.table()) == content, "run: python -m tests.rewards.table"


def test_every_module_of_the_folder_has_a_card() -> None:
    folder = importlib.import_module("diffalign.rewards").__path__[0]
    files = {path.stem for path in Path(folder).glob("*.py")} - {"__init__"}
    assert files == {card.module for card in registry.cards().values()}


def test_no_page_has_a_place_that_was_never_filled_in() -> None:
    for page in [*table.PAGE.parent.glob("*.md"), table.PAGE.parents[1] / "README.md"]:
        assert "@@" not in page.read_text(encoding="utf-8"), page
