from __future__ import annotations

import fnmatch
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffalign import clip_sources, clip_tower
from diffalign.clip_tower import ClipTower
from diffalign.errors import ConfigError, DiffalignError, HubError, ModelError
from diffalign.vision import to_tensor
from tests.rewards import clips
from tests.rewards.clips import PROMPTS, media_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.transformers_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.open_clip_folder(tmp_path_factory.mktemp("open_clip"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def embed(place: Path | str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tower = ClipTower(str(place), path="tensor", **options)
    return tower.images(media_of(2)), tower.texts(PROMPTS, CPU)


def equal(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one, two, strict=True))


def in_cache(place: Path, repo: str, cache: Path, commit: str = "1" * 40) -> None:
    """Lay a folder down as the hub's client keeps a downloaded repository."""
    base = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(place, base / "snapshots" / commit)
    (base / "refs").mkdir(exist_ok=True)
    (base / "refs" / "main").write_text(commit)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def _picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 71, 3), dtype=np.uint8))


BOTH = ["config.json", "open_clip_config.json"]
SIDES = {"height": clips.SIDE, "width": clips.SIDE}
PROCESSORS = {
    "old": {"size": clips.SIDE, "crop_size": clips.SIDE, "resample": 3},
    "new": {"size": {"shortest_edge": clips.SIDE}, "crop_size": SIDES, "resample": 3},
    "bilinear": {"size": {"shortest_edge": clips.SIDE}, "crop_size": SIDES, "resample": 2},
    "squash": {"size": SIDES, "do_center_crop": False, "resample": 3},
    "colours": {
        "size": {"shortest_edge": clips.SIDE},
        "crop_size": SIDES,
        "image_mean": [0.5] * 3,
        "image_std": [0.2] * 3,
    },
    "plain": {"size": {"shortest_edge": clips.SIDE}, "crop_size": SIDES, "do_normalize": False},
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_every_form_of_the_preprocessing_file_is_the_stock_processor(copy: Path, kind: str, nested: bool) -> None:
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Stock
    except ImportError:  # before transformers 5
        from transformers import CLIPImageProcessor as Stock
    told = PROCESSORS[kind]
    name, content = (
        ("processor_config.json", {"image_processor": told}) if nested else ("preprocessor_config.json", told)
    )
    (copy / name).write_text(json.dumps(content))
    expected = Stock(**told)(_picture(), return_tensors="pt")["pixel_values"]
    found = ClipTower(str(copy), path="reference")._preprocess(to_tensor(_picture()))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"size": {"shortest_edge": 40}, "crop_size": SIDES}, r"resizes to \{'shortest_edge': 40\}"),
        ({"size": 64, "crop_size": 64}, "to the 32 pixels its model sees"),
        ({"size": clips.SIDE, "resample": 0}, "with method 0"),
    ],
)
def test_a_preprocessing_we_cannot_follow_is_refused(copy: Path, told: dict[str, Any], says: str) -> None:
    (copy / "preprocessor_config.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=says):
        embed(copy)


@pytest.mark.parametrize("content", ["{", "[]", "\ufeff", '"a"'])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_damaged_settings_file_is_one_clear_error(copy: Path, name: str, content: str) -> None:
    (copy / name).write_text(content)
    with pytest.raises(ModelError, match=f"the settings '.*{name}'"):
        embed(copy)


class Trap:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(("which", "name"), [("folder", "pytorch_model.bin"), ("own", "open_clip_pytorch_model.bin")])
def test_a_pickle_with_code_in_a_folder_is_refused_and_not_run(
    which: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    place = shutil.copytree(request.getfixturevalue(which), tmp_path / "copy")
    (file,) = place.glob("*.safetensors")
    torch.save({**load_file(file), "x": Trap(tmp_path / "sprung")}, place / name)
    file.unlink()
    with pytest.raises(ModelError, match="cannot load"):
        embed(place)
    assert not (tmp_path / "sprung").exists()


def test_a_folder_that_asks_to_run_code_is_refused(own: Path, tmp_path: Path) -> None:
    place = shutil.copytree(own, tmp_path / "copy")
    told = json.loads((place / "open_clip_config.json").read_text())
    told["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    (place / "open_clip_config.json").write_text(json.dumps(told))
    with pytest.raises(ModelError, match="asks to run code of its own"):
        embed(place)


def test_a_folder_of_both_libraries_is_read_by_the_one_whose_weights_it_has(
    folder: Path, own: Path, tmp_path: Path
) -> None:
    both = shutil.copytree(folder, tmp_path / "both")
    shutil.copy(own / "open_clip_config.json", both)
    assert clip_sources.find_source(str(both)).library == "transformers"
    assert equal(embed(both), embed(folder))
    shutil.copy(own / "open_clip_model.safetensors", both)
    assert clip_sources.find_source(str(both)).library == "open_clip"
    assert equal(embed(both), embed(own))


def test_another_type_of_model_is_named(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ConfigError, match="a model of the type 'siglip', but this reward reads 'clip'"):
        embed(copy)


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./here", "a/b/c", "hf-hub:name"])
def test_a_path_that_is_not_there_is_no_hub_id(model: str) -> None:
    with pytest.raises(ConfigError, match=r"it is not a hub id \(owner/name\)"):
        clip_sources.find_source(model)


@pytest.mark.parametrize("model", ["shapes-clip", "ViT-B-32:openai"])
def test_a_revision_of_what_is_not_on_the_hub_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match=f"revision 'abc' .* '{model}' is no hub id"):
        clip_sources.find_source(model, "abc")


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
@pytest.mark.parametrize("which", ["folder", "own"])
def test_a_downloaded_repository_works_without_network(
    which: str, prefix: str, request: pytest.FixtureRequest, cache: Path
) -> None:
    place = request.getfixturevalue(which)
    in_cache(place, "owner/name", cache)
    source = clip_sources.find_source(f"{prefix}owner/name")
    assert source.version == clip_sources.find_source(str(place)).version  # the content, wherever it lies
    assert equal(embed(f"{prefix}owner/name"), embed(place))


def test_a_revision_picks_its_own_weights(folder: Path, own: Path, cache: Path) -> None:
    in_cache(folder, "owner/name", cache, "1" * 40)
    in_cache(own, "owner/name", cache, "2" * 40)
    assert clip_sources.find_source("owner/name", "1" * 40).library == "transformers"
    assert clip_sources.find_source("owner/name", "2" * 40).library == "open_clip"


def test_settings_without_weights_in_the_cache_are_a_hub_error(copy: Path, cache: Path) -> None:
    (copy / "model.safetensors").unlink()
    in_cache(copy, "owner/name", cache)
    with pytest.raises(HubError, match="its weights are not there, and the hub cannot be reached or has none"):
        clip_sources.find_source("owner/name")


@pytest.mark.parametrize(
    ("has", "fetched"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5"], ["model.safetensors"]),
        (["config.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors"], ["model-1-of-2.safetensors"]),
        (["config.json", "pytorch_model.bin", "flax_model.msgpack"], ["pytorch_model.bin"]),
        (
            [
                *BOTH,
                "open_clip_pytorch_model.bin",
                "open_clip_model.safetensors",
                "model.safetensors",
                "pytorch_model.bin",
            ],
            ["open_clip_model.safetensors"],
        ),
        ([*BOTH, "open_clip_pytorch_model.bin"], ["open_clip_pytorch_model.bin"]),
        ([*BOTH, "model.safetensors"], ["model.safetensors"]),
    ],
)
def test_only_the_smallest_sufficient_set_of_weights_is_fetched(
    has: list[str], fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        for name in has:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).write_text('{"model_type": "clip"}')
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    clip_sources.find_source("owner/name")
    weights = [path.name for path in tmp_path.iterdir() if path.suffix != ".json"]
    assert sorted(weights)[: len(fetched)] == fetched
    assert len({Path(name).suffix for name in weights}) == 1


def test_the_embedded_model_is_a_source_like_any_other() -> None:
    tower = ClipTower(clip_tower.EMBEDDED)
    assert tower.images(media_of(1)).norm() == pytest.approx(1, abs=1e-5)
    assert tower.source.version == clip_sources.find_source(clip_tower.EMBEDDED).version


def test_finding_a_source_imports_no_library_for_a_folder(folder: Path) -> None:
    import subprocess

    code = (
        "import sys; from diffalign.clip_sources import find_source; find_source(sys.argv[1])\n"
        "assert not {'transformers', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def test_every_fault_of_a_source_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {}}')
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(DiffalignError):
        embed(tmp_path)
