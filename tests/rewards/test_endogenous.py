from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.cases import Case
from diffalign.endogenous import load_model
from diffalign.errors import ConfigError, HubError, ModelError
from diffalign.rewards.endogenous import LikelihoodRatio, SelfConfidence
from diffalign.scoring import ScoreCache, make_reward, score
from diffalign.world.compose import sample_clauses, sample_scene
from diffalign.world.grammar import say
from diffalign.world.rendering import render_many
from tests.tiny import FAMILIES, build

OWN = ("max_sequence_length", "num_inference_steps", "clean_caption", "complex_human_instruction", "system_prompt")
SMALL: dict[type, dict[str, Any]] = {
    LikelihoodRatio: {"levels": (0.25, 0.5), "draws": 2},
    SelfConfidence: {"steps": 4, "share": 0.5, "draws": 2},
}
REWARDS = list(SMALL)
PROMPTS = ["red cube", "blue ball", "green tree"]
FAMILY_NAMES = ["sd15", "sdxl", "sd3", "flux", "chroma", "pixart_sigma", "sana", "qwen_image", "aura_flow", "lumina2"]
USUAL = ("sd15", "sd3", "flux", "sana_sprint")  # the others: -m slow
FAMILY_NAMES += ["z_image", "hunyuan_dit", "latent_consistency", "sana_sprint"]


def side_of(name: str) -> int:
    return 32 if name in ("sana", "sana_sprint", "lumina2") else 16


def reward_of(kind: type, name: str = "sd3", pipe: Any = None, **options: Any) -> Any:
    call = {k: v for k, v in FAMILIES[name].call(1).items() if k in OWN}
    call |= {"intermediate_timesteps": None} if name == "sana_sprint" else {}
    return kind(**{"model": pipe or build(name), "call": call, **SMALL[kind], **options})


