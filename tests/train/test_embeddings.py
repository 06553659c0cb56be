"""Every prompt is encoded once and alone; images stay what they were."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.drive import Driver
from diffalign.memory import tensors_in
from diffalign.train.embeddings import PromptCache
from diffalign.train.fingerprint import Fingerprint, encoders
from tests.tiny import FAMILIES, build, call

ROWS = ["sd15", "sdxl", "sd3", "flux", "chroma", "pixart_sigma", "sana", "lumina2", "z_image", "aura_flow"]
ROWS += ["hunyuan_dit", "cogvideox", "wan21", "ltx_video", "hunyuan_video"]


def frozen(name: str) -> Any:
    pipe = build(name)
    for module in encoders(pipe).values():
        module.requires_grad_(False)
    return pipe


def media(pipe: Any, name: str, batch: int, **extra: Any) -> torch.Tensor:
    own = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe(**{**call(name, batch), "generator": own, "output_type": "pt", **extra})[0])


class Count:
    """Rows that go through the encoders of a pipeline."""

    def __init__(self, pipe: Any) -> None:
        self.calls = 0
        for module in encoders(pipe).values():
            module.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("name", ROWS)
def test_images_with_the_cache_are_the_stock_images_and_a_second_call_encodes_nothing(name: str) -> None:
    pipe, batch = frozen(name), 2 if FAMILIES[name].batch else 1
    alone, both = media(pipe, name, 1), media(pipe, name, batch)
    count = Count(pipe)
    with warnings.catch_warnings(), PromptCache(pipe) as cache:
        warnings.filterwarnings("error", message=".*batch by batch")
        assert media(pipe, name, 1).equal(alone)
        torch.testing.assert_close(media(pipe, name, batch), both, rtol=0, atol=2e-3)
        first, encoded = count.calls, cache.encoded
        assert first > 0
        again = media(pipe, name, batch)
        media(pipe, name, 1)
        assert (count.calls, cache.encoded) == (first, encoded)
    assert "encode_prompt" not in vars(pipe)
    torch.testing.assert_close(again, both, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["qwen_image", "cogview4"])
def test_a_pipeline_that_pads_to_the_longest_prompt_keeps_its_own_way(name: str) -> None:
    pipe = frozen(name)
    stock = media(pipe, name, 2)
    with PromptCache(pipe) as cache:
        with pytest.warns(UserWarning, match="batch by batch"):
            assert media(pipe, name, 2).equal(stock)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*batch by batch")
            assert media(pipe, name, 2).equal(stock)
        assert cache.encoded == 0


def test_a_prompt_has_the_same_bits_in_every_batch() -> None:
    pipe = frozen("sd3")
    ask = {"prompt_2": None, "prompt_3": None}
    with PromptCache(pipe):
        alone = pipe.encode_prompt(["red cube"], **ask)
        batch = pipe.encode_prompt(["blue ball", "red cube", "red cube", "a tree"], **ask)
        word = pipe.encode_prompt("red cube", **ask)
    for one, many, single in zip(tensors_in(alone), tensors_in(batch), tensors_in(word), strict=True):
        assert many[1:2].equal(one)
        assert many[2:3].equal(one)
        assert single.equal(one)


def test_several_images_of_a_prompt_follow_each_other() -> None:
    pipe = frozen("sdxl")
    ask = {"prompt": ["red cube", "blue ball"], "num_images_per_prompt": 2, "negative_prompt": ["x", "y"]}
    stock = pipe.encode_prompt(**ask)
    with PromptCache(pipe):
        for mine, theirs in zip(pipe.encode_prompt(**ask), stock, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_other_arguments_are_other_embeddings() -> None:
    pipe = frozen("sd3")
    stock, ask = pipe.encode_prompt, {"prompt": "a", "prompt_2": None, "prompt_3": None}
    with PromptCache(pipe) as cache:
        for extra in ({}, {"clip_skip": 1}, {"negative_prompt": "x"}, {"max_sequence_length": 9}, {"clip_skip": 1}):
            for mine, theirs in zip(pipe.encode_prompt(**ask, **extra), stock(**ask, **extra), strict=True):
                assert mine.equal(theirs)
        assert cache.encoded == 4


def test_what_is_handed_out_may_be_written_to() -> None:
    pipe = frozen("sd15")
    with PromptCache(pipe):
        first = pipe.encode_prompt("a", "cpu", 1, False)[0]
        kept = first.clone()
        first.zero_()
        assert pipe.encode_prompt("a", "cpu", 1, False)[0].equal(kept)


def test_embeddings_made_in_inference_mode_serve_gradients_later() -> None:
    pipe = frozen("sd15")
    with PromptCache(pipe):
        with torch.inference_mode():
            pipe.encode_prompt("a", "cpu", 1, False)
        weight = torch.ones(16, requires_grad=True)
        (pipe.encode_prompt("a", "cpu", 1, False)[0] * weight).sum().backward()
    assert weight.grad is not None


def test_on_disk_they_serve_the_next_run_to_the_bit(tmp_path: Path) -> None:
    with PromptCache(frozen("flux"), tmp_path) as cache:
        first = media(cache.pipe, "flux", 2)
        assert cache.encoded == 3  # two prompts, and what neither wants
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    with PromptCache(frozen("flux"), tmp_path) as cache:
        assert media(cache.pipe, "flux", 2).equal(first)
        assert cache.encoded == 0
    files[0].write_bytes(b"torn")
    with PromptCache(frozen("flux"), tmp_path) as cache:
        assert media(cache.pipe, "flux", 2).equal(first)
        assert cache.encoded == 1


def test_a_place_that_cannot_be_written_only_ends_the_storing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with PromptCache(frozen("sd15"), tmp_path / "file") as cache, pytest.warns(UserWarning, match="no longer stored"):
        media(cache.pipe, "sd15", 2)


def test_memory_is_bounded_and_the_oldest_go_first() -> None:
    pipe = frozen("sd15")
    row = pipe.encode_prompt("a", "cpu", 1, False)[0].nbytes
    with PromptCache(pipe, most=2 * row) as cache:
        for prompt in ("a", "b", "a", "c", "a", "b"):
            pipe.encode_prompt(prompt, "cpu", 1, False)
        assert cache.encoded == 4
        assert cache._bytes == 2 * row


def test_a_changed_weight_an_adapter_or_another_tokenizer_is_another_fingerprint() -> None:
    from peft import LoraConfig

    pipe = frozen("sd15")
    look = Fingerprint(pipe)
    seen = [look.now()]
    assert look.now() == Fingerprint(frozen("sd15")).now() == seen[0]
    pipe.unet.conv_in.weight.data += 1  # no part of it
    assert look.now() == seen[0]
    weight = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight[7, 3] += 1
    seen.append(look.now())
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    seen.append(look.now())
    pipe.text_encoder.disable_adapters()
    seen.append(look.now())
    pipe.tokenizer.add_tokens("<mine>")
    seen.append(look.now())
    pipe.text_encoder.half()
    seen.append(look.now())
    assert len(set(seen)) == len(seen) == 6


def test_using_a_tokenizer_leaves_the_fingerprint() -> None:
    for name in ("sd3", "qwen_image_edit"):
        pipe = frozen(name)
        before = Fingerprint(pipe).now()
        media(pipe, name, 1)
        assert Fingerprint(pipe).now() == before


def test_adapters_on_the_text_encoder_are_seen_between_two_calls() -> None:
    from peft import LoraConfig

    pipe = frozen("sd15")
    with PromptCache(pipe) as cache:
        plain = pipe.encode_prompt("a", "cpu", 1, False)[0]
        pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        with pytest.warns(UserWarning, match="asks for gradients"):
            trained = pipe.encode_prompt("a", "cpu", 1, False)[0]
        assert trained.requires_grad
        assert cache.encoded == 1
        pipe.text_encoder.requires_grad_(False)
        adapted = pipe.encode_prompt("a", "cpu", 1, False)[0]
        assert adapted.equal(trained)
        assert not adapted.equal(plain)
        pipe.text_encoder.disable_adapters()
        assert pipe.encode_prompt("a", "cpu", 1, False)[0].equal(plain)


def test_given_embeddings_pass_through_and_errors_stay_the_pipelines() -> None:
    pipe = frozen("sd15")
    embeds = torch.randn(2, 77, 16)
    with PromptCache(pipe) as cache:
        assert pipe.encode_prompt(None, "cpu", 1, False, prompt_embeds=embeds)[0].equal(embeds)
        with pytest.raises(ValueError, match="batch size"):
            pipe.encode_prompt(["a", "b"], "cpu", 1, True, negative_prompt=["x"])
        with pytest.raises(TypeError):
            pipe.encode_prompt("a", "cpu", nonsense=1)
        assert cache.encoded == 0


def test_a_driver_under_the_cache_walks_as_without_it() -> None:
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    stock = Driver(build("sd3"), **call("sd3", 2), generator=generators).rollout().media
    pipe = frozen("sd3")
    count = Count(pipe)
    with PromptCache(pipe) as cache:
        for _ in range(2):
            found = Driver(pipe, **call("sd3", 2), generator=generators).rollout().media
            torch.testing.assert_close(found, stock, rtol=0, atol=1e-3)
            calls = count.calls
        assert cache.encoded == 2
        Driver(pipe, **call("sd3", 2), generator=generators).rollout(grad=True)
        assert count.calls == calls
    assert "encode_prompt" not in vars(pipe)


def test_a_closed_cache_leaves_a_living_driver_working(tmp_path: Path) -> None:
    pipe = frozen("sd15")
    with PromptCache(pipe, tmp_path) as cache:
        driver = Driver(pipe, **call("sd15", 1), generator=torch.Generator().manual_seed(1))
    driver.rollout()
    assert cache.encoded == 0
    assert os.listdir(tmp_path) == []


def test_a_pipeline_without_encode_prompt_is_left_alone() -> None:
    with PromptCache(object()) as cache:
        assert cache.encoded == 0
