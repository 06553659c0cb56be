"""The rewards of rubrics with a model that knows nothing, with nonsense, and with a judge that makes no mistake."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffalign import world
from diffalign.cases import Case
from diffalign.judges.asking import Question
from diffalign.rewards.key_facts import KeyFacts
from diffalign.rewards.principle import PrincipleReward
from diffalign.rewards.rubric import RubricReward
from diffalign.vision import quantise
from diffalign.world import render_many
from diffalign.world.facts import facts
from diffalign.world.grammar import TAGS, Clauses, parse, say
from diffalign.world.scenes import Scene
from diffalign.world.verifier import verify
from diffalign.zoo.telling import tell
from tests.judges.scripted_rubrics import Scripted, items_of, verdicts
from tests.judges.tiny_judges import folder

MEDIA = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CASES = [
    Case(prompt="a red circle", metadata={"rubric": ["Is it red?", "Is it round?"]}),
    Case(prompt="two blue squares", source=Image.new("RGB", (16, 16), "red")),
]
SPECS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rubric": (RubricReward, {}),
    "each": (RubricReward, {"ask": "each"}),
    "principle": (PrincipleReward, {}),
    "key_facts": (KeyFacts, {"max_tokens": 8}),
}
ODD = st.text() | st.sampled_from(
    ["[1]", "{}", '{"scores": {}}', "yes", "[" * 300, '[{"answer": "yes"}]', '{"scores": {"picture-1": 1e999}}', "\0"]
)


def reward_of(name: str, judge: Any) -> Any:
    made, options = SPECS[name]
    return made(judge, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folder(tmp_path_factory.mktemp("tiny") / "judge"))


@pytest.mark.parametrize("name", SPECS)
def test_a_model_that_knows_nothing_gives_numbers_in_range_or_invalid_rows(name: str, tiny: str) -> None:
    reward = reward_of(name, {"model": tiny, "covered": 0.0})
    found = reward(MEDIA, CASES)
    low, high = reward.range
    assert found.total.shape == (2,)
    assert all(low <= total <= high for total in found.total[found.valid].tolist())
    assert all(one.valid or one.problem for _, one in reward.judgements)
    assert all(one.raw for _, one in reward.judgements)
    if name == "each":
        assert bool(found.valid[0])  # probabilities need no words; the other row's rubric has to be written


@pytest.mark.parametrize("name", ["rubric", "principle"])
@settings(max_examples=200, deadline=None)
@given(text=ODD)
def test_nonsense_is_invalid_and_never_a_number(name: str, text: str) -> None:
    reward = reward_of(name, Scripted(lambda question: text))
    found = reward(MEDIA, CASES)
    assert not found.valid.any()
    assert all(one.problem for _, one in reward.judgements)


@settings(max_examples=100, deadline=None)
@given(text=ODD)
def test_whatever_a_judge_tells_the_share_of_facts_is_between_0_and_1(text: str) -> None:
    found = reward_of("key_facts", Scripted(lambda question: text))(MEDIA, CASES)
    assert all(0 <= total <= 1 for total in found.total[found.valid].tolist())


def drawn(count: int, seed: int) -> tuple[list[Scene], list[Case]]:
    """Scenes of the shapes world with the prompt they show, and every other one with that of another."""
    rng = random.Random(seed)
    clauses = [world.sample_clauses(rng.choice(TAGS), rng) for _ in range(count)]
    scenes = [world.sample_scene(each, rng) for each in clauses]
    asked = [clauses[k] if k % 2 == 0 else clauses[(k + 1) % count] for k in range(count)]
    return scenes, [Case(prompt=say(each)) for each in asked]


def exact(scenes: list[Scene], cases: list[Case]) -> Scripted:
    """A judge that makes no mistake: it knows the scene behind each picture."""
    known = {
        picture.numpy().tobytes(): scene for picture, scene in zip(quantise(render_many(scenes)), scenes, strict=True)
    }
    asked = {fact.question: fact for case in cases for fact in facts(parse(case.prompt) or Clauses(()))}

    def says(question: Question) -> str:
        if not question.images:
            prompt = question.text.split('"')[1]
            return json.dumps([{"question": f.question, "must": f.must} for f in facts(parse(prompt) or Clauses(()))])
        scene = known[question.images[0].numpy().tobytes()]
        listed = items_of(question)
        return verdicts([asked[item].holds(scene) for item in listed]) if listed else tell(scene)

    return Scripted(says)


def test_with_a_judge_that_makes_no_mistake_a_rubric_agrees_with_the_verifier() -> None:
    scenes, cases = drawn(60, 0)
    media = render_many(scenes)
    truth = [verdict.strict for verdict in verify(media, cases)]
    found = RubricReward(exact(scenes, cases))(media, cases)
    assert found.valid.all()
    assert [total == 1 for total in found.total.tolist()] == truth
    assert 20 < sum(truth) < 45


def test_with_a_judge_that_tells_what_is_there_a_right_scene_has_all_its_key_facts() -> None:
    scenes, cases = drawn(60, 1)
    media = render_many(scenes)
    found = KeyFacts(exact(scenes, cases))(media, cases).total.tolist()
    assert all(total == 1 for total in found[::2])
    assert sum(found[1::2]) / 30 < 0.5
