"""The four proofs of every search pipeline, on several families, and what all of them promise alike."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffalign import align
from diffalign.budget import Limits, limits_of
from diffalign.cases import Case
from diffalign.errors import BudgetError, ConfigError, InvalidReward, NotDifferentiable, UnknownName
from diffalign.pipelines import DensePipeline, ReNOPipeline, SearchPipeline, SMCPipeline, TreePipeline
from diffalign.searching import Improvement
from diffalign.snapshot import differences, snapshot
from diffalign.trees import save_tree
from tests.tiny import build, call

FAMILIES = ["sd15", pytest.param("sdxl", marks=pytest.mark.slow), "sd3", "flux", "ltx_video"]
SHELLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tree": (TreePipeline, {}),
    "smc": (SMCPipeline, {}),
    "reno": (ReNOPipeline, {}),
    "random": (SearchPipeline, {"search": {"method": "random"}}),
    "zero_order": (SearchPipeline, {"search": {"method": "zero_order"}}),
    "paths": (SearchPipeline, {"search": {"method": "paths"}}),
    "stepwise": (SearchPipeline, {"search": {"method": "stepwise"}}),
    "beam": (SearchPipeline, {"search": {"method": "beam"}}),
    "decisive": (SearchPipeline, {"search": {"method": "decisive"}}),
    "svdd": (SearchPipeline, {"search": {"method": "svdd"}}),
    "dense": (DensePipeline, {}),
}


class Brightness:
    name, differentiable, modality, version, range = "brightness", True, "image", None, (0.0, 1.0)

    def __call__(self, media: torch.Tensor, cases: Any) -> torch.Tensor:
        return media.flatten(1).mean(1)


class Constant(Brightness):
    name, differentiable = "constant", False

    def __call__(self, media: torch.Tensor, cases: Any) -> torch.Tensor:
        return torch.full((len(media),), 0.5)


class Picky(Brightness):
    """NaN for images whose mean is below what it has seen first."""

    name, differentiable = "picky", False

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, media: torch.Tensor, cases: Any) -> torch.Tensor:
        found = media.flatten(1).mean(1)
        self.first = float(found[0]) if self.first is None else self.first
        return torch.where(found < self.first, torch.nan, found)


class Impatient(Brightness):
    """Ctrl-C after some scorings."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def __call__(self, media: torch.Tensor, cases: Any) -> torch.Tensor:
        self.patience -= 1
        if self.patience < 0:
            raise KeyboardInterrupt
        return super().__call__(media, cases)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(output: Any) -> np.ndarray:
    return np.stack([np.asarray(row) for row in (output.images if hasattr(output, "images") else output.frames)])


def plain_nfe(pipe: Any, asked: dict[str, Any]) -> int:
    from diffalign.drive import Driver

    return sum(Driver(pipe, **asked).costs)


def run(name: str, family: str, *, times: int = 8, batch: int = 1, seed: int = 3, **more: Any) -> Any:
    shell, told = SHELLS[name]
    pipe = build(family)
    asked = {**call(family, batch), **more.pop("asked", {})}
    budget = more.pop("budget", times * plain_nfe(pipe, call(family, 1)))
    generator = more.pop("generator", seeded(seed))
    return shell.from_pipe(pipe)(
        **asked, generator=generator, **{"reward": Brightness(), "budget": budget, **told, **more}
    )


