"""ImageReward at a tiny width, in the published layout, against its formulas written out by hand."""

from __future__ import annotations

import math
import os
import string
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import v2

from diffalign.cases import Case
from diffalign.errors import ConfigError, DiffalignError, HubError, InvalidReward, ModelError
from diffalign.rewards import imagereward
from diffalign.rewards.imagereward import CONTEXT, MEAN, STD, Scorer, normalised, ours
from diffalign.scoring import Reward, ScoreCache, make_reward, score
from diffalign.vision import to_pil
from tests.rewards.layouts import expanded, layout

State = dict[str, Tensor]
LETTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
SIDE, LAYERS, SEES, READS = 32, 2, 128, 192  # widths of the encoders: 2 and 3 heads of 64
PROMPTS = ["two red circles", "a blue square", "", "a green triangle above a red circle"]
HOSTILE = ["", " ", "[SEP] [PAD] [CLS] [MASK]", "[ENC]", "\U0001f600" * 50, "x" * 10_000, "word " * 2_000, "\x00\ud83d"]


def small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A published shape with every width made small."""
    words = len(WORDS) + 2
    narrow = {1024: SEES, 3072: 3 * SEES, 4096: 160, 768: READS, 197: 1 + (SIDE // 16) ** 2, 30524: words}
    return tuple(narrow.get(n, n) for n in shape)


def published(seed: int = 0) -> State:
    """A random checkpoint with the names of the published one, unused entries included."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in (layout("imagereward") | layout("imagereward", "unused")).items():
        number = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        if name.startswith("mlp.layers."):
            shape = tuple(READS if n == 768 else n for n in shape)
        elif number >= LAYERS:
            continue
        elif "intermediate.dense" in name:
            shape = small((96, *shape[1:]))
        elif ".output.dense.weight" in name and "attention" not in name:
            shape = small((768, 96))
        else:
            shape = small(shape)
        spread = 0.5 if len(shape) == 1 or name.endswith(("_token", "_embed")) else 1.5 / math.sqrt(shape[-1])
        state[name] = torch.randn(shape, generator=generator) * spread + ("orm" in name and name.endswith("weight"))
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    return state


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of heads of 64: (B, Q, D), (B, K, D), (B, K, D) -> (B, Q, D)."""
    rows = []
    for at in range(0, query.shape[-1], 64):
        q, k, v = (x[..., at : at + 64] for x in (query, key, value))
        logits = q @ k.mT / 8.0
        rows.append((logits if mask is None else logits.masked_fill(mask[:, None] == 0, -torch.inf)).softmax(-1) @ v)
    return torch.cat(rows, -1)


def by_hand(state: State, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The score from the published names alone: ViT (before each block a norm), BERT (after each), five matrices."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    eye = "blip.visual_encoder"
    kernel = state[f"{eye}.patch_embed.proj.weight"]
    patches = F.unfold(pixels, 16, stride=16).mT @ kernel.flatten(1).T + state[f"{eye}.patch_embed.proj.bias"]
    x = torch.cat([state[f"{eye}.cls_token"].expand(len(pixels), -1, -1), patches], 1) + state[f"{eye}.pos_embed"]
    for k in range(LAYERS):
        block = f"{eye}.blocks.{k}"
        q, k_, v = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + linear(attended(q, k_, v), f"{block}.attn.proj")
        inner = F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        x = x + linear(inner, f"{block}.mlp.fc2")
    seen = norm(x, f"{eye}.norm", 1e-6)

    book = "blip.text_encoder.embeddings"
    y = state[f"{book}.word_embeddings.weight"][ids] + state[f"{book}.position_embeddings.weight"][: ids.shape[1]]
    y = norm(y, f"{book}.LayerNorm", 1e-12)
    for k in range(LAYERS):
        layer = f"blip.text_encoder.encoder.layer.{k}"
        for kind, source in (("attention", None), ("crossattention", seen)):
            told, at = (y if source is None else source), f"{layer}.{kind}"
            q, k_, v = linear(y, f"{at}.self.query"), linear(told, f"{at}.self.key"), linear(told, f"{at}.self.value")
            found = linear(attended(q, k_, v, mask if source is None else None), f"{at}.output.dense")
            y = norm(found + y, f"{at}.output.LayerNorm", 1e-12)
        inner = F.gelu(linear(y, f"{layer}.intermediate.dense"))
        y = norm(linear(inner, f"{layer}.output.dense") + y, f"{layer}.output.LayerNorm", 1e-12)
    z = y[:, 0]
    for place in (0, 2, 4, 6, 7):
        z = linear(z, f"mlp.layers.{place}")
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published file, and the published kind of vocabulary beside it."""
    path = tmp_path_factory.mktemp("imagereward")
    torch.save(published(), path / "ImageReward.pt")
    write_vocabulary(path)
    return path


