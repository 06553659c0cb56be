"""Credit and gradients are those of a training, and the comparison of them goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy import stats

from diffalign import atomic
from diffalign.bench import credit, credit_gradients
from diffalign.bench.credit_gradients import cosine, gradients, jackknife, ratio, signal
from diffalign.bench.credit_methods import Method, Methods, against_siblings
from diffalign.bench.credit_oracle import (
    OracleConfig,
    Worth,
    redrawn,
)
from diffalign.cli import main
from diffalign.errors import ConfigError
from diffalign.train.objective import make
from tests.bench.credit_jobs import (
    CALL,
    DENSE,
    NOISE,
    STEPS,
    Failing,
    all_methods,
    still_job,
    walked,
)
from tests.cli.conftest import here, tiny  # noqa: F401
from tests.train.jobs import gradients as trained_gradients
from tests.train.jobs import job

# the methods


def test_dense_gains_are_what_each_step_moves_a_linear_reward_by() -> None:
    with still_job(groups=2, group_size=3, micro_batch=3) as found:
        methods = Methods(all_methods(dense=DENSE), NOISE)
        rollouts, rewards = walked(found, methods)
        A = methods.credited(found, rollouts, rewards, 64)["dense"].A.double()
        x = torch.stack([torch.cat([r.walk.latents[i] for r in rollouts]).flatten(1).mean(1) for i in range(STEPS)], 1)
        gains = x.double().diff(dim=1).view(2, 3, STEPS - 1)
    torch.testing.assert_close(A, (gains - gains.mean(1, keepdim=True)).flatten(0, 1), rtol=1e-3, atol=1e-5)


def test_plain_credit_is_what_a_training_step_deals() -> None:
    with job("sd3", call=CALL, groups=2, group_size=3, micro_batch=3) as (found, _):
        methods = Methods(all_methods(coca={"objective": {"flow_grpo": {"credit": {"similarity": "coca"}}}}), NOISE)
        rollouts, rewards = walked(found, methods)
        credited = methods.credited(found, rollouts, rewards, 64)
        for name, told in (("flow_grpo", "flow_grpo"), ("coca", {"flow_grpo": {"credit": {"similarity": "coca"}}})):
            dealt = make(told).collect(found, 0).micros
            torch.testing.assert_close(credited[name].A, torch.cat([m.advantages for m in dealt]).float())
        assert credited["coca"].cost == {"nfe": 0, "decodes": 0, "reward_calls": 0}
        assert rollouts[0].walk.predictions


def test_methods_that_share_completions_are_each_charged_for_them() -> None:
    told = all_methods(dense=DENSE, again={**DENSE, "advantage": {"step_norm": "group_all"}})
    with job("sd3", call=CALL, groups=1, group_size=2, micro_batch=2) as (found, _):
        methods = Methods(told, NOISE)
        rollouts, rewards = walked(found, methods)
        cost = {name: each.cost for name, each in methods.credited(found, rollouts, rewards, 64).items()}
    assert cost["flow_grpo"] == {"nfe": 0, "decodes": 0, "reward_calls": 0}
    assert cost["dense"] == cost["again"]
    assert cost["dense"]["reward_calls"] == STEPS - 1
    assert cost["dense"]["nfe"] == sum(STEPS - i for i in range(STEPS - 1))


def test_siblings_are_compared_with_redraws_of_their_step() -> None:
    told = all_methods(siblings={"objective": {"tree_grpo": {"branches": 3, "scale": False}}})
    with still_job(groups=1, group_size=2, micro_batch=2) as found:
        methods = Methods(told, NOISE)
        rollouts, rewards = walked(found, methods)
        A = against_siblings(found, methods.objectives["siblings"], rollouts, rewards, 64)  # type: ignore[arg-type]
        others = redrawn(found, rollouts[0], 2, 2, 1, 64, "sibling")[..., 0]
        mine = rewards[:, 0]
        gap = mine - (mine + others.sum(1)) / 3
        deviation = mine.std(correction=0) + 1e-4
    torch.testing.assert_close(A[:, 2], gap / deviation, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"dense": {"objective": "dense_grpo"}}, "no plain 'flow_grpo'"),
        ({"flow_grpo": {}, "oracle": {}}, "called 'oracle'"),
        ({"flow_grpo": {}, "x": {"of": "y", "control": "shuffled"}}, "none of the methods"),
        ({"flow_grpo": {}, "x": {"objective": {"flow_grpo": {"noise": {"level": 1}}}}}, "same walks"),
        ({"flow_grpo": {}, "x": {"control": "shuffled"}}, "belongs to another method"),
    ],
)
def test_methods_that_cannot_be_compared_are_refused(told: dict[str, Any], words: str) -> None:
    from diffalign import config

    with pytest.raises(ConfigError, match=words):
        Methods({name: config.build(Method, each) for name, each in told.items()}, NOISE)


# the gradients


@pytest.mark.parametrize("weighting", ["none", "tempflow", "ratio_norm"])
def test_a_method_has_the_gradient_that_a_training_step_has(weighting: str) -> None:
    objective = {"flow_grpo": {"credit": {"weighting": weighting}}}
    with job("sd3", objective, call=CALL, groups=2, group_size=3, micro_batch=3) as (found, chosen):
        micros = chosen.collect(found, 0).micros
        for micro in micros:
            chosen.learn(found, micro, len(micro) / 6)
        trained = trained_gradients(found)
        A = torch.cat([micro.advantages for micro in micros])[None]
        methods = Methods(all_methods(weighted={"objective": objective}), NOISE)
        methods.walker.noise(found, 0)
        weights = methods.step_weights(micros[0], weighting)
        g, steps = gradients(found, micros, A, weights[None], "mean")
        torch.testing.assert_close(g[0], trained, rtol=1e-3, atol=1e-6 * float(trained.abs().max()) + 1e-9)
        torch.testing.assert_close((weights[:, None] * steps).sum(0), g[0])


def test_orthogonal_gradients_have_no_signal_and_equal_ones_no_noise() -> None:
    parts = torch.eye(8)
    assert ratio(parts) == pytest.approx(1 / 7)
    assert signal(parts @ parts.T) == pytest.approx(0)
    mean = torch.tensor([3.0, 0, 0, 0, 0, 0, 0, 0])
    noisy = mean + torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    assert signal((noisy @ noisy.T).double()) == pytest.approx(9 / 8, rel=0.1)
    assert ratio(noisy) == pytest.approx(9 / 8, rel=0.1)


def test_the_cosine_is_that_of_the_expectations_and_scale_does_not_matter() -> None:
    drawing = torch.Generator().manual_seed(0)
    a, b = torch.tensor([1.0, 0.0, 0, 0]), torch.tensor([1.0, 1.0, 0, 0])
    x, y = (mean + torch.randn(1500, 4, generator=drawing).double() for mean in (a, b))
    assert cosine(x @ y.T, x @ x.T, y @ y.T) == pytest.approx(0.5**0.5, abs=0.1)
    assert cosine(x @ x.T, x @ x.T, x @ x.T) == pytest.approx(1)
    assert cosine(3 * x @ y.T, 9 * x @ x.T, y @ y.T) == pytest.approx(cosine(x @ y.T, x @ x.T, y @ y.T))
    hidden = torch.diag(torch.ones(4)) - 0.1
    assert cosine(hidden, hidden, hidden) != cosine(hidden, hidden, hidden)  # NaN


def test_the_jackknife_of_a_mean_is_its_t_interval() -> None:
    values = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    found = jackknife(lambda parts: float(values[parts].mean()), 8)
    error = float(values.std()) / 8**0.5
    lo, hi = stats.t.interval(0.95, 7, loc=float(values.mean()), scale=error)
    assert found["lo"] == pytest.approx(lo)
    assert found["hi"] == pytest.approx(hi)


def test_influence_is_gathered_from_the_middle_block_in_the_walks_order() -> None:
    with job("sd3", call=CALL, groups=2, group_size=2, micro_batch=2) as (found, objective):
        micros = objective.collect(found, 0).micros
        A = torch.cat([micro.advantages for micro in micros])
        seen = credit_gradients.Influence(found)
        with seen.hooked():
            gradients(found, micros, A[None], torch.ones(1, STEPS - 1), "mean", look=seen)
        thr = seen.thr(A, found.group_ids)
        for i in micros[0].trained:
            assert torch.cat(seen.noises[i]).shape == torch.cat([m.walk.latents[0] for m in micros]).shape
            assert len(torch.cat(seen.features[i])) == 4
        noise = torch.cat(seen.noises[0])
        assert float(noise.std()) == pytest.approx(1, abs=0.2)
        assert thr.shape == (4, STEPS - 1)
        denoiser = next(iter(found.trained.denoisers.values()))
        assert credit_gradients.middle(denoiser) is denoiser.get_submodule("transformer_blocks.1")
        assert not credit_gradients.middle(denoiser)._forward_hooks


def test_images_without_a_reward_count_nowhere_and_survive_the_row(tmp_path: Path) -> None:
    told = credit.CreditBench(
        methods=all_methods(dense=DENSE), reward="failing", parts=3, groups=1, group_size=4, noise=NOISE,
        oracle=OracleConfig(redraws=2),
    )  # fmt: skip
    with job("sd3", reward=Failing(), call=CALL, groups=1, group_size=4, micro_batch=4, invalid_limit=0.5) as (
        found,
        _,
    ):
        methods = Methods(told.methods, told.noise)
        row, tensors = credit.measure(found, methods, told, 0)
    again = json.loads(json.dumps(atomic.finite(row), allow_nan=False))
    assert again["rewards"][2] is None
    assert credit.tensor(again["rewards"]).isnan().tolist() == [False, False, True, False]
    assert again["A"]["flow_grpo"][2] == [0.0] * (STEPS - 1)
    torch.testing.assert_close(Worth.read(again["worth"]).V, Worth.read(row["worth"]).V, equal_nan=True)
    assert all(bool(each.isfinite().all()) for each in tensors.values())


# the verb

ASK = [
    "bench", "credit", "--config", "credit_shapes", "--parts", "3", "--reference", "1", "--groups", "1",
    "--group-size", "3", "-r", "brightness", "oracle.redraws=2", "sampling.num_inference_steps=4", "noise.high=3",
    "call.height=16", "call.width=16", "--json", "out.json", "--influence",
]  # fmt: skip


@pytest.mark.slow
def test_the_shipped_comparison_runs_and_goes_on_where_it_stopped(tiny: str, here: Path) -> None:  # noqa: F811
    assert main([*ASK, "-m", tiny]) == 0
    folder = here / "out/bench_credit"
    rows, whole = folder / "rows.jsonl", json.loads((here / "out.json").read_text())
    assert len(rows.read_text().splitlines()) == 4
    assert {*whole["gradients"]} == {*whole["ranks"], "oracle"}
    assert len(whole["ranks"]["dense"]["spearman"]) == len(whole["trained"]) == 3
    assert whole["gradients"]["flow_grpo"]["cosine"]["mean"] == whole["gradients"]["flow_grpo"]["cosine"]["mean"]
    costs = {name: row["nfe"] for name, row in whole["gradients"].items()}
    assert costs["flow_grpo"] == costs["coca"] == costs["coca_fixed"] == 4 + 3 * 3 < costs["dense_1"] < costs["dense"]
    assert costs["dense_shuffled"] == costs["dense"]
    assert Image.open(folder / "plot.png").size[0] > 1000
    assert (folder / "influence.png").exists()
    text = (folder / "table.md").read_text()
    assert all(f"| {name} |" in text for name in whole["gradients"])
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:2]) + lines[2][:30])  # killed in the middle of a line
    assert main([*ASK, "-m", tiny]) == 0
    assert json.loads((here / "out.json").read_text()) == whole
    assert (folder / "table.md").read_text() == text
    kept = rows.read_bytes()
    assert main([*ASK, "-m", tiny]) == 0
    assert rows.read_bytes() == kept
    assert main([*ASK, "-m", tiny, "--group-size", "2"]) == 2


def test_without_redraws_only_gradients_are_told(tiny: str, here: Path) -> None:  # noqa: F811
    ask = ["bench", "credit", "-m", tiny, "-r", "brightness", "--parts", "3", "--reference", "0", "--groups", "1"]
    ask += ["--group-size", "2", "oracle.redraws=0", "call.num_inference_steps=3", "call.height=16", "call.width=16"]
    assert main([*ask, "call.guidance_scale=2", "--json", "out.json"]) == 0
    found = json.loads((here / "out.json").read_text())
    assert found["ranks"] is None
    assert found["variance"] is None
    assert "oracle" not in found["gradients"]
    assert found["gradients"]["flow_grpo"]["nfe"] == 2 * (3 + 3 * 2)


@pytest.mark.parametrize("bad", [["--parts", "2"], ["--group-size", "1"], ["oracle.redraws=3"], ["methods.x.of=y"]])
def test_a_comparison_that_cannot_work_is_refused_first(bad: list[str], tiny: str, here: Path) -> None:  # noqa: F811
    assert main([*ASK, "-m", tiny, *bad]) == 2
    assert not (here / "out/bench_credit/rows.jsonl").exists()


def test_numbers_of_parts_do_not_move_when_more_are_asked_for() -> None:
    few = credit.CreditBench(methods={}, reward="brightness", parts=3, reference=2)
    more = credit.CreditBench(methods={}, reward="brightness", parts=5, reference=2)
    assert set(credit.numbers(few)) < set(credit.numbers(more))
