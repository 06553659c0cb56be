"""Bad input: one clear message that says what to do, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign import atomic
from diffalign.cli import main
from diffalign.errors import OutputError
from tests.cli.conftest import SMALL, here, tiny  # noqa: F401

Fails = Callable[..., str]


@pytest.fixture
def fails(here: Path, capsys: pytest.CaptureFixture[str]) -> Fails:  # noqa: F811
    """Run a command line that must fail well; gives back its message."""

    def run(*argv: str) -> str:
        before = sorted(str(path) for path in here.rglob("*") if path.is_file())
        capsys.readouterr()
        assert main(list(argv)) == 2
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        assert "unexpected" not in shown.err, shown.err
        assert sorted(str(path) for path in here.rglob("*") if path.is_file()) == before
        return shown.err

    return run


def write_reward(here: Path, body: str) -> str:  # noqa: F811
    (here / "mine.py").write_text(f"import torch\ndef bad(media, cases):\n    return {body}\n")
    return "mine.py:bad"


def best_of_2(tiny: str, reward: str) -> list[str]:  # noqa: F811
    return ["generate", "-m", tiny, "-p", "one", "--method", "best_of_n", "--n", "2", "--reward", reward, *SMALL]


def test_an_unknown_reward_is_answered_with_the_nearest_and_the_list(fails: Fails):
    said = fails("generate", "-p", "one", "--method", "best_of_n", "--reward", "brightnes")
    assert "no reward called 'brightnes'. Did you mean 'brightness'?" in said
    assert "diffalign ls rewards" in said


def test_an_unknown_method_is_answered_with_the_nearest(fails: Fails):
    said = fails("generate", "-p", "one", "--method", "best_of_m", "--reward", "brightness")
    assert "Did you mean 'best_of_n'?" in said


def test_an_unknown_model_is_answered_with_the_command_that_makes_it(fails: Fails):
    assert "diffalign zoo" in fails("generate", "-p", "one", "-m", "shapes-sd9")


def test_a_hub_id_without_network_says_so_and_offers_the_embedded_model(fails: Fails):
    said = fails("generate", "-p", "one", "-m", "someone/something")
    assert "cannot fetch 'someone/something'" in said
    assert "'shapes-sd3'" in said


def test_a_folder_without_a_pipeline_is_named(fails: Fails, here: Path):  # noqa: F811
    (here / "empty").mkdir()
    assert "model_index.json" in fails("generate", "-p", "one", "-m", "./empty")


@pytest.mark.parametrize("name", ["methid", "call.methid", "smc.particles"])
def test_an_unknown_setting_is_named_with_its_path(name: str, fails: Fails, here: Path):  # noqa: F811
    (here / "c.yaml").write_text("call: 3\n" if name.startswith("call") else f"{name}: 3\n")
    said = fails("generate", "-p", "one", "--config", "c.yaml")
    assert name.split(".")[0] in said


def test_an_unknown_override_is_answered_with_the_nearest(fails: Fails):
    assert "'lmit'. Did you mean 'limit'?" in fails("generate", "-p", "one", "lmit=3")


def test_a_value_of_the_wrong_type_is_quoted_with_what_is_expected(fails: Fails):
    said = fails("generate", "-p", "one", "limit=many")
    assert "limit" in said
    assert "many" in said
    assert "whole number" in said


def test_an_option_of_the_wrong_type_points_to_the_help(fails: Fails):
    said = fails("generate", "-p", "one", "--limit", "many")
    assert "--limit" in said
    assert "--help" in said


def test_an_unknown_option_points_to_the_help(fails: Fails):
    assert "--help" in fails("generate", "--promt", "one")


def test_a_word_that_is_no_setting_is_quoted(fails: Fails):
    assert "'nonsense' is not understood" in fails("generate", "-p", "one", "nonsense")


def test_a_missing_argument_is_named(fails: Fails):
    assert "IMAGES is missing" in fails("score")


def test_a_config_that_is_nowhere_lists_the_shipped_ones(fails: Fails):
    assert "best_of_n_shapes" in fails("generate", "--config", "best_of_shapes")


def test_broken_yaml_is_named_with_its_file(fails: Fails, here: Path):  # noqa: F811
    (here / "c.yaml").write_text("a: [1\n")
    assert "c.yaml" in fails("generate", "--config", "c.yaml")


@pytest.mark.parametrize(
    ("prompt", "said"), [("", "is empty"), ("  ", "is empty"), ("word " * 2000, "10,000 characters")]
)
def test_a_prompt_no_model_can_follow_is_refused(prompt: str, said: str, fails: Fails, tiny: str):  # noqa: F811
    assert said in fails("generate", "-m", tiny, "-p", prompt, *SMALL)


def test_no_prompt_at_all_names_the_three_ways(fails: Fails):
    assert "--prompt, --prompts FILE or --split" in fails("generate")


def test_an_empty_prompt_file_is_named(fails: Fails, here: Path):  # noqa: F811
    (here / "p.txt").write_text("\n")
    assert "p.txt" in fails("generate", "--prompts", "p.txt")


@pytest.mark.parametrize("kind", ["garbage", "truncated", "absent"])
def test_an_unreadable_image_is_named(kind: str, fails: Fails, here: Path):  # noqa: F811
    if kind == "garbage":
        (here / "a.png").write_bytes(b"not an image")
    if kind == "truncated":
        noise = Image.fromarray((torch.rand(64, 64, 3) * 255).byte().numpy())
        noise.save(here / "whole.png")
        (here / "a.png").write_bytes((here / "whole.png").read_bytes()[:3000])
    assert "a.png" in fails("score", "a.png", "-p", "red", "-r", "brightness", "--strict")


def test_scores_of_nothing_but_unreadable_images_are_an_error_that_names_one(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
):
    (here / "a.png").write_bytes(b"not an image")
    assert main(["score", "a.png", "-p", "red", "-r", "brightness"]) == 2
    assert "a.png" in capsys.readouterr().err


def test_an_infinite_reward_is_an_error_not_a_winner(fails: Fails, here: Path, tiny: str):  # noqa: F811
    reward = write_reward(here, "torch.full((len(media),), torch.inf)")
    assert "infinite" in fails(*best_of_2(tiny, reward))


def test_all_candidates_invalid_is_an_error(fails: Fails, here: Path, tiny: str):  # noqa: F811
    reward = write_reward(here, "torch.full((len(media),), torch.nan)")
    assert "nothing to choose from" in fails(*best_of_2(tiny, reward))


def test_a_reward_of_the_wrong_shape_is_told_the_right_one(fails: Fails, here: Path, tiny: str):  # noqa: F811
    assert "(1,)" in fails(*best_of_2(tiny, write_reward(here, "media")))


def test_a_search_without_a_reward_is_told_how_to_add_one(fails: Fails):
    assert "--reward clip" in fails("generate", "-p", "one", "--method", "best_of_n")


def test_a_budget_too_small_for_one_image_says_what_one_costs(fails: Fails, tiny: str):  # noqa: F811
    ask = ["generate", "-m", tiny, "-p", "one", "--method", "best_of_n", "--budget", "3", "-r", "brightness", *SMALL]
    assert "one candidate costs 4" in fails(*ask)


def test_nan_from_the_model_is_blamed_on_the_model(fails: Fails, here: Path):  # noqa: F811
    from tests.tiny import build

    pipe = build("sd3")
    next(pipe.transformer.parameters()).data.fill_(torch.nan)
    pipe.save_pretrained(here / "broken")
    said = fails("generate", "-m", "./broken", "-p", "one", *SMALL)
    assert "produced NaN" in said
    assert "float32" in said


def test_a_device_that_is_not_here_is_named(fails: Fails, tiny: str):  # noqa: F811
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    assert "device is 'cuda'" in fails("generate", "-m", tiny, "-p", "one", "--device", "cuda", "dtype=float32", *SMALL)


@pytest.mark.parametrize("flag", ["--out", "--json"])
def test_a_place_that_cannot_be_written_is_known_before_the_work(flag: str, fails: Fails, here: Path):  # noqa: F811
    (here / "file").write_text("in the way")
    said = fails("generate", "-m", "/no/such/model", "-p", "one", flag, "file/below")
    assert "cannot write" in said


def test_debug_shows_the_traceback(here: Path):  # noqa: F811
    with pytest.raises(Exception, match="no reward called"):
        main(["generate", "-p", "one", "--method", "best_of_n", "--reward", "brightnes", "--debug"])


def test_an_unforeseen_error_is_one_message_too(
    monkeypatch: pytest.MonkeyPatch,
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
):
    from diffalign.cli import ls

    def broken(self: Any) -> None:
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr(ls.List, "run", broken)
    assert main(["ls", "rewards"]) == 2
    said = capsys.readouterr().err
    assert "ZeroDivisionError: by accident" in said
    assert "--debug" in said


def test_an_interrupted_write_leaves_the_old_file_and_no_other(here: Path):  # noqa: F811
    place = atomic.write_json(here / "a.json", {"old": True})

    class Interrupting:
        def save(self, file: Any, format: str) -> None:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic.write_image(place, Interrupting())  # type: ignore[arg-type]
    assert json.loads(place.read_text()) == {"old": True}
    assert list(here.iterdir()) == [place]


def test_a_value_json_cannot_hold_leaves_the_old_file(here: Path):  # noqa: F811
    place = atomic.write_json(here / "a.json", {"old": True})
    with pytest.raises(ValueError, match="nan"):
        atomic.write_json(place, {"new": float("nan")})
    assert json.loads(place.read_text()) == {"old": True}


def test_a_full_disk_is_an_output_error_and_leaves_the_old_file(here: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    place = atomic.write_text(here / "a.txt", "old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        atomic.write_text(place, "new")
    assert place.read_text() == "old"
    assert list(here.iterdir()) == [place]
