"""`generate` edits pictures: they reach the cases, the run folder and the gallery."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.bench.card import hash_prompts
from diffalign.cases import Case
from diffalign.cli import main
from diffalign.cli.edits import checks_of
from diffalign.gallery.folders import read_side
from diffalign.vision import read_image, to_tensor
from tests.tiny import build

STEPS = ["call.num_inference_steps=2"]
MINE = """
import torch
from diffalign.scoring import Score

class Judged:
    name, modality, differentiable, version, range, options = "judged", "edit", False, "1", None, {}

    def __call__(self, media, cases):
        near = torch.tensor([float(sum(case.source.getpixel((0, 0))) / 765) for case in cases])
        told = [case.prompt == "make it red" for case in cases]
        nan = torch.nan
        parts = {
            "near": near,
            "check/Is it red?": torch.tensor([1.0 if yes else nan for yes in told]),
            "check/Is the rest kept?": torch.tensor([0.0 if yes else nan for yes in told]),
            "item/winter": torch.tensor([nan if yes else 0.5 for yes in told]),
        }
        return Score(media.flatten(1).mean(1), parts)
"""


@pytest.fixture(scope="session")
def editor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a saved StableDiffusionInstructPix2PixPipeline with random weights."""
    folder = tmp_path_factory.mktemp("tiny") / "instruct_pix2pix"
    build("instruct_pix2pix").save_pretrained(folder)
    return str(folder)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def save(path: Path, level: int, size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level // 2)).save(path)
    return path


def same(a: Path, b: Path) -> bool:
    return torch.equal(to_tensor(read_image(a)), to_tensor(read_image(b)))


def test_a_picture_is_edited_and_stands_in_the_run_folder(editor: str, here: Path):
    save(here / "street.png", 200)
    assert (
        main(["generate", "-m", editor, "-p", "make it red", "-p", "make it blue", "--image", "street.png", *STEPS])
        == 0
    )
    out = here / "out/generate"
    rows = lines(out / "results.jsonl")
    assert [row["instruction"] for row in rows] == ["make it red", "make it blue"]
    assert [row["inputs"] for row in rows] == [{"source": f"inputs/0000{k}-source.png"} for k in (0, 1)]
    assert all(same(out / row["inputs"]["source"], here / "street.png") for row in rows)
    assert not same(out / rows[0]["file"], out / rows[1]["file"])


def test_another_picture_gives_another_edit_and_the_command_makes_it_again(editor: str, here: Path):
    for level in (10, 240):
        save(here / f"in/{level}.png", level)
    ask = ["generate", "-m", editor, "-p", "make it red", "--image", "in", *STEPS]
    assert main(ask) == 0
    rows = lines(here / "out/generate/results.jsonl")
    assert len({row["seed"] for row in rows}) == 2
    assert [row["prompt"] for row in rows] == ["make it red"] * 2
    for row in rows:
        command = shlex.split(row["command"])
        assert main([*command[1:], "--out", "again"]) == 0
        assert same(here / "again/images/00000.png", here / "out/generate" / row["file"])


def test_pictures_of_a_folder_go_to_as_many_prompts_in_the_order_of_their_names(editor: str, here: Path):
    save(here / "in/b.png", 240)
    save(here / "in/a.png", 10, (24, 16))  # another size goes into a call of its own
    ask = ["generate", "-m", editor, "-p", "one", "-p", "two", "--image", "in", *STEPS]
    assert main(ask) == 0
    rows = lines(here / "out/generate/results.jsonl")
    for row, name in zip(rows, "ab", strict=True):
        assert same(here / "out/generate" / row["inputs"]["source"], here / f"in/{name}.png")
    assert read_image(here / "out/generate" / rows[0]["file"]).size == (24, 16)


def test_prompts_name_their_pictures_from_where_their_file_lies(editor: str, here: Path):
    save(here / "set/pictures/a.png", 30)
    told = [{"prompt": "make it red", "source": "pictures/a.png", "seed": 5, "kind": "recolour"}]
    told += [{"prompt": "make it blue", "input_image": "pictures/a.png"}]
    (here / "set/edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    assert main(["generate", "-m", editor, "--prompts", "set/edits.jsonl", *STEPS]) == 0
    rows = lines(here / "out/generate/results.jsonl")
    assert rows[0]["seed"] == 5
    assert rows[0]["metadata"] == {"kind": "recolour"}
    assert all(same(here / "out/generate" / row["inputs"]["source"], here / "set/pictures/a.png") for row in rows)


def test_a_source_that_is_no_picture_stays_metadata(tiny: str, here: Path):
    (here / "p.jsonl").write_text('{"prompt": "one", "source": "COCO"}\n')
    small = ["call.height=16", "call.width=16", *STEPS]
    assert main(["generate", "-m", tiny, "--prompts", "p.jsonl", *small]) == 0
    [row] = lines(here / "out/generate/results.jsonl")
    assert row["metadata"]["source"] == "COCO"
    assert "inputs" not in row
    assert "instruction" not in row


@pytest.mark.parametrize("method", ["stock", "best_of_n"])
def test_a_gallery_of_edits_shows_source_instruction_and_checks(editor: str, here: Path, method: str):
    (here / "mine.py").write_text(MINE)
    save(here / "street.png", 200)
    ask = ["generate", "-m", editor, "-p", "make it red", "-p", "make it winter", "--image", "street.png", *STEPS]
    more = ["--method", "best_of_n", "--n", "2"] if method == "best_of_n" else []
    assert main([*ask, "-r", "mine.py:Judged", *more]) == 0
    red, winter = lines(here / "out/generate/results.jsonl")
    assert red["checks"] == [
        {"name": "Is it red?", "passed": True},
        {"name": "Is the rest kept?", "passed": False},
    ]
    assert winter["checks"] == [{"name": "winter", "passed": False, "note": "partly: 0.5"}]
    first = read_side(here / "out/generate").items[0]
    assert (first.instruction, list(first.inputs)) == ("make it red", ["source"])
    assert set(first.scores) == {"judged", "near"}  # a question is a check, and no column
    assert main(["gallery", "out/generate", "--out", "page"]) == 0
    entry = json.loads((here / "page/manifest.json").read_text())["entries"][0]
    assert entry["instruction"] == "make it red"
    assert (here / "page" / entry["inputs"]["source"]["shown"]).is_file()
    assert [check["name"] for check in entry["shots"][0]["checks"]] == ["Is it red?", "Is the rest kept?"]


def test_a_run_of_edits_is_scored_again_with_its_sources(editor: str, here: Path):
    (here / "mine.py").write_text(MINE)
    save(here / "street.png", 200)
    ask = ["generate", "-m", editor, "-p", "make it red", "--image", "street.png", "-r", "mine.py:Judged", *STEPS]
    assert main(ask) == 0
    assert main(["score", "out/generate", "-r", "mine.py:Judged", "--out", "again"]) == 0
    [row], [again] = lines(here / "out/generate/results.jsonl"), lines(here / "again/scores.jsonl")
    assert json.dumps(row["parts"]["near"]) in json.dumps(again)


def test_the_card_tells_pictures_apart_as_it_does_prompts(here: Path):
    pictures = [read_image(save(here / f"{level}.png", level)) for level in (1, 2)]
    found = [hash_prompts([Case(prompt="a", source=picture)]) for picture in (*pictures, pictures[0], None)]
    assert found[0] == found[2]
    assert len(set(found)) == 3


def test_a_sum_of_rewards_and_questions_of_other_prompts(here: Path):
    parts = {
        "total": 0.4,
        "rubric/item/a b": 1.0,
        "edit_r1/check/Is a/b kept?": 0.0,
        "item/other": None,
        "items/x": 1.0,
    }
    assert checks_of(parts) == [{"name": "a b", "passed": True}, {"name": "Is a/b kept?", "passed": False}]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--image", "nowhere.png"], "there is no image 'nowhere.png'"),
        (["--image", "empty"], "a folder without pictures"),
        (["--image", "text.png"], "cannot read the image 'text.png'"),
        (["-p", "two", "-p", "three", "--image", "in"], "2 pictures for 3 prompts"),
        (["--image", "in", "--image-seed", "3"], "image_seed is one image's own seed"),
    ],
)
def test_a_picture_that_cannot_be_had_is_one_clear_error(
    more: list[str], says: str, editor: str, here: Path, capsys: pytest.CaptureFixture[str]
):
    (here / "empty").mkdir()
    (here / "text.png").write_text("no picture")
    for level in (1, 2):
        save(here / f"in/{level}.png", level)
    assert main(["generate", "-m", editor, "-p", "one", *more, *STEPS]) != 0
    assert says in " ".join(capsys.readouterr().err.split())


def test_prompts_with_pictures_and_an_image_are_too_much(editor: str, here: Path, capsys: pytest.CaptureFixture[str]):
    save(here / "a.png", 1)
    (here / "p.jsonl").write_text('{"prompt": "one", "source": "a.png"}\n')
    assert main(["generate", "-m", editor, "--prompts", "p.jsonl", "--image", "a.png", *STEPS]) != 0
    assert "pictures of their own" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("family", "says"), [("sd3", "takes no picture"), ("sd_controlnet", "as a condition")])
def test_a_pipeline_that_edits_nothing_says_so(family: str, says: str, here: Path, capsys: pytest.CaptureFixture[str]):
    build(family).save_pretrained(here / "model")
    save(here / "a.png", 1)
    assert main(["generate", "-m", "model", "-p", "one", "--image", "a.png", *STEPS]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert says in said
    assert "--model" in said
