"""`bench rewards`: the verifier is always right about scenes, a constant never knows, and nothing is scored twice."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from diffalign import vision, world
from diffalign.cli import main
from tests.data.files import encoded, jsonl, parquet, picture

REWARDS = """
import torch
from diffalign.scoring import Score

def constant(media, cases):
    return torch.zeros(len(media))

asked = []
def redness(media, cases):
    asked.append(tuple(media.shape))
    red = media[:, 0].flatten(1).mean(1)
    return torch.where(red > 0.9, torch.nan, red)
redness.version = "1"

def edit(media, cases):
    assert all(case.source.size == tuple(media.shape[:1:-1]) for case in cases)
    red, blue = media[:, 0].flatten(1).mean(1), media[:, 2].flatten(1).mean(1)
    return Score(red, {"consistency": blue})
edit.modality = "edit"
"""


@pytest.fixture
def place(here: Path) -> Path:
    (here / "mine.py").write_text(REWARDS)
    return here


def scenes(folder: Path, count: int = 40) -> Path:
    """Comparisons of a scene that the prompt asks for with a scene of another prompt, the right one on either side."""
    rng, rows = random.Random(0), []
    cases = [case for case in world.prompts("hard") if case.metadata["clauses"]][: count + 1]
    drawn = [world.sample_scene(world.Clauses.from_dict(case.metadata["clauses"]), rng) for case in cases]
    media = world.render_many(drawn)
    verdicts = world.verify(media[1:], cases[:-1])
    for k, image in enumerate(vision.to_pil(media)):
        image.save(folder / f"{k}.png")
    for k, case in enumerate(cases[:-1]):
        if not verdicts[k].strict:
            right, wrong = f"{k}.png", f"{k + 1}.png"
            pair = ([right, wrong], [1, 2]) if k % 2 else ([wrong, right], [2, 1])
            rows.append({"prompt": case.prompt, "images": pair[0], "ranks": pair[1]})
    return jsonl(folder / "pairs.jsonl", rows)


def bench(*words: str) -> list[dict[str, Any]]:
    assert main(["bench", "rewards", *words, "--json", "b.json"]) == 0
    found: list[dict[str, Any]] = json.loads(Path("b.json").read_text())["rows"]
    return found


def test_the_verifier_gets_all_a_constant_half_and_clip_something_between(place: Path, capsys):
    file = scenes(place)
    rows = bench(str(file), "-r", "shapes", "-r", "mine.py:constant", "-r", "clip")
    found = {row["reward"]: row for row in rows}
    assert {row["protocol"] for row in rows} == {"half"}
    assert found["shapes"]["accuracy"] == {"mean": 1.0, "lo": 1.0, "hi": 1.0}
    assert found["constant"]["accuracy"] == {"mean": 0.5, "lo": 0.5, "hi": 0.5}
    assert found["constant"]["score_ties"] == found["constant"]["pairs"] == found["shapes"]["pairs"] > 30
    assert 0.5 < found["clip"]["accuracy"]["lo"] <= found["clip"]["accuracy"]["mean"] < 1
    shown = capsys.readouterr().out
    assert "100.0%" in shown
    assert "shapes" in (place / "out/bench_rewards/table.md").read_text()
    card = json.loads((place / "out/bench_rewards/card.json").read_text())
    assert (card["format"], card["unreadable"], card["rewards"]["shapes"]) == ("plain", 0, {"shapes": "1"})
    lines = [json.loads(line) for line in (place / "out/bench_rewards/rows.jsonl").read_text().splitlines()]
    assert len(lines) == card["comparisons"] == found["clip"]["pairs"]
    assert sorted(lines[0]["scores"]["shapes"]) == [0, 1]


def test_sizes_are_scored_apart_and_invalid_scores_are_counted(place: Path):
    names = [picture(place, f"{k}.png", c, (8 + 4 * (k == 1), 8)) for k, c in enumerate(("#500000", "#100000", "red"))]
    rows = [{"prompt": p, "images": names, "ranks": [1, 2, 3]} for p in ("a", "b")]
    (row,) = bench(str(jsonl(place / "r.jsonl", rows)), "-r", "mine.py:redness", "--protocol", "half")
    assert (row["pairs"], row["invalid"], row["accuracy"]["mean"]) == (2, 4, 1.0)
    lines = [json.loads(line) for line in (place / "out/bench_rewards/rows.jsonl").read_text().splitlines()]
    assert lines[0]["scores"]["redness"][2] is None


def test_a_second_run_asks_for_what_is_not_in_the_cache(place: Path):
    from diffalign import loading

    names = [picture(place, f"{k}.png", c) for k, c in enumerate(("#500000", "#100000", "#200000"))]
    rows = [
        {"prompt": "a", "images": names[:2], "ranks": [1, 2]},
        {"prompt": "a", "images": names[1:], "ranks": [2, 1]},
    ]
    file = str(jsonl(place / "r.jsonl", rows))
    asked = loading.load_address("mine.py:redness")[0].asked
    first = bench(file, "-r", "mine.py:redness", "--limit", "1", "--cache", "c.sqlite")
    assert sum(shape[0] for shape in asked) == 2
    whole = bench(file, "-r", "mine.py:redness", "--cache", "c.sqlite")
    assert sum(shape[0] for shape in asked) == 3
    assert bench(file, "-r", "mine.py:redness", "--cache", "c.sqlite") == whole
    assert sum(shape[0] for shape in asked) == 3
    assert (first[0]["pairs"], whole[0]["pairs"]) == (1, 2)


def test_pickapic_picks_its_threshold_on_validation_data(place: Path):
    def row(caption: str, left: str, right: str, label: float) -> dict[str, Any]:
        told = {"caption": caption, "jpg_0": encoded(left, format="JPEG"), "jpg_1": encoded(right, format="JPEG")}
        return {**told, "label_0": label, "label_1": 1 - label, "has_label": True, "num_example_per_prompt": 1}

    near, far = ("#500000", "#480000"), ("#800000", "#000000")
    parquet(place / "test_unique-00000-of-00001.parquet", [row("a", *near, 0.5), row("b", *far, 1)])
    parquet(place / "validation_unique-00000-of-00001.parquet", [row("c", *near, 0.5), row("d", *far, 1)])
    ask = ["test_unique-*", "-r", "mine.py:redness", "--scale", "5"]
    official, half = bench(*ask, "--validation", "validation_unique-*")
    assert (official["protocol"], official["threshold"], official["accuracy"]["mean"]) == ("pickapic", 0.1, 1.0)
    assert (half["protocol"], half["pairs"], half["label_ties"], half["accuracy"]["mean"]) == ("half", 2, 1, 1.0)
    without, _ = bench(*ask)
    assert (without["threshold"], without["accuracy"]["mean"]) == (0.0, 0.75)


def test_edits_are_judged_aspect_by_aspect_at_the_size_of_their_source(place: Path):
    def image(colour: str, size: tuple[int, int] = (8, 8)) -> dict[str, Any]:
        return {"bytes": encoded(colour, size), "path": None}

    row = {
        "instruction": "warmer",
        "input_image": image("green", (12, 8)),
        "output_images": [image("red"), image("blue")],
    }
    rows = [{**row, "task_type": "tone", "dimension": name} for name in ("prompt_following", "consistency")]
    found = bench(str(parquet(place / "e.parquet", rows)), "-r", "mine.py:edit", "--protocol", "editreward")
    # the reward has a part for consistency, which likes blue; prompt following falls back on the total
    assert [(row["aspect"], row["accuracy"]["mean"]) for row in found] == [("prompt_following", 1), ("consistency", 0)]


def test_a_picture_that_cannot_be_opened_leaves_its_comparison_out(place: Path, capsys):
    good = [picture(place, f"{k}.png", c) for k, c in enumerate(("#500000", "#100000"))]
    rows = [
        {"prompt": "a", "images": good, "ranks": [1, 2]},
        {"prompt": "b", "images": ["no.png", "1.png"], "ranks": [1, 2]},
    ]
    (row,) = bench(str(jsonl(place / "r.jsonl", rows)), "-r", "mine.py:redness")
    assert (row["pairs"], row["invalid"]) == (1, 1)
    assert "1 comparisons have a picture that cannot be opened" in capsys.readouterr().out
    assert main(["bench", "rewards", str(jsonl(place / "r.jsonl", rows[1:])), "-r", "mine.py:redness"]) == 2
    assert "no.png" in capsys.readouterr().err


def test_prompts_that_were_trained_on_are_counted(place: Path, capsys):
    file = scenes(place, 4)
    (place / "train.txt").write_text(json.loads(file.read_text().splitlines()[0])["prompt"].upper() + "\nanother\n")
    bench(str(file), "-r", "shapes", "--seen", "train.txt")
    assert json.loads((place / "out/bench_rewards/card.json").read_text())["seen"] == 1
    assert "trained on" in capsys.readouterr().err


def test_a_dry_run_counts_and_scores_nothing(place: Path):
    file = str(scenes(place, 5))
    assert main(["bench", "rewards", file, "-r", "clip", "-r", "shapes", "--dry-run", "--json", "d.json"]) == 0
    cost = json.loads((place / "d.json").read_text())["cost"]
    assert cost["images"] == 2 * cost["comparisons"] == cost["reward_calls"] / 2
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["absent.jsonl"], "no file"),
        (["r.jsonl", "--format", "hpdv4"], "hpdv4"),
        (["r.jsonl", "--protocol", "halves"], "half"),
        (["r.jsonl", "--limit", "0"], "limit"),
        ([], "FILE"),
    ],
)
def test_what_cannot_be_done_is_one_message(place: Path, capsys, words, says):
    jsonl(place / "r.jsonl", [{"prompt": "a", "images": ["a.png", "b.png"], "ranks": [1, 2]}])
    assert main(["bench", "rewards", *words]) == 2
    assert says in capsys.readouterr().err
