"""Every verb: help that teaches, stable JSON, one real process each, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffalign.cli import main
from tests.cli.conftest import SMALL

VERBS = [
    ["demo"], ["generate"], ["score"], ["ls"], ["check"], ["zoo", "list"], ["zoo", "show"], ["zoo", "measure"],
    ["zoo", "build"], ["bench", "seam"], ["bench", "rewards"], ["bench", "scoring"], ["bench", "mixing"],
]  # fmt: skip


def run(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffalign.cli", *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_shows_examples_and_every_common_option(verb: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"diffalign {' '.join(verb)}" in shown.split("Options:")[0].split("\n", 1)[1]
    for option in ("--config", "--seed", "--out", "--dry-run", "--json", "--debug"):
        assert option in shown


@pytest.mark.parametrize("verb", ["demo", "generate", "check"])
def test_verbs_that_run_a_model_choose_device_and_attention(verb: str, capsys: pytest.CaptureFixture[str]):
    main([verb, "--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--attention", "--device", "--dtype"))


def test_without_a_verb_the_help_is_shown(capsys: pytest.CaptureFixture[str]):
    main([])
    shown = capsys.readouterr()
    assert "diffalign demo" in shown.out + shown.err


def test_ls_rewards_has_the_documented_keys(here: Path):
    assert main(["ls", "rewards", "--json", "r.json"]) == 0
    found = {row["name"]: row for row in json.loads((here / "r.json").read_text())}
    assert set(found["clip"]) >= {"name", "modality", "differentiable", "range", "installable"}
    assert found["clip"]["differentiable"] is True
    assert {"shapes", "shapes_soft", "brightness", "jpeg_size", "colourfulness"} <= set(found)


def test_ls_pipelines_and_configs_name_what_other_verbs_take(here: Path):
    assert main(["ls", "pipelines", "--json", "p.json"]) == 0
    assert "best_of_n" in {row["name"] for row in json.loads((here / "p.json").read_text())}
    assert main(["ls", "configs", "--json", "c.json"]) == 0
    assert {"name": "best_of_n_shapes", "kind": "search"} in json.loads((here / "c.json").read_text())


def test_check_reports_every_capability_with_its_reason(tiny: str, here: Path):
    assert main(["check", tiny, *SMALL, "--json", "check.json"]) == 0
    found = json.loads((here / "check.json").read_text())
    assert found["pipeline"] == "StableDiffusion3Pipeline"
    assert {"schedule", "predict", "rollout", "decode"} <= set(found["capabilities"])
    assert all(set(c) == {"ok", "error", "reason"} for c in found["capabilities"].values())


@pytest.mark.slow
def test_bench_seam_gives_two_ratios(here: Path):
    assert main(["bench", "seam", "--model-ms", "2", "--steps", "3", "--repeats", "1", "--json", "seam.json"]) == 0
    found = json.loads((here / "seam.json").read_text())
    assert found["predict_ratio"] > 0
    assert found["rollout_ratio"] > 0


@pytest.mark.parametrize(
    "argv",
    [
        ["ls", "rewards"],
        pytest.param(["generate", "-p", "one", "-r", "brightness"], marks=pytest.mark.slow),
        pytest.param(["check"], marks=pytest.mark.slow),
        ["bench", "seam", "--dry-run"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_real_process_ends_well_and_says_nothing_on_stderr(argv: list[str], tiny: str, tmp_path: Path):
    if argv[0] == "generate":
        argv = [*argv, "-m", tiny, *SMALL]
    if argv[0] == "check":
        argv = [*argv, tiny, *SMALL]
    done = run(*argv, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.slow
def test_score_in_a_real_process(tmp_path: Path):
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    done = run("score", "a.png", "-p", "red", "-r", "brightness", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_in_a_real_process_is_one_message_and_code_2(tmp_path: Path):
    done = run("generate", "-p", "one", "-r", "brightnes", "--method", "best_of_n", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("UnknownName: no reward called 'brightnes'. Did you mean 'brightness'?")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/generate/*"))


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, here: Path, capsys: pytest.CaptureFixture[str]):
    from diffalign.cli import ls

    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ls.List, "run", interrupted)
    assert main(["ls", "rewards"]) == 130
    assert "interrupted" in capsys.readouterr().err
