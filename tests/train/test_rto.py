"""RTO: a preference training's opinion of every step, against densities in closed form and against Flow-GRPO."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign import config
from diffalign.drive import Driver
from diffalign.errors import ConfigError
from diffalign.noise import Transition
from diffalign.train import adapters, checkpoint, steps
from diffalign.train.lora import layers_of
from diffalign.train.objectives.rto import RTOConfig, step_gap, step_rewards
from diffalign.train.start import train
from tests.tiny import build
from tests.train import jobs
from tests.train.tiny_runs import CALL, files, rows, settings

DENSE = {"step_norm": "group_step", "eps": 1e-12}


def saved(folder: Path, family: str = "sd3", *, by: float = jobs.TOUCH, targets: tuple[str, ...] = ()) -> Path:
    """A LoRA of rank 3 as a preference training leaves it, on layers of its own."""
    pipe = build(family)
    trained = adapters.attach(pipe, adapters.AdapterConfig(rank=3, targets=targets, seed=5))
    draws = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in trained.named_parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=draws) if by else 0 * parameter)
    trained.save(folder)
    trained.detach()
    return folder


def rto(folder: Path, family: str = "sd3", **more: Any) -> Any:
    told = {"preferred": str(folder), "samples": 6, **more.pop("settings", {})}
    return jobs.job(family, {"rto": told}, advantage=DENSE, **more)


@torch.no_grad()
def means_of(driver: Driver, rollout: Any) -> dict[int, Transition]:
    """What another pipeline makes of the steps of a walk."""
    found: dict[int, Transition] = {}
    driver.replay(rollout.part, rollout.kernel, grad=False, on_step=lambda i, p, t, q: found.update({i: t}))
    return found


def gaussian(mean: Tensor, std: float, x: Tensor) -> Tensor:
    return torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)


@given(st.floats(0.01, 2), st.integers(0, 1000))
def test_a_gap_is_the_difference_of_two_log_densities(std: float, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    x, one, two = (torch.randn(3, 5, generator=draws, dtype=torch.float64) for _ in range(3))
    assert torch.allclose(step_gap(x, one, two, std), gaussian(one, std, x) - gaussian(two, std, x), atol=1e-6 / std**2)


def test_what_the_base_draws_is_less_likely_and_what_the_preferred_draws_is_more() -> None:
    draws = torch.Generator().manual_seed(0)
    base, shift, std = torch.zeros(1, 4), torch.tensor([[0.3, -0.2, 0.1, 0.5]]), 0.7
    noise = std * torch.randn(200_000, 4, generator=draws)
    expected = float(shift.square().mean()) / (2 * std**2)
    for mean, sign in ((base, -1), (base + shift, 1)):
        found = step_gap(mean + noise, (base + shift).expand_as(noise), base.expand_as(noise), std)
        assert float(found.mean()) == pytest.approx(sign * expected, abs=4 * float(found.std()) / math.sqrt(len(noise)))


@given(st.integers(0, 1000), st.booleans())
def test_step_rewards_are_bounded_and_may_keep_the_total(seed: int, keep: bool) -> None:
    draws = torch.Generator().manual_seed(seed)
    gaps, total = torch.randn(4, 3, generator=draws) * 5, torch.randn(4, generator=draws)
    told = RTOConfig(preferred="x", keep_total=keep, scale=0.1, limit=0.07)
    found = step_rewards(gaps, torch.tensor([[0.0, 1.0, 0.5], [1.0, 2.0, 0.0]]), total, told)
    own = found - torch.stack([torch.zeros(4), torch.zeros(4), total], 1)
    assert float(own.abs().max()) <= (0.14 if keep else 0.07) + 1e-6
    if keep:
        assert torch.allclose(found.sum(1), total, atol=1e-5)
    else:
        assert torch.allclose(own[:, 2], torch.zeros(4), atol=1e-6)  # a step that says nothing


@pytest.mark.parametrize("family", ["sd3", pytest.param("sd15_ddim", marks=pytest.mark.slow)])
def test_a_preferred_model_that_is_the_base_gives_the_advantages_of_flow_grpo(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "dpo", family, by=0)
    with rto(folder, family) as (job, chosen):
        jobs.touched(job)
        chosen.prepare(job)
        dense = [micro.advantages for micro in chosen.collect(job, 0).micros]
    with jobs.job(family, "flow_grpo", advantage={"eps": 1e-12}) as (job, plain):
        jobs.touched(job)
        broadcast = [micro.advantages for micro in plain.collect(job, 0).micros]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(dense, broadcast, strict=True))


def test_gaps_are_those_of_two_pipelines(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dpo")
    with rto(folder) as (job, chosen):
        jobs.touched(job)
        rollouts, _ = chosen.sampled(job, 0, job.cases_of(0))
        gaps = chosen.gaps(job, rollouts[0])
        rollout = rollouts[0]
        kept = dict(job.call)
    pipe = build("sd3")
    adapters.load(pipe, folder)
    means = [means_of(Driver(stock, rollout.cases, **kept), rollout) for stock in (pipe, build("sd3"))]
    for column, i in enumerate(rollout.trained):
        expected = step_gap(rollout.walk.moves[i], means[0][i].mean, means[1][i].mean, means[0][i].std)
        assert torch.allclose(gaps[:, column], expected, atol=1e-6 + 1e-3 * float(expected.abs().max()))
    assert float(gaps.abs().max()) > 0


def test_what_is_far_from_the_base_on_average_is_not_cut_off() -> None:
    """Of a good preference model the mean is many deviations below 0 on the base's walks, and says nothing."""
    gaps = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) - torch.tensor([0.0, 8.0])
    base = torch.stack([gaps.mean(0), gaps.std(0, correction=0)])
    found = step_rewards(gaps, base, torch.zeros(400), RTOConfig(preferred="x"))
    assert float((found.abs() >= 0.1 - 1e-6).float().mean()) < 0.06
    assert torch.corrcoef(torch.stack([found[:, 1], gaps[:, 1]]))[0, 1] > 0.98


