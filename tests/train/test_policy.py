"""Laws that every policy gradient over denoising steps keeps, on tiny pipelines of the real classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from diffalign import noise
from diffalign.train import preflight
from diffalign.train.loop import Loop
from tests.train import jobs
from tests.train.jobs import Brightness, asked

DRESSES: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": True},
}
FOUR = ("sd15_ddim", "sd3", "flux", "wan21")
KERNELS = {"flow_sde": "sd3", "cps": "sd3", "ddim": "sd15"}
every_objective = pytest.mark.parametrize("objective", jobs.OBJECTIVES)


def rows(micro: Any) -> list[Any]:
    """What carries advantages: the layers of a tree, or the micro-batch itself."""
    return getattr(micro, "layers", [micro])


def dealt(objective: Any, micro: Any) -> float:
    """Deal random advantages; gives -mean(A), steps counted alike, those that have no noise (Heun's) as 0."""
    torch.manual_seed(0)
    for part in rows(micro):
        part.advantages = torch.randn(part.advantages.shape)
    if micro is not rows(micro)[0]:
        return -sum(float(part.advantages.mean()) for part in rows(micro)) / len(rows(micro))
    return -float((micro.advantages * (objective.deviations(micro) > 0)).mean())


def require_exact(job: Any, objective: Any) -> None:
    """Ratio 1 to the bit, loss -mean(A), no clip, and a gradient."""
    jobs.touched(job)
    found = objective.collect(job, 0)
    for micro in found.micros:
        before, again = objective.replayed(job, micro)
        assert torch.equal(before, again)
        assert before.dtype == torch.float32
        expected = dealt(objective, micro)
        told = jobs.learn(job, objective, [micro])
        assert told["ratio_mean"] == pytest.approx(1, abs=1e-6)
        assert told["loss"] == pytest.approx(expected, abs=1e-6)
        assert told["clip_low"] == told["clip_high"] == 0
    assert float(jobs.gradients(job).norm()) > 0


@pytest.mark.parametrize("family", FOUR)
@every_objective
def test_before_any_update_the_ratio_is_1_to_the_bit_and_the_loss_minus_the_mean_advantage(
    objective: str, family: str
) -> None:
    with jobs.job(family, **asked(objective)) as (job, chosen):
        require_exact(job, chosen)


@pytest.mark.parametrize("dress", DRESSES)
@pytest.mark.parametrize(("objective", "family"), [*(("flow_grpo", f) for f in FOUR), ("tree_grpo", "sd3")])
def test_the_ratio_is_1_to_the_bit_under_autocast_and_with_checkpointing(
    objective: str, family: str, dress: str
) -> None:
    with jobs.job(family, **asked(objective), **DRESSES[dress]) as (job, chosen):
        require_exact(job, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in jobs.FAST if name not in FOUR])
def test_the_ratio_is_1_to_the_bit_on_every_family(family: str) -> None:
    with jobs.job(family) as (job, chosen):
        require_exact(job, chosen)


@every_objective
def test_the_ratio_is_1_to_the_bit_with_summed_log_densities_and_with_full_weights(objective: str) -> None:
    with jobs.job("sd3", **asked(objective, density="sum")) as (job, chosen):
        require_exact(job, chosen)
    with jobs.job("sd3", **asked(objective) | {"adapter": {"kind": "full"}}) as (job, chosen):
        require_exact(job, chosen)


@every_objective
def test_the_preflight_passes_and_leaves_neither_gradient_nor_change(objective: str) -> None:
    with jobs.job("sd3", **asked(objective)) as (job, chosen):
        before = jobs.weights(job)
        found = preflight.fly(job, chosen)
        assert found.ratio_off == 0
        assert found.reached > 0
        assert found.spread > 0
        assert jobs.equal(before, jobs.weights(job))
        assert not jobs.gradients(job).any()


