"""`score` leaves invalid images out of means, says why, writes what it found, and continues from its cache."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign import registry
from diffalign.cli import main

REWARD = """
import torch
seen = []
def redness(media, cases):
    seen.extend(c.prompt for c in cases)
    red = media[:, 0].flatten(1).mean(1)
    return torch.where(red > 0.9, torch.nan, red)
redness.version = "1"
"""


@pytest.fixture
def photos(here: Path) -> Path:
    """Three pictures of two sizes; the brightest cannot be scored."""
    (here / "photos").mkdir()
    for k, red in enumerate((50, 100, 250)):
        Image.new("RGB", (16 + 4 * (k == 1), 16), (red, 0, 0)).save(here / f"photos/{k}.png")
    (here / "mine.py").write_text(REWARD)
    return here


def rows(here: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (here / "out/score/scores.jsonl").open(encoding="utf-8")]


def test_each_image_gets_a_row_and_invalid_ones_are_counted(photos: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["score", "photos", "-p", "red", "-r", "mine.py:redness", "-r", "brightness", "--json", "s.json"]) == 0
    assert [row["redness"] for row in rows(photos)] == [pytest.approx(50 / 255), pytest.approx(100 / 255), None]
    redness, brightness = json.loads((photos / "s.json").read_text())["rows"]
    assert (redness["n"], redness["invalid"]) == (2, 1)
    assert redness["mean"] == pytest.approx(75 / 255)
    assert brightness["n"] == 3
    assert "redness" in capsys.readouterr().out


def test_prompts_come_from_a_file_or_from_beside_the_image(photos: Path):
    (photos / "p.txt").write_text("a\nb\nc\n")
    assert main(["score", "photos", "--prompts", "p.txt", "-r", "mine.py:redness"]) == 0
    assert [row["prompt"] for row in rows(photos)] == ["a", "b", "c"]
    (photos / "photos/1.txt").write_text("beside\n")
    assert main(["score", "photos", "-r", "mine.py:redness"]) == 0
    assert [row["prompt"] for row in rows(photos)] == ["", "beside", ""]


def test_a_generate_folder_brings_its_prompts(photos: Path):
    result = {"file": "0.png", "prompt": "from the run", "seed": 1}
    (photos / "photos/results.jsonl").write_text(json.dumps(result) + "\n")
    assert main(["score", "photos", "-r", "mine.py:redness"]) == 0
    assert [row["prompt"] for row in rows(photos)] == ["from the run"]


def test_a_second_run_with_a_cache_asks_the_reward_nothing(photos: Path, monkeypatch: pytest.MonkeyPatch):
    ask = ["score", "photos", "-p", "red", "-r", "brightness", "--cache", "c.sqlite"]
    assert main(ask) == 0
    first = rows(photos)
    from diffalign.rewards import brightness

    def fail(*_: object) -> None:
        raise AssertionError("asked again")

    target = next(v for v in vars(brightness).values() if getattr(v, "name", "") == "brightness")
    if isinstance(target, type):
        monkeypatch.setattr(target, "__call__", fail)
    assert main(ask) == 0
    assert rows(photos) == first


def test_a_single_file_can_be_scored(photos: Path):
    assert main(["score", "photos/0.png", "-p", "red", "-r", "brightness"]) == 0
    assert len(rows(photos)) == 1


def shot(here: Path) -> list[dict[str, Any]]:
    return json.loads((here / "out/score/summary.json").read_text())["rows"]


def test_a_second_run_loads_no_weights(photos: Path, monkeypatch: pytest.MonkeyPatch):
    ask = ["score", "photos", "-p", "a red square", "-r", "clip", "-r", "brightness"]
    assert main(ask) == 0
    first = rows(photos)
    assert [(row["asked"], row["from_cache"]) for row in shot(photos)] == [(3, 0), (3, 0)]
    from diffalign import clip_tower

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(clip_tower, "load", fail)
    assert main(ask) == 0
    assert rows(photos) == first
    assert [(row["asked"], row["from_cache"], row["cached"]) for row in shot(photos)] == [(0, 3, "yes")] * 2


def test_a_run_that_was_stopped_asks_only_for_what_is_missing(photos: Path):
    (photos / "mine.py").write_text(
        "import pathlib\n"
        "def fragile(media, cases):\n"
        "    if pathlib.Path('stop').exists() and media.shape[-1] == 20: raise KeyboardInterrupt\n"
        "    return media.flatten(1).mean(1)\n"
        "fragile.version = '1'\n"
    )
    ask = ["score", "photos", "-r", "mine.py:fragile", "--batch", "1"]
    (photos / "stop").touch()
    assert main(ask) == 130
    (photos / "stop").unlink()
    assert main(ask) == 0
    assert (shot(photos)[0]["asked"], shot(photos)[0]["from_cache"]) == (2, 1)


@pytest.mark.parametrize(("option", "said"), [("--no-cache", "off"), ("--cache=c.sqlite", "no (no version)")])
def test_what_is_asked_every_time_is_said(photos: Path, option: str, said: str, capsys: pytest.CaptureFixture[str]):
    (photos / "mine.py").write_text("def dark(media, cases):\n    return 1 - media.flatten(1).mean(1)\n")
    for _ in range(2):
        assert main(["score", "photos", "-r", "mine.py:dark", option]) == 0
        assert (shot(photos)[0]["asked"], shot(photos)[0]["cached"]) == (3, said)
    assert said in capsys.readouterr().out
    assert not (photos / "out/score/scores.sqlite").exists()


def test_an_unreadable_image_is_one_invalid_row_with_its_reason(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "photos/1.png").write_text("no image")
    assert main(["score", "photos", "-r", "brightness"]) == 0
    assert [row["brightness"] is None for row in rows(photos)] == [False, True, False]
    assert rows(photos)[1]["error"] == "the image cannot be read: it is not an image"
    assert (shot(photos)[0]["n"], shot(photos)[0]["invalid"]) == (2, 1)
    assert "1 of them could not be read" in capsys.readouterr().out
    assert main(["score", "photos", "-r", "brightness", "--strict"]) == 2
    assert "photos/1.png" in capsys.readouterr().err


def test_a_folder_without_one_readable_image_is_an_error_that_leaves_its_rows(
    photos: Path, capsys: pytest.CaptureFixture[str]
):
    for k in range(3):
        (photos / f"photos/{k}.png").write_bytes(b"")
    assert main(["score", "photos", "-r", "brightness"]) == 2
    assert "none of the 3 images can be read" in capsys.readouterr().err
    assert all(row["error"] for row in rows(photos))


def test_a_reward_that_raises_on_one_picture_costs_one_row(photos: Path):
    (photos / "mine.py").write_text(
        "def picky(media, cases):\n"
        "    if (media[:, 0].flatten(1).mean(1) > 0.9).any(): raise ValueError('too red')\n"
        "    return media.flatten(1).mean(1)\n"
    )
    assert main(["score", "photos", "-r", "mine.py:picky"]) == 0
    assert [row["picky"] is None for row in rows(photos)] == [False, False, True]
    assert rows(photos)[2]["invalid"] == {"picky": "ValueError: too red"}


def test_a_reward_that_raises_on_everything_stops_the_run(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "mine.py").write_text("def broken(media, cases):\n    return undefined\n")
    assert main(["score", "photos", "-r", "mine.py:broken", "--batch", "2"]) == 2
    assert "'undefined' is not defined" in capsys.readouterr().err


def test_a_reward_that_reads_prompts_wants_them(photos: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["score", "photos", "-r", "clip"]) == 2
    assert "reward 'clip' reads the prompt, but no image has one" in capsys.readouterr().err
    (photos / "photos/1.txt").write_text("a red square")
    assert main(["score", "photos", "-r", "clip", "-r", "brightness"]) == 0
    assert [row["clip"] is None for row in rows(photos)] == [True, False, True]
    assert rows(photos)[0]["invalid"] == {"clip": "no prompt"}
    assert [row["n"] for row in shot(photos)] == [1, 3]


def test_the_total_is_the_weighted_sum_and_invalid_where_a_part_is(photos: Path):
    assert main(["score", "photos", "-r", "mine.py:redness:2", "-r", "brightness:0.5", "--total"]) == 0
    found = rows(photos)
    assert found[0]["total"] == pytest.approx(2 * found[0]["redness"] + 0.5 * found[0]["brightness"])
    assert found[2]["total"] is None
    assert shot(photos)[2]["reward"] == "total"


def test_parts_are_columns_of_the_jsonl_and_of_the_csv_where_asked_for(photos: Path):
    (photos / "mine.py").write_text(
        "from diffalign.scoring import Score\n"
        "def split(media, cases):\n"
        "    light = media.flatten(1).mean(1)\n"
        "    return Score(light, {'half': light / 2, 'double': light * 2})\n"
    )
    ask = ["score", "photos", "-r", "mine.py:split"]
    header = {}
    for name, option in (("auto", []), ("yes", ["--parts"]), ("no", ["--no-parts"])):
        assert main([*ask, *option]) == 0
        header[name] = (photos / "out/score/scores.csv").read_text().splitlines()[0]
        assert ("split/half" in rows(photos)[0]) == (name != "no")
    assert header["auto"] == header["no"] == "file,prompt,split,error"
    assert header["yes"] == "file,prompt,split,split/half,split/double,error"


@pytest.mark.parametrize("prompt", ["=1+1", "+x", "-x", "@x", " =1+1", "\t=1", 'a, "b"\nc', "", "\u2028"])
def test_no_prompt_is_a_formula_in_the_csv(photos: Path, prompt: str):
    assert main(["score", "photos/0.png", f"--prompt={prompt}", "-r", "brightness"]) == 0
    with (photos / "out/score/scores.csv").open(newline="", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert row["prompt"] == (f"'{prompt}" if prompt.strip()[:1] in "=+-@" and prompt.strip() else prompt)
    assert float(row["brightness"]) == rows(photos)[0]["brightness"]


def test_the_best_and_the_worst_are_named(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "p.txt").write_text("a\na\nb\n")
    assert main(["score", "photos", "--prompts", "p.txt", "-r", "brightness", "--top", "1"]) == 0
    picked = [json.loads(line) for line in (photos / "out/score/top.jsonl").read_text().splitlines()]
    assert [(row["which"], row["file"]) for row in picked] == [("best", "photos/2.png"), ("worst", "photos/0.png")]
    assert "photos/2.png" in capsys.readouterr().out
    assert main(["score", "photos", "--prompts", "p.txt", "-r", "brightness", "--top", "1", "--per-prompt"]) == 0
    picked = [json.loads(line) for line in (photos / "out/score/top.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["file"][-5]) for row in picked] == [("a", "1"), ("a", "0"), ("b", "2"), ("b", "2")]


def test_the_order_of_sizes_and_the_batch_change_no_score(photos: Path):
    rng = random.Random(0)
    for k in range(20):
        Image.new("RGB", (rng.choice([8, 12, 16]), 8), (rng.randrange(256), 0, 0)).save(photos / f"photos/x{k:02}.png")
    found = []
    for batch in ("1", "3", "64"):
        assert main(["score", "photos", "-r", "brightness", "--no-cache", "--batch", batch]) == 0
        found.append([row["brightness"] for row in rows(photos)])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0] == pytest.approx(found[2], abs=1e-6)


@pytest.mark.parametrize("width", ["80", "200"])
def test_the_summary_fits_the_terminal(
    photos: Path, width: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", width)
    assert main(["score", "photos", "-p", "red " * 60, "-r", "brightness", "-r", "jpeg_size", "--top", "2"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= int(width)


def test_a_dry_run_counts_and_says_what_memory_the_cards_name(photos: Path):
    ask = ["score", "photos", "-p", "red", "-r", "clip:2", "-r", "brightness", "--dry-run", "--json", "plan.json"]
    assert main(ask) == 0
    cost = json.loads((photos / "plan.json").read_text())["cost"]
    assert (cost["images"], cost["reward_calls"], cost["memory_gb"]) == (3, 6, 0.1)
    assert set(cost["memory"]) == {"clip", "brightness"}
    assert not (photos / "out").exists()
    assert main(["score", "photos", "-r", "clpi", "--dry-run"]) == 2


def test_our_own_figures_are_not_scored_when_the_output_lies_among_the_images(photos: Path):
    for _ in range(2):
        assert main(["score", ".", "-r", "brightness"]) == 0
        assert main(["score", "**/*.png", "-r", "brightness"]) == 0
        assert len(rows(photos)) == 3
    assert (photos / "out/score/histogram.png").read_bytes().startswith(b"\x89PNG")


REFUSES = """
from diffalign.errors import ConfigError
def refuses(media, cases):
    if any(c.prompt == "bench" for c in cases): raise ConfigError("it does not know 'bench'")
    return media.flatten(1).mean(1)
