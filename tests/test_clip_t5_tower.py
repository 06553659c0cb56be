"""CLIP-FlanT5 at a tiny width against the stock parts, one picture at a time, and its published layout."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPImageProcessor, T5Config

from diffalign.clip_t5_tower import GROUND, ClipT5Tower, Parts, answer_likelihood, ours, squared, vision_settings
from diffalign.errors import ConfigError, HubError, ModelError
from diffalign.vision import to_pil, to_tensor
from tests.rewards import clip_t5
from tests.rewards.clip_t5 import SIDE, State, Stock, media_of, published, write
from tests.rewards.layouts import layout
from tests.tiny.text import t5_tokenizer

BEFORE, AFTER = "USER: ", ["\nIs it red? ASSISTANT: ", "\nIs it a small blue square, or is it not? ASSISTANT: "]


@pytest.fixture(scope="module")
def model() -> Stock:
    return clip_t5.stock()


@pytest.fixture(scope="module")
def folder(model: Stock, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("clip_t5"), published(model))


@pytest.fixture(scope="module")
def tower(folder: Path) -> ClipT5Tower:
    return make(folder)


def make(folder: Path, **options: Any) -> ClipT5Tower:
    return ClipT5Tower(**{"model": str(folder), "dtype": torch.float32, "path": "tensor", **options})


def likely(tower: ClipT5Tower, media: Tensor, after: list[str], answer: str = "Yes") -> Tensor:
    return tower.likelihood(tower.look(media), BEFORE, after, answer)


def by_the_library(model: Stock, media: Tensor, after: str, answer: str = "Yes") -> Tensor:
    """The published steps on one picture (3, H, W), from the saved picture on."""
    picture = to_pil(media[None])[0]
    side = max(picture.size)
    reads = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    ground = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in reads.image_mean))
    ground.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    words = t5_tokenizer()
    with torch.no_grad():
        hidden = model.vision(reads(ground, return_tensors="pt")["pixel_values"], output_hidden_states=True)
        seen = model.projector(hidden.hidden_states[-2][:, 1:])
        ends = [model.t5.shared(torch.tensor(words(text)["input_ids"]))[None] for text in (BEFORE, after)]
        labels = torch.tensor([words(answer)["input_ids"]])
        loss = model.t5(inputs_embeds=torch.cat([ends[0], seen, ends[1]], 1), labels=labels).loss
    return torch.as_tensor((-loss).exp())


@pytest.mark.parametrize(("height", "width"), [(28, 28), (40, 40), (50, 31), (20, 44)])
def test_the_likelihood_is_that_of_the_stock_parts_on_the_saved_picture(
    model: Stock, folder: Path, height: int, width: int
) -> None:
    media = media_of(2, height, width)
    expected = torch.stack([by_the_library(model, row, after) for row, after in zip(media, AFTER, strict=True)])
    found = likely(make(folder, path="reference"), media, AFTER)
    assert torch.allclose(found, expected, rtol=2e-2)
    assert abs(float(expected[0] - expected[1])) > 1e-4


def test_pictures_that_need_no_resizing_agree_exactly(model: Stock, tower: ClipT5Tower) -> None:
    media = (media_of(2, SIDE, SIDE) * 255).round() / 255
    expected = torch.stack([by_the_library(model, row, after) for row, after in zip(media, AFTER, strict=True)])
    assert torch.allclose(likely(tower, media, AFTER), expected, rtol=1e-4)


def test_a_batch_equals_singles_and_a_permutation_permutes(tower: ClipT5Tower) -> None:
    media, after = media_of(4), [*AFTER, "\nx", ""]
    whole = likely(tower, media, after)
    singles = torch.cat([likely(tower, media[k : k + 1], [after[k]]) for k in range(4)])
    assert torch.allclose(whole, singles, rtol=1e-4)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(likely(tower, media[order], [after[int(k)] for k in order]), whole[order], rtol=1e-4)


def test_picture_words_and_answer_all_count(tower: ClipT5Tower) -> None:
    media = media_of(2)
    found = [likely(tower, media[[k]], [after], said) for k in (0, 1) for after in AFTER for said in ("Yes", "No")]
    assert len({f"{float(one):.4e}" for one in found}) == 8


@given(p=st.floats(0.01, 0.99), count=st.integers(1, 6), words=st.integers(2, 9))
def test_a_probability_of_p_for_each_of_n_tokens_gives_p(p: float, count: int, words: int) -> None:
    rest = (1 - p) / (words - 1)
    logits = torch.full((1, count, words), rest, dtype=torch.float64).log()
    logits[..., 1] = torch.tensor(p, dtype=torch.float64).log()
    assert float(answer_likelihood(logits, torch.ones(count, dtype=torch.long))) == pytest.approx(p, rel=1e-4)


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6))
def test_the_likelihood_is_the_geometric_mean_of_the_tokens(chances: list[float]) -> None:
    logits = torch.tensor([[[p, 1 - p] for p in chances]], dtype=torch.float64).log()
    expected = float(torch.tensor(chances, dtype=torch.float64).log().mean().exp())
    assert float(answer_likelihood(logits, torch.zeros(len(chances), dtype=torch.long))) == pytest.approx(
        expected, rel=1e-4
    )


@examples(max_examples=4, deadline=None)
@given(seed=st.integers(0, 99))
def test_the_gradient_reaches_the_pixels_and_matches_a_directional_difference(tower: ClipT5Tower, seed: int) -> None:
    media = media_of(1, 36, 30, seed).mul(0.5).add(0.25).requires_grad_()
    (gradient,) = torch.autograd.grad(likely(tower, media, AFTER[:1]).log().sum(), media)
    direction, step = gradient / gradient.norm(), 1e-2
    ends = [float(likely(tower, media.detach() + s * direction, AFTER[:1]).log()) for s in (step, -step)]
    assert gradient.isfinite().all()
    assert gradient.norm() > 1e-3
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=5e-2)
    assert all(weight.grad is None and not weight.requires_grad for weight in tower.parts.parameters())


def test_auto_takes_the_reference_path_but_where_a_gradient_is_asked_for(folder: Path) -> None:
    media, found = media_of(1), {path: make(folder, path=path) for path in ("auto", "reference", "tensor")}
    plain = {path: likely(tower, media, AFTER[:1]) for path, tower in found.items()}
    assert torch.equal(plain["auto"], plain["reference"])
    assert not torch.equal(plain["auto"], plain["tensor"])
    graded = likely(found["auto"], media.clone().requires_grad_(), AFTER[:1])
    assert torch.allclose(graded, plain["tensor"], rtol=1e-5)
    assert graded.requires_grad
    assert not likely(found["reference"], media.clone().requires_grad_(), AFTER[:1]).requires_grad


def test_checkpointing_changes_neither_likelihood_nor_gradient(folder: Path, tower: ClipT5Tower) -> None:
    grads = []
    for made in (tower, make(folder, checkpointing=True)):
        media = media_of(2).requires_grad_()
        likely(made, media, AFTER).log().sum().backward()
        grads.append(media.grad)
    assert torch.allclose(grads[0], grads[1], rtol=1e-3, atol=1e-6)  # type: ignore[arg-type]


def test_the_padding_is_clips_mean_colour_on_the_two_longer_sides() -> None:
    media = torch.ones(1, 3, 4, 10)
    found = squared(media)
    assert found.shape == (1, 3, 10, 10)
    assert torch.allclose(found[:, :, 3:7], media)
    for rows in (found[:, :, :3], found[:, :, 7:]):
        assert torch.allclose(rows, torch.tensor(GROUND)[:, None, None].expand(1, 3, 3, 10))
    assert torch.allclose(squared(media.transpose(2, 3)), found.transpose(2, 3))
    assert [round(255 * level) for level in GROUND] == [122, 116, 104]


@examples(max_examples=20, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_the_square_is_where_the_published_code_pastes_the_picture(height: int, width: int) -> None:
    media = (media_of(1, height, width) * 255).round() / 255
    side = max(height, width)
    ground = Image.new("RGB", (side, side), (122, 116, 104))
    ground.paste(to_pil(media)[0], ((side - width) // 2, (side - height) // 2))
    assert torch.allclose(squared(media), to_tensor(ground), atol=1e-6)


def test_texts_end_as_t5_ends_them_and_its_marks_are_left_out(tower: ClipT5Tower) -> None:
    words = t5_tokenizer()
    plain, marked, foreign = tower.ids(["Is it red?", "a</s>b<pad>", "\u4e09"])
    assert plain == words("Is it red?")["input_ids"]
    assert marked.count(words.eos_token_id) == 1
    assert words.pad_token_id not in marked
    assert words.unk_token_id in foreign
    assert tower.ids(["half \ud83d"])[0][-1] == words.eos_token_id


def test_a_text_beyond_the_limit_is_cut_and_does_not_change_its_neighbour(tower: ClipT5Tower) -> None:
    media, alone = media_of(2), likely(tower, media_of(2)[:1], AFTER[:1])
    found = likely(tower, media, [AFTER[0], "x" * 5000])
    assert torch.allclose(found[:1], alone, rtol=1e-4)
    assert torch.equal(likely(tower, media[1:], ["x" * 5000]), likely(tower, media[1:], ["x" * 6000]))


def test_bfloat16_answers_alike_and_autocast_changes_nothing(folder: Path, tower: ClipT5Tower) -> None:
    half, media = make(folder, dtype=torch.bfloat16), media_of(2)
    found = likely(half, media, AFTER)
    assert found.dtype == torch.float32
    assert torch.allclose(found.log(), likely(tower, media, AFTER).log(), atol=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(likely(half, media, AFTER), found)


def test_loading_under_inference_mode_leaves_later_gradients_and_the_random_state_alone(folder: Path) -> None:
    fresh, before = make(folder), torch.random.get_rng_state()
    with torch.inference_mode():
        likely(fresh, media_of(1), AFTER[:1])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert likely(fresh, media_of(1).requires_grad_(), AFTER[:1]).requires_grad


def test_the_names_of_the_published_checkpoint_and_of_our_module_are_one_to_one_at_full_size() -> None:
    there = layout("clip_t5")
    state = {name: torch.empty(shape, device="meta") for name, shape in there.items()}
    state = {str(ours(name)): tensor for name, tensor in state.items()}
    assert len(state) == len(there)
    told = T5Config(
        vocab_size=32100, d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    seen = vision_settings(state, "x")
    module = Parts(told, seen)
    second = {f"t5.{side}.embed_tokens.weight" for side in ("encoder", "decoder")}
    found = {name: tuple(weight.shape) for name, weight in module.state_dict().items() if name not in second}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == found
    assert {ours(name) for name in layout("clip_t5", "unused")} == {None}
    assert all(weight.is_meta for weight in module.parameters())
    assert (seen.image_size, seen.num_attention_heads, seen.num_hidden_layers) == (336, 16, 24)
    assert (seen.projection_dim, seen.hidden_act) == (512, "quick_gelu")


def test_the_tiny_checkpoint_has_the_names_of_the_published_one(model: Stock) -> None:
    there = {**layout("clip_t5"), **layout("clip_t5", "unused")}
    sizes = {"block": 2, "layers": 3}

    def kept(name: str) -> bool:
        parts = name.split(".")
        return all(int(parts[parts.index(kind) + 1]) < most for kind, most in sizes.items() if kind in parts)

    assert set(published(model)) == {name for name in there if kept(name) and "position_ids" not in name}


def test_a_pickle_is_converted_and_shards_and_a_bare_file_read_alike(
    model: Stock, folder: Path, tower: ClipT5Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    state, plain = published(model), likely(tower, media_of(1), AFTER[:1])
    clip_t5.write_settings(tmp_path / "pickled")
    names, index = sorted(state), {}
    for k in range(3):
        file = f"pytorch_model-0000{k + 1}-of-00003.bin"
        torch.save({name: state[name] for name in names[k::3]}, tmp_path / "pickled" / file)
        index |= dict.fromkeys(names[k::3], file)
    (tmp_path / "pickled" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(likely(make(tmp_path / "pickled"), media_of(1), AFTER[:1]), plain)
    assert torch.equal(likely(make(folder / "model.safetensors"), media_of(1), AFTER[:1]), plain)
    (tmp_path / "pickled" / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(ModelError, match=r"cannot read the weights .*00002"):
        likely(make(tmp_path / "pickled"), media_of(1), AFTER[:1])
    (tmp_path / "pickled" / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(ModelError, match="does not say which shard holds what"):
        make(tmp_path / "pickled").version  # noqa: B018


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_a_pickle_with_code_is_refused(model: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    clip_t5.write_settings(tmp_path)
    torch.save(published(model) | {"evil": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="can run code, so it is not loaded"):
        likely(make(tmp_path), media_of(1), AFTER[:1])
    assert not (tmp_path / "ran").exists()


def without(state: State, *starts: str) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(starts)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: without(s, "mm_projector.2.bias"), "'projector.2.bias' is missing"),
        (lambda s: without(s, "lm_head"), "'t5.lm_head.weight' is missing"),
        (lambda s: without(s, "shared"), "have no 'shared.weight'"),
        (
            lambda s: without(s, "vision_tower.vision_tower.vision_model.embeddings.patch"),
            "no picture tower that we know",
        ),
        (lambda s: s | {"mm_projector.2.bias": torch.ones(3)}, r"'projector.2.bias' is \(3,\), not \(32,\)"),
        (lambda s: s | {"extra": torch.ones(4)}, "'t5.extra' is unknown"),
    ],
)
def test_weights_that_do_not_fit_are_one_clear_error(
    model: Stock, tmp_path: Path, change: Callable[[State], State], says: str
) -> None:
    write(tmp_path, change(published(model)))
    with pytest.raises(ModelError, match=says):
        likely(make(tmp_path), media_of(1), AFTER[:1])


def test_a_checkpoint_without_its_picture_tower_takes_clips_own(
    model: Stock, folder: Path, tower: ClipT5Tower, tmp_path: Path
) -> None:
    bare = write(tmp_path / "bare", without(published(model), "vision_tower."))
    whole = {f"vision_model.{name}": tensor for name, tensor in model.vision.state_dict().items()}
    (tmp_path / "clip").mkdir()
    save_file(
        whole | {"text_model.x": torch.ones(1), "logit_scale": torch.ones(1)}, tmp_path / "clip" / "model.safetensors"
    )
    found = likely(make(bare, vision=str(tmp_path / "clip")), media_of(1), AFTER[:1])
    assert torch.equal(found, likely(tower, media_of(1), AFTER[:1]))
    with pytest.raises(HubError, match=r"cannot fetch 'openai/clip-vit-large-patch14-336'.*Give `vision`"):
        likely(make(bare), media_of(1), AFTER[:1])


def test_a_checkpoint_without_a_tokenizer_takes_the_one_it_is_told(
    model: Stock, tower: ClipT5Tower, tmp_path: Path
) -> None:
    write(tmp_path / "bare", published(model))
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    t5_tokenizer().save_pretrained(tmp_path / "words")
    found = make(tmp_path / "bare", tokenizer=str(tmp_path / "words"))
    assert torch.equal(likely(found, media_of(1), AFTER[:1]), likely(tower, media_of(1), AFTER[:1]))
    with pytest.raises(HubError, match=r"cannot fetch 'google/flan-t5-xxl'.*Give `tokenizer`"):
        likely(make(tmp_path / "bare"), media_of(1), AFTER[:1])


def test_the_version_tells_weights_and_settings_apart(model: Stock, folder: Path, tmp_path: Path) -> None:
    same, other = write(tmp_path / "a", published(model)), published(model)
    other["mm_projector.0.bias"] += 1
    found = [make(place).version for place in (folder, same, write(tmp_path / "b", other))]
    assert found[0] == found[1] != found[2]
    assert make(write(tmp_path / "c", published(model), d_kv=16)).version != found[0]


def test_the_version_tells_what_lies_beside_the_checkpoint_apart(model: Stock, folder: Path, tmp_path: Path) -> None:
    bare = write(tmp_path / "bare", published(model))
    for name in ("tokenizer.json", "spiece.model"):
        (bare / name).unlink(missing_ok=True)
    for place in ("words", "other"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "tokenizer.json").write_text(place)
        (tmp_path / place / "model.safetensors").write_text(place)
    one, two = str(tmp_path / "words"), str(tmp_path / "other")
    assert make(bare, tokenizer=one).version != make(bare, tokenizer=two).version
    assert make(folder, tokenizer=one).version == make(folder, tokenizer=two).version
    assert make(folder, vision=one).version != make(folder, vision=two).version
    (tmp_path / "words" / "tokenizer.json").write_text("changed since")
    before = make(bare, tokenizer=one).version
    assert before != make(bare, tokenizer=two).version


@pytest.mark.parametrize(
    ("model", "kind"),
    [("/nowhere/at/all", ConfigError), ("nowhere", ConfigError), ("nobody/nothing", HubError)],
)
def test_without_network_or_files_the_error_says_what_to_give(model: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="Give `model`"):
        likely(ClipT5Tower(model), media_of(1), AFTER[:1])


def test_a_folder_without_weights_says_which_files_it_needs(tmp_path: Path) -> None:
    clip_t5.write_settings(tmp_path)
    with pytest.raises(ConfigError, match=r"neither model.safetensors nor pytorch_model.bin"):
        likely(make(tmp_path), media_of(1), AFTER[:1])
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match="cannot read the settings"):
        likely(make(tmp_path), media_of(1), AFTER[:1])