def write_vocabulary(path: Path) -> None:
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def reward(folder: Path) -> Any:
    return make(folder)


def make(folder: Path, **options: Any) -> Any:
    return make_reward({"imagereward": {"model": str(folder), "tokenizer": str(folder), "path": "tensor", **options}})


def media_of(rows: int, height: int = 40, width: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(seed))


def cases_of(prompts: list[str]) -> list[Case]:
    return [Case(prompt=p) for p in prompts]


def total(reward: Reward, media: Tensor, prompts: list[str]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*reads 35 tokens")
        return score(reward, media, cases_of(prompts)).total


def encoded(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """[CLS], the letters of each word, [SEP], and [PAD] up to 35 tokens."""
    rows = []
    for prompt in prompts:
        letters = ["##" * (at > 0) + letter for word in prompt.split() for at, letter in enumerate(word)]
        rows.append([WORDS.index(token) for token in ["[CLS]", *letters[: CONTEXT - 2], "[SEP]"]])
    ids = torch.tensor([row + [0] * (CONTEXT - len(row)) for row in rows])
    return ids, (torch.arange(CONTEXT) < torch.tensor([[len(row)] for row in rows])).long()


def test_the_names_of_the_published_file_and_of_our_module_are_one_to_one_at_full_size() -> None:
    module = Scorer(
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"image_size": 224, "patch_size": 16},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"vocab_size": 30524, "max_position_embeddings": 512},
    )
    there = layout("imagereward")
    assert len({ours(name) for name in there}) == len(there) == 620
    assert {ours(name): shape for name, shape in there.items()} == {
        name: tuple(tensor.shape) for name, tensor in module.state_dict().items()
    }
    assert {ours(name) for name in layout("imagereward", "unused")} == {None}


def test_the_sizes_of_the_published_model_are_read_from_its_shapes() -> None:
    state = {str(ours(k)): torch.empty(v, device="meta") for k, v in layout("imagereward").items()}
    made = Scorer.like(state, "it")
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert (made.vision.config.image_size, made.vision.config.num_attention_heads) == (224, 16)
    assert made.text.config.num_attention_heads == 12


def test_a_range_in_a_layout_stands_for_each_of_its_numbers() -> None:
    assert list(expanded({"a.{0-1}.b{1-2}.c": [3], "d": [4]})) == ["a.0.b1.c", "a.0.b2.c", "a.1.b1.c", "a.1.b2.c", "d"]


def test_the_score_is_that_of_the_formulas_written_out(reward: Reward) -> None:
    media = media_of(4, SIDE, SIDE)
    pixels = v2.functional.normalize(media, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    expected = by_hand(published(), pixels, *encoded(PROMPTS))
    assert expected.std() > 0.05  # the random weights tell the rows apart
    assert torch.allclose(total(reward, media, PROMPTS), expected, atol=2e-4)


def test_the_picture_and_the_prompt_both_count(reward: Reward) -> None:
    media = media_of(2, SIDE, SIDE)
    found = total(reward, media[[0, 0, 1, 1]], ["a", "two blue squares", "a", "two blue squares"])
    assert len({round(v, 4) for v in found.tolist()}) == 4


def test_raw_scores_of_mean_and_of_mean_plus_std_become_0_and_1() -> None:
    found = normalised(torch.tensor([MEAN, MEAN + STD], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0.0, 1.0], abs=1e-12)
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)


@examples(max_examples=10)
@given(picks=st.permutations(range(4)), height=st.integers(20, 60), width=st.integers(20, 60))
def test_a_batch_in_any_order_equals_single_calls(reward: Reward, picks: list[int], height: int, width: int) -> None:
    media, prompts = media_of(4, height, width)[picks], [PROMPTS[k] for k in picks]
    singles = [total(reward, media[k : k + 1], prompts[k : k + 1]) for k in range(4)]
    assert torch.allclose(total(reward, media, prompts), torch.cat(singles), atol=1e-4)


