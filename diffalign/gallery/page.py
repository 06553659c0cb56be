"""The page: a manifest and its code as files that open from disk, without a server or a request to anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffalign import atomic
from diffalign.errors import ConfigError, OutputError
from diffalign.gallery import manifest as manifests
from diffalign.gallery.manifest import Heading
from diffalign.gallery.sides import Side

MOST_CODE = 300_000  # bytes


def write(
    sides: Sequence[Side],
    folder: Path,
    heading: Heading | None = None,
    advance: Callable[[int], None] = lambda n: None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the gallery of `sides`, the first of them the baseline, into `folder`; gives back its manifest.

    `folder`/index.html opens in a browser. An older gallery in the folder is replaced; its pictures stay.
    """
    atomic.require_folder(folder)
    require_ours(folder)
    manifest = manifests.build(sides, folder, heading or Heading(), advance, seed=seed)
    put(manifest, folder)
    return manifest


def put(manifest: Mapping[str, Any], folder: Path) -> None:
    """Write a manifest and the page's code beside its media."""
    for path in manifests.paths(manifest):
        manifests.require_inside(path)
    require_ours(folder)
    text = json.dumps(manifest, ensure_ascii=False, allow_nan=False)
    atomic.write_text(folder / "manifest.json", f"{text}\n")  # first: it says that the folder is ours
    atomic.write_text(folder / "manifest.js", f"window.DIFFALIGN_MANIFEST = {_as_script(text)};\n")
    atomic.write_text(folder / "README.md", _space(manifest))
    for name, content in code().items():
        atomic.write_bytes(folder / name, content)


def require_ours(folder: Path) -> None:
    """Refuse to write over a page or README that no gallery wrote."""
    for name in ("index.html", "README.md"):
        if (folder / name).exists() and not (folder / "manifest.json").exists():
            raise OutputError(f"'{folder / name}' is not a gallery's. Choose another place with --out.")


def code() -> dict[str, bytes]:
    """The page's own files by their place in a gallery."""
    source = files("diffalign.gallery") / "page"
    found = {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()}
    if "index.html" not in found:
        raise ConfigError("this installation lacks the gallery's page. Install diffalign again.")
    return {name if name == "index.html" else f"page/{name}": found[name] for name in sorted(found)}


def _space(manifest: Mapping[str, Any]) -> str:
    """What a static Space on the hub wants to read about the folder."""
    about = {"title": manifest["title"], "sdk": "static", "app_file": "index.html"}
    lines = [f"{name}: {json.dumps(value)}" for name, value in about.items()]
    return "\n".join(["---", *lines, "---", "", "Made with `diffalign gallery`. Open index.html.", ""])


def _as_script(text: str) -> str:
    """JSON that is also JavaScript, whatever stands in a prompt: line separators and tags are escaped."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
