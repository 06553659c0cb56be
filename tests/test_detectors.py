from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from diffalign import world
from diffalign.detectors import ColourNamer, Detector, ShapesDetector, detect_rows, find_detector
from diffalign.errors import ConfigError, DiffalignError, HubError, UnknownName
from diffalign.rules.geneval import COLOURS, Detection
from diffalign.world.scenes import Scene, Shape


def media_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, 3, 40, 56, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("spec", "kind", "says"),
    [
        ("nowhere", ConfigError, "there is no folder 'nowhere', and it is not a hub id"),
        ("facebook/mask2former-swin-small-coco-instance", HubError, "cannot fetch .* leave `detector` out"),
        ("math:sqrt", ConfigError, "math:sqrt is no detector: it needs `detect"),
        ("math:sqroot", UnknownName, r"no detector called 'sqroot'. Did you mean 'sqrt'\?"),
        (7, ConfigError, "7 is no detector"),
    ],
)
def test_a_wrong_detector_is_one_clear_error(
    spec: Any, kind: type[DiffalignError], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(kind, match=says):
        find_detector(spec).detect(media_of(1), [["cat"]])


def test_a_detector_of_the_user_comes_from_a_file_or_as_an_object(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from diffalign.rules.geneval import Detection\n"
        "class Everything:\n"
        "    version = 'v7'\n"
        "    def detect(self, media, labels):\n"
        "        return [[Detection(name, 1.0, (0, 0, 1, 1)) for name in row] for row in labels]\n"
    )
    found = find_detector(f"{tmp_path / 'mine.py'}:Everything")
    assert isinstance(found, Detector)
    assert found.version == "v7"
    assert find_detector(found) is found
    rows = detect_rows(found, media_of(3), [["a"], None, ["b", "c"]])
    assert [row and [one.label for one in row] for row in rows] == [["a"], None, ["b", "c"]]


def test_rows_that_are_not_finite_are_not_shown_to_the_detector() -> None:
    media = media_of(3)
    media[1, 0, 0, 0] = torch.nan
    assert [row is None for row in detect_rows(ShapesDetector(), media, [["circle"]] * 3)] == [False, True, False]


def test_the_shapes_detector_sees_shapes_colours_and_boxes_at_any_size() -> None:
    scene = Scene((Shape("circle", "red", 20, 20, 8), Shape("square", "blue", 44, 40, 8)))
    media = torch.nn.functional.interpolate(world.render(scene)[None], scale_factor=2, mode="bilinear")
    (found,) = ShapesDetector().detect(media, [["circle", "blue square", "red square", "shape"]])
    assert [(one.label, one.colour) for one in found] == [
        ("circle", "red"),
        ("blue square", "blue"),
        ("shape", "red"),
        ("shape", "blue"),
    ]
    assert found[0].box == pytest.approx((24, 24, 56, 56), abs=1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = open_clip.model.CLIP(**config).state_dict()
        save_file(
            {k: torch.randn_like(v) * 0.3 if v.ndim > 1 else v for k, v in state.items()},
            folder / "open_clip_model.safetensors",
        )
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


def test_a_colour_is_the_nearest_mean_of_three_phrasings(clip: Path) -> None:
    namer, image = ColourNamer(str(clip)), media_of(1)[0]
    scores = []
    for colour in COLOURS:
        texts = [f"a photo of a {colour} cat", f"a photo of a {colour}-colored cat", f"a photo of a {colour} object"]
        mean = namer.tower.texts(texts, torch.device("cpu")).mean(0)
        scores.append(float(torch.cosine_similarity(mean, namer.tower.images(image[None, :, 4:30, 6:40])[0], dim=0)))
    expected = COLOURS[max(range(len(COLOURS)), key=scores.__getitem__)]
    assert namer.name(image, Detection("cat", 1.0, (6.2, 3.9, 39.8, 30.4))) == expected


def test_only_the_object_itself_decides_about_its_colour(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namer, seen = ColourNamer(str(clip)), []
    look = namer.tower.images
    monkeypatch.setattr(namer.tower, "images", lambda media: seen.append(media) or look(media))
    mask = torch.zeros(40, 56, dtype=torch.bool)
    mask[10:20, 10:25] = True
    for seed in (0, 1):
        image = media_of(1, seed)[0].where(~mask, media_of(1)[0])
        namer.name(image, Detection("cat", 1.0, (8.0, 8.0, 30.0, 22.0), mask=mask))
    assert torch.equal(*seen)
    assert seen[0].shape == (1, 3, 14, 22)
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx([0.6] * 3)  # #999


def test_a_box_outside_the_picture_is_cut_to_what_there_is(clip: Path) -> None:
    for box in ((-20.0, -5.0, 3.0, 4.0), (50.0, 38.0, 90.0, 80.0), (80.0, 80.0, 90.0, 90.0), (3.2, 3.2, 3.3, 3.3)):
        assert ColourNamer(str(clip)).name(media_of(1)[0], Detection("cat", 1.0, box)) in COLOURS


def test_a_class_outside_the_shapes_world_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="'shapes' does not know the class 'dog': it sees circle, square, triangle"):
        ShapesDetector().detect(media_of(1), [["dog"]])