def test_the_reference_path_is_the_published_transform(folder: Path, reward: Any) -> None:
    fresh, media = make(folder, path="auto"), media_of(2, 48, 70)
    steps = v2.Compose(
        [v2.Resize(SIDE, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIDE), v2.PILToTensor()]
    )
    pixels = torch.stack([steps(picture) for picture in to_pil(media)]).float() / 255
    expected = v2.functional.normalize(
        pixels, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    )
    assert torch.allclose(fresh.preprocess(media), expected, atol=1e-5)
    assert not torch.equal(fresh.preprocess(media), reward.preprocess(media))


@examples(max_examples=5)
@given(seed=st.integers(0, 99))
def test_the_gradient_reaches_the_pixels_and_matches_a_directional_difference(reward: Reward, seed: int) -> None:
    media = media_of(1, 40, 40, seed).mul(0.5).add(0.25).requires_grad_()
    (gradient,) = torch.autograd.grad(total(reward, media, PROMPTS[:1]).sum(), media)
    direction, step = gradient / gradient.norm(), 2e-2
    ends = [float(total(reward, media.detach() + s * direction, PROMPTS[:1])) for s in (step, -step)]
    assert gradient.isfinite().all()
    assert gradient.norm() > 1e-3
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=5e-2)


def test_the_weights_get_no_gradient(reward: Any) -> None:
    total(reward, media_of(2).requires_grad_(), PROMPTS[:2]).sum().backward()
    found = list(reward.scorer.parameters())
    assert found
    assert all(w.grad is None and not w.requires_grad and not w.is_meta for w in found)
    assert not any(module.training for module in reward.scorer.modules())


def test_loading_under_inference_mode_leaves_later_gradients_and_the_random_state_alone(folder: Path) -> None:
    fresh, before = make(folder), torch.random.get_rng_state()
    with torch.inference_mode():
        total(fresh, media_of(1), PROMPTS[:1])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert total(fresh, media_of(1).requires_grad_(), PROMPTS[:1]).requires_grad


def test_half_precision_and_autocast_keep_a_float32_head(folder: Path, reward: Any) -> None:
    half, media = make(folder, dtype="bfloat16"), media_of(4)
    assert half.scorer.head[0].weight.dtype == torch.float32
    assert torch.equal(half.scorer.head[0].weight, reward.scorer.head[0].weight)
    plain = total(reward, media, PROMPTS)
    assert total(half, media, PROMPTS).dtype == torch.float32
    assert torch.allclose(total(half, media, PROMPTS), plain, rtol=2e-2, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(total(reward, media, PROMPTS), plain)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("path", ["tensor", "reference"])
def test_a_picture_that_is_not_finite_is_an_invalid_row_and_its_neighbours_are_not(
    folder: Path, bad: float, path: str
) -> None:
    fresh, media = make(folder, path=path), media_of(3)
    clean = total(fresh, media, PROMPTS[:3])
    media[1, 0, 3, 3] = bad
    found = score(fresh, media, cases_of(PROMPTS[:3]))
    assert found.valid.tolist() == [True, False, True]
    assert torch.allclose(found.total[[0, 2]], clean[[0, 2]], atol=1e-5)
    with pytest.raises(InvalidReward, match="NaN for all 1 rows"):
        score(fresh, media[1:2], cases_of(["a"]))


def test_prompts_beyond_35_tokens_are_counted_and_named(folder: Path) -> None:
    fresh = make(folder)
    with pytest.warns(UserWarning, match=r"reads 35 tokens, so the end of 1 of 2 prompts does not count \(1 so far\)"):
        score(fresh, media_of(2), cases_of(["short", "a " * 34]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(fresh, media_of(1), cases_of(["a " * 33]))  # with both end marks exactly 35
    assert fresh.truncated == 1
    long = total(fresh, media_of(2)[[0, 0]], ["a " * 33 + "b", "a " * 33 + "c"])
    assert torch.allclose(long[0], long[1])  # rows of one batch may differ in the last bit


def test_hostile_prompts_are_plain_text_and_leave_their_neighbours_alone(reward: Any) -> None:
    media = media_of(1).expand(len(HOSTILE) + 1, -1, -1, -1)
    found = total(reward, media, [*HOSTILE, "a"])
    whole = [not any("\ud800" <= letter <= "\udfff" for letter in prompt) for prompt in [*HOSTILE, "a"]]
    assert found.isfinite().tolist() == whole  # half a character is no text
    assert torch.allclose(found[-1:], total(reward, media[:1], ["a"]), atol=1e-4)
    ids, _ = reward.tokens(["a [SEP] b"])
    marks = reward.tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"])
    assert ids[0, 0] == marks[0]
    assert [int((ids == mark).sum()) for mark in marks] == [1, 1]


def test_the_pickle_is_converted_once_and_a_safetensors_copy_scores_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    plain = total(make(folder), media_of(1), ["a"])
    (kept,) = (tmp_path / "cache" / "weights").glob("*.safetensors")
    stamp = kept.stat().st_mtime_ns
    assert torch.equal(total(make(folder), media_of(1), ["a"]), plain)
    assert kept.stat().st_mtime_ns == stamp
    kept.rename(tmp_path / "ImageReward.safetensors")
    assert torch.equal(total(make(folder, model=str(tmp_path)), media_of(1), ["a"]), plain)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_a_pickle_with_code_is_refused_and_does_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**published(), "evil": Evil()}, tmp_path / "ImageReward.pt")
    with pytest.raises(ModelError, match="can run code, so it is not loaded"):
        total(make(folder, model=str(tmp_path)), media_of(1), ["a"])
    assert not (tmp_path / "ran").exists()


def without(state: State, name: str) -> State:
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: without(s, "mlp.layers.7.bias"), "'head.7.bias' is missing"),
        (lambda s: without(s, "blip.visual_encoder.pos_embed"), "'vision.embeddings.position_embedding' is missing"),
        (lambda s: s | {"mlp.layers.7.weight": torch.ones(2, 16)}, r"'head.7.weight' is \(2, 16\), not \(1, 16\)"),
        (lambda s: s | {"blip.visual_encoder.pos_embed": torch.ones(5)}, "do not fit"),
        (lambda s: s | {"blip.extra": torch.ones(5)}, "'blip.extra' is unknown"),
        (lambda s: {"weight": torch.ones(3)}, "They are not ImageReward's"),
    ],
)
def test_weights_that_do_not_fit_are_one_clear_error(folder: Path, tmp_path: Path, change: Any, says: str) -> None:
    torch.save(change(published()), tmp_path / "ImageReward.pt")
    with pytest.raises(ModelError, match=says):
        total(make(folder, model=str(tmp_path)), media_of(1), ["a"])


