"""What a job's rewards become before it learns: totals, tasks, hardness, filters, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.train.job import Job
from tests.train import jobs
from tests.train.jobs import Brightness, asked


class Blind(Brightness):
    """NaN of every image."""

    name = "blind"

    def __call__(self, media: Tensor, cases: Any) -> Tensor:
        return torch.full((len(media),), torch.nan)


def values(found: Any) -> Tensor:
    return torch.cat([micro.advantages for micro in found.micros])


@pytest.mark.parametrize("objective", ["flow_grpo", "dense_grpo"])
@pytest.mark.filterwarnings("ignore:reward .* failed")
def test_a_reward_of_weight_0_may_fail_everywhere_and_changes_nothing(objective: str) -> None:
    found = []
    for members in ([(Brightness(100), 1.0)], [(Brightness(100), 1.0), (Blind(), 0.0)]):
        with jobs.job("sd3", members=members, **asked(objective)) as (job, chosen):
            found.append(chosen.collect(job, 0))
    assert found[1].stats["invalid"] == 0
    assert found[1].stats["reward"] == found[0].stats["reward"] > 0
    assert torch.equal(values(found[0]), values(found[1]))


@pytest.mark.parametrize(
    "settings", [{"flow_grpo": {}}, {"dense_grpo": {}}, {"flow_grpo": {"credit": {"phases": [0.9]}}}]
)
@pytest.mark.filterwarnings("ignore:reward .* failed")
def test_a_missing_reward_leaves_its_weight_to_the_others_where_the_job_says_so(settings: dict[str, Any]) -> None:
    told = {"missing": "renormalise"}
    if settings != {"flow_grpo": {}}:
        told["step_norm"] = "group_step"
    found = []
    for members in ([(Brightness(100), 2.0)], [(Brightness(100), 1.0), (Blind(), 1.0)]):
        with jobs.job("sd3", settings, members=members, advantage=told) as (job, chosen):
            found.append(chosen.collect(job, 0))
    assert found[1].stats["invalid"] == 0
    assert found[1].stats["reward"] == pytest.approx(found[0].stats["reward"])
    assert values(found[1]).any()
    torch.testing.assert_close(values(found[0]), values(found[1]), rtol=1e-4, atol=1e-4)


PROMPTS = ("red cube", "blue ball", "green tree", "grey boat")


def test_tasks_of_prompts_are_known_for_the_whole_step_and_scale_their_advantages() -> None:
    """One task of two prompts has one deviation, so that its advantages stand to each other as its rewards do."""
    with jobs.job(
        "sd3",
        reward=(reward := Brightness(100)),
        prompts=PROMPTS,
        tags=("a", "b", "a", "b"),
        groups=4,
        advantage={"normalise": "tmn", "tmn_gamma": 0.0},
    ) as (job, chosen):
        assert reward.scale == 100
        tags = [case.metadata["tag"] for case in job.cases_of(0)]
        ids = job.task_ids(0).tolist()
        assert len(set(ids)) == 2
        assert len(set(zip(tags, ids, strict=True))) == 2
        _, rewards = chosen.sampled(job, 0, job.cases_of(0))
        found = values(chosen.collect(job, 0))[:, 0]
        groups = rewards[:, 0].double().view(4, 3)
        for tag in "ab":
            rows = torch.tensor([tags[3 * k] == tag for k in range(4)])
            std = groups[rows].var(1).mean().sqrt()
            expected = (groups[rows] - groups[rows].mean(1, keepdim=True)) / (std + 1e-4)
            torch.testing.assert_close(found.view(4, 3)[rows].double(), expected, rtol=1e-4, atol=1e-4)


def test_every_process_knows_the_tasks_of_all_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"groups": 4, "updates": 2, "advantage": {"normalise": "tmn"}}
    with jobs.job("sd3", prompts=PROMPTS, tags=("a", "b", "c", "b"), **settings) as (job, _):
        found, tags = [], []
        monkeypatch.setattr(Job, "processes", property(lambda self: 2))
        for rank in range(2):
            monkeypatch.setattr(Job, "rank", property(lambda self, rank=rank: rank))
            vars(job).pop("group_ids", None)
            found.append(job.task_ids(0))
            tags += [case.metadata["tag"] for case in job.cases_of(0)]
    assert torch.equal(found[0], found[1])
    assert len(set(zip(tags, found[0].tolist(), strict=True))) == len(set(tags)) == 3


def test_prompts_without_a_task_are_one_task_and_a_name_that_none_has_is_refused() -> None:
    with jobs.job("sd3", prompts=PROMPTS, groups=4, advantage={"normalise": "tmn"}) as (job, chosen):
        assert not job.task_ids(0).any()
        assert values(chosen.collect(job, 0)).isfinite().all()
    with pytest.raises(ConfigError, match="task_by is 'kind'"), jobs.job("sd3", advantage={"task_by": "kind"}):
        pass


class Cosines:
    """A tower that finds the images of a prompt ever less like it, as far as the opposite."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def cosines(self, media: Tensor, prompts: Any) -> Tensor:
        self.prompts += prompts
        return torch.linspace(0.9, -1.2, len(media))


