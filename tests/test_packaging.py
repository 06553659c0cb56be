from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = {
    "diffalign": "diffalign",
    "pipelines": "diffalign/pipelines",
    "rewards": "diffalign/rewards",
    "configs": "diffalign/configs",
}


def built(source: Path, kind: str, out: Path) -> Path:
    """A wheel or sdist of a source tree, without network."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    (found,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that building leaves nothing behind."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in MAPPED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tree, "wheel", tmp_path_factory.mktemp("wheel"))


def content(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_of_the_tree_under_its_mapped_name(wheel: Path, tree: Path) -> None:
    expected = {
        (Path(package) / path.relative_to(tree / folder)).as_posix()
        for folder, package in MAPPED.items()
        for path in (tree / folder).rglob("*")
        if path.is_file()
    }
    assert content(wheel) == expected
    assert {"diffalign/py.typed", "diffalign/rewards/cards.yaml", "diffalign/pipelines/__init__.py"} <= expected


def test_the_wheel_has_one_top_level_package_and_the_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in content(wheel)} == {"diffalign"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(wheel: Path, tree: Path, tmp_path: Path) -> None:
    with tarfile.open(built(tree, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("diffalign-*")
    assert content(built(source, "wheel", tmp_path / "again")) == content(wheel)


def test_the_installed_wheel_imports_and_lists_its_rewards(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import diffalign, diffalign.rewards, diffalign.pipelines, diffalign.configs, pathlib, sys\n"
        "from diffalign import registry\n"
        "home = pathlib.Path(diffalign.__file__).parent\n"
        "assert home == pathlib.Path(sys.argv[1]) / 'diffalign', home\n"
        "assert pathlib.Path(diffalign.rewards.__file__).parent == home / 'rewards'\n"
        "print(*[info.name for info in registry.rewards()])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "brightness clip" in ran.stdout


@pytest.mark.parametrize("folder", ["pipelines", "rewards"])
def test_a_bare_import_of_a_mapped_folder_is_refused(folder: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ran.returncode == 1
    assert f"diffalign.{folder}" in ran.stderr.splitlines()[-1]
    assert "ImportError" in ran.stderr


def test_every_mapped_folder_is_flat() -> None:
    for folder in ("pipelines", "rewards"):
        assert not [p for p in (ROOT / folder).iterdir() if p.is_dir() and p.name != "__pycache__"]


def test_no_shipped_file_is_a_pickle_or_too_large() -> None:
    files = [p for folder in (*MAPPED, "gallery", "docs") for p in (ROOT / folder).rglob("*") if p.is_file()]
    pickles = [p for p in files if p.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")]
    weights = [p.stat().st_size for p in files if p.suffix == ".safetensors"]
    assert not pickles
    assert all(size <= 12e6 for size in weights)
    assert sum(weights) <= 64e6
