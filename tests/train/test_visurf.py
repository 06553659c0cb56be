"""ViSurf: its three controls in closed form, and references among the draws of a tiny pipeline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign import media
from diffalign.errors import ConfigError
from diffalign.noise import Kernel, Levels, cps, ddim
from diffalign.train import known
from diffalign.train.advantage import AdvantageConfig, advantages
from diffalign.train.objective import make
from diffalign.train.objectives.visurf import controlled
from diffalign.train.objectives.visurf_grpo import bridged
from diffalign.train.opening import opened
from tests.train import jobs
from tests.train.test_known import OTHERS, search_run
from tests.train.tiny_runs import CALL, files, pipeline, rows, run, settings

NONE = torch.tensor([False])


def compared(rewards: list[float], *, smooth: bool = True) -> torch.Tensor:
    """Advantages of one group whose last image is the reference."""
    members = torch.tensor(rewards)[:, None]
    held = controlled(members, members[:, 0], len(rewards), NONE, smooth=smooth)
    config = AdvantageConfig(normalise="grpo", ddof=0, eps=0.0)
    return advantages(held, torch.ones(1), torch.zeros(len(rewards), dtype=torch.long), config).values


@pytest.mark.parametrize("size", [4, 24])
def test_a_reference_that_no_draw_reaches_leads(size: int) -> None:
    found = compared([0.0] * size + [1.0])
    assert float(found[-1]) == pytest.approx(math.sqrt(size), rel=1e-5)
    assert found[:-1].tolist() == pytest.approx([-1 / math.sqrt(size)] * size, rel=1e-5)


@given(st.lists(st.floats(0, 1, width=16), min_size=3, max_size=8).filter(lambda r: max(r) - min(r) > 0.01))
def test_once_a_draw_is_as_good_the_reference_says_nothing(draws: list[float]) -> None:
    found, alone = compared([*draws, max(draws)]), compared_alone(draws)
    assert float(found[-1]) == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(found[:-1], alone * math.sqrt((len(draws) + 1) / len(draws)), rtol=1e-3, atol=1e-4)
    assert float(compared([*draws, max(draws)], smooth=False)[-1]) > 0


def compared_alone(draws: list[float]) -> torch.Tensor:
    config = AdvantageConfig(normalise="grpo", ddof=0, eps=0.0)
    return advantages(
        torch.tensor(draws)[:, None], torch.ones(1), torch.zeros(len(draws), dtype=torch.long), config
    ).values


def test_a_reward_that_comes_for_nothing_does_not_count() -> None:
    members = torch.tensor([[0.2, 0.5], [0.4, 0.6], [0.9, 9.0]])
    free = torch.tensor([False, True])
    total = torch.tensor([0.7, 1.0, 0.9])
    kept = controlled(members, total, 3, free, smooth=False)
    assert kept[-1].tolist() == pytest.approx([0.9, 0.0])
    held = controlled(members, total, 3, free, smooth=True)  # 0.9 without it, which a draw passes
    assert held[-1].tolist() == pytest.approx([0.3, 0.55])
    assert torch.equal(held[:-1], members[:-1])


def asked(folder: Path, **more: object) -> dict[str, object]:
    (folder / OTHERS).write_text("green tree\ngrey boat\n")
    search = search_run(folder / "known")
    told = {
        "prompts": None,
        "data": {"from_search": [str(search)]},
        "objective": {"visurf": {"draws": 2}},
        "evaluate": {"prompts": str(folder / OTHERS)},
    }
    return told | more


@pytest.mark.parametrize("micro_batch", [4, 3, 1])
def test_the_last_of_every_group_is_the_reference_as_the_model_would_draw_it(tmp_path: Path, micro_batch: int) -> None:
    told = settings(tmp_path, **asked(tmp_path, micro_batch=micro_batch))
    with opened(pipeline(), told, model="tiny", call=CALL, seed=0, out=tmp_path / "o") as job:
        objective = make(told.objective)
        objective.check(job)
        cases = job.cases_of(0)
        micros, rewards = objective.sampled(job, 0, cases)  # type: ignore[attr-defined]
        made = torch.cat([micro.media for micro in micros])
        plain = torch.cat([media.to_tensor(job.driver([case]).rollout(quiet=True).media).detach() for case in cases])
        for k, case in enumerate(cases):
            if k % 4 == 3:
                picture = next(e.pictures[0] for e in job.stock.entries if e.case.prompt == case.prompt)
                clean = known.latents(job, [case], [picture])
                expected = media.to_tensor(job.driver([case]).decode(clean)).detach()[0]
                torch.testing.assert_close(made[k], expected, atol=2e-3, rtol=0)
                assert not torch.allclose(made[k], plain[k], atol=1e-2)
            else:
                torch.testing.assert_close(made[k], plain[k], atol=2e-3, rtol=0)
        torch.testing.assert_close(rewards, job.score(made, cases))


def test_a_run_learns_and_says_how_often_references_lead(tmp_path: Path) -> None:
    found, _ = run(tmp_path, "out", **asked(tmp_path))
    assert found["steps"] == 3


def test_a_job_without_references_or_with_strange_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reference picture of each prompt"):
        run(tmp_path, objective="visurf")
    told = asked(tmp_path)
    with pytest.raises(ConfigError, match="free names 'clip'"):
        run(tmp_path, **{**told, "objective": {"visurf": {"free": ["clip"]}}})
    with pytest.raises(ConfigError, match="two or more draws"):
        run(tmp_path, **{**told, "group_size": 2, "micro_batch": 2})


# on walks


@pytest.mark.parametrize("chosen", [cps(0.7), ddim(0.0), cps(1.0)], ids=["cps", "still", "fresh"])
def test_a_bridge_has_the_levels_of_the_sampler_and_ends_at_the_reference(chosen: Kernel) -> None:
    sigma = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0]).double()
    levels, draws = Levels(1 - sigma, sigma, "flow"), torch.Generator().manual_seed(0)
    clean = torch.tensor([0.5, -2.0, 3.0]).expand(200_000, 3)
    kernel = bridged(chosen, clean, torch.ones(len(clean), dtype=torch.bool))
    x = torch.randn(clean.shape, generator=draws)
    for i in range(4):
        alpha, level = levels.at(i)
        torch.testing.assert_close(x.mean(0), alpha * clean[0], atol=0.02, rtol=0)
        assert float((x - alpha * clean).std()) == pytest.approx(level, abs=5e-3)
        said = torch.randn(clean.shape, generator=draws)  # whatever the model predicts
        x = kernel(levels, x, said, i).sample(torch.randn(clean.shape, generator=draws))
    torch.testing.assert_close(x, clean.contiguous(), atol=1e-4, rtol=0)


def test_a_model_that_points_at_the_reference_walks_the_bridge() -> None:
    sigma = torch.tensor([1.0, 0.6, 0.0]).double()
    levels, draws = Levels(1 - sigma, sigma, "flow"), torch.Generator().manual_seed(0)
    clean, x = torch.randn(4, 5, generator=draws), torch.randn(4, 5, generator=draws)
    alpha, level = levels.at(1)
    said = levels.target(clean, (x - alpha * clean) / level, 1)
    rows = torch.tensor([True, False, True, False])
    one, two = cps(0.7)(levels, x, said, 1), bridged(cps(0.7), clean, rows)(levels, x, said, 1)
    torch.testing.assert_close(one.mean, two.mean)
    other = bridged(cps(0.7), clean, rows)(levels, x, said + 1, 1).mean
    assert torch.equal(other[~rows], cps(0.7)(levels, x, said + 1, 1).mean[~rows])


def on_walks(folder: Path, **more: object) -> dict[str, object]:
    own = {"noise": {"kernel": "cps"}}
    return asked(folder, **{"objective": {"visurf_grpo": own}, **more})


def test_bridges_lead_to_the_references_and_have_the_ratio_1(tmp_path: Path) -> None:
    told = settings(tmp_path, **on_walks(tmp_path))
    with opened(pipeline(), told, model="tiny", call=CALL, seed=0, out=tmp_path / "o") as job:
        objective: Any = make(told.objective)
        objective.check(job)
        jobs.touched(job)
        micros = objective.collect(job, 0).micros
        for micro in micros:
            for k, case in enumerate(micro.cases):
                picture = next(e.pictures[0] for e in job.stock.entries if e.case.prompt == case.prompt)
                clean = known.latents(job, [case], [picture])[0]
                assert torch.allclose(micro.walk.latents[-1][k], clean, atol=1e-4) == (k % 4 == 3)
            old, new = objective.replayed(job, micro)
            assert torch.equal(old, new)
            assert float(objective.learn(job, micro, 1.0)["ratio_mean"]) == 1.0


def test_a_run_on_walks_learns_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    whole, _ = run(tmp_path, "whole", **on_walks(tmp_path))
    assert "reference_leads" in rows(tmp_path / "whole")[-1]
    run(tmp_path, "parts", **on_walks(tmp_path, steps=2))
    run(tmp_path, "parts", **on_walks(tmp_path))
    assert whole["steps"] == 3
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"noise": {"kernel": "flow_sde"}}, "bridges keep the coefficients"),
        ({"credit": {"similarity": "coca"}}, "which a bridge has none of"),
        ({"free": ["clip"]}, "free names 'clip'"),
    ],
)
def test_walks_without_sense_are_refused(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, **on_walks(tmp_path, objective={"visurf_grpo": given}))
