"""`diffalign gallery` through its command line: runs, folders of pictures, configs, and what it says when it cannot."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.cli import main
from diffalign.gallery import manifest, page
from tests.gallery.test_pages import picture

FEW = ["--split", "hard", "--limit", "2", "call.num_inference_steps=2"]


def folders(tmp_path: Path) -> list[str]:
    for n, name in enumerate(("before", "after")):
        (tmp_path / name).mkdir()
        for k in range(3):
            picture(10 * n + k, (32, 32)).save(tmp_path / name / f"{k}.png")
    return [str(tmp_path / "before"), str(tmp_path / "after")]


def test_two_runs_become_a_page_and_each_image_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = [str(tmp_path / "stock"), str(tmp_path / "best")]
    assert main(["generate", *FEW, "--out", runs[0]]) == 0
    assert main(["generate", *FEW, "--method", "best_of_n", "--n", "3", "-r", "brightness", "--out", runs[1]]) == 0
    out = tmp_path / "page"
    assert main(["gallery", *runs, "--out", str(out), "--heldout", "colourfulness"]) == 0
    made = manifest.read(out)
    assert [system["name"] for system in made["systems"]] == ["stock", "best_of_n"]
    roles = {reward["name"]: reward["role"] for reward in made["rewards"]}
    assert roles == {"truth": "truth", "colourfulness": "heldout", "brightness": "proxy"}
    assert made["unlike"] == []
    assert made["systems"][1]["cost"]["nfe"] == 12
    assert made["entries"][0]["tags"] == ["hard"]
    for shot in made["entries"][1]["shots"]:
        words = shlex.split(shot["command"])
        assert words[0] == "diffalign"
        again = tmp_path / "again"
        assert main([*words[1:], "--out", str(again)]) == 0
        with Image.open(again / "images" / "00000.png") as new, Image.open(out / shot["media"]["original"]) as old:
            assert abs(np.asarray(new, int) - np.asarray(old, int)).max() <= 1  # alone and in a batch


def test_folders_of_pictures_become_a_page_a_sheet_and_an_animation(tmp_path: Path, capsys):
    out, sheet, gif = tmp_path / "page", tmp_path / "sheet.png", tmp_path / "flip.gif"
    words = ["gallery", *folders(tmp_path), "--name", "base", "--name", "lora", "--title", "<b>two</b>"]
    words += ["--heldout", "brightness", "--out", str(out), "--sheet", str(sheet), "--gif", str(gif)]
    assert main(words) == 0
    made = manifest.read(out)
    assert [system["name"] for system in made["systems"]] == ["base", "lora"]
    assert made["title"] == "<b>two</b>"
    assert made["summaries"][0]["rewards"]["brightness"]["n"] == 3
    with Image.open(sheet) as opened:
        assert opened.width > 300
    with Image.open(gif) as opened:
        assert getattr(opened, "n_frames", 1) == 2
    said = capsys.readouterr().out
    assert "hf upload USER/NAME" in said
    assert str(out / "index.html") in said
    assert "sdk" in (out / "README.md").read_text()


def test_a_config_runs_its_systems_once(tmp_path: Path, capsys):
    config = tmp_path / "two.yaml"
    config.write_text(
        "split: hard\nlimit: 2\ncall: {num_inference_steps: 2}\nreward: {brightness: 1.0}\n"
        "systems:\n  stock: {}\n  best of 2: {method: best_of_n, n: 2}\n",
        encoding="utf-8",
    )
    words = ["gallery", "--config", str(config), "--out", str(tmp_path / "page")]
    assert main(words) == 0
    assert "images in" in capsys.readouterr().out
    first = manifest.read(tmp_path / "page")
    assert [system["name"] for system in first["systems"]] == ["stock", "best of 2"]
    assert first["summaries"][0]["rewards"]["brightness"]["losses"] == 0
    assert {reward["name"]: reward["role"] for reward in first["rewards"]}["brightness"] == "proxy"
    assert main(words) == 0
    assert "images in" not in capsys.readouterr().out
    assert manifest.read(tmp_path / "page")["id"] == first["id"]
    assert main(["gallery", "--config", str(config), "--dry-run"]) == 0
    assert main([*words, "limit=1"]) == 0  # other cases: the runs that are there are not these
    assert "images in" in capsys.readouterr().out
    assert len(manifest.read(tmp_path / "page")["entries"]) == 1
    assert main([*words, "heldout=[no_such_reward]", "limit=2"]) == 2
    assert "images in" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to compare"),
        (["nowhere"], "not a folder"),
        (["a", "b", "--name", "x"], "1 names for 2 sources"),
        (["a", "--page", "b"], "page belongs to votes"),
    ],
)
def test_what_cannot_be_compared_is_said(words: list[str], said: str, capsys):
    assert main(["gallery", *words]) == 2
    assert said in capsys.readouterr().err


def test_an_image_seed_is_for_one_prompt(capsys, tmp_path: Path):
    assert main(["generate", "-p", "a", "-p", "b", "--image-seed", "3", "--out", str(tmp_path)]) == 2
    assert "exactly one --prompt" in capsys.readouterr().err


def test_a_lora_is_loaded_over_the_model_and_told_on_the_card(tmp_path: Path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from diffalign.shell import load_pipeline

    pipe = load_pipeline("shapes-sd3")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(str(tmp_path / "lora"), transformer_lora_layers=weights)
    words = ["generate", "-p", "two red circles", "call.num_inference_steps=2"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    assert main([*words, "--lora", str(tmp_path / "lora"), "--out", str(tmp_path / "b")]) == 0
    pictures = [Image.open(tmp_path / name / "images" / "00000.png").tobytes() for name in "ab"]
    assert pictures[0] != pictures[1]
    assert json.loads((tmp_path / "b" / "card.json").read_text())["method"]["lora"]
    file = next((tmp_path / "lora").glob("*.safetensors"))
    assert main([*words, "--lora", str(file), "--out", str(tmp_path / "c")]) == 0
    assert Image.open(tmp_path / "c" / "images" / "00000.png").tobytes() == pictures[1]
    assert main([*words, "--lora", str(tmp_path / "none"), "--out", str(tmp_path / "d")]) == 2


def test_an_older_gallery_gets_the_page_of_this_version(tmp_path: Path):
    out = tmp_path / "page"
    assert main(["gallery", *folders(tmp_path), "--out", str(out)]) == 0
    before = (out / "manifest.json").read_bytes()
    (out / "index.html").write_text("old")
    assert main(["gallery", str(out), "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert (out / "index.html").read_bytes() == page.code()["index.html"]
    assert (out / "manifest.json").read_bytes() == before
    assert (tmp_path / "sheet.png").exists()


def test_the_command_of_a_page_can_be_typed_again(tmp_path: Path):
    (tmp_path / "my pictures").mkdir()
    picture().save(tmp_path / "my pictures" / "x.png")
    words = ["gallery", str(tmp_path / "my pictures"), "--title", "it's mine"]
    assert main([*words, "--out", str(tmp_path / "page")]) == 0
    assert shlex.split(manifest.read(tmp_path / "page")["command"]) == ["diffalign", *words]


def test_a_gallery_holds_no_key_of_a_judge(tmp_path: Path):
    mine = tmp_path / "mine.py"
    mine.write_text("def dark(media, cases, judge=None):\n    return 1 - media.flatten(1).mean(1)\n", encoding="utf-8")
    config = tmp_path / "two.yaml"
    judge = "{url: 'http://127.0.0.1:9/v1', key: sk-very-secret}"
    config.write_text(
        f"split: hard\nlimit: 1\ncall: {{num_inference_steps: 2}}\nreward: {{'{mine}:dark': {{judge: {judge}}}}}\n"
        "systems:\n  stock: {}\n  best of 2: {method: best_of_n, n: 2}\n",
        encoding="utf-8",
    )
    assert main(["gallery", "--config", str(config), "--out", str(tmp_path / "page")]) == 0
    files = [path for path in (tmp_path / "page").rglob("*") if path.is_file()]
    assert {"config.yaml", "settings.json", "results.jsonl", "manifest.json"} <= {path.name for path in files}
    assert not [path for path in files if b"sk-very-secret" in path.read_bytes()]
