"""What a search does when a model, a machine or a caller does not behave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import align
from diffalign.drive import Driver
from diffalign.errors import ConfigError, ModelError
from diffalign.pipelines import ReNOPipeline, SMCPipeline
from diffalign.trees import read_tree, save_tree
from tests.test_search_pipelines import Brightness, plain_nfe, run, seeded
from tests.tiny import build, call


def asked(family: str = "sd3") -> dict[str, Any]:
    return {k: v for k, v in call(family, 1).items() if k != "prompt"}


def break_pixels(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    """Decoding gives NaN where `broken(number of the image)` says so."""
    real, made = Driver.decode, [0]

    def decode(self: Driver, x: torch.Tensor, **options: Any) -> Any:
        media = real(self, x, **options)
        for k in range(len(media)):
            if broken(made[0] + k):
                media[k] = torch.nan
        made[0] += len(media)
        return media

    monkeypatch.setattr(Driver, "decode", decode)


def test_an_image_the_model_broke_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch):
    break_pixels(monkeypatch, lambda number: number == 2)
    report = run("tree", "sd3").report
    assert report.invalid == [1]
    assert any("1 images had NaN" in note for note in report.notes)


def test_a_model_that_breaks_every_image_is_named(monkeypatch: pytest.MonkeyPatch):
    break_pixels(monkeypatch, lambda number: True)
    with pytest.raises(ModelError, match="float32 or bfloat16"):
        run("tree", "sd3")


def test_short_memory_halves_the_rows_of_a_backward_pass_too(monkeypatch: pytest.MonkeyPatch):
    whole = run("reno", "sd3", batch=2, output_type="pt")
    real = Driver.rollout

    def short(self: Driver, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("grad") and self.batch > 1:
            raise torch.OutOfMemoryError("out of memory, on purpose")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Driver, "rollout", short)
    with pytest.warns(UserWarning, match="do not fit the memory") as warned:
        halved = run("reno", "sd3", batch=2, output_type="pt")
    assert len(warned) == 1
    assert torch.allclose(whole.images, halved.images, atol=1e-4)
    assert whole.report.budget["nfe"] == halved.report.budget["nfe"]


def test_rows_at_once_bounds_a_backward_pass(monkeypatch: pytest.MonkeyPatch):
    widths: list[int] = []
    real = Driver.rollout

    def watched(self: Driver, *args: Any, **kwargs: Any) -> Any:
        widths.append(self.batch)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Driver, "rollout", watched)
    run("reno", "sd3", batch=2, rows_at_once=1)
    assert set(widths) == {1}


@pytest.mark.parametrize(
    ("shell", "told"),
    [(ReNOPipeline, {"reno": {"iterations": 3}}), (SMCPipeline, {"smc": {"particles": 2, "proposal": "gradient"}})],
)
def test_an_autoencoder_that_must_run_in_float32_is_differentiated_in_half_precision(shell: Any, told: dict[str, Any]):
    pipe = build("sdxl").to(torch.float16)
    assert pipe.vae.config.force_upcast
    out = shell.from_pipe(pipe)(**call("sdxl", 1), generator=seeded(), reward=Brightness(), **told)
    assert bool(out.report.best_reward.isfinite().all())
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float16}
    assert "decode" not in vars(pipe.vae)


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    report = run("tree", "sd3", budget=4 * plain_nfe(build("sd3"), call("sd3", 1))).report
    save_tree(report.tree, tmp_path / "tree.safetensors")
    return tmp_path / "tree.safetensors"


def test_a_tree_remembers_what_it_was_grown_for(grown: Path):
    assert read_tree(grown).origin["reward"].startswith("brightness")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"asked": {"guidance_scale": 1.5}}, "guidance_scale"), ({"asked": {"prompt": "two"}}, "prompt")],
)
def test_a_tree_is_not_grown_on_for_something_else(grown: Path, change: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=named):
        run("tree", "sd3", grown=grown, **change)


def test_a_tree_is_not_grown_on_for_another_reward(grown: Path):
    class Darkness(Brightness):
        name = "darkness"

    with pytest.raises(ConfigError, match="reward"):
        run("tree", "sd3", grown=grown, reward=Darkness())


def test_a_tree_that_is_grown_on_shows_its_old_leaves_too(grown: Path):
    before = max(read_tree(grown).cases[0].value[leaf] for leaf in read_tree(grown).cases[0].leaves)
    out = run("tree", "sd3", grown=grown, top_k=4, budget=plain_nfe(build("sd3"), call("sd3", 1)))
    assert len(out.images) == 4
    assert float(out.report.best_reward[0]) >= before - 1e-5


def test_what_only_one_method_knows_reaches_it_through_the_one_door():
    out = align(
        build("sd3"), "a cube", method="reno", reward=Brightness(), generator=seeded(),
        settings={"reno": {"iterations": 2}}, finish={"num_inference_steps": 3},
        **asked() | {"num_inference_steps": 1},
    )  # fmt: skip
    assert out.report.extras["reno"]["final"] is not None


def test_what_no_method_knows_is_refused():
    with pytest.raises(ConfigError, match="veto"):
        align(build("sd3"), "a cube", method="tree", reward=Brightness(), veto=lambda media, cases: None, **asked())


def test_alignment_without_a_reward_is_refused():
    with pytest.raises(ConfigError, match="ls rewards"):
        align(build("sd3"), "a cube", reward=None, **asked())


def test_a_veto_keeps_what_it_marks_from_being_shown():
    def too_bright(media: torch.Tensor, cases: list[Any]) -> torch.Tensor:
        return media.flatten(1).mean(1) > limit

    free = run("beam", "sd3")
    limit = sorted(free.report.scores.total[0].tolist())[-2] + 1e-6
    held = run("beam", "sd3", veto=too_bright)
    assert float(held.report.best_reward[0]) <= limit < float(free.report.best_reward[0])
