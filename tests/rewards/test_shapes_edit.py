"""The exact edit quality as a reward."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffalign import world
from diffalign.cases import Case
from diffalign.errors import ConfigError, InvalidReward
from diffalign.reward_kinds import FunctionReward
from diffalign.rewards.shapes_edit import shapes_edit
from diffalign.scoring import Reward, ScoreCache, make_reward, score

OUTCOMES = world.OUTCOMES


@pytest.fixture
def reward() -> Reward:
    return make_reward(shapes_edit)


def drawn(size: int = 64, count: int = 10) -> tuple[Tensor, list[Case], list[float]]:
    """Edits of every outcome with their exact quality."""
    rng, media, cases, quality = random.Random(1), [], [], []
    for number in range(count):
        triple = world.sample_edit(rng)
        result = world.attempt(triple, OUTCOMES[number % len(OUTCOMES)], rng)
        media.append(world.render(result, size))
        cases.append(world.edit_case(triple, size=size))
        quality.append(world.judge_edit(triple.source, result, triple.edit).quality)
    return torch.stack(media), cases, quality


@pytest.mark.parametrize("size", [64, 128])
def test_the_total_is_the_smaller_part_and_the_exact_quality(reward: Reward, size: int) -> None:
    media, cases, quality = drawn(size)
    found = score(reward, media, cases)
    assert set(found.parts) == {"followed", "kept"}
    assert torch.equal(found.total, torch.minimum(found.parts["followed"], found.parts["kept"]))
    assert sum(abs(a - b) < 1e-5 for a, b in zip(found.total.tolist(), quality, strict=True)) >= 9


def test_a_batch_equals_singles_and_a_permutation_permutes(reward: Reward) -> None:
    media, cases, _ = drawn()
    whole = score(reward, media, cases).total
    singles = [score(reward, media[k : k + 1], cases[k : k + 1]).total for k in range(len(cases))]
    assert torch.equal(whole, torch.cat(singles))
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(0))
    assert torch.equal(score(reward, media[order], [cases[int(k)] for k in order]).total, whole[order])


def test_what_the_verdict_does_not_apply_to_is_invalid_and_an_unreadable_result_is_0(reward: Reward) -> None:
    media, cases, _ = drawn(count=3)
    cases[0] = replace(cases[0], prompt="make it sing", metadata={})
    media[1] = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = score(reward, media, cases)
    assert found.valid.tolist() == [False, True, True]
    assert found.total[0].isnan()
    assert float(found.total[1]) == 0
    with pytest.raises(InvalidReward, match="NaN for all 1 rows"):
        score(reward, media[:1], cases[:1])


def test_it_judges_edits_and_needs_a_source(reward: Reward) -> None:
    assert isinstance(reward, FunctionReward)
    assert (reward.modality, reward.range, reward.differentiable) == ("edit", (0.0, 1.0), False)
    with pytest.raises(ConfigError, match="judges edits, but a case has no source"):
        score(reward, torch.rand(1, 3, 64, 64), [Case(prompt="make the red circle blue")])


def test_scores_are_cached_by_picture_source_and_instruction(reward: Reward, tmp_path: object) -> None:
    media, cases, _ = drawn(count=1)
    cache = ScoreCache(f"{tmp_path}/c.sqlite")
    other = [replace(cases[0], metadata={}), replace(cases[0], source=drawn(count=2)[1][1].source)]
    for case in (*cases, *cases, *other):
        score(reward, media, [case], cache=cache, all_invalid=True)
    assert len(cache) >= 2
    assert cache.answered["shapes_edit"] == 1
