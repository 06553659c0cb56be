"""A shell is the stock pipeline with one more way to call it: the four proofs, and everything that worked before."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline

from diffalign.budget import Limits
from diffalign.errors import BudgetError, ConfigError, HubError, InvalidReward, ModelError
from diffalign.pipelines import BestOfNPipeline
from tests.tiny import build, call

IMAGE = ["sd15", "sdxl", "sd3", "flux", "instruct_pix2pix", "sd_controlnet"]
FAMILIES = [*IMAGE, "ltx_video"]


class Brightness:
    """Mean of all pixels; remembers what it was asked about."""

    name, differentiable, modality, version, range = "brightness", True, "image", None, (0.0, 1.0)

    def __init__(self) -> None:
        self.cases: list[Any] = []

    def __call__(self, media: torch.Tensor, cases: Any) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.cases += list(cases)
        return media.flatten(1).mean(1)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(output: Any) -> np.ndarray:
    return np.stack([np.asarray(row) for row in (output.images if hasattr(output, "images") else output.frames)])


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_without_a_reward_the_output_is_the_stock_output(family: str):
    pipe = build(family)
    shell = BestOfNPipeline.from_pipe(pipe)
    stock = pixels(pipe(**call(family, 2), generator=seeded()))
    assert np.array_equal(stock, pixels(shell(**call(family, 2), generator=seeded())))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("listed", [False, True])
def test_one_candidate_is_the_stock_image_bit_for_bit(family: str, output_type: str, listed: bool):
    def generators() -> Any:
        return [seeded(5), seeded(9)] if listed else seeded()

    pipe = build(family)
    stock = pipe(**call(family, 2), generator=generators(), output_type=output_type)
    ours = BestOfNPipeline.from_pipe(pipe)(
        **call(family, 2), generator=generators(), output_type=output_type, reward=Brightness(), n=1
    )
    assert np.array_equal(pixels(stock), pixels(ours))
    assert type(stock) is type(ours)


def test_the_best_reward_never_falls_when_candidates_are_added(family: str):
    shell = BestOfNPipeline.from_pipe(build(family))
    best = []
    for n in (1, 2, 8):
        out = shell(**call(family, 1), generator=seeded(), reward=Brightness(), n=n)
        best.append(float(out.report.best_reward[0]))
    assert best == sorted(best)
    assert best[-1] > best[0]


def test_the_same_seed_gives_the_same_report(family: str):
    shell = BestOfNPipeline.from_pipe(build(family))
    runs = [shell(**call(family, 2), generator=seeded(), reward=Brightness(), n=3) for _ in range(2)]
    assert np.array_equal(pixels(runs[0]), pixels(runs[1]))
    assert torch.equal(runs[0].report.scores.total, runs[1].report.scores.total)


def test_whatever_is_swapped_in_is_put_back_even_when_the_reward_raises(family: str):
    pipe = build(family)
    before = {k: (type(v), id(v)) for k, v in pipe.components.items()}
    shell = BestOfNPipeline.from_pipe(pipe)
    bars = dict(shell._progress_bar_config)

    def broken(media: torch.Tensor, cases: Any) -> torch.Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        shell(**call(family, 1), generator=seeded(), reward=broken, n=2)
    assert {k: (type(v), id(v)) for k, v in shell.components.items()} == before
    assert shell._progress_bar_config == bars
    stock = pixels(pipe(**call(family, 1), generator=seeded()))
    assert np.array_equal(stock, pixels(shell(**call(family, 1), generator=seeded())))


def test_a_later_candidate_does_not_depend_on_its_neighbours():
    shell = BestOfNPipeline.from_pipe(build("sd3"))
    asked = {k: v for k, v in call("sd3", 2).items() if k not in ("prompt", "negative_prompt")}
    ask = {**asked, "reward": Brightness(), "n": 3, "top_k": 3, "output_type": "pt"}
    both = shell(prompt=["one", "two"], generator=[seeded(5), seeded(9)], **ask)
    alone = shell(prompt="two", generator=seeded(9), **ask)
    assert both.report.seeds[1] == alone.report.seeds[0]
    assert both.report.seeds[1][0] == 9
    assert len({seed for row in both.report.seeds for seed in row}) == 6
    assert torch.equal(both.report.best[1], alone.report.best[0])
    assert torch.allclose(both.images[3:], alone.images, atol=1e-5)


def test_a_candidate_can_be_drawn_again_from_its_seed():
    pipe = build("sd3")
    out = BestOfNPipeline.from_pipe(pipe)(**call("sd3", 1), generator=seeded(), reward=Brightness(), n=4)
    seed = out.report.seeds[0][int(out.report.best[0, 0])]
    assert np.array_equal(pixels(out), pixels(pipe(**call("sd3", 1), generator=seeded(seed))))


def test_without_a_generator_the_global_seed_decides():
    shell = BestOfNPipeline.from_pipe(build("sd3"))
    reports = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        reports.append(shell(**call("sd3", 2), reward=Brightness(), n=2).report)
    assert torch.equal(reports[0].scores.total, reports[1].scores.total)
    assert not torch.equal(reports[0].scores.total, reports[2].scores.total)


def test_images_come_best_first_for_each_prompt_in_turn():
    out = BestOfNPipeline.from_pipe(build("sd3"))(
        **call("sd3", 2), generator=seeded(), reward=Brightness(), n=4, top_k=2, output_type="pt"
    )
    got = out.images.flatten(1).mean(1)
    assert len(out.images) == 4
    assert got[0] >= got[1]
    assert got[2] >= got[3]
    assert torch.allclose(got.view(2, 2), out.report.scores.total.gather(1, out.report.best), atol=1e-6)


def test_images_per_prompt_are_candidates_of_one_call():
    pipe = build("sd15")
    stock = pipe(**call("sd15", 2), generator=seeded(), num_images_per_prompt=2, output_type="np")
    shell = BestOfNPipeline.from_pipe(pipe)
    ask = {"generator": seeded(), "num_images_per_prompt": 2, "output_type": "np", "reward": Brightness()}
    first = shell(**call("sd15", 2), **ask, n=2)
    order = first.report.best
    assert len(first.images) == 4
    grid = stock.images.reshape(2, 2, *stock.images.shape[1:])
    assert np.array_equal(first.images, grid[[[0], [1]], order].reshape(stock.images.shape))
    more = shell(**call("sd15", 2), **(ask | {"generator": seeded()}), n=4, top_k=1)
    assert more.report.candidates == 4
    assert len(more.images) == 2
    with pytest.raises(ConfigError, match="Make n a multiple of 2"):
        shell(**call("sd15", 2), **ask, n=3)


def test_a_tuple_is_returned_when_asked_and_the_report_stays_on_the_pipeline():
    shell = BestOfNPipeline.from_pipe(build("sd15"))
    out = shell(**call("sd15", 1), generator=seeded(), return_dict=False, reward=Brightness(), n=2)
    stock = shell(**call("sd15", 1), generator=seeded(), return_dict=False)
    assert isinstance(out, tuple)
    assert len(out) == len(stock)
    assert shell.report.candidates == 2


def test_the_callers_callback_sees_every_step_and_the_shell_itself():
    shell = BestOfNPipeline.from_pipe(build("sd3"))
    seen = []

    def callback(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipe is shell, step, sorted(tensors)))
        return {}

    shell(**call("sd3", 1), generator=seeded(), callback_on_step_end=callback, reward=Brightness(), n=2)
    assert seen == [(True, step, ["latents"]) for _ in range(2) for step in range(4)]


def test_starting_latents_belong_to_the_stock_image_only():
    pipe = build("sd15")
    shape = pipe(**call("sd15", 1), generator=seeded(), output_type="latent").images.shape
    latents = torch.randn(shape, generator=seeded(1))
    out = BestOfNPipeline.from_pipe(pipe)(
        **call("sd15", 1), latents=latents, generator=seeded(), reward=Brightness(), n=3, top_k=3, output_type="np"
    )
    stock = pipe(**call("sd15", 1), latents=latents, generator=seeded(), output_type="np").images[0]
    assert np.array_equal(out.images[out.report.best[0].tolist().index(0)], stock)
    assert len(set(out.report.scores.total[0].tolist())) == 3


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_latents_can_be_asked_for_and_are_scored_by_their_pixels(family: str):
    pipe = build(family)
    shell = BestOfNPipeline.from_pipe(pipe)
    stock = pipe(**call(family, 2), generator=seeded(), output_type="latent").images
    out = shell(**call(family, 2), generator=seeded(), output_type="latent", reward=Brightness(), n=1)
    assert torch.equal(out.images, stock)
    seen = shell(**call(family, 2), generator=seeded(), output_type="pt", reward=Brightness(), n=1)
    assert torch.allclose(out.report.scores.total, seen.report.scores.total, atol=1e-5)


def test_an_unknown_output_type_is_named():
    with pytest.raises(ConfigError, match="output_type is 'jpeg'"):
        BestOfNPipeline.from_pipe(build("sd3"))(**call("sd3", 1), output_type="jpeg", reward=Brightness(), n=1)


def test_rewards_see_the_picture_to_edit_and_the_control_picture():
    reward = Brightness()
    BestOfNPipeline.from_pipe(build("instruct_pix2pix"))(**call("instruct_pix2pix", 2), reward=reward, n=1)
    assert all(case.source is not None and case.control is None for case in reward.cases)
    reward = Brightness()
    BestOfNPipeline.from_pipe(build("sd_controlnet"))(**call("sd_controlnet", 2), reward=reward, n=1)
    assert all(case.control is not None and case.source is None for case in reward.cases)


def test_prompt_embeddings_take_the_place_of_prompts():
    pipe, reward = build("sd15"), Brightness()
    asked = {k: v for k, v in call("sd15", 2).items() if k not in ("prompt", "negative_prompt")}
    embeds, negative = pipe.encode_prompt(["a", "b"], "cpu", 1, True, negative_prompt=["c", "c"])
    out = BestOfNPipeline.from_pipe(pipe)(
        prompt_embeds=embeds, negative_prompt_embeds=negative, **asked, generator=seeded(), reward=reward, n=2
    )
    assert len(out.images) == 2
    assert {case.prompt for case in reward.cases} == {""}


def test_a_reward_that_reads_prompts_refuses_embeddings_alone():
    pipe, reward = build("sd15"), Brightness()
    reward.reads_prompt = True  # type: ignore[attr-defined]
    embeds, negative = pipe.encode_prompt(["a"], "cpu", 1, True, negative_prompt=["c"])
    with pytest.raises(ConfigError, match="'brightness' reads the prompt"):
        BestOfNPipeline.from_pipe(pipe)(prompt_embeds=embeds, negative_prompt_embeds=negative, reward=reward, n=2)


def test_a_budget_of_nfe_is_never_exceeded_and_is_used_up():
    shell = BestOfNPipeline.from_pipe(build("sd3"))
    each = shell(**call("sd3", 2), generator=seeded(), reward=Brightness(), n=1).report.budget["nfe"]
    report = shell(**call("sd3", 2), generator=seeded(), reward=Brightness(), budget=int(3.5 * each)).report
    assert report.candidates == 3
    assert report.budget["nfe"] == 3 * each
    assert report.budget["decodes"] == report.budget["reward_calls"] == 3


def test_a_budget_too_small_for_one_candidate_is_refused():
    shell = BestOfNPipeline.from_pipe(build("sd3"))
    with pytest.raises(BudgetError, match="nfe = 3 per prompt, but one candidate costs 8"):
        shell(**call("sd3", 1), reward=Brightness(), budget=3)


def test_reward_calls_and_seconds_are_limits_too():
    shell = BestOfNPipeline.from_pipe(build("sd3"))
    assert shell(**call("sd3", 1), reward=Brightness(), budget=Limits(reward_calls=2)).report.candidates == 2
    with pytest.raises(BudgetError, match="seconds per prompt"):
        shell(**call("sd3", 1), reward=Brightness(), budget=Limits(seconds=1e-6))


def test_more_images_than_the_budget_allows_are_refused():
    shell = BestOfNPipeline.from_pipe(build("sd3"))
    with pytest.raises(BudgetError, match="top_k is 3, but the budget ended after 2"):
        shell(**call("sd3", 1), reward=Brightness(), budget=16, top_k=3)


def test_the_winner_does_not_depend_on_how_rewards_are_chunked():
    shell = BestOfNPipeline.from_pipe(build("sd3"))
    ask = {**call("sd3", 3), "reward": Brightness(), "n": 3}
    reports = [shell(**ask, generator=seeded(), reward_chunk=chunk).report for chunk in (None, 1, 2)]
    assert all(torch.equal(reports[0].best, report.best) for report in reports)


def test_a_callback_that_interrupts_ends_the_search():
    shell = BestOfNPipeline.from_pipe(build("sd3"))

    def stop(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return {}

    out = shell(**call("sd3", 1), generator=seeded(), callback_on_step_end=stop, reward=Brightness(), n=4)
    assert out.report.candidates < 4


def test_the_report_is_plain_json():
    out = BestOfNPipeline.from_pipe(build("sd3"))(**call("sd3", 2), generator=seeded(), reward=Brightness(), n=2)
    assert json.loads(json.dumps(out.report.json(), allow_nan=False))["method"] == "best_of_n"


def test_something_that_is_no_pipeline_is_refused():
    with pytest.raises(ConfigError, match="got str"):
        BestOfNPipeline.from_pipe("shapes-sd3")  # type: ignore[arg-type]


def test_the_report_holds_parts_curve_and_theory():
    out = BestOfNPipeline.from_pipe(build("sd3"))(
        **call("sd3", 2), generator=seeded(), reward=[Brightness(), lambda m, c: m.flatten(1).std(1)], n=4
    )
    report = out.report.json()
    assert len(report["parts"]) == 2
    assert [len(row) for row in report["scores"]] == [4, 4]
    assert [point[0] for point in report["curve"]] == [8.0, 16.0, 24.0, 32.0]
    assert report["expected"] == sorted(report["expected"])
    assert report["expected"][-1] == pytest.approx(float(out.report.best_reward.mean()))
    assert report["win_rate"] == pytest.approx(4 / 5)
    assert report["card"]["num_inference_steps"] == 4


def test_the_win_rate_of_a_smaller_n_is_averaged_over_prompts():
    from diffalign.search import best_of_n

    shell = BestOfNPipeline.from_pipe(build("sd3"))
    report = shell(**call("sd3", 2), generator=seeded(), reward=Brightness(), n=6).report
    each = [best_of_n.win_rate(row, 3, 2) for row in report.scores.total]
    assert report.win_rate_of(3, 2) == pytest.approx(sum(each) / 2)
    assert report.win_rate_of(3, 2) == pytest.approx(3 / 5)


def test_invalid_candidates_are_counted_and_never_chosen():
    def picky(media: torch.Tensor, cases: Any) -> torch.Tensor:
        score = media.flatten(1).mean(1)
        return torch.where(torch.tensor([c.seed == 3 for c in cases]), torch.nan, score)

    report = BestOfNPipeline.from_pipe(build("sd3"))(**call("sd3", 1), generator=seeded(), reward=picky, n=3).report
    assert report.invalid == [1]
    assert int(report.best[0, 0]) != 0


def test_a_prompt_without_any_valid_candidate_is_an_error():
    with pytest.raises(InvalidReward, match="NaN for all 2 candidates of 'red cube'"):
        BestOfNPipeline.from_pipe(build("sd3"))(
            **call("sd3", 1), reward=lambda m, c: torch.full((len(m),), torch.nan), n=2
        )


def test_nan_from_the_model_is_an_error_about_the_model():
    pipe = build("sd3")
    next(pipe.transformer.parameters()).data.fill_(torch.nan)
    with pytest.raises(ModelError, match="produced NaN"):
        BestOfNPipeline.from_pipe(pipe)(**call("sd3", 1), reward=Brightness(), n=2)


@pytest.mark.parametrize(("ask", "said"), [({"n": 0}, "n is 0"), ({"n": 2, "top_k": 3}, "only 2 candidates")])
def test_impossible_numbers_are_refused_before_anything_runs(ask: dict[str, int], said: str):
    with pytest.raises(ConfigError, match=said):
        BestOfNPipeline.from_pipe(build("sd3"))(**call("sd3", 1), reward=Brightness(), **ask)


def test_a_shell_is_an_instance_of_the_stock_class_and_shares_its_components():
    pipe = build("sd3")
    shell = BestOfNPipeline.from_pipe(pipe)
    assert isinstance(shell, type(pipe))
    assert isinstance(shell, BestOfNPipeline)
    assert all(shell.components[name] is component for name, component in pipe.components.items())
    assert type(shell.stock()) is type(pipe)


def test_wrapping_a_shell_does_not_stack():
    pipe = build("sd3")
    shell = BestOfNPipeline.from_pipe(pipe)
    assert type(BestOfNPipeline.from_pipe(shell)) is type(shell)
    assert type(type(shell).from_pipe(pipe)) is type(shell)


def test_a_component_can_be_replaced_while_wrapping_and_the_original_keeps_its_own():
    pipe = build("sd15")
    other = type(pipe.scheduler).from_config(pipe.scheduler.config)
    shell = BestOfNPipeline.from_pipe(pipe, scheduler=other)
    assert shell.scheduler is other
    assert pipe.scheduler is not other
    with pytest.raises(ConfigError, match="has no component 'schedular'"):
        BestOfNPipeline.from_pipe(pipe, schedular=other)


def test_the_signature_lists_the_stock_arguments_and_ours():
    names = list(inspect.signature(BestOfNPipeline.from_pipe(build("sd3")).__call__).parameters)
    assert names[0] == "prompt"
    assert {"reward", "n", "budget", "top_k", "guidance_scale"} <= set(names)


def test_moving_the_shell_moves_the_model():
    shell = BestOfNPipeline.from_pipe(build("sd3")).to(torch.float64)
    assert shell.transformer.dtype == torch.float64


def test_saving_writes_the_stock_class_that_plain_diffusers_loads(tmp_path: Path):
    pipe = build("flux")
    BestOfNPipeline.from_pipe(pipe).save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipe)
    before, after = (p(**call("flux", 1), generator=seeded()) for p in (pipe, again))
    assert np.array_equal(pixels(before), pixels(after))
    shell = BestOfNPipeline.from_pretrained(tmp_path)
    assert isinstance(shell, type(pipe))
    assert isinstance(shell, BestOfNPipeline)


def test_diffusers_can_turn_a_shell_into_another_task():
    other = AutoPipelineForImage2Image.from_pipe(BestOfNPipeline.from_pipe(build("sd15")))
    assert type(other).__name__ == "StableDiffusionImg2ImgPipeline"


def test_lora_weights_load_into_the_shell_and_out_again(tmp_path: Path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    donor = build("sd3")
    donor.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    donor.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(donor.transformer))
    shell = BestOfNPipeline.from_pipe(build("sd3"))
    plain = pixels(shell(**call("sd3", 1), generator=seeded()))
    shell.load_lora_weights(tmp_path)
    changed = pixels(shell(**call("sd3", 1), generator=seeded(), reward=Brightness(), n=1))
    assert not np.array_equal(plain, changed)
    assert np.array_equal(changed, pixels(shell.stock()(**call("sd3", 1), generator=seeded())))
    shell.unload_lora_weights()
    assert np.array_equal(plain, pixels(shell(**call("sd3", 1), generator=seeded(), reward=Brightness(), n=1)))


def test_model_offload_works_as_before():
    shell = BestOfNPipeline.from_pipe(build("sd3"))
    plain = shell(**call("sd3", 1), generator=seeded(), reward=Brightness(), n=2)
    shell.enable_model_cpu_offload(device="cpu")
    moved = shell(**call("sd3", 1), generator=seeded(), reward=Brightness(), n=2)
    assert np.array_equal(pixels(plain), pixels(moved))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="accelerate moves single weights to an accelerator only")
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_to_a_gpu_works_as_before(how: str):
    shell = BestOfNPipeline.from_pipe(build("sd3"))
    plain = shell.to("cuda")(**call("sd3", 1), generator=seeded(), reward=Brightness(), n=2)
    getattr(shell.to("cpu"), how)()
    moved = shell(**call("sd3", 1), generator=seeded(), reward=Brightness(), n=2)
    assert torch.allclose(plain.report.scores.total, moved.report.scores.total, atol=1e-3)


def test_the_bar_counts_candidates_and_obeys_the_users_settings(capsys: pytest.CaptureFixture[str]):
    shell = BestOfNPipeline.from_pipe(build("sd3"))
    shell(**call("sd3", 1), reward=Brightness(), n=2)
    assert capsys.readouterr().err == ""
    shell.set_progress_bar_config(desc="mine")
    shell(**call("sd3", 1), reward=Brightness(), n=2)
    shown = capsys.readouterr().err
    assert "mine" in shown
    assert "2/2" in shown
    assert "4/4" not in shown  # the steps of each candidate stay silent


def test_a_folder_that_holds_no_pipeline_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        BestOfNPipeline.from_pretrained(tmp_path)


def test_a_hub_id_without_network_offers_the_embedded_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="embedded model 'shapes-sd3'"):
        BestOfNPipeline.from_pretrained("someone/some-model-nobody-cached")
