"""Rewards that compare a prompt's pictures with each other: who gives them all of it, and who refuses them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign import align
from diffalign.cases import Case
from diffalign.errors import ConfigError, InvalidReward
from diffalign.judges.asking import Decision, Judgement
from diffalign.pipelines import BestOfNPipeline, DensePipeline, ReNOPipeline, SearchPipeline, SMCPipeline, TreePipeline
from diffalign.rewards.pairwise import Pairwise
from diffalign.rewards.principle import PrincipleReward
from diffalign.scoring import ScoreCache, make_reward, score
from tests.rewards.scripted import Scripted, grey
from tests.tiny import build, call

SEARCHES = [TreePipeline, SMCPipeline, ReNOPipeline, SearchPipeline, DensePipeline]


class Rank:
    """How many of the other rows of a prompt are darker; remembers what each call was about."""

    name, differentiable, modality, version, range = "rank", False, "image", None, None
    listwise = True

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        self.seen.append([case.prompt for case in cases])
        level = media.flatten(1).mean(1)
        alike = torch.tensor([[a.prompt == b.prompt for b in cases] for a in cases])
        return ((level[:, None] > level) & alike).sum(1).float()


class Level(Rank):
    """The brightness that `Rank` ranks by, each row by itself."""

    name, listwise = "level", False

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        return media.flatten(1).mean(1)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def best_of(n: int, reward: Any, family: str = "sd15", batch: int = 1, **more: Any) -> Any:
    pipe = BestOfNPipeline.from_pipe(build(family))
    return pipe(**call(family, batch), reward=reward, n=n, generator=seeded(), **more)


def pixels(output: Any) -> np.ndarray:
    return np.stack([np.asarray(row) for row in (output.images if hasattr(output, "images") else output.frames)])


def brighter(asked: Decision) -> tuple[float, float]:
    return (0.9, 0.1) if asked.images[0].mean() > asked.images[1].mean() else (0.1, 0.9)


@pytest.mark.parametrize("family", ["sd15", "ltx_video"])
def test_best_of_n_ranks_all_candidates_of_a_prompt_together(family: str) -> None:
    reward = Rank()
    ranked, level = best_of(4, reward, family, batch=2), best_of(4, Level(), family, batch=2)
    assert sorted(len(prompts) for prompts in reward.seen) == [4] * len(reward.seen)
    assert all(len(set(prompts)) == 1 for prompts in reward.seen)
    if family == "sd15":  # the rank of a video is the mean over its frames
        order = level.report.scores.total.argsort(1).argsort(1).float()
        assert torch.equal(ranked.report.scores.total, order)
        assert np.array_equal(pixels(ranked), pixels(level))
    assert (ranked.report.scores.total.sum(1) == 6).all()
    assert ranked.report.budget["reward_calls"] == level.report.budget["reward_calls"] == 4


def test_candidates_of_equal_prompts_compete_with_their_own_only() -> None:
    reward = Rank()
    asked = {**call("sd15", 2), "prompt": ["a cat"] * 2}
    pipe = BestOfNPipeline.from_pipe(build("sd15"))
    found = pipe(**asked, reward=reward, n=3, generator=[seeded(), seeded().manual_seed(4)]).report
    assert reward.seen == [["a cat"] * 3] * 2
    assert found.scores.total.sort(1).values.tolist() == [[0.0, 1.0, 2.0]] * 2


def test_several_images_of_a_call_are_candidates_of_one_comparison() -> None:
    ranked, level = (best_of(4, each, num_images_per_prompt=2, batch=2) for each in (Rank(), Level()))
    assert torch.equal(ranked.report.scores.total, level.report.scores.total.argsort(1).argsort(1).float())
    assert ranked.report.seeds == level.report.seeds
    assert np.array_equal(pixels(ranked), pixels(level))


def test_the_curve_of_a_comparison_has_a_point_for_each_draw_and_never_falls() -> None:
    curve = best_of(4, Rank()).report.curve
    assert len(curve) == 4
    assert [point[2] for point in curve] == sorted(point[2] for point in curve)
    assert curve[-1][2] == 3.0


def test_a_sum_with_a_comparison_is_scored_together_and_its_other_parts_are_cached(tmp_path: Any) -> None:
    cache = ScoreCache(tmp_path / "scores.sqlite")
    spec = [(Rank(), 1.0), ("brightness", 2.0)]
    found = best_of(4, spec, score_cache=cache).report.scores
    assert set(found.parts) == {"rank", "brightness"}
    assert torch.allclose(found.total, found.parts["rank"] + 2 * found.parts["brightness"])
    assert len(cache) == 4


def test_a_round_robin_picks_the_picture_that_wins_most() -> None:
    judge = Scripted(chooses=brighter)
    found, level = best_of(4, Pairwise(judge, against="group")), best_of(4, Level())
    assert len(judge.decisions) == 12  # every two of four, in both orders
    assert found.report.scores.total.sum() == pytest.approx(2.0)
    assert np.array_equal(pixels(found), pixels(level))


def test_a_principle_shows_candidates_beside_each_other() -> None:
    judge = Scripted(lambda q: json.dumps({"scores": {f"picture-{k + 1}": 3 for k in range(len(q.images))}}))
    best_of(4, PrincipleReward(judge))
    assert {len(question.images) for question in judge.questions} == {4}


@pytest.mark.parametrize("shell", SEARCHES)
def test_searches_refuse_a_comparison_and_say_what_to_do(shell: Any) -> None:
    judge = Scripted(chooses=brighter)
    pipe = shell.from_pipe(build("sd15"))
    for reward, instead in ((Pairwise(judge, against="group"), "against: reference"), (Rank(), "best_of_n")):
        with pytest.raises(ConfigError, match=f"(?s)'{reward.name}' compares.*{instead}"):
            pipe(**call("sd15"), reward=[reward, "brightness"], budget=160)
    assert judge.decisions == []


def test_the_one_door_refuses_a_comparison_too_and_takes_rows_by_themselves() -> None:
    pipe, asked = build("sd15"), call("sd15")
    prompt = asked.pop("prompt")
    with pytest.raises(ConfigError, match="method 'tree' scores a few pictures at a time"):
        align(pipe, prompt, method="tree", reward=Rank(), budget=64, **asked)
    alone = Pairwise(Scripted(chooses=brighter), against="reference")
    found = align(
        pipe, [Case(prompt="a", reference=grey())], method="random", reward=[alone, "brightness"], budget=32, **asked
    )
    assert found.report.scores.valid.any()


def test_frames_of_a_video_are_compared_with_those_of_the_same_time_only() -> None:
    levels = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.1, 0.9], [0.5, 0.7, 0.1]])  # (B, F)
    media, cases = levels[:, :, None, None, None].expand(3, 3, 3, 4, 4), [Case(prompt="a")] * 3
    reward = Rank()
    found = score(make_reward(reward), media, cases)
    assert torch.allclose(found.total, torch.tensor([(0 + 1 + 1) / 3, (1 + 0 + 2) / 3, (2 + 2 + 0) / 3]))
    assert reward.seen == [["a"] * 3] * 3
    plain = score(make_reward(Level()), media, cases).total
    assert torch.allclose(plain, levels.mean(1))


def test_an_error_about_candidates_repeats_what_the_judge_said() -> None:
    class Mute(Level):
        name = "mute"

        def __init__(self) -> None:
            self.judgements: list[tuple[Case, Judgement]] = []

        def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
            self.judgements += [(case, Judgement(problem="the reply is a poem")) for case in cases]
            return torch.full((len(cases),), torch.nan)

    with pytest.raises(InvalidReward, match=r"all 2 candidates.*mute says: the reply is a poem"):
        best_of(2, Mute())
    with pytest.raises(InvalidReward, match=r"all 1 rows.*mute says: the reply is a poem"):
        score(make_reward([Mute(), "brightness"]), torch.rand(1, 3, 4, 4), [Case(prompt="a")])
    with pytest.raises(InvalidReward, match="no pair of it was answered"):
        best_of(2, Pairwise(Scripted(), against="group"))
