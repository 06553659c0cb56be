"""Pages on disk: what is written, what is refused, and that nothing a user wrote can leave its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffalign import atomic
from diffalign.errors import ConfigError, OutputError
from diffalign.gallery import manifest, page, witnesses
from diffalign.gallery.folders import read_side
from diffalign.gallery.manifest import Heading
from diffalign.gallery.sides import Item, Side, matched, named_apart, numbered, roles_of

HOSTILE = [
    "<script>alert(1)</script>",
    'a "quoted" one',
    "مربع أحمر",
    "🟥🔵 two",
    "</script>",
    "a\u2028b",
    "x" * 10_000,
]
OUTSIDE = [
    "/elsewhere/x.png",
    "media/../../x.png",
    "a\\b.png",
    "C:/x.png",
    "media/x.html",
    "../x.png",
    "/elsewhere/x",
    "media/../../x",
    "https://x.y/z.png",
    "//x/y.png",
    "a\\b",
    "",
    None,
    "C:/x",
    "a\0b",
]


def picture(seed: int = 0, size: tuple[int, int] = (16, 12)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def side(name: str, prompts: list[str], scores: list[float | None], **more: Any) -> Side:
    keys = numbered(prompts)
    items = [
        Item(key=key, prompt=prompt, picture=picture(k), seed=k, scores={"clip": score})
        for k, (key, prompt, score) in enumerate(zip(keys, prompts, scores, strict=True))
    ]
    return Side(name=name, items=items, roles={"clip": "proxy"}, **more)


def written(folder: Path, *sides: Side, **heading: Any) -> dict[str, Any]:
    return page.write(list(sides), folder, Heading(**heading))


def test_a_page_is_complete_on_disk(tmp_path: Path):
    made = written(tmp_path, side("a", ["x", "y"], [0.1, 0.2]), side("b", ["x", "y"], [0.3, None]))
    assert manifest.read(tmp_path) == json.loads(json.dumps(made))
    assert (tmp_path / "index.html").exists()
    assert all((tmp_path / path).is_file() for path in manifest.paths(made))
    assert made["summaries"][0]["rewards"]["clip"]["n"] == 1
    code = sum(len(content) for content in page.code().values())
    assert code <= page.MOST_CODE


def test_the_same_sides_give_the_same_files(tmp_path: Path):
    sides = side("a", ["x"], [0.1]), side("b", ["x"], [0.3])
    first, second = written(tmp_path / "1", *sides), written(tmp_path / "2", *sides)
    assert first["id"] == second["id"]
    names = [sorted(p.name for p in (tmp_path / n / "media").iterdir()) for n in "12"]
    assert names[0] == names[1]
    assert written(tmp_path / "3", *sides[::-1])["id"] != first["id"]


@pytest.mark.parametrize("prompt", HOSTILE)
def test_no_prompt_can_end_the_script_that_holds_it(tmp_path: Path, prompt: str):
    written(tmp_path, side("a", [prompt], [0.1]), title=prompt)
    text = (tmp_path / "manifest.js").read_text(encoding="utf-8")
    assert text.startswith("window.DIFFALIGN_MANIFEST = {")
    assert not set(text) & set("<>&\u2028\u2029")
    held = json.loads(text.removeprefix("window.DIFFALIGN_MANIFEST = ").rstrip().removesuffix(";"))
    assert held["entries"][0]["prompt"] == prompt
    assert held["title"] == prompt


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path, path: Any):
    made = written(tmp_path, side("a", ["x"], [0.1]))
    made["entries"][0]["shots"][0]["media"]["original"] = path
    (tmp_path / "manifest.json").write_text(json.dumps(made), encoding="utf-8")
    with pytest.raises(ConfigError, match="not inside its folder"):
        manifest.read(tmp_path)
    with pytest.raises(ConfigError, match="not inside its folder"):
        page.put(made, tmp_path)


def test_a_newer_or_foreign_manifest_is_refused(tmp_path: Path):
    made = written(tmp_path, side("a", ["x"], [0.1]))
    for change, said in (({"version": 2}, "version 2"), ({"format": "other"}, "not a gallery")):
        (tmp_path / "manifest.json").write_text(json.dumps(made | change), encoding="utf-8")
        with pytest.raises(ConfigError, match=said):
            manifest.read(tmp_path)
    with pytest.raises(ConfigError, match="not a gallery"):
        manifest.read(tmp_path / "nothing")


def test_films_keep_every_frame_and_fit_the_format(tmp_path: Path):
    frames = torch.rand(30, 3, 8, 1000, generator=torch.Generator().manual_seed(0))
    item = Item(key="x", prompt="x", picture=frames)
    made = written(tmp_path, Side(name="a", items=[item]))
    media = made["entries"][0]["shots"][0]["media"]
    assert (media["kind"], media["frames"], media["columns"]) == ("film", 30, 16)
    with Image.open(tmp_path / media["original"]) as sheet:
        assert sheet.size == (16_000, 16)
        last = sheet.crop((13 * 1000, 8, 14 * 1000, 16))
    expected = (frames[29] * 255).movedim(0, -1)
    found = torch.tensor(list(last.getdata())).view(8, 1000, 3)
    assert float((expected - found).abs().max()) <= 1


def test_pictures_that_cannot_be_shown_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "in"
    folder.mkdir()
    picture().save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    picture(1, (40, 40)).save(folder / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    made = written(tmp_path / "out", read_side(folder))
    told = {entry["prompt"]: entry["shots"][0] for entry in made["entries"]}
    assert told["good"]["media"]
    for name in ("cut", "text", "huge"):
        assert told[name]["media"] is None
        assert name in told[name]["missing"]
    assert "no picture for 3 of 4" in made["notes"][0]


def test_an_original_picture_is_kept_to_the_byte(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    picture().save(folder / "x.jpg", quality=80)
    made = written(tmp_path / "out", read_side(folder))
    original = made["entries"][0]["shots"][0]["media"]["original"]
    assert (tmp_path / "out" / original).read_bytes() == (folder / "x.jpg").read_bytes()


def test_zero_entries_make_a_page_too(tmp_path: Path):
    made = written(tmp_path, Side(name="a", items=[]), Side(name="b", items=[]))
    assert made["entries"] == []
    with pytest.raises(ConfigError, match="at least one system"):
        written(tmp_path)


@given(st.lists(st.sampled_from(["x", "y", "z"]), max_size=12))
def test_prompts_asked_several_times_are_told_apart(prompts):
    keys = numbered(prompts)
    assert len(set(keys)) == len(prompts)
    assert [key.split("\n")[0] for key in keys] == prompts


def test_entries_are_matched_over_systems_and_gaps_are_said(tmp_path: Path):
    rows = matched([side("a", ["x", "y"], [0, 0]), side("b", ["y", "z"], [0, 0])])
    assert [(key.split("\n")[0], [item is not None for item in items]) for key, items in rows] == [
        ("x", [True, False]),
        ("y", [True, True]),
        ("z", [False, True]),
    ]
    made = written(tmp_path, side("a", ["x", "y"], [0, 0]), side("b", ["y", "z"], [0, 0]))
    assert len(made["notes"]) == 2


def test_systems_of_one_name_are_told_apart():
    names = [each.name for each in named_apart([side(n, [], []) for n in ("a", "b", "a", "a (2)", "a")])]
    assert len(set(names)) == 5
    assert names[:2] == ["a", "b"]


def test_what_steered_one_system_is_no_independent_witness():
    sides = [Side(name="a", items=[], roles={"clip": "heldout", "truth": "truth"})]
    sides.append(Side(name="b", items=[], roles={"clip": "proxy", "sharp": "heldout"}))
    assert roles_of(sides) == {"truth": "truth", "sharp": "heldout", "clip": "proxy"}


def test_cards_that_differ_in_more_than_the_method_are_named(tmp_path: Path):
    a = {"model": "m", "call": {"steps": 20}, "method": {"name": "x"}, "rewards": {}}
    b = a | {"method": {"name": "y"}, "rewards": {"clip": "1"}}
    assert written(tmp_path, side("a", ["x"], [0], card=a), side("b", ["x"], [0], card=b))["unlike"] == []
    other = b | {"call": {"steps": 10}}
    (said,) = written(tmp_path, side("a", ["x"], [0], card=a), side("b", ["x"], [0], card=other))["unlike"]
    assert said == "call.steps of b is 10, and of a 20."
    assert written(tmp_path, side("a", ["x"], [0], card=a), side("b", ["x"], [0]))["unlike"] == [
        "b has no evaluation card."
    ]


def test_folders_of_pictures_match_by_name_and_find_their_captions(tmp_path: Path):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        for k, file in enumerate(("a_red_cube", "b")):
            picture(k).save(tmp_path / name / f"{file}.png")
    (tmp_path / "before" / "b.txt").write_text("a blue ball\n", encoding="utf-8")
    before, after = read_side(tmp_path / "before"), read_side(tmp_path / "after")
    assert [item.prompt for item in before.items] == ["a red cube", "a blue ball"]
    assert [items[1] is not None for _, items in matched([before, after])] == [True, True]
    (tmp_path / "after" / "prompts.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert [item.prompt for item in read_side(tmp_path / "after").items] == ["one", "two"]
    picture().save(tmp_path / "after" / "b.webp")
    with pytest.raises(ConfigError, match="several pictures called 'b'"):
        read_side(tmp_path / "after")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds neither"):
        read_side(tmp_path / "empty")


def test_a_run_that_names_files_outside_itself_is_refused(tmp_path: Path):
    row = {"prompt": "x", "file": "../secret.png"}
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not inside it"):
        read_side(tmp_path)
    (tmp_path / "results.jsonl").write_text("{broken\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"results\.jsonl:1 is not JSON"):
        read_side(tmp_path)


def test_outputs_at_hand_become_a_page(tmp_path: Path):
    from diffalign import align
    from diffalign.gallery import show
    from tests.tiny import build, call

    pipe, asked = build("sd15"), call("sd15", 2)
    seeds = [torch.Generator().manual_seed(k) for k in range(2)]
    stock = pipe(**asked, generator=seeds)
    dense = align(pipe, method="dense", reward="brightness", generator=seeds, **asked)
    better = align(pipe, method="best_of_n", reward="brightness", budget=60, top_k=2, generator=seeds, **asked)
    opened = show({"stock": stock, "dense": dense, "best": better}, asked["prompt"], tmp_path)
    made = manifest.read(opened.parent)
    shots = made["entries"][1]["shots"]
    assert [shot["media"]["kind"] for shot in shots] == ["image"] * 3
    assert len(shots[1]["steps"]["levels"]) == len(shots[1]["steps"]["rewards"])
    assert shots[2]["scores"]["brightness"] == pytest.approx(float(better.report.best_reward[1]), abs=1e-5)
    assert made["systems"][2]["cost"]["nfe"] <= 60
    with pytest.raises(ConfigError, match="cannot be matched"):
        show({"stock": stock}, ["a", "b", "c"], tmp_path)


def test_a_training_run_shows_its_samples_over_steps_and_its_curves(tmp_path: Path):
    run = tmp_path / "run"
    for step in (100, 20):
        folder = run / "samples" / f"step-{step}"
        folder.mkdir(parents=True)
        picture(step).save(folder / "0.png")
        picture(7).save(folder / "source.png")
        row = {"prompt": "x", "file": "0.png", "reward": step / 100, "inputs": {"source": "source.png"}}
        row |= {"instruction": "make it red", "checks": [{"name": "red", "passed": True, "note": ""}]}
        (folder / "results.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    rows = [
        {"step": 20, "proxy": 0.2, "truth": 0.5, "loss": 1, "heldout": 0.0, "diversity": 1.0},
        {"step": 100, "proxy": 1.0, "truth": None, "heldout": -0.5, "diversity": 0.7},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = written(tmp_path / "page", read_side(run))
    (entry,) = made["entries"]
    (shot,) = entry["shots"]
    assert [sample["step"] for sample in shot["samples"]] == [20, 100]
    assert shot["samples"][1]["media"] == shot["media"]
    assert entry["instruction"] == "make it red"
    assert entry["inputs"]["source"]["width"] == 16
    assert shot["checks"][0]["passed"] is True
    charts = [{each["name"]: (each["x"], each["y"]) for each in chart["series"]} for chart in made["curves"]]
    assert charts == [  # figures of one unit each
        {"proxy": ([20, 100], [0.2, 1.0]), "truth": ([20], [0.5])},
        {"heldout": ([20, 100], [0.0, -0.5])},
        {"diversity": ([20, 100], [1.0, 0.7])},
    ]
    assert len({chart["y"] for chart in made["curves"]}) == 3
    (tmp_path / "new" / "samples").mkdir(parents=True)
    with pytest.raises(ConfigError, match="without samples"):
        read_side(tmp_path / "new")


def test_a_kept_file_is_called_what_it_is(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    picture().save(folder / "a.png")
    (folder / "a.png").rename(folder / "a.html")
    (folder / "passwords.mp4").write_text("root:x:0:0")
    rows = [{"prompt": "x", "file": "a.html"}, {"prompt": "y", "file": "passwords.mp4"}]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = written(tmp_path / "out", read_side(folder))
    first, second = (entry["shots"][0] for entry in made["entries"])
    assert first["media"]["original"].endswith(".png")
    assert second["missing"] == "passwords.mp4 is not a video"
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_links_out_of_a_folder_are_refused(tmp_path: Path):
    (tmp_path / "secret.txt").write_text("secret")
    picture().save(tmp_path / "other.png")
    for name, target in (("a.txt", "secret.txt"), ("b.png", "other.png")):
        folder = tmp_path / name
        folder.mkdir()
        picture().save(folder / "a.png")
        (folder / name).symlink_to(tmp_path / target)
        with pytest.raises(ConfigError, match="not inside it"):
            read_side(folder)


def test_a_folder_of_somebody_elses_page_is_left_alone(tmp_path: Path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(OutputError, match="not a gallery's"):
        written(tmp_path, side("a", ["x"], [0.1]))
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_page_that_was_cut_short_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = atomic.write_bytes

    def breaking(path: Path, content: bytes) -> Path:
        if path.name == "index.html":
            raise KeyboardInterrupt
        return real(path, content)

    monkeypatch.setattr(atomic, "write_bytes", breaking)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, side("a", ["x"], [0.1]))
    monkeypatch.undo()
    written(tmp_path, side("a", ["x"], [0.1]))
    assert (tmp_path / "index.html").exists()


def test_scores_say_nothing_about_who_a_page_is_and_rounding_wins_nothing(tmp_path: Path):
    pair = side("a", ["x", "y"], [0.5, 0.5]), side("b", ["x", "y"], [0.50000003, 0.5])
    made = written(tmp_path, *pair)
    assert made["summaries"][0]["rewards"]["clip"]["ties"] == 2
    assert written(tmp_path, pair[0], side("b", ["x", "y"], [0.9, 0.1]))["id"] == made["id"]


def test_sixteen_bits_of_grey_stay_grey(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    ramp = torch.arange(64 * 64).view(64, 64) * 16
    Image.fromarray(ramp.numpy().astype("uint16")).save(folder / "ramp.png")
    Image.new("LA", (8, 8), (200, 128)).save(folder / "clear.png")
    made = written(tmp_path / "out", *witnesses.scored([read_side(folder)], "brightness"))
    clear, grey = (entry["shots"][0] for entry in made["entries"])
    assert grey["scores"]["brightness"] == pytest.approx(0.5, abs=0.01)
    with Image.open(tmp_path / "out" / clear["media"]["shown"]) as shown:
        assert shown.mode == "RGBA"


@pytest.mark.parametrize(
    "odd",
    [
        {"parts": [1], "steps": [1], "inputs": [1], "tags": 3, "checks": ["a"], "candidates": "x", "command": 4},
        {"reward": 10**400, "seed": "text"},
        {"prompt": "a\u2028b"},
        {"prompt": None},
    ],
)
def test_odd_rows_of_a_run_make_no_page_fail(tmp_path: Path, odd: dict[str, Any]):
    picture().save(tmp_path / "a.png")
    row = json.dumps({"prompt": "x", "file": "a.png", **odd}, ensure_ascii=False)
    (tmp_path / "results.jsonl").write_text("\ufeff" + row.replace('"x"', "NaN") + "\n", encoding="utf-8")
    assert len(written(tmp_path / "out", read_side(tmp_path))["entries"]) == 1
