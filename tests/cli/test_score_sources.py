"""Where `score` finds images and prompts: folders, patterns, runs, JSONL, parquet; and broken files of every kind."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.cli import main
from tests.cli.conftest import SMALL

NEEDS = """
import torch
def compares(media, cases):
    light = [0.0 if c.source is None else c.source.getpixel((0, 0))[0] / 255 for c in cases]
    return media[:, 0].flatten(1).mean(1) - torch.tensor(light)
def counts(media, cases):
    return torch.tensor([float(c.metadata.get("count", "nan")) for c in cases])
def order(media, cases):
    return torch.tensor([float(len(c.prompt)) for c in cases])
"""


@pytest.fixture
def photos(here: Path) -> Path:
    """Three pictures, one in a folder below, and rewards that read what comes with them."""
    (here / "photos/deep").mkdir(parents=True)
    for name, red in (("a", 50), ("b", 100), ("deep/c", 250)):
        Image.new("RGB", (8, 8), (red, 0, 0)).save(here / f"photos/{name}.png")
    (here / "mine.py").write_text(NEEDS)
    return here


def rows(here: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (here / "out/score/scores.jsonl").read_text().splitlines()]


def write(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_files_folders_and_patterns_may_be_mixed_and_no_image_counts_twice(photos: Path):
    ask = ["score", "photos/b.png", "photos", "photos/*.png", "-r", "brightness"]
    assert main(ask) == 0
    assert [row["file"] for row in rows(photos)] == ["photos/b.png", "photos/a.png", "photos/deep/c.png"]
    assert main(["score", "photos/**/*.png", "-r", "brightness"]) == 0
    assert len(rows(photos)) == 3
    assert main(["score", "photos/*", "-r", "brightness"]) == 0
    assert [row["file"] for row in rows(photos)] == ["photos/a.png", "photos/b.png"]


@pytest.mark.parametrize(
    ("word", "said"), [("nowhere", "there is no image"), ("x/*.png", "matches no image"), ("clip.mp4", "is a video")]
)
def test_what_is_no_image_is_refused_by_name(photos: Path, word: str, said: str, capsys: pytest.CaptureFixture[str]):
    (photos / "clip.mp4").touch()
    assert main(["score", word, "-r", "brightness"]) == 2
    assert said in capsys.readouterr().err


def test_without_images_the_help_is_named(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["score", "-r", "brightness"]) == 2
    assert "IMAGES is missing" in capsys.readouterr().err


def test_prompts_are_matched_by_the_name_of_the_image(photos: Path):
    write(photos / "p.jsonl", {"file": "deep/c.png", "prompt": "ccc"}, {"file": "b", "prompt": "bb"},
          {"file": "photos/a.png", "prompt": "a"})  # fmt: skip
    assert main(["score", "photos", "--prompts", "p.jsonl", "-r", "mine.py:order"]) == 0
    assert [row["prompt"] for row in rows(photos)] == ["a", "bb", "ccc"]
    (photos / "p.csv").write_text('file,prompt,count\nc.png,"c, and more",3\na.png,a,1\nb.png,b,2\n')
    assert main(["score", "photos", "--prompts", "p.csv", "-r", "mine.py:counts"]) == 0
    assert [(row["prompt"], row["counts"]) for row in rows(photos)] == [("a", 1), ("b", 2), ("c, and more", 3)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"file": "a.png", "prompt": "a"}], "no prompt for the image 'photos/b.png'"),
        ([{"file": "a.png", "prompt": "a"}] * 2, "two prompts for 'a.png'"),
        ([{"prompt": "a"}], "has 1 prompts for 3 images"),
    ],
)
def test_prompts_that_do_not_fit_the_images_are_refused(
    photos: Path, content: list[dict[str, Any]], said: str, capsys: pytest.CaptureFixture[str]
):
    write(photos / "p.jsonl", *content)
    assert main(["score", "photos", "--prompts", "p.jsonl", "-r", "brightness"]) == 2
    assert said in capsys.readouterr().err


def test_a_name_that_fits_two_images_is_refused(photos: Path, capsys: pytest.CaptureFixture[str]):
    Image.new("RGB", (8, 8)).save(photos / "photos/deep/a.png")
    write(photos / "p.jsonl", *({"file": f"{name}.png", "prompt": name} for name in "abc"))
    assert main(["score", "photos", "--prompts", "p.jsonl", "-r", "brightness"]) == 2
    assert "may be 'photos/a.png' or 'photos/deep/a.png'" in capsys.readouterr().err


def test_rows_of_a_jsonl_bring_pictures_and_metadata_relative_to_their_file(photos: Path):
    write(
        photos / "photos/rows.jsonl",
        {"image": "b.png", "prompt": "x", "source": "a.png", "metadata": {"count": 2}},
        {"image": "deep/c.png", "caption": "y", "inputs": {"source": "b.png"}, "count": 3},
        {"image": "a.png", "prompt": "z", "source": "gone.png", "count": 4},
    )
    assert main(["score", "photos/rows.jsonl", "-r", "mine.py:compares", "-r", "mine.py:counts"]) == 0
    assert [row["compares"] for row in rows(photos)] == [pytest.approx(50 / 255), pytest.approx(150 / 255), None]
    assert [row["counts"] for row in rows(photos)] == [2, 3, None]
    assert [row["prompt"] for row in rows(photos)] == ["x", "y", "z"]
    assert rows(photos)[2]["error"] == "the source cannot be read: there is no file 'photos/gone.png'"


def test_rewards_of_edits_need_the_picture_that_was_edited(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "mine.py").write_text(NEEDS + "compares.modality = 'edit'\n")
    assert main(["score", "photos", "-r", "mine.py:compares"]) == 2
    assert "no image comes with its source" in capsys.readouterr().err
    write(photos / "photos/rows.jsonl", {"file": "b.png", "prompt": "x", "source": "a.png"},
          {"file": "a.png", "prompt": "y"})  # fmt: skip
    assert main(["score", "photos/rows.jsonl", "-r", "mine.py:compares"]) == 0
    assert [row["compares"] is None for row in rows(photos)] == [False, True]
    assert rows(photos)[1]["invalid"] == {"compares": "no source image"}


def test_a_run_keeps_the_metadata_of_its_prompts_for_verifiable_rewards(tiny: str, photos: Path):
    given = {"prompt": "two cats", "seed": 3, "count": 2, "metadata": {"tag": "counting", "odd": float("nan")}}
    (photos / "p.jsonl").write_text(json.dumps(given) + "\n")
    assert main(["generate", "-m", tiny, "--prompts", "p.jsonl", *SMALL]) == 0
    [row] = [json.loads(line) for line in (photos / "out/generate/results.jsonl").read_text().splitlines()]
    assert row["metadata"] == {"count": 2, "tag": "counting", "odd": None, "kind": "counting"}
    for place in ("out/generate", "out/generate/results.jsonl", "out/gen*"):
        assert main(["score", place, "-r", "mine.py:counts", "--no-cache"]) == 0
        assert [(row["prompt"], row["counts"]) for row in rows(photos)] == [("two cats", 2)]


def test_the_gallery_reads_a_run_with_metadata(tiny: str, photos: Path):
    write(photos / "p.jsonl", {"prompt": "two cats", "metadata": {"tag": "counting", "include": [{"class": "cat"}]}})
    assert main(["generate", "-m", tiny, "--prompts", "p.jsonl", *SMALL]) == 0
    assert main(["gallery", "out/generate", "--out", "page"]) == 0


def png(red: int) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(held, format="PNG")
    return held.getvalue()


def parquet(path: Path, columns: dict[str, list[Any]], group: int = 2) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=group)


@pytest.mark.parametrize("held", ["bytes", "dict", "path"])
def test_parquet_holds_bytes_or_paths_under_guessed_or_named_columns(photos: Path, held: str):
    reds = [10, 60, 110, 160, 210]
    for k, red in enumerate(reds):
        Image.new("RGB", (8, 8), (red, 0, 0)).save(photos / f"{k}.png")
    forms: dict[str, Callable[[int], Any]] = {
        "bytes": lambda k: png(reds[k]),
        "dict": lambda k: {"bytes": png(reds[k]), "path": None} if k % 2 else {"bytes": None, "path": f"{k}.png"},
        "path": lambda k: f"{k}.png",
    }
    cells, words = [forms[held](k) for k in range(5)], ["w" * (k + 1) for k in range(5)]
    more = {"count": list(range(5)), "metadata": ['{"tag": "x"}'] * 5, "source": [None, *(png(0) for _ in range(4))]}
    parquet(photos / "guess.parquet", {"image": cells, "caption": words, **more})
    parquet(photos / "named.parquet", {"pic": cells, "words": words, **more})
    rewards = ["-r", "mine.py:compares", "-r", "mine.py:counts", "-r", "mine.py:order"]
    for name, option in (("guess", []), ("named", ["--image-column", "pic", "--prompt-column", "words"])):
        assert main(["score", f"{name}.parquet", *rewards, *option]) == 0
        assert [row["compares"] for row in rows(photos)] == pytest.approx([red / 255 for red in reds])
        assert [row["counts"] for row in rows(photos)] == list(range(5))
        assert [row["order"] for row in rows(photos)] == [1, 2, 3, 4, 5]
        assert rows(photos)[3]["file"] == f"{name}.parquet#3"


def test_a_broken_cell_is_one_invalid_row(photos: Path):
    parquet(photos / "t.parquet", {"image": [png(1), b"junk", None], "prompt": ["a", "b", "c"]})
    assert main(["score", "t.parquet", "-r", "brightness"]) == 0
    assert [row.get("error") for row in rows(photos)] == [
        None, "the image cannot be read: it is not an image", "the image cannot be read: its cell is empty",
    ]  # fmt: skip


def test_columns_that_are_not_there_are_named(photos: Path, capsys: pytest.CaptureFixture[str]):
    parquet(photos / "t.parquet", {"pic": [png(1)], "words": ["a"]})
    assert main(["score", "t.parquet", "-r", "brightness"]) == 2
    assert "has pic, words, and no image" in capsys.readouterr().err
    (photos / "bad.parquet").write_text("no parquet")
    assert main(["score", "bad.parquet", "-r", "brightness"]) == 2
    assert "cannot read 'bad.parquet' as parquet" in capsys.readouterr().err


def test_parquet_without_pyarrow_says_what_to_install(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import sys

    (photos / "t.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["score", "t.parquet", "-r", "brightness"]) == 2
    assert 'pip install "diffalign[parquet]"' in capsys.readouterr().err


def test_broken_and_odd_images_of_every_kind_never_crash(here: Path):
    (here / "zoo").mkdir()
    rng = random.Random(0)
    sound = Image.effect_noise((40, 30), 80).convert("RGB")
    odd = {
        "one": Image.new("RGB", (1, 1), "red"), "tall": Image.new("RGB", (2, 3000), "red"),
        "wide": Image.new("RGB", (3000, 1), "red"), "palette": sound.convert("P"), "bit": sound.convert("1"),
        "alpha": sound.convert("RGBA"), "deep": Image.new("I;16", (9, 9), 40000), "grey": sound.convert("L"),
    }  # fmt: skip
    for name, image in odd.items():
        image.save(here / f"zoo/{name}.png")
    sound.convert("CMYK").save(here / "zoo/cmyk.jpg")
    Image.new("F", (9, 9), 0.5).save(here / "zoo/float.tiff")
    sound.save(here / "zoo/moves.gif", save_all=True, append_images=[sound.rotate(90)])
    content = (here / "zoo/palette.png").read_bytes()
    for k in range(30):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 20)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        ends = rng.choice(["png", "jpg", "gif", "webp", "tif", "bmp"])
        (here / f"zoo/damaged{k}.{ends}").write_bytes(damaged[: rng.randrange(len(damaged)) if k % 2 else None])
    (here / "zoo/empty.png").touch()
    (here / "zoo/text.png").write_text("not an image")
    (here / "zoo/folder.png").mkdir()
    (here / "zoo/gone.png").symlink_to("nowhere")
    (here / "zoo" / "halb\udce9.png").write_bytes(content)
    rewards = [word for name in ("clip", "brightness", "colourfulness", "jpeg_size") for word in ("-r", name)]
    half = ["score", "zoo", "-p", "half \ud800 a letter", "--top", "3"]
    assert main([*half, "-r", "brightness"]) == 0
    assert main([*half, "-r", "clip"]) == 2  # no tokenizer takes half a letter
    assert main(["score", "zoo", "-p", "a letter", *rewards, "--total", "--top", "3"]) == 0
    found = {Path(row["file"]).name: row for row in rows(here)}
    for name in [*(f"{name}.png" for name in odd), "cmyk.jpg", "float.tiff", "moves.gif"]:
        assert found[name]["clip"] is not None
        assert found[name]["brightness"] is not None
    for name in ("empty.png", "text.png", "gone.png"):
        assert found[name]["brightness"] is None
        assert found[name]["error"]
    assert found["one.png"]["brightness"] != 0
