"""Edits from call to reward: pictures of a stock call become those of its cases, and a judge picks among edits."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffalign import media
from diffalign.cases import Case
from diffalign.errors import InvalidReward
from diffalign.judges.asking import Question
from diffalign.judges.local import LocalJudge
from diffalign.judges.protocols import Sampling
from diffalign.pipelines import BestOfNPipeline
from diffalign.request import Request
from diffalign.rewards.edit_r1 import EditR1
from diffalign.rewards.editscore import EditScore
from diffalign.scoring import ScoreCache
from diffalign.world import edit_sets, render_many
from tests.judges import tiny_judges
from tests.rewards.scripted import Scripted, level
from tests.tiny import build, call, dits, unets
from tests.tiny.family import loud, pictures, prompts

EDITORS = ["instruct_pix2pix", "flux_kontext"]


def adapter() -> diffusers.T2IAdapter:
    sizes = {"in_channels": 3, "channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 2}
    return loud(diffusers.T2IAdapter, **sizes, adapter_type="full_adapter")


def adapted() -> diffusers.UNet2DConditionModel:
    """With attention in its first level, where an adapter speaks."""
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return unets.unet(down_block_types=down, up_block_types=up)


def stable(name: str, **extra: Any) -> Callable[[], DiffusionPipeline]:
    return partial(unets.stable, getattr(diffusers, f"StableDiffusion{name}Pipeline"), unet=unets.unet, **extra)


CONTROL = {"controlnet": unets.controlnet}
PIPES: dict[str, Callable[[], DiffusionPipeline]] = {
    **{name: partial(build, name) for name in (*EDITORS, "sd_img2img", "sd_inpaint", "flux_img2img")},
    **{name: partial(build, name) for name in ("sdxl_instruct_pix2pix", "sd_controlnet", "sd3_controlnet", "sd15")},
    "sd3_img2img": partial(dits.sd3, diffusers.StableDiffusion3Img2ImgPipeline),
    "sd_controlnet_img2img": stable("ControlNetImg2Img", **CONTROL),
    "sd_controlnet_inpaint": stable("ControlNetInpaint", **CONTROL),
    "sd_adapter": partial(unets.stable, diffusers.StableDiffusionAdapterPipeline, unet=adapted, adapter=adapter),
}
GIVEN = {  # the arguments that hold pictures -> which of a case they fill
    "instruct_pix2pix": {"image": "source"},
    "sdxl_instruct_pix2pix": {"image": "source"},
    "flux_kontext": {"image": "source"},
    "flux_img2img": {"image": "source"},
    "sd_img2img": {"image": "source"},
    "sd3_img2img": {"image": "source"},
    "sd_inpaint": {"image": "source", "mask_image": None},
    "sd_controlnet": {"image": "control"},
    "sd3_controlnet": {"control_image": "control"},
    "sd_controlnet_img2img": {"image": "source", "control_image": "control"},
    "sd_controlnet_inpaint": {"image": "source", "control_image": "control", "mask_image": None},
    "sd_adapter": {"image": "control"},
    "sd15": {},
}


class Noting:
    """A reward that remembers its cases."""

    name, differentiable, modality, version, range = "noting", False, "image", None, None

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def __call__(self, media: torch.Tensor, cases: Any) -> torch.Tensor:
        self.cases += cases
        return media.flatten(1).mean(1)


def shown(name: str, count: int) -> dict[str, list[Image.Image]]:
    """Other pictures for every argument that holds some."""
    drawn = pictures(count * len(GIVEN[name]))
    return {argument: drawn[k * count : (k + 1) * count] for k, argument in enumerate(GIVEN[name])}


def seen(name: str, n: int = 1, **given: Any) -> list[Case]:
    """The cases that a reward is asked about by a call of that pipeline."""
    reward, pipe = Noting(), PIPES[name]()
    usual: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16}
    if name == "flux_kontext":
        usual |= {"max_area": 256, "_auto_resize": False}
    known = inspect.signature(type(pipe).__call__).parameters
    usual = {key: value for key, value in usual.items() if key in known}
    BestOfNPipeline.from_pipe(pipe)(**usual, **given, reward=reward, n=n, generator=torch.Generator().manual_seed(0))
    return reward.cases


def same(picture: Image.Image | None, other: Image.Image | None) -> bool:
    if picture is None or other is None:
        return picture is other
    return np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(other.convert("RGB")))


def filled(name: str, given: dict[str, list[Image.Image]], row: int, slot: str) -> Image.Image | None:
    return next((given[argument][row] for argument, place in GIVEN[name].items() if place == slot), None)


@pytest.mark.parametrize("name", GIVEN)
def test_the_pictures_of_a_call_become_those_of_its_cases(name: str) -> None:
    given = shown(name, 2)
    found = seen(name, n=2, prompt=prompts(2), **given)
    assert [case.prompt for case in found] == prompts(2) * 2
    for k, case in enumerate(found):
        assert same(case.source, filled(name, given, k % 2, "source"))
        assert same(case.control, filled(name, given, k % 2, "control"))
        assert case.reference is None


@pytest.mark.parametrize("name", ["instruct_pix2pix", "sd_img2img", "sd_controlnet", "sd_controlnet_img2img"])
def test_one_picture_serves_every_prompt_in_whatever_it_is_held(name: str) -> None:
    alone = {argument: drawn[0] for argument, drawn in shown(name, 1).items()}
    for form in ("pil", "pt", "np"):
        given = {key: _as(form, picture) for key, picture in alone.items()}
        if form != "pil":  # stock pipelines take one array for each prompt
            given = {key: np.concatenate([v] * 2) if form == "np" else torch.cat([v] * 2) for key, v in given.items()}
        for case in seen(name, prompt=prompts(2), **given):
            assert same(case.source, filled(name, {k: [v] for k, v in alone.items()}, 0, "source"))
            assert same(case.control, filled(name, {k: [v] for k, v in alone.items()}, 0, "control"))


def _as(form: str, picture: Image.Image) -> Any:
    batch = media.to_tensor([picture])
    return picture if form == "pil" else batch if form == "pt" else batch.permute(0, 2, 3, 1).numpy()


def test_several_images_of_a_prompt_share_its_source() -> None:
    given = shown("instruct_pix2pix", 2)
    found = seen("instruct_pix2pix", n=2, prompt=prompts(2), num_images_per_prompt=2, **given)
    assert [same(case.source, given["image"][0]) for case in found] == [True, True, False, False]


def test_two_controlnets_read_a_picture_each_and_the_first_is_the_control() -> None:
    pipe = stable("ControlNet", controlnet=lambda: [unets.controlnet(), unets.controlnet()])()
    drawn, reward = pictures(2), Noting()
    asked = {"prompt": prompts(2), "num_inference_steps": 2, "height": 16, "width": 16}
    BestOfNPipeline.from_pipe(pipe)(**asked, image=drawn, reward=reward, n=1)
    assert [same(case.control, drawn[0]) for case in reward.cases] == [True, True]


def test_latents_in_place_of_a_picture_are_no_source() -> None:
    given = torch.zeros(1, 4, 8, 8)
    (case,) = seen("instruct_pix2pix", prompt="red cube", image=given)
    assert case.source is None


def test_a_map_of_one_channel_is_a_grey_picture() -> None:
    (found,) = media.pictures(torch.full((1, 1, 4, 6), 0.2), 1)
    assert found is not None
    assert (found.mode, found.size) == ("RGB", (6, 4))
    assert found.getpixel((0, 0)) == (51, 51, 51)


def bound(call: Callable[..., Any], **given: Any) -> Case:
    (case,) = Request.of(object(), call, (), {"prompt": "a", **given}).cases
    return case


def test_pipelines_with_other_names_for_their_pictures_are_understood() -> None:
    first, second = pictures(2)

    def omnigen(self: Any, prompt: Any, input_images: Any = None, generator: Any = None) -> None: ...

    def repaints(
        self: Any, prompt: Any, control_image: Any = None, control_mask: Any = None, generator: Any = None
    ) -> None: ...

    assert same(bound(omnigen, input_images=[[first, second]]).source, first)
    found = bound(repaints, control_image=first, control_mask=second)
    assert same(found.source, first)
    assert same(found.control, first)
    for cls in (diffusers.StableDiffusion3ControlNetInpaintingPipeline, diffusers.QwenImageControlNetInpaintPipeline):
        assert same(bound(cls.__call__, control_image=first, control_mask=second).source, first)


def test_a_picture_of_the_case_stands_where_the_call_has_none() -> None:
    picture = pictures(1)[0]
    (case,) = seen("sd15", prompt=Case(prompt="red cube", source=picture, metadata={"instruction": "x"}))
    assert same(case.source, picture)
    assert case.metadata == {"instruction": "x"}


def lights(question: Question) -> str:
    """The brighter the edit the better, for both protocols."""
    if len(question.images) == 1 and "yes-or-no" in question.text:
        return json.dumps([{"question": "Is it brighter?", "category": "follow"}])
    light = level(question.images[-1])
    return json.dumps(
        {"checks": [1], "reasoning": "", "score": 10 * light if "checks" in question.text else [25 * light, 20]}
    )


@pytest.mark.parametrize("family", EDITORS)
@pytest.mark.parametrize("reward", [EditScore, EditR1])
def test_the_best_of_several_edits_by_a_judge(family: str, reward: Any) -> None:
    judge = Scripted(lights)
    shell, asked = BestOfNPipeline.from_pipe(build(family)), call(family, 2)
    seed = torch.Generator().manual_seed(0)
    out = shell(**asked, reward=reward(judge), n=4, generator=seed, output_type="pt")
    scores = out.report.scores
    assert scores.valid.all()
    assert torch.equal(out.report.best[:, 0], scores.total.argmax(1))
    assert torch.allclose(shell_light(out.images), best_light(scores, reward), atol=0.02)
    for question in judge.questions:
        if len(question.images) == 2:
            assert any(same(media.to_pil(question.images[0]), picture) for picture in asked["image"])


def shell_light(images: torch.Tensor) -> torch.Tensor:
    return images.float().clamp(0, 1).flatten(1).mean(1)


def best_light(scores: Any, reward: Any) -> torch.Tensor:
    """The light of the best candidates by what the judge said of them."""
    part = scores.parts["prompt_following" if reward is EditScore else "final"]
    return part.gather(1, scores.total.argmax(1, keepdim=True))[:, 0] / 10


@pytest.mark.parametrize("family", EDITORS)
def test_malformed_replies_leave_candidates_out_of_the_choice(family: str) -> None:
    def moody(question: Question) -> str:
        return lights(question) if round(1000 * level(question.images[-1])) % 2 else "splendid"

    pipe, seed = build(family), torch.Generator().manual_seed(0)
    out = BestOfNPipeline.from_pipe(pipe)(**call(family, 1), reward=EditScore(Scripted(moody)), n=8, generator=seed)
    scores = out.report.scores
    valid = scores.valid[0]
    assert 0 < int(valid.sum()) < 8
    assert bool(valid[int(out.report.best[0, 0])])


@pytest.mark.parametrize("family", EDITORS)
def test_a_real_judge_that_knows_nothing_is_asked_twice_and_never_becomes_a_number(family: str, tmp_path: Path) -> None:
    judge = LocalJudge(str(tiny_judges.folder(tmp_path / "judge")))
    reward = EditScore(judge, sampling=Sampling(temperature=0.7, max_tokens=24))
    shell = BestOfNPipeline.from_pipe(build(family))
    with pytest.raises(InvalidReward, match="editscore"):  # weights that know nothing write no JSON
        shell(**call(family, 1), reward=reward, n=2, generator=torch.Generator().manual_seed(0))
    assert len(reward.judgements) == 2
    assert all(one.problem and len(one.raw) == 4 for _, one in reward.judgements)  # both questions, asked twice


def test_a_second_search_asks_nothing(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores.db")
    shell, found = BestOfNPipeline.from_pipe(build("instruct_pix2pix")), []
    for _ in range(2):
        judge = Scripted(lights)
        seed = torch.Generator().manual_seed(0)
        out = shell(**call("instruct_pix2pix", 1), reward=EditScore(judge), n=2, generator=seed, score_cache=cache)
        found.append(out.report.scores.total)
    assert judge.questions == []
    assert torch.equal(*found)


def test_exact_edits_beat_others_by_a_judge_that_reads_the_world() -> None:
    rng = random.Random(3)
    triples = [edit_sets.sample_edit(rng) for _ in range(4)]
    outcomes = [edit_sets.attempt(triple, outcome, rng) for triple in triples for outcome in ("exact", "none")]
    cases = [edit_sets.edit_case(triple) for triple in triples for _ in range(2)]
    drawn = render_many(outcomes)
    told = {case.prompt: case for case in cases}

    def knows(question: Question) -> str:
        if len(question.images) == 1:
            return json.dumps({"score": [25, 25]})
        case = next(case for prompt, case in told.items() if f"instruction was: {prompt}\n" in question.text)
        (verdict,) = edit_sets.verify_edits(question.images[1][None], [case])
        return json.dumps({"score": [25 * verdict.followed, 25 * verdict.kept]})

    found = EditScore(Scripted(knows))(drawn, cases).total
    assert found[::2].tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    assert (found[1::2] < 0.5).all()
