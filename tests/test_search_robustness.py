"""What a search does when a model, a machine or a caller does not behave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import align
from diffalign.budget import Limits
from diffalign.drive import Driver
from diffalign.errors import ConfigError, ModelError, NotDifferentiable
from diffalign.pipelines import BestOfNPipeline, ReNOPipeline, SearchPipeline, SMCPipeline
from diffalign.trees import read_tree, save_tree
from tests.test_search_pipelines import Brightness, Impatient, plain_nfe, run, seeded
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


def test_a_scheduler_without_a_stochastic_step_of_ours_is_no_obstacle_to_methods_that_take_none():
    from diffusers import IPNDMScheduler

    pipe = build("sd15")
    pipe.scheduler = IPNDMScheduler.from_config(pipe.scheduler.config)
    told = {"reward": Brightness(), "budget": 100, "generator": seeded(), "search": {"method": "random"}}
    out = SearchPipeline.from_pipe(pipe)(**call("sd15", 1), **told)
    assert out.report.card["kernel"] is None


@pytest.mark.parametrize(("name", "limits"), [("smc", {"decodes": 10}), ("svdd", {"reward_calls": 10})])
def test_time_that_is_left_is_not_spent_against_another_limit(name: str, limits: dict[str, int]):
    report = run(name, "sd3", budget=Limits(seconds=20, **limits)).report
    assert report.budget["decodes"] <= 10


def test_short_memory_inside_the_model_leaves_a_raised_autoencoder_raised(monkeypatch: pytest.MonkeyPatch):
    pipe = build("sdxl").to(torch.float16)
    real = pipe.unet.forward

    def short(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(sample) > 2:
            raise torch.OutOfMemoryError("out of memory, on purpose")
        return real(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", short)
    with pytest.warns(UserWarning, match="do not fit the memory"):
        out = ReNOPipeline.from_pipe(pipe)(
            **call("sdxl", 2), generator=seeded(), reward=Brightness(), reno={"iterations": 2}
        )
    assert bool(out.report.best_reward.isfinite().all())
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float16}


def test_an_interrupt_between_backward_passes_leaves_the_autoencoder_as_it_was():
    pipe = build("sdxl").to(torch.float16)
    own = pipe.vae.decode
    pipe.vae.decode = lambda *args, **kwargs: own(*args, **kwargs)  # as torch.compile would set it
    mine = pipe.vae.decode
    ReNOPipeline.from_pipe(pipe)(**call("sdxl", 1), generator=seeded(), reward=Impatient(1), reno={"iterations": 4})
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float16}
    assert vars(pipe.vae)["decode"] is mine


def test_parts_stay_with_their_images_when_memory_runs_short_after_scoring(monkeypatch: pytest.MonkeyPatch):
    real = torch.autograd.grad
    failures = [2]

    def short(*args: Any, **kwargs: Any) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise torch.OutOfMemoryError("out of memory, on purpose")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", short)
    with pytest.warns(UserWarning, match="do not fit the memory"):
        report = run("reno", "sd3", batch=4, reno={"iterations": 3}).report
    assert torch.allclose(report.scores.parts["brightness"], report.scores.total, equal_nan=True)


def test_a_gradient_proposal_survives_a_round_without_valid_rewards_and_names_a_reward_without_slopes():
    class Detached(Brightness):
        def __call__(self, media: torch.Tensor, cases: Any) -> torch.Tensor:
            return super().__call__(media.detach(), cases)

    class Blind(Brightness):
        calls = 0

        def __call__(self, media: torch.Tensor, cases: Any) -> torch.Tensor:
            self.calls += 1
            return super().__call__(media, cases) * (torch.nan if self.calls == 1 else 1.0)

    told = {"smc": {"particles": 2, "proposal": "gradient"}}
    assert bool(run("smc", "sd3", reward=Blind(), budget=None, **told).report.best_reward.isfinite().all())
    with pytest.raises(NotDifferentiable, match="gradient proposal"):
        run("smc", "sd3", reward=Detached(), budget=None, **told)


def test_the_gradient_proposal_is_chunked_too(monkeypatch: pytest.MonkeyPatch):
    widths: list[int] = []
    real = Driver.predict

    def watched(self: Driver, x: torch.Tensor, i: int, *, grad: bool = False) -> torch.Tensor:
        widths.append(len(x))
        return real(self, x, i, grad=grad)

    monkeypatch.setattr(Driver, "predict", watched)
    run("smc", "sd3", budget=None, rows_at_once=1, smc={"particles": 2, "proposal": "gradient"})
    assert set(widths) == {1}


def test_old_leaves_of_a_tree_are_shown_within_the_budget(grown: Path):
    plain = plain_nfe(build("sd3"), call("sd3", 1))
    report = run("tree", "sd3", grown=grown, keep=5, budget=Limits(nfe=plain, reward_calls=2)).report
    assert report.budget["reward_calls"] <= 2


def test_a_grown_tree_goes_on_after_another_method(grown: Path):
    out = align(
        build("sd3"), call("sd3", 1)["prompt"], method="random+tree", reward=Brightness(), generator=seeded(),
        grown=grown, budget=8 * plain_nfe(build("sd3"), call("sd3", 1)), **asked(),
    )  # fmt: skip
    assert any("goes on as it was" in note for note in out.report.notes) or out.report.tree is not None


def test_a_promise_about_every_image_must_be_kept_by_every_method():
    told = {"reward": Brightness(), "generator": seeded(), "veto": lambda media, cases: media.flatten(1).mean(1) < 0}
    with pytest.raises(ConfigError, match="smc does not know it"):
        align(build("sd3"), "a cube", method="smc+beam", **told, **asked())


def test_a_keyword_goes_only_to_the_methods_that_know_it():
    plain = plain_nfe(build("sd3"), call("sd3", 1))
    told = {"reward": Brightness(), "generator": seeded(), "budget": 12 * plain}
    out = align(build("sd3"), "a cube", method="smc+random", value=2, **told, **asked())
    assert out.report.budget["nfe"] <= 12 * plain
    assert align(build("sd3"), "a cube", method="random", value=None, **told, **asked()).images


def test_no_row_at_once_is_refused():
    with pytest.raises(ConfigError, match="rows_at_once"):
        run("tree", "sd3", rows_at_once=0)


def test_best_of_n_takes_seconds_as_people_say_them():
    out = BestOfNPipeline.from_pipe(build("sd3"))(
        **call("sd3", 1), generator=seeded(), reward=Brightness(), budget="0.5s"
    )
    assert out.report.candidates > 1


@pytest.mark.parametrize("method", ["best_of_n", "tree"])
def test_a_generator_that_is_passed_again_gives_other_images(method: str):
    generator = seeded()
    told = {"method": method, "reward": Brightness(), "budget": 200, "output_type": "pt", **asked()}
    first, second = (align(build("sd3"), "a cube", generator=generator, **told) for _ in range(2))
    assert not torch.equal(first.images, second.images)
    again = align(build("sd3"), "a cube", generator=seeded(), **told)
    assert torch.equal(first.images, again.images)
    drop_in = [
        BestOfNPipeline.from_pipe(build("sd3"))(prompt="a cube", generator=g, reward=Brightness(), n=3, **asked())
        for g in (generator, generator)
    ]
    assert set(drop_in[0].report.seeds[0]) & set(drop_in[1].report.seeds[0]) == {-1}


def test_independent_draws_need_no_pure_noise_to_start_from():
    pipe, edit = build("sd_img2img"), call("sd_img2img", 1)
    told = {"reward": Brightness(), "output_type": "pt", **edit}
    stock = pipe(**edit, generator=seeded(), output_type="pt").images
    budget = 4 * plain_nfe(pipe, edit)
    out = align(pipe, method="best_of_n", generator=seeded(), top_k=4, budget=budget, **told)
    assert len({float(row.mean()) for row in out.images}) == 4
    assert any(torch.allclose(row, stock[0], atol=1e-5) for row in out.images)
    both = align(pipe, method="random+tree", generator=seeded(), budget=2 * budget, **told).report
    assert any("draws its own starts" in note for note in both.notes)


@pytest.mark.parametrize("count", [1, 3])
def test_generators_that_do_not_match_the_images_are_refused(count: int):
    generators = [seeded(k) for k in range(count)]
    with pytest.raises(ConfigError, match=f"{count} generators are given for 2 images"):
        run("tree", "sd3", batch=2, generator=generators)


def test_a_later_method_that_cannot_run_leaves_the_first_ones_images():
    pipe, edit = build("sd_img2img"), call("sd_img2img", 1)
    told = {"reward": Brightness(), "generator": seeded(), "budget": 8 * plain_nfe(pipe, edit), **edit}
    out = align(pipe, method="random+reno", **told)
    assert len(out.images) == 1
    assert any("could not run" in note and "starts from an image" in note for note in out.report.notes)


def test_a_tree_forgets_the_opinions_of_another_value():
    told = {"method": "tree", "reward": Brightness(), "budget": 200, **asked()}

    def opinions(tree: Any) -> list[float]:
        return [each for each in tree.cases[0].opinion if each == each]

    first = align(build("sd3"), "a cube", generator=seeded(), value="clean", **told).report.tree
    before = opinions(first)
    told["budget"] = 60
    same = align(build("sd3"), "a cube", generator=seeded(), value="clean", grown=first, **told).report.tree
    assert opinions(same)[: len(before)] == before
    silent = align(build("sd3"), "a cube", generator=seeded(), grown=same, **told).report.tree
    assert opinions(silent)[: len(before)] == before
    other = align(build("sd3"), "a cube", generator=seeded(), value=2, grown=silent, **told).report.tree
    assert len(opinions(other)) < len(before)


def test_a_report_names_no_seed_that_would_not_make_the_image_again():
    def seeds(generator: Any, batch: int = 1) -> list[list[int]]:
        best = BestOfNPipeline.from_pipe(build("sd3"))
        found: list[list[int]] = best(**call("sd3", batch), generator=generator, reward=Brightness(), n=2).report.seeds
        return found

    used = seeded(5)
    torch.rand(3, generator=used)
    assert seeds(seeded(5))[0][0] == 5
    assert seeds(used)[0][0] == -1
    assert [row[0] for row in seeds(seeded(5), 2)] == [5, -1]
    assert [row[0] for row in seeds([seeded(5), seeded(6)], 2)] == [5, 6]
    assert all(seed >= 0 for row in seeds(used, 2) for seed in row[1:])