def test_the_hardness_of_data_weighs_images_by_how_far_they_are_from_their_prompt() -> None:
    plain, told = [], {"hardness": "data"}
    for advantage, tower in (({}, None), (told, Cosines())):
        with jobs.job("sd3", reward=Brightness(100), micro_batch=6, advantage=advantage, tower=tower) as (job, chosen):
            plain.append(values(chosen.collect(job, 0)))
            prompts = [case.prompt for case in job.cases_of(0)]
    assert tower.prompts == prompts
    delta = (1 - torch.linspace(0.9, -1.2, 6)).clamp(0, 1)
    mean = delta.view(2, 3).mean(1).repeat_interleave(3)
    factor = delta.sigmoid() / mean.sigmoid()
    torch.testing.assert_close(plain[1], (plain[0] * factor[:, None]), rtol=1e-4, atol=1e-4)


def test_hardness_is_that_of_a_video_over_its_frames() -> None:
    with jobs.job("sd3", advantage={"hardness": "data"}, tower=Cosines()) as (job, _):
        found = job.misses(torch.rand(2, 3, 3, 8, 8), job.cases_of(0)[:2])
        each = torch.linspace(0.9, -1.2, 6).view(2, 3).mean(1)
        torch.testing.assert_close(found, (1 - each).clamp(0, 1))


DENSE = {"dense_grpo": {}}
NOT_IN_A_JOB: list[tuple[Any, dict[str, Any], str]] = [
    ("flow_grpo", {"hardness": "responsiveness"}, "reward of a demonstration"),
    ("flow_grpo", {"hardness": "both"}, "reward of a demonstration"),
    ("flow_grpo", {"hardness": "data"}, "no CLIP(.|\n)*evaluate.tower"),
    (DENSE, {"step_norm": "group_step", "renorm": True}, "objective.dense_grpo.credit"),
    (DENSE, {"step_norm": "group_step", "credit": "return"}, "objective.dense_grpo.credit"),
    (DENSE, {"step_norm": "group_step", "mu": 0.5}, "objective.dense_grpo.credit"),
    ("flow_grpo", {"order": "normalise_combine", "filter": [0.1, 0.2]}, "2 numbers for 1 rewards"),
]


@pytest.mark.parametrize(("objective", "advantage", "says"), NOT_IN_A_JOB, ids=str)
def test_advantages_that_a_job_cannot_have_are_refused_before_anything_is_sampled(
    objective: Any, advantage: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says), jobs.job("sd3", objective, advantage=advantage):
        pass


@pytest.mark.parametrize("process", ["none", "renorm"])
def test_step_rewards_meet_the_outcome_before_they_are_summed(process: str) -> None:
    settings = {"dense_grpo": {"credit": {"process": process, "gamma": 1}}}
    with jobs.job("sd3", settings, advantage={"step_norm": "group_step"}) as (_, chosen):
        gains, final = torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[0.5]])
        each = gains - 0.5 if process == "renorm" else gains
        expected = each.flip(1).cumsum(1).flip(1)
        torch.testing.assert_close(chosen.through_steps(gains, final), expected)


class OneGroup(Brightness):
    """Brightness of one prompt's images; all others are alike."""

    prompt = ""

    def __call__(self, media: Tensor, cases: Any) -> Tensor:
        apart = torch.tensor([float(case.prompt == self.prompt) for case in cases])
        return super().__call__(media, cases) * apart


def test_a_filter_leaves_the_loss_to_the_mean_over_what_it_keeps() -> None:
    """Groups without any spread teach nothing, so that the filter only changes how many images the loss is over."""
    found = []
    for advantage in ({}, {"filter": 1e-6}):
        reward = OneGroup(100)
        with jobs.job("sd3", reward=reward, advantage=advantage) as (job, chosen):
            jobs.touched(job)
            reward.prompt = job.cases_of(0)[0].prompt
            collected = chosen.collect(job, 0)
            told = jobs.learn(job, chosen, collected.micros)
            found.append((collected.stats["kept"], values(collected), told["loss"], jobs.gradients(job)))
    (all_kept, plain, _, whole), (half_kept, filtered, _, part) = found
    assert (all_kept, half_kept) == (1.0, 0.5)
    assert torch.equal(plain, filtered)
    assert whole.any()
    torch.testing.assert_close(part, 2 * whole, rtol=1e-4, atol=1e-5 * float(whole.norm()))
