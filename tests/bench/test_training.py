"""`bench train` and `bench watch`: truth compared picture by picture, over time, model calls and steps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign import atomic, config
from diffalign.bench import training, training_plot, training_runs, training_table, watching
from diffalign.cli import main
from tests.cli.conftest import here, tiny  # noqa: F401


def curve(
    name: str, truth: Sequence[Sequence[float]], *, seed: int = 0, every: int = 10, pace: float = 1.0, **more: Any
) -> training.Curve:
    """A run whose evaluation k has these truths of its prompts."""
    steps = torch.arange(len(truth), dtype=torch.float64) * every
    rows = [{"step": every * k, "truth": sum(t) / len(t), "proxy": 0.1 * k} for k, t in enumerate(truth)]
    cost = {"step": steps, "seconds": steps * pace * 60, "nfe": steps * pace * 1e5}
    values = torch.tensor(truth, dtype=torch.float64)
    return training.Curve(name=name, seed=seed, cost=cost, truth=values, rows=rows, ended="all steps done", **more)


def line(name: str, values: Sequence[float], prompts: int = 3, **more: Any) -> training.Curve:
    return curve(name, [[value] * prompts for value in values], **more)


def test_a_method_that_climbs_twice_as_fast_reaches_the_reference_in_half_its_steps():
    slow = line("slow", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    fast = line("fast", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0], pace=2.0)
    groups = training.groups_of([slow, fast])
    found = training.reach(groups["fast"], groups["slow"], "step")
    assert found["mean"] == pytest.approx(47.5)  # 0.95: the last evaluation averaged with the one before
    assert found["of_reference"] == pytest.approx(0.475)
    assert found["lo"] == pytest.approx(found["hi"])  # all prompts are alike
    assert training.reach(groups["fast"], groups["slow"], "seconds")["of_reference"] == pytest.approx(0.95)
    assert training.reach(groups["fast"], groups["slow"], "nfe")["of_reference"] == pytest.approx(0.95)
    assert training.reach(groups["slow"], groups["slow"], "step")["mean"] == pytest.approx(100.0)


def test_a_truth_that_is_never_reached_is_not_a_number():
    groups = training.groups_of([line("good", [0.0, 1.0]), line("flat", [0.0, 0.0])])
    found = training.reach(groups["flat"], groups["good"], "nfe")
    assert found["mean"] is found["of_reference"] is found["hi"] is None
    assert found["reached"] == 0
    assert "never [never, never]" in training_table.table(training.summary(groups, reference="good"), reference="good")


def test_seeds_that_ended_at_other_steps_are_averaged_as_far_as_all_of_them_got():
    short, long = line("a", [0.0, 0.5], seed=0), line("a", [0.0, 0.5, 1.0], seed=1, pace=3.0)
    group = training.groups_of([short, long])["a"]
    minutes, truth = group.along("seconds")
    assert (minutes / 60).tolist() == [0.0, 20.0]  # 10 and 30 minutes for 10 steps
    assert truth.mean((1, 2)).tolist() == [0.0, 0.5]
    assert group.last.mean(1).tolist() == [0.5, 1.0]


def test_a_gain_on_every_prompt_is_certain_where_prompts_differ_widely():
    easy_and_hard = [[0.0, 1.0] * 10, [0.1, 1.1] * 10]
    row = training.summary(training.groups_of([curve("a", easy_and_hard)]))[0]
    assert row["gain"] == pytest.approx({"mean": 0.1, "lo": 0.1, "hi": 0.1})
    assert row["after"]["hi"] - row["after"]["lo"] > 0.2


def test_seeds_that_differ_widen_the_interval():
    seeds = [line("a", [0.0, value], seed=k) for k, value in enumerate([0.1, 0.5, 0.9])]
    row = training.summary(training.groups_of(seeds))[0]
    assert row["gain"]["mean"] == pytest.approx(0.5)
    assert row["gain"]["lo"] == pytest.approx(0.1)
    assert row["gain"]["hi"] == pytest.approx(0.9)


def test_the_difference_to_the_reference_is_of_the_seeds_that_both_have():
    reference = [line("ref", [0.0, 0.5], seed=k) for k in range(3)]
    groups = training.groups_of([*reference, line("a", [0.0, 0.6], seed=1), line("b", [0.0, 0.6], seed=7)])
    rows = {row["name"]: row for row in training.summary(groups, reference="ref")}
    assert rows["a"]["over_reference"]["mean"] == pytest.approx(0.1)
    assert rows["b"]["over_reference"] is rows["ref"]["over_reference"] is None


def test_prompts_without_a_truth_somewhere_are_left_out_everywhere():
    a, b = curve("a", [[0.0, 1.0], [0.5, math.nan]]), curve("b", [[0.0, 1.0], [0.7, 0.9]])
    assert [each.truth.shape for each in training.aligned([a, b])] == [(2, 1), (2, 1)]
    means = training.aligned([a, line("c", [0.0, 0.3], prompts=1)])
    assert means[0].truth[1].tolist() == [0.5]


def run_folder(place: Path, truths: Sequence[Sequence[float]], *, kept: int | None = None) -> Path:
    """A run folder with an evaluation of some prompts after every step, 10 NFE of training and 1000 of judging each."""
    for k, truth in enumerate(truths):
        rows = [{"index": n, "truth": value} for n, value in enumerate(truth)][:kept]
        atomic.write_jsonl(place / "samples" / f"step-{k}" / "results.jsonl", rows)
    mean = [sum(truth) / len(truth) for truth in truths]
    atomic.write_jsonl(place / "metrics.jsonl", [{"step": k, "truth": v, "proxy": v} for k, v in enumerate(mean)])
    spent = [{"seconds": 6.0 * k, "judging_seconds": 5.0 * k} for k in range(len(truths))]
    nfe = [{"nfe": 1010 * k + 1000, "judging_nfe": 1000 * (k + 1)} for k in range(len(truths))]
    rows = [{"step": k, **a, **b} for k, (a, b) in enumerate(zip(spent, nfe, strict=True))]
    atomic.write_jsonl(place / "timing.jsonl", rows)
    atomic.write_text(place / "config.yaml", config.say({"evaluate": {"per_prompt": 2}}))
    alarms = [{"step": 1, "signature": "flat_high", "says": "Flat."}]
    atomic.write_json(place / "summary.json", {"ended": "all steps done", "alarms": alarms, "chosen": 1})
    return place


def test_a_run_folder_is_read_prompt_by_prompt_and_without_the_cost_of_evaluations(tmp_path: Path):
    found = training.read(run_folder(tmp_path, [[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]]), "a", 0)
    assert found is not None
    assert found.truth.tolist() == [[0.5, 0.0], [1.0, 0.5]]
    assert found.cost["nfe"].tolist() == [0, 10]
    assert found.cost["seconds"].tolist() == [0, 1]
    assert (found.seconds, found.chosen, found.alarms[0]["signature"]) == (6.0, 1, "flat_high")


def test_means_stand_in_where_not_all_pictures_were_kept(tmp_path: Path):
    found = training.read(run_folder(tmp_path, [[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]], kept=2), "a", 0)
    assert found is not None
    assert found.truth.tolist() == [[0.25], [0.75]]


def test_the_plot_is_drawn_with_one_run_and_with_many(tmp_path: Path):
    curves = [line(f"run {k}", [0.0, 0.1 * k], seed=s) for k in range(12) for s in range(2)]
    for some in (curves[:1], curves):
        place = training_plot.draw(training.groups_of(some), tmp_path / "plot.png", title="a plan", reference="run 0")
        assert Image.open(place).size[0] > 1500


@pytest.mark.parametrize(
    ("truth", "alarm", "kind", "verdict"),
    [
        ([0.5, 0.5, 0.4], 10, "hack", "in time"),
        ([0.5, 0.4, 0.4], 10, "hack", "late"),
        ([0.5, 0.4, 0.4], None, "hack", "missed"),
        ([0.5, 0.5, 0.5], None, "hack", "not raised, truth held"),
        ([0.5, 0.5, 0.5], 20, "hack", "in time"),
        ([0.5, 0.6, 0.7], None, "healthy", "quiet"),
        ([0.5, 0.6, 0.7], 10, "healthy", "false alarm"),
    ],
)
def test_an_alarm_is_in_time_only_before_the_truth_fell(truth: list[float], alarm: int | None, kind: Any, verdict: str):
    alarms = [] if alarm is None else [{"step": alarm, "signature": "flat_high"}]
    row = watching.outcome(line("a", truth, alarms=alarms), kind, "test")
    assert row["verdict"] == verdict
    if alarm is not None:
        assert row["truth_then"]["mean"] == pytest.approx(truth[alarm // 10] - truth[0])
    assert verdict in watching.table([row])
    assert watching.told([row])[f"test {kind}"]["good"] == int(verdict in watching.GOOD)


PLAN: dict[str, Any] = {
    "common": {
        "reward": {"brightness": 1.0},
        "truth": "brightness",
        "split": "train",
        "groups": 2,
        "group_size": 2,
        "micro_batch": 4,
        "steps": 2,
        "ema": 0.0,
        "adapter": {"rank": 2},
        "trackers": [],
        "call": {"num_inference_steps": 3, "height": 16, "width": 16},
        "evaluate": {"split": "heldout", "limit": 3, "every": 1, "batch": 4, "kl_prompts": 0},
    }
}


def plan(place: Path, model: str, **more: Any) -> str:
    told = {**PLAN, "common": PLAN["common"] | {"model": model}, **more}
    atomic.write_text(place / "plan.yaml", config.say(told))
    return str(place / "plan.yaml")


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ({}, "no runs are named"),
        ({"a": {"seeds": [1, 1]}}, "only once"),
        ({"a/b": {}}, "folder"),
        ({"a": {"overrides": {"grups": 3}}}, "run 'a': unknown key 'grups'"),
        ({"a": {}, "b": {"overrides": {"evaluate": {"limit": 4}}}}, "picture by picture"),
        ({"a": {"sedes": [1]}}, "Did you mean 'runs.a.seeds'"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_before_anything_runs(
    runs: dict[str, Any],
    says: str,
    tiny: str,  # noqa: F811
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
):
    assert main(["bench", "train", "--config", plan(here, tiny, runs=runs)]) == 2
    assert says in capsys.readouterr().err
    assert not (here / "out").exists()


def test_a_dry_run_tells_what_is_left_to_do(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]):  # noqa: F811
    runs = {"a": {"seeds": [0, 1], "overrides": {"minutes": 2}}, "b": {"overrides": {"minutes": 3}}}
    assert main(["bench", "train", "--config", plan(here, tiny, runs=runs), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "# minutes: 7.0" in said
    assert "['a-0', 'b-0', 'a-1']" in said  # the first seed of all before the second of any


def test_a_watch_that_reads_the_truth_is_refused(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]):  # noqa: F811
    runs = {"a": {"kind": "hack", "part": "test", "overrides": {"watch": {"read_truth": True}}}}
    assert main(["bench", "watch", "--config", plan(here, tiny, runs=runs)]) == 2
    assert "may not see the truth" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_is_trained_reported_and_not_trained_again(tiny: str, here: Path):  # noqa: F811
    runs = {"a": {"seeds": [0, 1]}, "b": {"overrides": {"optim": {"learning_rate": 0.01}}}}
    ask = ["bench", "train", "--config", plan(here, tiny, runs=runs, reference="a"), "--json", "found.json"]
    assert main([*ask, "--only", "a", "--at-once", "2"]) == 0
    assert main(ask) == 0
    found = json.loads((here / "found.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["a", "b"]
    assert [row["finished"] for row in found["rows"]] == [2, 1]
    assert found["rows"][0]["prompts"] == 3
    assert found["rows"][1]["nfe"] > 0
    out = here / "out/bench_train"
    assert len((out / "rows.jsonl").read_text().splitlines()) == 3 * 3
    assert "| to the last truth of a |" in (out / "table.md").read_text()
    log = (out / "logs/a-0.log").read_bytes()
    assert main(ask) == 0
    assert (out / "logs/a-0.log").read_bytes() == log


@pytest.mark.slow
def test_planted_runs_are_trained_and_told_by_part(tiny: str, here: Path):  # noqa: F811
    runs = {
        "dark": {"kind": "hack", "part": "test", "reward": {"diffalign.bench.hacks:darkness": 1.0}},
        "sound": {"kind": "healthy", "part": "tune"},
    }
    file = plan(here, tiny, runs=runs, hack={"optim": {"learning_rate": 0.01}})
    assert main(["bench", "watch", "--config", file, "--at-once", "2", "--json", "found.json"]) == 0
    found = json.loads((here / "found.json").read_text())
    assert {(row["name"], row["part"]) for row in found["rows"]} == {("dark", "test"), ("sound", "tune")}
    assert set(found["counts"]) == {"test hack", "tune healthy"}
    assert training_runs.COMMAND[1:] == ("-m", "diffalign", "train")
