"""Prompts of a step are a function of the seed and the step's number."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.train.data import PromptSampler, PromptsConfig, merged, read, shared_prompts, weights_of
from diffalign.train.settings import TrainConfig


def cases(count: int) -> list[Case]:
    return [Case(prompt=f"prompt {k}", metadata={"tag": "odd" if k % 2 else "even"}) for k in range(count)]


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))


@given(sizes=SIZES)
def test_a_step_asked_alone_is_the_step_of_the_walk(sizes: tuple[int, int, int]) -> None:
    count, groups, seed = sizes
    walk = PromptSampler(cases(count), seed)
    through = [walk.at(step, groups) for step in range(12)]
    assert [PromptSampler(cases(count), seed).at(step, groups) for step in (11, 3, 0)] == [
        through[step] for step in (11, 3, 0)
    ]
    assert all(len(step) == groups for step in through)


@given(sizes=SIZES)
def test_no_prompt_comes_twice_in_a_step_while_there_are_enough(sizes: tuple[int, int, int]) -> None:
    count, groups, seed = sizes
    sampler = PromptSampler(cases(count), seed)
    for step in range(20):
        assert max(Counter(sampler.at(step, groups)).values()) <= (1 if count >= groups else -(-groups // count) + 1)


@given(sizes=SIZES)
def test_every_epoch_uses_every_prompt_once(sizes: tuple[int, int, int]) -> None:
    count, groups, seed = sizes
    sampler = PromptSampler(cases(count), seed)
    walk = [index for step in range(4 * count) for index in sampler.at(step, groups)]
    for epoch in range(4):
        assert sorted(walk[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_shuffle_differently() -> None:
    sampler = PromptSampler(cases(30), 0)
    assert sampler.at(0, 30) != sampler.at(1, 30) != PromptSampler(cases(30), 1).at(1, 30)


def test_images_are_numbered_prompt_by_prompt_and_each_owns_its_seed() -> None:
    sampler = PromptSampler(cases(50), 3)
    found = [sampler.cases_of(step, 4, 5) for step in range(20)]
    assert [case.prompt for case in found[2]] == [f"prompt {k}" for k in sampler.at(2, 4) for _ in range(5)]
    assert len({case.seed for step in found for case in step}) == 20 * 20
    assert PromptSampler(cases(50), 3).cases_of(7, 4, 5) == found[7]


def test_weights_are_the_shares_of_draws_and_zero_is_never_drawn() -> None:
    given = cases(40)
    sampler = PromptSampler(given, 0, weights_of(given, {"odd": 3.0}, "tag"))
    drawn = Counter(given[k].metadata["tag"] for step in range(3000) for k in sampler.at(step, 2))
    assert drawn["odd"] / 6000 == pytest.approx(0.75, abs=0.025)  # 4 standard errors and the second draw's bias
    never = PromptSampler(given, 0, weights_of(given, {"odd": 0}, "tag"))
    steps = [never.at(step, 20) for step in range(20)]
    assert all(sorted(step) == list(range(0, 40, 2)) for step in steps)
    assert never.at(3, 20) == steps[3]


@pytest.mark.parametrize(
    ("weights", "said"),
    [({"od": 1.0}, "Did you mean 'odd'"), ({"odd": 0.0, "even": 0.0}, "every prompt the weight 0")],
)
def test_weights_that_mean_nothing_are_refused(weights: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        weights_of(cases(4), weights, "tag")


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_a_number_of_zero_or_more(weight: float) -> None:
    with pytest.raises(ConfigError, match="0 or more"):
        TrainConfig(prompt_weights={"odd": weight})


def test_duplicates_are_merged_and_counted_unless_they_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red cube\n\na blue ball\na  red cube \n")
    with pytest.warns(UserWarning, match="1 of 3 prompts again; 2 distinct"):
        assert [case.prompt for case in read(PromptsConfig(file=str(file)))] == ["a red cube", "a blue ball"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read(PromptsConfig(file=str(file), keep_duplicates=True))) == 3
    with pytest.warns(UserWarning, match="again"):
        assert len(read(PromptsConfig(file=str(file), limit=1))) == 1


def test_one_instruction_for_two_pictures_is_two_cases() -> None:
    picture = Image.new("RGB", (4, 4))
    assert len(merged([Case(prompt="make it red", source=picture), Case(prompt="make it red", source=picture)])) == 2


def test_the_shapes_world_is_a_prompt_set() -> None:
    with pytest.warns(UserWarning, match="distinct"):
        found = read(PromptsConfig(split="train"))
    assert len({case.prompt for case in found}) == len(found) > 100


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    with pytest.raises(ConfigError, match="no prompt"):
        read(PromptsConfig(file=str(empty)))
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"prompt": " "}\n')
    with pytest.raises(ConfigError, match="no prompt to train on"):
        read(PromptsConfig(file=str(blank)))
    with pytest.raises(ConfigError, match="no prompt"):
        PromptSampler([], 0)
    for wrong in ({}, {"file": "a", "split": "train"}, {"split": "train", "limit": 0}):
        with pytest.raises(ConfigError):
            PromptsConfig(**wrong)


def test_prompts_that_are_evaluated_too_are_found() -> None:
    training = [Case(prompt=p) for p in ("A red cube.", "a  red CUBE", "a blue ball")]
    assert shared_prompts(training, [Case(prompt="a red cube")]) == ["A red cube.", "a  red CUBE"]
    assert shared_prompts(training, [Case(prompt="green")]) == []


def test_tasks_are_numbered_in_the_order_of_the_groups_and_unnamed_prompts_share_one() -> None:
    tags = ["a", None, "b", "a", None]
    cases = [Case(prompt=str(k), metadata={} if tag is None else {"tag": tag}) for k, tag in enumerate(tags)]
    sampler = PromptSampler(cases, seed=0)
    for step in range(3):
        found = sampler.tasks_of(step, 5, "tag")
        names = [case.metadata.get("tag") for case in sampler.cases_of(step, 5, 1)]
        assert found == [list(dict.fromkeys(names)).index(name) for name in names]
    assert sampler.tasks_of(0, 5, "other") == [0] * 5
