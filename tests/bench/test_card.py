"""Unlike cards are never compared, and the message names what differs."""

from __future__ import annotations

import dataclasses
import json

import pytest

from diffalign.bench.card import EvaluationCard, hash_prompts, require_alike
from diffalign.cases import Case
from diffalign.errors import ConfigError

CARD = EvaluationCard(
    model="m", sampler="Euler", call={"num_inference_steps": 20, "guidance_scale": 2.5}, dtype="float32", seeds=(1, 2),
    prompts="abc", rewards={"clip": "1"}, versions={"torch": "2"},
)  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model", "n", "'model'"),
        ("sampler", "DDIM", "'sampler'"),
        ("call", {"num_inference_steps": 4, "guidance_scale": 2.5}, "'call.num_inference_steps' is 20"),
        ("call", {"num_inference_steps": 20}, "'call.guidance_scale'"),
        ("dtype", "float16", "'dtype'"),
        ("seeds", (1, 3), "'seeds'"),
        ("prompts", "abd", "'prompts'"),
        ("rewards", {"clip": "2"}, "'rewards.clip'"),
        ("versions", {"torch": "3"}, "'versions.torch'"),
    ],
)
def test_cards_that_differ_cannot_be_compared(field: str, value: object, said: str):
    with pytest.raises(ConfigError, match=said):
        require_alike(CARD, dataclasses.replace(CARD, **{field: value}))


def test_the_method_is_what_is_compared():
    require_alike(CARD, dataclasses.replace(CARD, method={"name": "best_of_n", "n": 4}))


def test_a_card_survives_json():
    require_alike(CARD, EvaluationCard.read(json.loads(json.dumps(CARD.json()))))


def test_a_card_that_lacks_a_field_is_refused():
    content = CARD.json()
    del content["dtype"]
    with pytest.raises(ConfigError, match="no 'dtype'"):
        EvaluationCard.read(content)


def test_the_prompt_hash_sees_words_and_order():
    a, b = Case(prompt="a"), Case(prompt="b")
    assert hash_prompts([a, b]) == hash_prompts([a.with_seed(9), b])
    assert len({hash_prompts([a, b]), hash_prompts([b, a]), hash_prompts([a])}) == 3
