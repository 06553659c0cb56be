"""Who may import whom: section 2 of the architecture, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [  # each may import itself and what stands before it
    {"errors"},
    {"cases", "config", "loading", "registry", "atomic", "vision", "media", "request", "own_rewards"},
    {
        "scoring",
        "reward_kinds",
        "score_cache",
        "sqlite_file",
        "calibration",
        "valued",
        "rules",
        "weights",
        "data",
        "intervals",
        "reward_specs",
        "shaping",
        "noise",
        "budget",
        "transport",
        "transport_map",
        "judges",
        "clip_tower",
        "clip_t5_tower",
        "clip_sources",
        "qwen_tower",
        "probes",
    },
    {"search", "world", "detectors", "detector_models"},
    {
        "drive",
        "arguments",
        "looping",
        "stage",
        "standin",
        "steering",
        "tap",
        "memory",
        "metering",
        "restore",
        "attention",
    },
    {"conformance", "recording", "snapshot", "borrowed", "report", "shell", "walk", "zoo"}
    | {"clean_latents", "endogenous", "judging", "searching", "search_shell", "trees", "aligning"},
    {"train", "gallery", "bench"},
    {"cli", "__main__"},
]
ONLY = {  # narrower than their layer
    "search": {"search", "noise", "budget", "config", "errors"},
    "world": {"world", "cases", "errors"},
    "rewards": {"scoring", "cases", "registry", "errors", "vision", "clip_tower", "judges", "transport", "world"}
    | {"calibration", "detectors", "endogenous", "probes", "qwen_tower", "rules", "shaping", "weights"}
    | {"clip_t5_tower", "own_rewards", "valued"},
    "pipelines": {"shell", "drive", "search", "scoring", "budget", "config", "errors"}
    | {"cases", "media", "noise", "registry", "report", "request", "searching", "search_shell", "trees"},
}
TENSORS_ONLY = {"diffusers", "transformers", "accelerate", "pathlib", "os", "io", "PIL"}


def sources() -> Iterator[tuple[str, Path]]:
    """(unit, file): the unit is a core module or sub-package, or `pipelines` or `rewards`."""
    for path in sorted((ROOT / "diffalign").rglob("*.py")):
        relative = path.relative_to(ROOT / "diffalign")
        unit = relative.parts[0].removesuffix(".py")
        if unit != "__init__" and relative.parts[:2] != ("zoo", "models"):
            yield unit, path
    for folder in ("pipelines", "rewards"):
        for path in sorted((ROOT / folder).glob("*.py")):
            yield folder, path


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Every absolute name a file imports; relative imports are resolved against its package."""
    package = "diffalign." + ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1]).removeprefix(
        "diffalign"
    ).lstrip(".")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            steps = package.rstrip(".").split(".")
            base = ".".join(steps[: len(steps) - node.level + 1]) if node.level else ""
            place = ".".join(filter(None, [base, node.module]))
            found |= {f"{place}.{alias.name}" for alias in node.names} if place == "diffalign" else {place}
    return found


def core_units(path: Path, *, top_level_only: bool = False) -> set[str]:
    names = imported(path, top_level_only=top_level_only)
    return {name.split(".")[1] for name in names if name.startswith("diffalign.")}


def rank(unit: str) -> int:
    for k, layer in enumerate(LAYERS):
        if unit in layer:
            return k
    raise AssertionError(f"diffalign/{unit} has no layer; give it a place in LAYERS, and in the architecture")


ALL = list(sources())


@pytest.mark.parametrize(("unit", "path"), ALL, ids=[str(path.relative_to(ROOT)) for _, path in ALL])
def test_every_arrow_points_down(unit: str, path: Path) -> None:
    for target in core_units(path):
        if unit in ("pipelines", "rewards"):
            inside = path.name == "__init__.py" and target == unit  # only the folder's __init__ names its files
            assert inside or target in ONLY[unit], f"{path.name} imports {target}"
            continue
        assert target not in ("pipelines", "rewards"), f"{path.name} reaches {target}/ by name; go through the registry"
        assert rank(target) <= rank(unit), f"{path.name} imports {target}, which stands above it"
        assert unit not in ONLY or target in ONLY[unit], f"{path.name} imports {target}"


def test_search_knows_tensors_only() -> None:
    for unit, path in ALL:
        if unit == "search":
            found = {name.split(".")[0] for name in imported(path)} & TENSORS_ONLY
            assert not found, f"{path.name} imports {found}"


def test_no_two_core_modules_need_each_other_to_load() -> None:
    needs: dict[str, set[str]] = {}
    for unit, path in ALL:
        needs.setdefault(unit, set()).update(core_units(path, top_level_only=True) - {unit})
    done: set[str] = set()

    def visit(unit: str, trail: tuple[str, ...]) -> None:
        assert unit not in trail, " -> ".join((*trail, unit))
        if unit not in done:
            for target in sorted(needs.get(unit, ())):
                visit(target, (*trail, unit))
            done.add(unit)

    for unit in sorted(needs):
        visit(unit, ())


def test_every_name_in_the_table_is_spelled_once() -> None:
    names = [name for layer in LAYERS for name in layer]
    assert len(names) == len(set(names))
