from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import clip_sources, clip_tower
from diffalign.clip_tower import ClipTower
from diffalign.errors import ConfigError, ModelError
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
