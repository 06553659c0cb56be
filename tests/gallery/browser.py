"""Galleries written by hand and a real browser to open them: what the tests of the page share."""

from __future__ import annotations

import io
import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

import diffalign

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

CHROMIUM = shutil.which("chromium")
PAGE = Path(diffalign.__file__).parent / "gallery" / "page"
ROLES = {"shapes": "truth", "clip": "proxy", "taste": "heldout"}
TAGS = ("counting", "colour", "position")


def picture(folder: Path, name: str, hue: int, size: tuple[int, int] = (64, 64), frames: int = 1) -> dict[str, Any]:
    """A disc on a ground, drawn once; with frames it moves from left to right. Returns the medium."""
    width, height = size
    columns = min(frames, 3)
    strip = Image.new("RGB", (width * columns, height * -(-frames // columns)), (236, 236, 230))
    draw = ImageDraw.Draw(strip)
    radius = min(size) // 4
    for frame in range(frames):
        left = frame % columns * width + (width - 2 * radius) * (frame + 1) // (frames + 1)
        top = frame // columns * height + height // 2 - radius
        colour = tuple(round(128 + 110 * math.cos(math.radians(hue + turn))) for turn in (0, 120, 240))
        draw.ellipse([left, top, left + 2 * radius, top + 2 * radius], fill=colour)
    (folder / "media").mkdir(parents=True, exist_ok=True)
    strip.save(folder / "media" / f"{name}.png")
    media = {"shown": f"media/{name}.png", "original": f"media/{name}.png", "width": width, "height": height}
    film = {"kind": "film", **media, "frames": frames, "columns": columns, "fps": 8}
    return {"kind": "image", **media} if frames == 1 else film


def entries(folder: Path, n: int, systems: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Entries with scores that favour later systems a little; the images of an entry are two of 24 files."""
    draw = random.Random(seed)
    media = [picture(folder, f"{i:02x}", hue=15 * i) for i in range(24)]
    made = []
    for i in range(n):
        shots = [
            {
                "media": media[(5 * i + 7 * system) % 24],
                "scores": {name: round(draw.gauss(0.5 + 0.06 * system, 0.1), 4) for name in ROLES},
                "seed": str(i),
                "command": f"diffalign generate --seed {i} --system system-{system}",
            }
            for system in range(systems)
        ]
        made.append(
            {
                "id": f"e{i}",
                "prompt": f"a disc number {i} on a table",
                "tags": [TAGS[i % 3]],
                "seed": str(i),
                "inputs": {},
            }
            | {"shots": shots}
        )
    return made


def summary(a: int, b: int, made: list[dict[str, Any]]) -> dict[str, Any]:
    """A plausible summary; the page shows these numbers and does not check them."""
    rows = {}
    for name in ROLES:
        gains = [e["shots"][b]["scores"][name] - e["shots"][a]["scores"][name] for e in made]
        wins, delta = sum(g > 0 for g in gains), sum(gains) / max(1, len(gains))
        rows[name] = {"n": len(gains), "delta": delta, "lo": delta - 0.02, "hi": delta + 0.03, "wins": wins}
        rows[name] |= {"losses": sum(g < 0 for g in gains), "ties": sum(g == 0 for g in gains), "win_rate": 0.7}
        rows[name] |= {"win_lo": 0.6, "win_hi": 0.8, "sign_p": 0.004}
    return {"a": a, "b": b, "rewards": rows}


def manifest(folder: Path, n: int = 40, systems: int = 2, **changes: Any) -> dict[str, Any]:
    made = entries(folder, n, systems)
    names = ("stock", "searched", "tuned", "both")[:systems]
    pairs = [(a, b) for a in range(systems) for b in range(a + 1, systems)]
    base = {
        "format": "diffalign-gallery",
        "version": 1,
        "id": f"page-{n}-{systems}",
        "title": "Discs, before and after",
        "made": "2026-01-01T00:00:00Z",
        "command": "diffalign gallery runs/discs --out out",
        "systems": [
            {
                "name": name,
                "card": {"sampler": "ddim", "steps": 20},
                "cost": {"nfe": 20 * (i + 1), "seconds": 1.5 * (i + 1)},
            }
            | {"diversity": 0.41 - 0.03 * i, "command": f"diffalign eval {name}"}
            for i, name in enumerate(names)
        ],
        "rewards": [{"name": name, "role": role, "range": [0, 1]} for name, role in ROLES.items()],
        "entries": made,
        "summaries": [summary(a, b, made) for a, b in pairs],
        "unlike": [],
        "notes": [],
    }
    return base | changes


def rich(folder: Path) -> dict[str, Any]:
    """Forty entries of three systems with one of each rarity: an edit, a film, a missing image, a curve."""
    data = manifest(folder, 40, 3, subtitle="Tiny discs", notes=["2 entries were left out: unreadable."])
    data["unlike"] = ["The cards differ in steps: 20 for stock, 40 for searched."]
    edit, film, missing = (data["entries"][i] for i in (1, 3, 4))
    edit["instruction"] = "make the disc blue"
    edit["inputs"] = {"source": picture(folder, "source", 200), "control": picture(folder, "control", 100)}
    edit["shots"][1] |= {
        "steps": {"levels": [1, 0.8, 0.6, 0.4, 0.2, 0], "rewards": [0.1, 0.3, 0.25, 0.5, 0.6, 0.72]},
        "checks": [
            {"name": "one disc", "passed": True, "note": "seen"},
            {"name": "blue", "passed": False, "note": "green"},
        ],
        "candidates": 16,
        "samples": [{"step": step, "media": picture(folder, f"step{step}", step)} for step in (0, 100, 200)],
    }
    for i, shot in enumerate(film["shots"]):
        shot["media"] = picture(folder, f"film{i}", 60 * i, frames=8)
    missing["shots"][1] = {"media": None, "missing": "the safety filter refused it", "scores": {"clip": None}}
    steps, proxy, truth = [0, 100, 200, 300], [0.5, 0.6, 0.68, 0.74], [0.5, 0.57, 0.6, 0.52]
    series = [{"name": "clip (proxy)", "x": steps, "y": proxy}, {"name": "shapes (truth)", "x": steps, "y": truth}]
    data["curves"] = [{"name": "Proxy and truth", "x": "step", "y": "mean score", "series": series}]
    return data


RECORD = """async () => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 64, height: 64 });
  const pen = canvas.getContext("2d"), parts = [], start = performance.now();
  const recorder = new MediaRecorder(canvas.captureStream(20), { mimeType: "video/webm" });
  recorder.ondataavailable = (event) => parts.push(event.data);
  recorder.start();
  for (let t = 0; t < 700; t = performance.now() - start) {
    pen.fillStyle = `hsl(${t} 80% 50%)`;
    pen.fillRect(0, 0, 64, 64);
    await new Promise((go) => setTimeout(go, 40));
  }
  await new Promise((done) => { recorder.onstop = done; recorder.stop(); });
  return [...new Uint8Array(await new Blob(parts).arrayBuffer())];
}"""


def video(page: Page, folder: Path) -> dict[str, Any]:
    """A short WebM, recorded by the browser itself: no encoder is needed."""
    (folder / "media" / "clip.webm").write_bytes(bytes(page.evaluate(RECORD)))
    path = "media/clip.webm"
    return {"kind": "video", "shown": path, "original": path, "width": 64, "height": 64, "frames": 12, "fps": 20}


def until(page: Page, claim: str, seconds: float = 20.0) -> None:
    """Wait for a claim in JavaScript; playwright's own waiting needs the `eval` that the page forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(claim):
        assert time.monotonic() < end, f"still not so after {seconds} s: {claim}"
        page.wait_for_timeout(20)


def write(folder: Path, data: dict[str, Any] | None) -> str:
    """Lay the page and its data out as the writer does; returns the address to open."""
    shutil.copytree(PAGE, folder / "page", dirs_exist_ok=True, ignore=shutil.ignore_patterns("index.html"))
    shutil.copy(PAGE / "index.html", folder / "index.html")
    if data is not None:
        text = json.dumps(data).replace("<", "\\u003c")
        (folder / "manifest.js").write_text(f"window.DIFFALIGN_MANIFEST = {text};\n", encoding="utf-8")
    return (folder / "index.html").as_uri()


def inked(canvas: Locator) -> float:
    """Where the disc on a canvas begins, from the left, as a share of its width."""
    with Image.open(io.BytesIO(canvas.screenshot())) as shot:
        row = shot.convert("RGB").crop((0, shot.height // 2, shot.width, shot.height // 2 + 1))
    ground = (236, 236, 230)
    far = [max(abs(a - b) for a, b in zip(colour, ground, strict=True)) > 40 for colour in row.getdata()]
    inside = [k for k in range(len(far)) if k > 8 and far[k]]
    return inside[0] / len(far)