@pytest.fixture(params=SHELLS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_without_a_reward_the_output_is_the_stock_output(name: str):
    pipe = build("sd3")
    stock = pixels(pipe(**call("sd3", 2), generator=seeded()))
    assert np.array_equal(stock, pixels(SHELLS[name][0].from_pipe(pipe)(**call("sd3", 2), generator=seeded())))


@pytest.mark.parametrize("name", ["tree", "smc", "reno", "zero_order"])
def test_the_best_is_at_least_the_first_and_comes_back_as_the_stock_type(name: str, family: str):
    out = run(name, family, output_type="pt")
    report = out.report
    assert type(out) is type(build(family)(**call(family, 1), generator=seeded()))
    media = out.images if hasattr(out, "images") else out.frames
    assert float(media.float().mean()) == pytest.approx(float(report.best_reward[0]), abs=1e-5)
    total = report.scores.total[0]
    assert float(report.best_reward[0]) == float(total[total.isfinite()].max()) > float(total[0])


def test_the_same_seed_gives_the_same_images_and_report(name: str):
    first, second = run(name, "sd3", times=6), run(name, "sd3", times=6)
    assert np.array_equal(pixels(first), pixels(second))
    assert torch.equal(first.report.scores.total.nan_to_num(), second.report.scores.total.nan_to_num())


def test_another_seed_gives_another_image(name: str):
    assert not np.array_equal(pixels(run(name, "sd3", seed=3)), pixels(run(name, "sd3", seed=4)))


def test_everything_is_put_back_also_when_the_reward_raises(name: str):
    shell, told = SHELLS[name]
    pipe = build("sd3")
    weight = next(pipe.transformer.parameters())
    weight.requires_grad_(True)
    made = shell.from_pipe(pipe)
    stock = pixels(pipe(**call("sd3", 1), generator=seeded()))  # transformers hooks its layers at the first call
    before, bars = snapshot(pipe), dict(getattr(made, "_progress_bar_config", {}))

    class Broken(Brightness):
        def __call__(self, media: torch.Tensor, cases: Any) -> torch.Tensor:
            raise RuntimeError("on purpose")

    ask = {"budget": 4 * plain_nfe(pipe, call("sd3", 1)), **told}
    for reward, outcome in ((Broken(), pytest.raises(RuntimeError, match="on purpose")), (Brightness(), nullcontext())):
        with outcome:
            made(**call("sd3", 1), generator=seeded(), reward=reward, **ask)
        assert differences(before, snapshot(pipe)) == []
        assert made._progress_bar_config == bars
    assert np.array_equal(stock, pixels(made(**call("sd3", 1), generator=seeded())))


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(7, marks=pytest.mark.slow)])
def test_no_budget_is_ever_exceeded(name: str, times: int):
    pipe = build("sd3")
    limit = times * plain_nfe(pipe, call("sd3", 1)) + 1
    try:
        report = run(name, "sd3", budget=limit, batch=2).report
    except BudgetError:
        return
    assert 0 < report.budget["nfe"] <= limit


@pytest.mark.parametrize(
    "limit",
    [
        Limits(decodes=5),
        Limits(reward_calls=6),
        pytest.param(Limits(decodes=9, nfe=90), marks=pytest.mark.slow),
    ],
)
def test_decodes_and_reward_calls_are_limits_too(name: str, limit: Limits):
    try:
        spent = run(name, "sd3", budget=limit).report.budget
    except BudgetError:
        return
    for which in ("nfe", "decodes", "reward_calls"):
        most = getattr(limit, which)
        assert most is None or spent[which] <= most


def test_a_budget_below_one_image_says_what_one_costs(name: str):
    with pytest.raises(BudgetError, match=r"Raise the\s+budget"):
        run(name, "sd3", budget=1)


def test_prompts_together_find_what_they_find_alone(name: str):
    pipe, (shell, told) = build("sd3"), SHELLS[name]
    asked = {k: v for k, v in call("sd3", 2).items() if k not in ("prompt", "negative_prompt")}
    ask = {**asked, "reward": Brightness(), "budget": 6 * plain_nfe(pipe, call("sd3", 1)), "output_type": "pt", **told}
    both = shell.from_pipe(pipe)(prompt=["one", "two"], generator=[seeded(5), seeded(9)], **ask)
    alone = shell.from_pipe(pipe)(prompt="two", generator=seeded(9), **ask)
    assert torch.equal(both.report.best[1], alone.report.best[0])
    assert torch.allclose(both.images[1], alone.images[0], atol=1e-4)


