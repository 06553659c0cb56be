"""The showcase in the repository: in step with the page's code, whole, and small."""

from __future__ import annotations

from pathlib import Path

from diffalign.gallery import manifest, page

FOLDER = Path(__file__).parents[2] / "gallery"
MOST = 6_000_000  # bytes


def test_the_showcase_has_the_page_of_this_version():
    held = {str(file.relative_to(FOLDER)) for file in FOLDER.rglob("*") if file.is_file()}
    own = {name for name in held if not name.startswith(("media/", "runs/"))}
    extra = {"manifest.json", "manifest.js", "README.md", "config.yaml"}
    assert own == {*page.code(), *extra}, "bring it up to date with `diffalign gallery gallery`"
    for name, content in page.code().items():
        assert (FOLDER / name).read_bytes() == content, f"{name} is old: run `diffalign gallery gallery`"


def test_the_showcase_is_whole_and_small():
    made = manifest.read(FOLDER)
    named = set(manifest.paths(made))
    held = {f"media/{file.name}" for file in (FOLDER / "media").iterdir()}
    assert named == held
    assert len(made["entries"]) >= 40
    assert made["unlike"] == []
    shipped = [file for file in FOLDER.rglob("*") if file.is_file() and "runs" not in file.parts]
    assert sum(file.stat().st_size for file in shipped) <= MOST