@pytest.mark.parametrize("key", ["model", "tokenizer"])
def test_without_network_a_hub_id_says_so_and_what_to_give_instead(
    folder: Path, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    default = {"model": imagereward.HUB, "tokenizer": imagereward.TOKENIZER}[key]
    with pytest.raises(HubError, match=f"cannot fetch .*{default}.* from the hub: .*Give `{key}` "):
        total(make(folder, **{key: default}), media_of(1), ["a"])


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"model": "/nowhere/at/all"}, ConfigError),
        ({"tokenizer": "nowhere"}, ConfigError),
        ({"dtype": "int8"}, ConfigError),
        ({"modle": "x"}, ConfigError),
    ],
)
def test_a_wrong_option_is_one_clear_error(folder: Path, options: Any, kind: type[DiffalignError]) -> None:
    with pytest.raises(kind):
        total(make(folder, **options), media_of(1), ["a"])


def test_a_folder_without_a_vocabulary_and_one_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither vocab.txt nor tokenizer.json"):
        total(make(folder, tokenizer=str(tmp_path)), media_of(1), ["a"])
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="Give `tokenizer` another"):
        total(make(folder, tokenizer=str(tmp_path)), media_of(1), ["a"])
    (tmp_path / "tokenizer.json").unlink()
    write_vocabulary(tmp_path)
    with (tmp_path / "vocab.txt").open("a", encoding="utf-8") as file:
        file.write("".join(f"extra{k}\n" for k in range(9)))
    with pytest.raises(ModelError, match=r"knows .* tokens, and the model"):
        total(make(folder, tokenizer=str(tmp_path)), media_of(1), ["a"])


def test_scores_are_cached_by_the_weights_and_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    cache, asked = ScoreCache(tmp_path / "c.sqlite"), cases_of(["a"])
    for _ in range(2):
        score(make(folder), media_of(1), asked, cache=cache)
    assert len(cache) == 1
    other = tmp_path / "other"
    other.mkdir()
    torch.save(published(seed=1), other / "ImageReward.pt")
    score(make(folder, model=str(other)), media_of(1), asked, cache=cache)
    assert len(cache) == 2
    (other / "vocab.txt").write_text("\n".join(reversed(WORDS)))
    assert make(folder).version != make(folder, tokenizer=str(other)).version