def test_a_constant_reward_is_said_to_be_no_help():
    with pytest.warns(UserWarning, match="search cannot help"):
        report = run("tree", "sd3", reward=Constant()).report
    assert "search cannot help" in report.notes[0]


@pytest.mark.parametrize("name", ["tree", "smc", "random", "beam"])
def test_candidates_that_cannot_be_scored_are_dropped_and_counted(name: str):
    report = run(name, "sd3", times=12, reward=Picky()).report
    assert report.best_reward.isfinite().all()
    assert report.invalid[0] == int((~report.scores.valid[0]).sum()) - (report.scores.total.shape[1] - report.counts[0])


def test_no_valid_candidate_at_all_is_an_error():
    class Blind(Constant):
        name = "blind"

        def __call__(self, media: torch.Tensor, cases: Any) -> torch.Tensor:
            return torch.full((len(media),), torch.nan)

    with pytest.raises(InvalidReward, match="blind"):
        run("smc", "sd3", reward=Blind())


def test_a_reward_without_a_gradient_is_refused_by_noise_optimisation():
    with pytest.raises(NotDifferentiable, match="tree="):
        run("reno", "sd3", reward=Constant())


@pytest.mark.parametrize("noise_level", [0, -1.0])
def test_a_branching_method_without_noise_says_what_to_set(noise_level: float):
    with pytest.raises(ConfigError, match="Set it above 0"):
        run("tree", "sd3", noise_level=noise_level)


def test_an_explicit_eta_of_zero_is_refused_by_a_branching_method():
    with pytest.raises(ConfigError, match="eta"):
        run("tree", "sd15", asked={"eta": 0.0})


def test_interrupting_gives_the_best_so_far():
    report = run("tree", "sd3", reward=Impatient(3)).report
    assert report.notes == ["interrupted: this is the best so far"]
    assert report.counts == [3]


def test_on_improve_sees_rising_rewards_and_pictures():
    seen: list[Improvement] = []
    report = run("tree", "sd3", on_improve=seen.append).report
    rewards = [found.reward for found in seen]
    assert rewards == sorted(rewards)
    assert rewards[-1] == float(report.best_reward[0])
    assert seen[0].image.size == (16, 16)


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_a_tree_goes_on_from_a_file_as_if_it_had_never_stopped(family: str, tmp_path: Path):
    pipe = build(family)
    each = plain_nfe(pipe, call(family, 1))
    half = run("tree", family, budget=4 * each).report
    save_tree(half.tree, tmp_path / "tree.safetensors")
    rest = run("tree", family, budget=4 * each, grown=tmp_path / "tree.safetensors").report
    leaves = [nodes.value[leaf] for nodes in rest.tree.cases for leaf in nodes.leaves]
    assert len(leaves) > half.counts[0]
    assert leaves[: half.counts[0]] == pytest.approx(half.scores.total[0].tolist())
    assert float(rest.best_reward[0]) >= float(half.best_reward[0]) - 1e-5


def test_a_few_steps_more_finish_what_noise_optimisation_began():
    pipe = build("sd3")
    shell = ReNOPipeline.from_pipe(pipe)
    ask = call("sd3", 1) | {"num_inference_steps": 1}
    out = shell(
        **ask, generator=seeded(), reward=Brightness(), reno={"iterations": 3}, finish={"num_inference_steps": 3}
    )
    told = out.report.extras["reno"]
    assert len(out.report.scores.total[0]) == 1
    assert float(told["final"][0]) == pytest.approx(float(out.report.best_reward[0]))


def test_checkpointing_changes_no_image_and_is_switched_off_again():
    plain, saved = (run("reno", "sd3", output_type="pt", checkpointing=on) for on in (False, True))
    assert torch.allclose(plain.images, saved.images, atol=1e-4)