def test_settings_of_credit_keep_all_that_follows() -> None:
    told = config.build(RTOConfig, {"preferred": "x", "credit": {"weighting": "tempflow"}})
    assert told.credit.gamma == 1


@pytest.mark.parametrize("targets", [(), (".*",)])
def test_the_ratio_is_1_and_the_carried_lora_leaves_no_trace(targets: tuple[str, ...], tmp_path: Path) -> None:
    folder, pipe = saved(tmp_path / "dpo", targets=targets), build("sd3")
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    with rto(folder, pipe=pipe) as (job, chosen):
        chosen.prepare(job)
        found = chosen.collect(job, 0)
        told = chosen.learn(job, found.micros[0], 1.0)
        assert float(told["ratio_mean"]) == 1.0
        flags = {name for name, p in pipe.transformer.named_parameters() if p.requires_grad}
        assert flags
        assert all(".diffalign." in name for name in flags)
        assert all(p.grad is None or ".diffalign." in name for name, p in pipe.transformer.named_parameters())
    assert not layers_of(pipe.transformer)
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())


def test_a_resumed_run_has_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "dpo")
    told = settings(
        tmp_path,
        objective={"rto": {"preferred": str(folder), "samples": 4}},
        advantage={"step_norm": "group_step"},
        steps=2,
        evaluate={"limit": 2, "every": 1, "kl_prompts": 0},
    )

    def run(out: str) -> Any:
        return train(build("sd3"), told, call=CALL, out=tmp_path / out, say=lambda text: None)

    run("whole")
    real, calls = steps.Steps._one_step, [0]

    def killed(self: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(steps.Steps, "_one_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    kept = checkpoint.load(tmp_path / "parts/checkpoints/step-1").state["objective"]["spreads"]
    assert kept.shape == (2, 3)
    assert float(kept[1].min()) > 0
    assert "limited" in rows(tmp_path / "whole")[-1]
    run("parts")
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"preferred": ""}, "rto needs preferred"),
        ({"preferred": "nowhere"}, "has no adapter.json"),
        ({"limit": 0.0}, "above 0"),
        ({"noise": {"window": 2, "rule": "uniform"}}, "Use fixed"),
        ({"credit": {"gamma": 0}}, "the last step alone"),
    ],
)
def test_settings_without_sense_are_refused(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says), rto(tmp_path, settings=given):
        pass


def test_a_training_of_all_weights_carries_no_lora(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="beside which no LoRA is carried"),
        rto(saved(tmp_path / "dpo"), adapter={"kind": "full"}),
    ):
        pass
