from __future__ import annotations

import fnmatch
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

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


def test_embeddings_are_those_of_the_model_itself(folder: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    pixels = (media_of(2, clips.SIDE) - torch.tensor(clip_sources.MEAN)[:, None, None]) / torch.tensor(
        clip_sources.STD
    )[:, None, None]
    tokens = open_clip.SimpleTokenizer(context_length=12)(PROMPTS)
    with torch.no_grad():
        found = model(input_ids=tokens, pixel_values=pixels)
    tower = ClipTower(str(folder), path="tensor")
    images, texts = tower.images(media_of(2, clips.SIDE)), tower.texts(PROMPTS, CPU)
    assert torch.allclose(images, found.image_embeds, atol=1e-6)
    assert torch.allclose(texts, found.text_embeds, atol=1e-6)
    assert torch.allclose(tower.scale * images @ texts.T, found.logits_per_image, atol=1e-4)


def test_shards_and_a_pickled_state_dict_give_the_same_embeddings(folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    CLIPModel.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert equal(embed(folder), embed(tmp_path / "shards"))
    assert equal(embed(folder), embed(pickled))


def test_old_folders_with_position_ids_in_their_weights_load(copy: Path, folder: Path) -> None:
    state = load_file(copy / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    assert equal(embed(folder), embed(copy))


def test_the_end_mark_is_found_with_the_old_number_and_the_right_one(tmp_path: Path) -> None:
    made = [clips.transformers_folder(tmp_path / str(eos), eos=eos) for eos in (2, 49407)]
    assert equal(embed(made[0]), embed(made[1]))


def test_both_shapes_of_what_transformers_returns_are_read() -> None:
    plain = torch.ones(2, 3)

    class Wrapped:
        pooler_output = plain

    assert clip_tower._features(plain) is plain
    assert clip_tower._features(Wrapped()) is plain


def tokenizer_in(folder: Path) -> None:
    """The shared byte-pair code as the files of a published tokenizer."""
    from transformers import CLIPTokenizer

    shared = open_clip.SimpleTokenizer()
    (folder / "tmp").mkdir()
    names = {**shared.encoder, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    names = {k: v for k, v in names.items() if k not in ("<start_of_text>", "<end_of_text>")}
    (folder / "tmp" / "vocab.json").write_text(json.dumps(names))
    merges = sorted(shared.bpe_ranks, key=shared.bpe_ranks.__getitem__)
    (folder / "tmp" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    made = CLIPTokenizer.from_pretrained(folder / "tmp", model_max_length=12)
    made.save_pretrained(folder)
    shutil.rmtree(folder / "tmp")


def test_the_folders_own_tokenizer_reads_as_the_shared_one_that_stands_in_for_it(copy: Path, folder: Path) -> None:
    tokenizer_in(copy)
    tower = ClipTower(str(copy), path="tensor")
    assert equal([tower.texts(PROMPTS, CPU)], [embed(folder)[1]])
    with pytest.warns(UserWarning, match="the end of 1 of 2 prompts"):
        cut = tower.texts(["circle " * 11, " ".join(["circle"] * 10)], CPU)
    assert equal([cut[:1]], [ClipTower(str(folder)).texts([" ".join(["circle"] * 10)], CPU)])
    assert tower.truncated == 1


def test_without_a_tokenizer_an_unusual_vocabulary_is_one_clear_error(copy: Path) -> None:
    state, told = load_file(copy / "model.safetensors"), json.loads((copy / "config.json").read_text())
    name = "text_model.embeddings.token_embedding.weight"
    state[name] = state[name][:100].contiguous()
    told["text_config"] |= {"vocab_size": 100, "eos_token_id": 99, "bos_token_id": 98}
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=r"its 100 tokens are not the 49408 .* tokenizer\.json"):
        embed(copy)
    tokenizer_in(copy)
    with pytest.raises(ModelError, match="knows 49408 tokens, but its model 100"):
        embed(copy)


def test_a_damaged_tokenizer_is_one_clear_error(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="transformers cannot load"):
        embed(copy)


@pytest.mark.parametrize("hf_tokenizer", [False, True])
@pytest.mark.parametrize(("words", "cut"), [(9, False), (10, False), (11, True), (12, True), (500, True)])
def test_one_word_too_many_is_noticed_by_every_tokenizer(
    own: Path, tmp_path: Path, words: int, cut: bool, hf_tokenizer: bool
) -> None:
    place = own
    if hf_tokenizer:  # it pads with its end mark, so that a cut of one word hides behind the padding
        place = shutil.copytree(own, tmp_path / "own")
        tokenizer_in(place)
        told = json.loads((place / "open_clip_config.json").read_text())
        told["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "own"
        (place / "open_clip_config.json").write_text(json.dumps(told))
    encoders = ClipTower(str(place)).encoders
    tokens, noticed = encoders.tokenise([" ".join(["circle"] * words), "a"])
    assert tokens.shape == (2, 12)
    assert noticed == [cut, False]


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


def test_half_a_model_names_what_is_missing(copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack visual_projection\.weight and 0 more"):
        embed(copy)


@pytest.mark.parametrize("which", ["folder", "own"])
def test_a_damaged_or_misshapen_weight_file_is_one_clear_error(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    place = shutil.copytree(request.getfixturevalue(which), tmp_path / "copy")
    (file,) = place.glob("*.safetensors")
    state = load_file(file)
    save_file({k: v.flatten() if v.ndim > 1 else v for k, v in state.items()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"cannot load|lack"):
        embed(place)
    file.write_bytes(b"\0" * 50)
    with pytest.raises(ModelError, match="cannot load"):
        embed(place)


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


@pytest.mark.parametrize(("name", "near"), [("float16", 5e-3), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("which", ["folder", "own"])
def test_half_precision_is_near_and_its_embeddings_are_float32(
    which: str, name: Any, near: float, request: pytest.FixtureRequest
) -> None:
    place = request.getfixturevalue(which)
    for plain, half in zip(embed(place), embed(place, dtype=name), strict=True):
        assert half.dtype == torch.float32
        assert torch.allclose(plain, half, atol=near)


def test_weights_stored_in_half_precision_are_computed_in_float32(copy: Path) -> None:
    state = {k: v.half() for k, v in load_file(copy / "model.safetensors").items()}
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    told = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**told, "dtype": "float16", "torch_dtype": "float16"}))
    tower = ClipTower(str(copy))
    assert next(tower.encoders.module.parameters()).dtype == torch.float32


@pytest.mark.parametrize("which", ["folder", "own"])
def test_loading_leaves_the_random_state_alone(which: str, request: pytest.FixtureRequest) -> None:
    before = torch.random.get_rng_state()
    embed(request.getfixturevalue(which))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_prompt_is_encoded_once_until_too_many_are_remembered(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_tower, "REMEMBERED", 3)
    tower, seen = ClipTower(str(own)), []
    text = tower.encoders.text
    monkeypatch.setattr(tower.encoders, "text", lambda tokens: seen.append(len(tokens)) or text(tokens))
    first = tower.texts(["a", "b", "a"], CPU)
    assert torch.equal(first[0], first[2])
    tower.texts(["b", "a"], CPU)
    tower.texts(["c", "d", "a"], CPU)  # a fourth: all are forgotten
    assert seen == [2, 3]
    assert torch.allclose(tower.texts(["a"], CPU)[0], first[0], atol=1e-6)
    assert len(tower.texts([f"circle {k}" for k in range(9)], CPU)) == 9  # more at once than are remembered


def test_an_architecture_with_a_checkpoint_is_open_clips_own_loading_of_it(tmp_path: Path) -> None:
    clips.know_tiny_h(tmp_path / "architectures")
    file = clips.hps_folder(tmp_path / "hps") / "HPS_v2_compressed.pt"
    source = clip_sources.checkpoint_source(clips.TINY_H, file, "state_dict")
    tower = ClipTower(lambda: source, path="tensor")
    stock = open_clip.create_model(clips.TINY_H, str(file)).eval()
    with torch.no_grad():
        expected = stock.encode_text(open_clip.get_tokenizer(clips.TINY_H)(PROMPTS), normalize=True)
    assert torch.allclose(tower.texts(PROMPTS, CPU), expected, atol=1e-6)
    assert tower.label == clips.TINY_H


def test_a_checkpoint_with_another_prefix_or_masks_loads_and_one_of_other_sizes_does_not(tmp_path: Path) -> None:
    clips.know_tiny_h(tmp_path / "architectures")
    file = clips.hps_folder(tmp_path / "hps") / "HPS_v2_compressed.pt"
    state = torch.load(file, weights_only=True)["state_dict"]
    wrapped = {f"module.{k}": v for k, v in state.items()} | {"module.attn_mask": torch.zeros(12, 12)}
    torch.save({"state_dict": wrapped}, tmp_path / "wrapped.pt")

    def texts(path: Path) -> torch.Tensor:
        return ClipTower(lambda: clip_sources.checkpoint_source(clips.TINY_H, path, "state_dict")).texts(PROMPTS, CPU)

    assert torch.equal(texts(tmp_path / "wrapped.pt"), texts(file))
    torch.save({"state_dict": {**state, "text_projection": torch.ones(3, 3)}}, tmp_path / "other.pt")
    with pytest.raises(ModelError, match=r"'text_projection' is \(3, 3\), not \(32, 16\)"):
        texts(tmp_path / "other.pt")


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