def test_short_memory_halves_the_rows_and_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    from diffalign.drive import Driver

    whole = run("smc", "sd3", output_type="pt")
    real = Driver.predict

    def short(self: Driver, x: torch.Tensor, i: int, *, grad: bool = False) -> torch.Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("out of memory, on purpose")
        return real(self, x, i, grad=grad)

    monkeypatch.setattr(Driver, "predict", short)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        halved = run("smc", "sd3", output_type="pt")
    assert any("do not fit the memory" in str(w.message) for w in caught)
    assert torch.allclose(whole.images, halved.images, atol=1e-4)
    assert whole.report.budget["nfe"] == halved.report.budget["nfe"]


@pytest.mark.parametrize(
    "method", ["tree", "smc", "reno", "zero_order", "reno+tree", "smc+reno", "tree+random", "beam"]
)
def test_one_door_opens_every_method_and_their_combinations(method: str):
    pipe = build("sd3")
    asked = {k: v for k, v in call("sd3", 1).items() if k != "prompt"}
    budget = 10 * plain_nfe(pipe, call("sd3", 1))
    out = align(pipe, "a red cube", method=method, reward=Brightness(), budget=budget, generator=seeded(), **asked)
    assert out.report.method == method
    assert 0 < out.report.budget["nfe"] <= budget


def test_noise_optimisation_counts_its_backward_passes():
    each = plain_nfe(build("sd3"), call("sd3", 1))
    report = run("reno", "sd3", reno={"iterations": 3}, budget=None).report
    assert report.budget["nfe"] == (3 + 2 * 2) * each


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_the_first_candidate_of_a_noisy_sampler_is_the_stock_image(scheduler: str):
    import diffusers

    pipe = build("sd15")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    stock = pipe(**call("sd15", 1), generator=seeded(), output_type="pt").images
    ask = {**call("sd15", 1), "generator": seeded(), "output_type": "pt", "reward": Brightness(), "top_k": 3}
    out = SearchPipeline.from_pipe(pipe)(**ask, search={"method": "random", "neighbours": 3, "rounds": 1})
    place = out.report.best[0].tolist().index(0)
    assert torch.allclose(stock[0], out.images[place], atol=1e-5)


def test_a_failed_decode_costs_nothing(monkeypatch: pytest.MonkeyPatch):
    from diffalign.drive import Driver

    real = Driver.rollout

    def short(self: Driver, *args: Any, **kwargs: Any) -> Any:
        walk = real(self, *args, **kwargs)
        if self.batch > 2:
            raise torch.OutOfMemoryError("out of memory, on purpose")
        return walk

    whole = run("random", "sd3", times=8).report
    monkeypatch.setattr(Driver, "rollout", short)
    with pytest.warns(UserWarning, match="do not fit the memory"):
        halved = run("random", "sd3", times=8).report
    assert whole.counts == halved.counts
    assert whole.budget["nfe"] == halved.budget["nfe"]


def test_fewer_images_than_asked_for_come_back_with_a_word():
    with pytest.warns(UserWarning, match="top_k is 3"):
        out = run("svdd", "sd3", top_k=3, output_type="pt")
    assert len(out.images) == 1


def test_a_tree_of_other_prompts_is_refused():
    pipe = build("sd3")
    grown = run("tree", "sd3", budget=4 * plain_nfe(pipe, call("sd3", 1)), batch=2).report.tree
    with pytest.raises(ConfigError, match="2 prompts"):
        run("tree", "sd3", grown=grown)


def test_a_second_method_without_budget_leaves_the_first_ones_images():
    pipe = build("sd3")
    asked = {k: v for k, v in call("sd3", 1).items() if k != "prompt"}
    settings = {"smc": {"particles": 8}}
    budget = 10 * plain_nfe(pipe, call("sd3", 1))
    told: Any = {"reward": Brightness(), "budget": budget, "settings": settings, "generator": seeded()}
    out = align(pipe, "a cube", method="tree+smc", **told, **asked)
    assert "too little left" in out.report.notes[0]