"""


def test_a_row_that_a_reward_refuses_costs_that_row_only(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "mine.py").write_text(REFUSES)
    (photos / "p.txt").write_text("bench\ncat\ncat\n")
    ask = ["score", "photos", "--prompts", "p.txt", "-r", "mine.py:refuses"]
    assert main([*ask, "--batch", "1"]) == 0
    assert main(ask) == 0
    assert [row["refuses"] is None for row in rows(photos)] == [True, False, False]
    assert rows(photos)[0]["invalid"] == {"refuses": "it does not know 'bench'"}
    assert main([*ask, "--strict"]) == 2
    assert "ConfigError: it does not know 'bench'" in capsys.readouterr().err


def test_a_class_that_the_detector_does_not_know_costs_its_rows_only(photos: Path):
    told = [{"include": [{"class": name, "count": 1}]} for name in ("bench", "circle", "circle")]
    listed = [{"file": f"photos/{k}.png", "prompt": "one", "metadata": row} for k, row in enumerate(told)]
    (photos / "all.jsonl").write_text("\n".join(map(json.dumps, listed)))
    assert main(["score", "all.jsonl", "-r", "geneval"]) == 0
    assert [row["geneval"] is None for row in rows(photos)] == [True, False, False]
    assert "'bench'" in rows(photos)[0]["invalid"]["geneval"]


def test_a_reward_that_refuses_every_row_ends_with_its_own_error(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "mine.py").write_text(REFUSES)
    assert main(["score", "photos", "-p", "bench", "-r", "mine.py:refuses", "--batch", "1"]) == 2
    assert "ConfigError: it does not know 'bench'" in capsys.readouterr().err


def test_a_reward_that_refuses_and_raises_at_first_still_scores_the_rest(photos: Path):
    (photos / "mine.py").write_text(
        REFUSES.replace("    return", "    if cases[0].prompt == 'x': raise OSError\n    return")
    )
    (photos / "p.txt").write_text("bench\nx\ncat\n")
    ask = ["score", "photos", "--prompts", "p.txt", "-r", "mine.py:refuses", "--batch", "1"]
    assert main(ask) == 0
    assert [row["refuses"] is None for row in rows(photos)] == [True, True, False]


def test_a_reward_that_answers_batches_wrongly_is_not_asked_row_by_row(
    photos: Path, capsys: pytest.CaptureFixture[str]
):
    (photos / "mine.py").write_text("def one(media, cases):\n    return media.mean()[None]\n")
    assert main(["score", "photos", "-r", "mine.py:one"]) == 2
    assert "Return a tensor of shape (2,)" in capsys.readouterr().err


@pytest.mark.parametrize("batch", ["1", "2", "16"])
def test_a_reward_that_always_raises_is_named(photos: Path, batch: str, capsys: pytest.CaptureFixture[str]):
    (photos / "mine.py").write_text("def raises(media, cases):\n    raise RuntimeError('boom')\n")
    assert main(["score", "photos", "-r", "mine.py:raises", "--batch", batch]) == 2
    shown = capsys.readouterr().err
    assert "InvalidReward: reward 'raises' raised RuntimeError: boom on every image" in shown
    assert "it is called as reward(media, cases)" in shown
    assert main(["score", "photos", "-r", "mine.py:raises", "--strict"]) == 2
    assert "InvalidReward: reward 'raises' raised RuntimeError: boom. Leave --strict out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["psnr", "ssim", "patch_similarity", "geneval", "compbench", "layout"])
def test_a_shipped_reward_that_judges_nothing_says_what_it_needs(
    photos: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["score", "photos", "-p", "a photo", "-r", name]) == 2
    needs = registry.cards()[name].needs
    assert needs
    assert f"(it needs {needs})" in capsys.readouterr().err
    assert rows(photos)[0]["invalid"] == {name: f"it needs {needs}"}


@pytest.mark.parametrize("name", ["psnr", "geneval", "compbench", "layout", "router", "masked", "ocr", "ssim"])
def test_the_example_of_what_a_reward_needs_is_a_row(name: str):
    needs = registry.cards()[name].needs
    assert set(json.loads(needs[needs.index("{") :])) <= {"file", "prompt", "metadata", "reference"}


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_here_is_named(photos: Path, device: str, capsys: pytest.CaptureFixture[str]):
    assert main(["score", "photos", "-r", "brightness", "--device", device]) == 2
    shown = capsys.readouterr().err
    assert f"ConfigError: device is '{device}', which does not work here; there is cpu" in shown


def test_the_fastest_device_can_be_asked_for(photos: Path):
    assert main(["score", "photos", "-r", "brightness", "--device", "auto"]) == 0