def media_of(rows: int, side: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def cases_of(*prompts: str) -> list[Case]:
    return [Case(prompt=prompt) for prompt in prompts or PROMPTS]


@pytest.mark.filterwarnings("ignore:.*inside its model")
@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in FAMILY_NAMES])
def test_every_family_is_scored_alike_in_a_batch_alone_and_in_small_chunks(name: str, kind: type) -> None:
    reward, media = reward_of(kind, name), media_of(3, side_of(name))
    found = score(reward, media, cases_of()).total
    alone = [score(reward, media[k : k + 1], cases_of(PROMPTS[k])).total for k in (2, 0, 1)]
    chunked = score(reward_of(kind, name, micro_batch=3), media, cases_of()).total
    assert found.isfinite().all()
    assert found.std() > 0
    assert torch.allclose(found[[2, 0, 1]], torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert torch.allclose(found, chunked, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*inside its model")
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_an_empty_prompt_has_a_ratio_of_zero(name: str) -> None:
    found = score(reward_of(LikelihoodRatio, name), media_of(2, side_of(name)), cases_of("", ""))
    assert torch.allclose(found.total, torch.zeros(2), atol=1e-6)


@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_swapping_the_prompt_with_the_empty_one_turns_the_sign(scale: str) -> None:
    media = media_of(1)
    forth = score(reward_of(LikelihoodRatio, scale=scale), media, cases_of("red cube")).total
    back = score(reward_of(LikelihoodRatio, scale=scale, empty="red cube"), media, cases_of("")).total
    assert torch.allclose(forth, -back, atol=1e-6)
    assert forth.abs() > 1e-4


@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_the_gradient_matches_a_directional_difference(name: str, kind: type) -> None:
    reward, media = reward_of(kind, name), media_of(2).mul(0.5).add(0.25).requires_grad_()
    (slope,) = torch.autograd.grad(score(reward, media, cases_of(*PROMPTS[:2])).total.sum(), media)
    direction, step = slope / slope.norm(), 2e-2
    ends = [
        float(score(reward, media.detach() + s * direction, cases_of(*PROMPTS[:2])).total.sum()) for s in (step, -step)
    ]
    assert slope.isfinite().all()
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(slope.norm()), rel=5e-2)


@pytest.mark.parametrize("kind", REWARDS)
def test_a_score_under_inference_mode_leaves_later_gradients_and_the_random_state_alone(kind: type) -> None:
    reward, before = reward_of(kind), torch.random.get_rng_state()
    with torch.inference_mode():
        score(reward, media_of(3), cases_of())
    assert torch.equal(torch.random.get_rng_state(), before)
    media = media_of(3).requires_grad_()
    score(reward, media, cases_of()).total.sum().backward()
    assert media.grad is not None
    assert media.grad.isfinite().all()


@pytest.mark.parametrize("kind", REWARDS)
def test_rows_per_image_is_what_the_model_runs(kind: type) -> None:
    reward = reward_of(kind)
    score(reward, media_of(3), cases_of())
    before = reward.latent_model.budget.nfe
    score(reward, media_of(3), cases_of())
    assert reward.latent_model.budget.nfe - before == 3 * reward.rows_per_image


def test_the_defaults_cost_what_the_cards_say() -> None:
    assert LikelihoodRatio().rows_per_image == 24
    assert SelfConfidence().rows_per_image == 48


@pytest.mark.parametrize("kind", REWARDS)
def test_a_picture_with_nan_is_invalid_and_changes_no_other(kind: type) -> None:
    reward, media = reward_of(kind), media_of(3)
    whole = score(reward, media, cases_of()).total
    media[1, 0, 0, 0] = torch.nan
    found = score(reward, media, cases_of())
    assert found.valid.tolist() == [True, False, True]
    assert torch.allclose(found.total[[0, 2]], whole[[0, 2]], atol=1e-5)


@pytest.mark.parametrize("kind", REWARDS)
def test_another_seed_is_another_score_and_the_same_one_is_the_same(kind: type) -> None:
    pipe = build("sd3")
    first, again, other = (
        score(reward_of(kind, pipe=pipe, seed=s), media_of(1), cases_of("a")).total for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_absolute_ratio_is_the_difference_of_its_parts() -> None:
    found = score(reward_of(LikelihoodRatio, scale="absolute"), media_of(3), cases_of())
    assert torch.allclose(found.total, found.parts["error_without_prompt"] - found.parts["error"], atol=1e-6)


def test_the_relative_ratio_does_not_depend_on_what_is_compared() -> None:
    errors, factor = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)), 7.0
    reward = LikelihoodRatio(scale="relative")
    assert torch.allclose(reward.advantage(errors), reward.advantage(factor * errors), atol=1e-5)
    assert torch.allclose(reward.advantage(errors), (errors[1].mean(0) / errors[0].mean(0)).log(), atol=1e-5)
    assert torch.equal(reward.advantage(torch.zeros(2, 4, 1)), torch.zeros(1))


def test_the_relative_ratio_takes_levels_of_pure_noise() -> None:
    assert score(reward_of(LikelihoodRatio, levels=(0.0, 0.5)), media_of(1), cases_of("a")).valid.all()


def test_the_sum_convention_is_the_mean_times_the_number_of_elements() -> None:
    pipe = build("sd3")
    mean, total = (
        score(reward_of(LikelihoodRatio, pipe=pipe, scale="absolute", convention=c), media_of(1), cases_of("a")).total
        for c in ("mean", "sum")
    )
    assert torch.allclose(total, mean * 4 * 8 * 8, rtol=1e-4)


@pytest.mark.parametrize("draws", [2, 8])
def test_the_confidence_of_a_perfect_denoiser_is_minus_log_delta(draws: int) -> None:
    reward = SelfConfidence(delta=1e-3, draws=draws)
    assert torch.allclose(reward.confidence(torch.zeros(1, draws, 2)), torch.full((2,), -math.log(1e-3)))
    assert reward.confidence(torch.full((1, draws, 1), 0.5)) < reward.confidence(torch.full((1, draws, 1), 0.4))