def test_one_door_knows_best_of_n_and_refuses_the_unknown():
    pipe = build("sd3")
    asked = {k: v for k, v in call("sd3", 1).items() if k != "prompt"}
    out = align(pipe, "a cube", method="best_of_n", reward=Brightness(), budget=200, generator=seeded(), **asked)
    assert out.report.method == "best_of_n"
    with pytest.raises(UnknownName, match="tree"):
        align(pipe, "a cube", method="tre", reward=Brightness(), **asked)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (400, Limits(nfe=400)),
        ("400", Limits(nfe=400)),
        ("20s", Limits(seconds=20)),
        (1.5, Limits(seconds=1.5)),
        (None, Limits()),
    ],
)
def test_a_budget_is_nfe_or_seconds(said: Any, meant: Limits):
    assert limits_of(said) == meant


def test_a_budget_that_means_nothing_is_refused():
    with pytest.raises(ConfigError, match="20s"):
        limits_of("soon")


@pytest.mark.parametrize("name", ["tree", "smc", "svdd", "beam"])
def test_seconds_end_a_search_in_time_and_are_used(name: str):
    report = run(name, "sd3", budget="1.5s").report
    assert 0.3 < report.budget["seconds"] < 3
    assert report.counts[0] > 2


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_every_output_type_comes_back(output_type: str):
    pipe = build("sd3")
    stock = pipe(**call("sd3", 1), generator=seeded(), output_type=output_type)
    ours = run("tree", "sd3", output_type=output_type)
    assert np.asarray(stock.images[0]).shape == np.asarray(ours.images[0]).shape


def test_a_tuple_is_given_where_a_tuple_is_asked_for():
    out = run("tree", "sd3", return_dict=False)
    assert isinstance(out, tuple)


def test_step_callbacks_are_refused_with_the_alternative():
    with pytest.raises(ConfigError, match="on_improve"):
        run("tree", "sd3", callback_on_step_end=lambda *a: {})


def test_dense_gains_add_up_to_the_way_from_first_to_last():
    told = run("dense", "sd3").report.extras["dense"]
    rewards, gains = told["rewards"][0], told["gains"][0]
    assert float(gains.sum()) == pytest.approx(float(rewards[-1] - rewards[0]), abs=1e-6)


def test_the_starting_latents_a_caller_gives_are_the_first_candidates_own():
    pipe = build("sd3")
    given = torch.randn(1, 4, 8, 8, generator=seeded(1))
    stock = pipe(**call("sd3", 1), latents=given, generator=seeded(), output_type="pt").images
    out = run("random", "sd3", times=1, latents=given, output_type="pt")
    assert torch.allclose(stock, out.images, atol=1e-5)


class Curious(Brightness):
    """Remembers what it was asked about."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, Any]] = set()

    def __call__(self, media: torch.Tensor, cases: Any) -> torch.Tensor:
        self.seen |= {(case.prompt, case.metadata.get("kind")) for case in cases}
        return super().__call__(media, cases)


def test_a_case_in_place_of_a_prompt_hands_its_metadata_to_the_reward(name: str):
    asked = [Case(prompt="a", metadata={"kind": "one"}), Case(prompt="a", metadata={"kind": "two"})]
    reward = Curious()
    more = {"asked": {"prompt": asked}, "generator": [seeded(1), seeded(2)]}
    run(name, "sd15", batch=2, reward=reward, **more)
    assert reward.seen == {("a", "one"), ("a", "two")}


def test_a_case_in_place_of_a_prompt_is_its_prompt_to_the_stock_call():
    pipe, told = TreePipeline.from_pipe(build("sd15")), {**call("sd15", 2), "output_type": "np"}
    cases = [Case(prompt=prompt) for prompt in told.pop("prompt")]
    found = pixels(pipe(prompt=cases, **told, generator=seeded()))
    assert (found == pixels(pipe(prompt=[case.prompt for case in cases], **told, generator=seeded()))).all()
    assert (found == pixels(pipe(cases, **told, generator=seeded()))).all()
