from __future__ import annotations

import torch

from diffalign.arguments import from_cases, take
from diffalign.cases import Case
from tests.tiny import build


def test_rows_of_a_call_repeat_what_belongs_to_a_case_and_nothing_else() -> None:
    call = {"prompt": "a", "system_prompt": "be kind", "guidance_scale": 2.0, "prompt_embeds": torch.arange(2.0)[None]}
    found = take(call, [0, 0], 1)
    assert found["prompt"] == ["a", "a"]
    assert found["system_prompt"] == "be kind"
    assert found["guidance_scale"] == 2.0
    assert found["prompt_embeds"].shape == (2, 2)


def test_all_rows_in_order_are_the_call_itself() -> None:
    call = {"prompt": ["a", "b"]}
    assert take(call, [0, 1], 2) == call
    assert take(call, [1, 0, 1], 2) == {"prompt": ["b", "a", "b"]}


def test_one_negative_prompt_serves_every_case() -> None:
    call = from_cases(build("sd15"), [Case(prompt="a"), Case(prompt="b")], {"negative_prompt": "blurry"})
    assert call["prompt"] == ["a", "b"]
    assert call["negative_prompt"] == ["blurry", "blurry"]
