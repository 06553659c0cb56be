"""The shipped models are stock, small, inside their bands, and work without any code of ours."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

from diffalign import world, zoo
from diffalign.errors import UnknownName
from diffalign.zoo.clip import auc

PIPELINES = [name for name in zoo.names() if name not in ("shapes-clip", "shapes-vlm")]
LARGEST, ALTOGETHER = 12_000_000, 64_000_000  # bytes


@pytest.mark.parametrize("name", PIPELINES)
def test_zoo_load_gives_the_stock_class_in_float32(name: str) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipe = zoo.load(name)
    assert type(pipe) is StableDiffusion3Pipeline
    assert pipe.transformer.dtype is torch.float32
    assert pipe.text_encoder.dtype is torch.float32


def test_plain_diffusers_draws_two_red_circles_without_arguments_or_warnings(caplog: pytest.LogCaptureFixture) -> None:
    from diffusers import DiffusionPipeline

    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
        pipe = DiffusionPipeline.from_pretrained(str(zoo.folder("shapes-sd3")))
        pipe.set_progress_bar_config(disable=True)
        image = pipe("two red circles", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    assert [str(w.message) for w in caught if w.category in (UserWarning, RuntimeWarning)] == []
    # diffusers always remarks on an AutoencoderTiny in this class, as it does for the published tiny autoencoders
    assert [text for text in caplog.messages if "Expected types for vae" not in text] == []


def test_words_outside_the_vocabulary_neither_crash_nor_matter() -> None:
    pipe = zoo.load("shapes-sd3")
    dog, cat = (pipe.tokenizer([word], padding="max_length", return_tensors="pt").input_ids for word in ("dog", "cat"))
    table = pipe.text_encoder.get_input_embeddings()
    assert torch.equal(table(dog)[0, 1], table(cat)[0, 1])


@pytest.mark.parametrize("name", PIPELINES)
def test_a_model_called_as_its_card_says_draws_from_the_case_seed(name: str) -> None:
    from diffalign.zoo.accuracy import generate

    pipe, call = zoo.load(name), zoo.card(name)["call"] | {"num_inference_steps": 1}
    cases = world.prompts("heldout")[:3]
    together, alone = generate(pipe, cases, call), generate(pipe, cases[2:], call)
    assert together.shape == (3, 3, 64, 64)
    assert torch.allclose(together[2:], alone, atol=1e-4)


def test_weights_are_safetensors_within_the_size_limits() -> None:
    files = [file for name in zoo.names() for file in zoo.folder(name).rglob("*") if file.is_file()]
    assert max(file.stat().st_size for file in files) <= LARGEST
    assert sum(file.stat().st_size for file in files) <= ALTOGETHER
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".jinja"}


@pytest.mark.parametrize("name", zoo.names())
def test_cards_hold_measured_numbers_with_their_command(name: str) -> None:
    card = zoo.card(name)
    assert {"name", "class", "bytes", "seed", "data", "method", "cost", "command", "call", "strict", "measured"} <= set(
        card
    )
    for found in card["measured"].values():
        assert found["lo"] <= found["strict"] <= found["hi"]
        assert found["n"] >= 80


def test_the_generator_is_imperfect_on_purpose() -> None:
    measured = zoo.card("shapes-sd3")["measured"]
    assert 0.35 <= measured["heldout"]["strict"] <= 0.70
    assert 0.05 <= measured["hard"]["strict"] <= 0.20


@pytest.mark.skipif("shapes-turbo" not in zoo.names(), reason="build it first: diffalign zoo build shapes-turbo")
def test_the_student_keeps_most_of_its_teacher_in_one_step() -> None:
    card = zoo.card("shapes-turbo")
    assert card["call"]["num_inference_steps"] == 1
    assert card["call"]["guidance_scale"] <= 1
    assert card["strict"] >= 0.6 * zoo.card("shapes-sd3")["strict"]


@pytest.mark.skipif("shapes-clip" not in zoo.names(), reason="build it first: diffalign zoo build shapes-clip")
def test_the_judge_is_useful_and_imperfect() -> None:
    assert 0.75 <= zoo.card("shapes-clip")["strict"] <= 0.92


@pytest.mark.skipif("shapes-clip" not in zoo.names(), reason="build it first: diffalign zoo build shapes-clip")
def test_open_clip_loads_the_judge_and_prefers_the_true_caption() -> None:
    model, _, tokens = zoo.load("shapes-clip")
    scene = world.Scene((world.Shape("circle", "red", 20, 20, 8), world.Shape("circle", "red", 44, 40, 8)))
    with torch.no_grad():
        image = model.encode_image(world.render(scene)[None] * 2 - 1)
        texts = model.encode_text(tokens(["two red circles", "a blue square"]))
    assert torch.cosine_similarity(image, texts).argmax() == 0


def test_measure_counts_images_and_gives_an_interval() -> None:
    found = zoo.measure("shapes-sd3", seed=1, n=4)
    assert found["n"] == 4
    assert 0 <= found["lo"] <= found["strict"] <= found["hi"] <= 1


def test_unknown_model_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match="shapes-sd3"):
        zoo.load("shapes-sd")


def test_auc_is_one_for_a_perfect_and_a_half_for_a_blind_judge() -> None:
    truth = torch.tensor([True, False, True, False])
    assert auc(truth.float(), truth) == 1
    assert auc(torch.zeros(4), truth) == 0.5