@pytest.mark.parametrize("convention", ["mean", "sum"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_log_densities_are_those_of_torchs_normal(kernel: str, convention: str) -> None:
    told = {"flow_grpo": {"density": convention, "noise": {"kernel": kernel}}}
    with jobs.job(KERNELS[kernel], told) as (job, chosen):
        rollout = chosen.collect(job, 0).micros[0]
        make = noise.KERNELS[kernel](0.7)
        with torch.no_grad():
            for k, i in enumerate(rollout.trained):
                x, following = rollout.walk.latents[i], rollout.walk.latents[i + 1]
                step = make(rollout.driver.levels, x, rollout.driver.predict(x, i), i)
                each = Normal(step.mean.double(), step.std).log_prob(following.double()).flatten(1)
                total = each.sum(1) if convention == "sum" else each.mean(1)
                torch.testing.assert_close(rollout.log_probs[k].double(), total, rtol=1e-4, atol=1e-5)


@every_objective
@pytest.mark.parametrize("kl", ["code", "path", "velocity"])
def test_an_untouched_lora_has_no_divergence_at_all(objective: str, kl: str) -> None:
    with jobs.job("sd3", **asked(objective, beta=0.5, kl=kl)) as (job, chosen):
        micros = chosen.collect(job, 0).micros
        for micro in micros:
            for part in rows(micro):
                part.advantages = torch.zeros_like(part.advantages)
        told = jobs.learn(job, chosen, micros)
        assert told["kl"] == 0
        assert told["loss"] == 0
        assert not jobs.gradients(job).any()


@pytest.mark.slow
@every_objective
@pytest.mark.parametrize("kl", ["code", "path", "velocity"])
def test_beta_only_scales_the_divergence(objective: str, kl: str) -> None:
    found: dict[float, tuple[Tensor, Any]] = {}
    for beta in (0.0, 0.1, 0.3):
        with jobs.job("sd3", **asked(objective, beta=beta, kl=kl)) as (job, chosen):
            jobs.touched(job)
            told = jobs.learn(job, chosen, chosen.collect(job, 0).micros)
            found[beta] = jobs.gradients(job), told.get("kl")
    assert found[0.1][1] == found[0.3][1] > 0
    assert found[0.0][1] is None  # nothing measured it
    part = found[0.1][0] - found[0.0][0]
    assert float(part.norm()) > 0
    torch.testing.assert_close(found[0.3][0] - found[0.0][0], 3 * part, rtol=1e-2, atol=1e-3 * float(part.norm()))


@every_objective
def test_advantages_of_a_group_sum_to_zero_and_do_not_see_a_constant_of_the_prompt(objective: str) -> None:
    def collected(reward: Any) -> list[Any]:
        with jobs.job("sd3", reward=reward, **asked(objective)) as (job, chosen):
            return [part.advantages.clone() for micro in chosen.collect(job, 0).micros for part in rows(micro)]

    class PerPrompt(Brightness):
        def __call__(self, media: Tensor, cases: Any) -> Tensor:
            return super().__call__(media, cases) + torch.tensor([float(len(case.prompt)) for case in cases])

    plain, shifted = collected(Brightness(100)), collected(PerPrompt(100))
    assert any(part.any() for part in plain)
    for a, b in zip(plain, shifted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
        assert float(a.sum(0).abs().max()) < 1e-4 * len(a)


@every_objective
def test_constant_rewards_change_no_weight_at_all(objective: str) -> None:
    reward = Brightness(100)
    with jobs.job("sd3", reward=reward, optim={"learning_rate": 0.01}, **asked(objective)) as (job, chosen):
        loop = Loop(job, chosen, track=lambda *_: None)
        loop._one_step()
        loop.step += 1
        after_one = jobs.weights(job)
        reward.scale = 0.0  # the optimiser has momentum now, which must not move anything either
        told = loop._one_step()
        assert jobs.equal(after_one, jobs.weights(job))
        assert told["loss"] == 0
        assert told["ratio_mean"] == pytest.approx(1)
        assert told["frac_zero_std"] == 1


def test_a_scaler_of_half_precision_bears_a_step_without_any_gradient() -> None:
    reward = Brightness(100)
    with jobs.job("sd3", reward=reward) as (job, chosen):
        scaler = job.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        job.accelerator.unscale_gradients = lambda optimizer: scaler.unscale_(optimizer.optimizer)
        loop = Loop(job, chosen, track=lambda *_: None)
        for scale in (100.0, 0.0, 100.0):
            reward.scale, before = scale, jobs.weights(job)
            loop._one_step()
            assert jobs.equal(before, jobs.weights(job)) == (scale == 0)


@every_objective
def test_micro_batches_add_up_to_the_gradient_of_one_batch(objective: str) -> None:
    def gradient(micro_batch: int) -> Tensor:
        told = asked(objective) | {"group_size": 4, "micro_batch": micro_batch}
        with jobs.job("sd3", reward=Brightness(100), **told) as (job, chosen):
            jobs.touched(job)
            micros = chosen.collect(job, 0).micros
            assert len(micros) == 8 // micro_batch
            jobs.learn(job, chosen, micros)
            return jobs.gradients(job)

    parts, whole = gradient(4 if objective == "tree_grpo" else 1), gradient(8)
    assert float((parts - whole).norm()) < 2e-3 * float(whole.norm())


def test_a_gradient_from_one_walk_is_the_same_however_it_is_cut() -> None:
    with jobs.job("sd3", group_size=4, micro_batch=1, groups=2) as (job, chosen):
        jobs.touched(job)
        micros = chosen.collect(job, 0).micros
        jobs.learn(job, chosen, micros)
        together = jobs.gradients(job)
        for micro in micros:
            for name, value in chosen.learn(job, micro, 1 / 8).items():
                assert value.isfinite(), name
        torch.testing.assert_close(jobs.gradients(job), together)


@every_objective
def test_the_ratio_leaves_1_in_the_second_update_only(objective: str) -> None:
    told = asked(objective) | {"updates": 2, "optim": {"learning_rate": 0.01}}
    with jobs.job("sd3", reward=Brightness(100), **told) as (job, chosen):
        jobs.touched(job)
        loop, means = Loop(job, chosen, track=lambda *_: None), []
        learn = chosen.learn

        def listening(*args: Any) -> dict[str, Tensor]:
            before, again = chosen.replayed(job, args[1])
            means.append(float((again - before).abs().max()))
            return learn(*args)

        chosen.learn = listening
        start = jobs.weights(job)
        loop._one_step()
        assert loop.updates == 2
        assert not jobs.equal(start, jobs.weights(job))
        assert means[0] == 0
        assert means[1] > 1e-6