def test_confidence_looks_at_the_last_share_of_the_steps() -> None:
    assert SelfConfidence(steps=10, share=0.6).probes.steps(10) == [4, 5, 6, 7, 8, 9]
    assert SelfConfidence(steps=10, share=1.0).probes.steps(20) == list(range(1, 20, 2))


@pytest.mark.parametrize("kind", REWARDS)
def test_online_weights_count_at_once(kind: type) -> None:
    pipe = build("sd3")
    reward = reward_of(kind, pipe=pipe)
    before = score(reward, media_of(1), cases_of("a")).total
    for name in ("transformer", "text_encoder"):
        with torch.no_grad():
            for parameter in getattr(pipe, name).parameters():
                parameter.mul_(1.1)
        after = score(reward, media_of(1), cases_of("a")).total
        assert not torch.equal(before, after)
        before = after
    assert reward.version is None


def test_scores_of_a_folder_are_cached_by_the_content_of_its_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("sd15").save_pretrained(folder)
    cache, options = (
        ScoreCache(tmp_path / "c.sqlite"),
        {"levels": [0.25, 0.5], "draws": 2, "call": {"num_inference_steps": 4}},
    )

    def total(cache: ScoreCache | None = None) -> float:
        reward = make_reward({"likelihood_ratio": {"model": str(folder), **options}})
        return float(score(reward, media_of(1), cases_of("a"), cache=cache).total)

    def rows() -> int:
        total(cache)
        return len(cache)

    assert [rows(), rows()] == [1, 1]
    before = total()
    file = next((folder / "unet").glob("*.safetensors"))
    save_file({k: v.flip(0).contiguous() for k, v in load_file(file).items()}, file)
    assert rows() == 2
    changed = total(cache)
    load_model.cache_clear()
    assert total() == changed != before  # the changed model was asked, not the one that was loaded before


def test_without_network_a_hub_id_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match="cannot fetch 'owner/name'"):
        score(make_reward({"self_confidence": {"model": "owner/name"}}), media_of(1), cases_of("a"))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"likelihood_ratio": {"draws": 3}}, "comes in pairs"),
        ({"likelihood_ratio": {"levels": [1.5]}}, "a share of the schedule"),
        ({"likelihood_ratio": {"micro_batch": 0}}, "at least 1 row"),
        ({"likelihood_ratio": {"weighting": "snr"}}, "uniform"),
        ({"self_confidence": {"share": 0.0}}, "a share of them above 0"),
        ({"self_confidence": {"weighting": "uniform"}}, "unknown key"),
    ],
)
def test_options_that_cannot_be_are_refused_before_a_model_loads(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_reward(spec)


def test_the_likelihood_weighting_refuses_pure_noise() -> None:
    with pytest.raises(ConfigError, match="Leave level 0 out"):
        score(reward_of(LikelihoodRatio, weighting="likelihood", levels=(0.0, 0.5)), media_of(1), cases_of("a"))


def test_a_pipeline_that_edits_is_refused() -> None:
    with pytest.raises(ModelError, match="on a prompt and a size alone"):
        score(reward_of(LikelihoodRatio, "sd_img2img"), media_of(1), cases_of("a"))


def test_the_embedded_model_prefers_a_scenes_own_prompt() -> None:
    rng = random.Random(0)
    clauses = [sample_clauses(kind, rng) for kind in ("single", "colours", "single", "colours")]
    media = render_many([sample_scene(each, rng) for each in clauses])
    prompts = [say(each) for each in clauses]
    own = score(make_reward("likelihood_ratio"), media, cases_of(*prompts)).total
    other = score(make_reward("likelihood_ratio"), media, cases_of(*prompts[1:], prompts[0])).total
    assert (own > other).all()
