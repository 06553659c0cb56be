from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffalign.cases import Case
from diffalign.drive import Driver
from diffalign.endogenous import LatentModel
from diffalign.errors import ConfigError, ModelError
from diffalign.noise import Levels
from diffalign.probes import Probes, Weighting, probe, weights_of
from tests.tiny import FAMILIES, build

OWN = ("max_sequence_length", "num_inference_steps", "clean_caption", "complex_human_instruction", "system_prompt")
FEW = {"levels": (0.25, 0.5), "draws": 2}
seeds = st.integers(0, 99)


class Signs(Probes):
    """Noise of all ones and all minus ones: their average is the exact expectation of anything quadratic."""

    def noise(self, i: int, like: Tensor) -> Tensor:
        return torch.stack([torch.ones(like.shape[1:]), -torch.ones(like.shape[1:])]).to(like)


def grid(count: int, widest: float = 16.0) -> Levels:
    """Variance-preserving levels, evenly spaced in the log of the signal-to-noise ratio."""
    ratio = torch.linspace(-widest, widest, count + 1, dtype=torch.float64)
    return Levels(ratio.sigmoid().sqrt(), (-ratio).sigmoid().sqrt(), "epsilon")


def every(count: int) -> tuple[float, ...]:
    return tuple((k + 0.5) / count for k in range(count))


def gaussian(levels: Levels, asked_seen: list[Any] | None = None) -> Any:
    """The optimal noise prediction where the data of a condition (mean, std) are Gaussian."""

    def denoise(x: Tensor, i: int, asked: Sequence[Any]) -> Tensor:
        alpha, sigma = levels.at(i)
        mean, std = (torch.tensor(part, dtype=x.dtype)[:, None] for part in zip(*asked, strict=True))
        if asked_seen is not None:
            asked_seen.append((i, x.detach().clone(), list(asked)))
        return sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    return denoise


def gap(errors: Tensor) -> Tensor:
    return (errors[1] - errors[0]).mean(0)


def ratio_of(
    x0: Tensor, own: Sequence[Any], other: Sequence[Any], probes: Probes, levels: Levels, **how: Any
) -> Tensor:
    return probe(gaussian(levels), levels, x0, [own, other], probes, gap, **how)[0]


@settings(max_examples=10)
@given(
    means=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    stds=st.tuples(st.floats(0.3, 2), st.floats(0.3, 2)),
    seed=seeds,
)
def test_the_likelihood_weighting_gives_the_log_ratio_of_two_gaussians(
    means: tuple[float, float], stds: tuple[float, float], seed: int
) -> None:
    levels, x0 = grid(200), torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)).double()
    probes = Signs(levels=every(200), draws=2, convention="sum")
    own, other = ([(mean, std)] * 3 for mean, std in zip(means, stds, strict=True))
    found = ratio_of(x0, own, other, probes, levels, weighting="likelihood")
    normals = [torch.distributions.Normal(mean, std) for mean, std in zip(means, stds, strict=True)]
    expected = (normals[0].log_prob(x0) - normals[1].log_prob(x0)).sum(1)
    assert torch.allclose(found, expected, rtol=1e-2, atol=2e-2)


def test_drawn_noise_tends_to_the_same_log_ratio() -> None:
    levels, x0 = grid(100), torch.full((1, 400), 0.5, dtype=torch.float64)
    probes = Probes(levels=every(100), draws=8, convention="sum")
    found = ratio_of(x0, [(0.5, 0.5)], [(0.0, 1.0)], probes, levels, weighting="likelihood")
    expected = 400 * (math.log(2) + 0.125)
    assert float(found) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("weighting", ["uniform", "velocity", "clean", "min_snr"])
@given(seed=seeds)
def test_the_ratio_is_antisymmetric_in_its_branches_and_zero_where_they_agree(weighting: Weighting, seed: int) -> None:
    levels, x0 = grid(10, 4.0), torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))
    probes = Probes(**FEW, seed=seed)
    one, two = [(0.3, 0.5), (1.0, 0.7)], [(-0.2, 1.5)] * 2
    forth = ratio_of(x0, one, two, probes, levels, weighting=weighting)
    assert torch.equal(forth, -ratio_of(x0, two, one, probes, levels, weighting=weighting))
    assert torch.equal(ratio_of(x0, one, one, probes, levels, weighting=weighting), torch.zeros(2))


def test_both_branches_and_all_pictures_see_the_same_noise() -> None:
    levels, seen = grid(10, 4.0), list[Any]()
    x0 = torch.zeros(2, 6)  # without a picture all that is left is noise
    probe(gaussian(levels, seen), levels, x0, [[(0.0, 1.0)] * 2, [(1.0, 1.0)] * 2], Probes(**FEW), gap)
    for _, x, _ in seen:
        rows = x.view(2, 2, 2, 6)  # branches, draws, pictures
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows[:, :, 0], rows[:, :, 1])
        assert torch.equal(rows[:, 0], -rows[:, 1])  # antithetic
    assert not torch.equal(seen[0][1], seen[1][1])


@given(order=st.permutations(range(4)), most=st.one_of(st.none(), st.integers(1, 20)))
def test_a_score_does_not_depend_on_its_batch_order_or_chunks(order: list[int], most: int | None) -> None:
    levels, x0 = grid(10, 4.0), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    conditions = [(0.1 * k, 1.0) for k in range(4)]
    alone = [ratio_of(x0[k : k + 1], conditions[k : k + 1], [(0.0, 2.0)], Probes(**FEW), levels) for k in order]
    found = ratio_of(x0[order], [conditions[k] for k in order], [(0.0, 2.0)] * 4, Probes(**FEW), levels, most=most)
    assert torch.allclose(found, torch.cat(alone), atol=1e-6)


@pytest.mark.parametrize("target", ["noise", "velocity", "clean"])
@pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction", "sample"])
def test_errors_of_every_target_are_those_of_the_implied_prediction(prediction: str, target: Any) -> None:
    share = torch.linspace(0.95, 0.05, 11, dtype=torch.float64)
    flow = prediction == "flow"
    levels = Levels(1 - share if flow else (1 - share**2).sqrt(), share, prediction)
    wrong = 0.1  # every model here is wrong by this much in the noise it implies
    x0, probes = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)), Probes(**FEW, target=target)

    def denoise(x: Tensor, i: int, asked: Sequence[Any]) -> Tensor:
        alpha, sigma = levels.at(i)
        clean = x0[[int(k) for k in asked]]
        noise = (x - alpha * clean) / sigma + wrong
        clean = (x - sigma * noise) / alpha
        told = {"epsilon": noise, "sample": clean, "flow": noise - clean, "v_prediction": alpha * noise - sigma * clean}
        return told[prediction]

    _, errors = probe(denoise, levels, x0, [[0, 1]], probes, lambda e: e[0].mean(0))
    for k, i in enumerate(probes.steps(10)):
        alpha, sigma = levels.at(i)
        scale = {"noise": 1.0, "clean": sigma / alpha, "velocity": 1 + sigma / alpha}[target]
        assert torch.allclose(errors[k], torch.full((1, 2, 2), (wrong * scale) ** 2), rtol=1e-3)


def test_the_gradient_is_that_of_the_whole_sum() -> None:
    levels, x0 = grid(10, 4.0), torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    own, other = [(0.3, 0.5)] * 3, [(0.0, 1.0)] * 3
    run = lambda x, most=None: ratio_of(x, own, other, Probes(**FEW), levels, most=most)  # noqa: E731
    (slope,) = torch.autograd.grad(run(x0).sum(), x0)
    (chunked,) = torch.autograd.grad(run(x0, 3).sum(), x0)
    step = 1e-4 * torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        change = (run(x0 + step) - run(x0 - step)).sum() / 2
    assert torch.allclose(slope, chunked)
    assert float((slope * step).sum()) == pytest.approx(float(change), rel=1e-3)
    assert torch.equal(run(x0), run(x0.detach()))


def test_weights_by_hand() -> None:
    levels = Levels(torch.tensor([0.0, 0.6, 0.8, 1.0]).double(), torch.tensor([1.0, 0.8, 0.6, 0.0]).double(), "epsilon")
    assert weights_of(levels, [0, 1, 2], "uniform") == pytest.approx([1 / 3] * 3)
    assert weights_of(levels, [0, 1], "min_snr") == pytest.approx([0.5, 0.5])  # ratios up to 5 count fully
    assert weights_of(grid(4, 4.0), [3], "min_snr") == pytest.approx([5 / math.exp(2)])
    span = 2 * math.log((0.8 / 0.6) ** 2)
    assert sum(weights_of(levels, [1, 2], "likelihood")) == pytest.approx(span / 2)
    with pytest.raises(ConfigError, match="none of pure noise"):
        weights_of(levels, [0, 1], "likelihood")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"levels": ()}, "Give at least one"),
        ({"levels": (1.0,)}, "to below 1"),
        ({"draws": 3}, "comes in pairs"),
        ({"draws": 0}, "at least one draw"),
    ],
)
def test_probes_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Probes(**{**FEW, **options})


def test_levels_that_fall_on_one_step_are_refused() -> None:
    with pytest.raises(ConfigError, match="only 1 differ in a schedule of 2 steps"):
        Probes(levels=(0.1, 0.2), draws=2).steps(2)


def model_of(name: str, pipe: Any = None) -> LatentModel:
    call = {k: v for k, v in FAMILIES[name].call(1).items() if k in OWN}
    return LatentModel(pipe or build(name), call)


def media_of(rows: int, side: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:.*inside its model")
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "qwen_image"])
def test_clean_latents_are_those_of_the_pipelines_own_constants_and_packing(name: str) -> None:
    model, media = model_of(name), media_of(2)
    vae = model.pipe.vae
    pixels = (media * 2 - 1)[:, :, None] if name == "qwen_image" else media * 2 - 1
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.mode()
        found = model.clean(media)
    if name == "qwen_image":
        expected = (raw - vae.config.latents_mean[0]) / vae.config.latents_std[0]
        expected = model.pipe._pack_latents(expected, 2, *expected.shape[1:2], *expected.shape[3:])
    else:
        expected = (raw - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        expected = model.pipe._pack_latents(expected, *expected.shape) if name == "flux" else expected
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*inside its model")
def test_latents_of_a_half_precision_pipeline_are_close_to_those_of_the_full_one() -> None:
    whole = model_of("flux").clean(media_of(1))
    half = model_of("flux", build("flux").to(torch.bfloat16)).clean(media_of(1))
    assert half.dtype == torch.float32
    assert torch.allclose(whole, half, atol=0.03)


@pytest.mark.parametrize(
    "name", ["sd15", "sd15_euler", "sdxl", "sd3", "chroma", "pixart_sigma", "sana_flow", "hunyuan_dit", "aura_flow"]
)
def test_the_two_branches_are_what_guidance_mixes(name: str) -> None:
    pipe, weight = build(name), 3.0
    side = 32 if name == "sana_flow" else 16
    model = model_of(name, pipe)
    denoise, x = model.denoiser(["red cube", ""], (side, side)), model.clean(media_of(1, side))
    i = len(model.levels((side, side))) // 2
    prompted, bare = denoise(torch.cat([x, x]), i, ["red cube", ""]).chunk(2)
    call = model.call | {"height": side, "width": side, "negative_prompt": [""], "guidance_scale": weight}
    call |= {"use_resolution_binning": False} if name in ("pixart_sigma", "sana_flow", "hunyuan_dit") else {}
    guided = Driver(pipe, [Case(prompt="red cube")], **call).predict(x.to(prompted), i)
    assert torch.allclose(guided, bare + weight * (prompted - bare), atol=1e-4)
    assert not torch.allclose(prompted, bare, atol=1e-4)


def test_a_batch_of_prompts_predicts_as_single_ones() -> None:
    model = model_of("sd3")
    x, prompts = model.clean(media_of(3)), ["red cube", "", "a longer prompt about boats"]
    together = model.denoiser(prompts, (16, 16))(x, 1, prompts)
    for k, prompt in enumerate(prompts):
        assert torch.allclose(
            together[k : k + 1], model.denoiser([prompt], (16, 16))(x[k : k + 1], 1, [prompt]), atol=1e-5
        )


def test_guidance_inside_the_model_is_told_once() -> None:
    model = model_of("flux")
    with pytest.warns(UserWarning, match="FluxPipeline reads guidance_scale inside its model") as told:
        [model.levels(size) for size in ((16, 16), (32, 32))]
    assert len(told) == 1


def test_guidance_beside_the_model_is_not_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_of("sd3").levels((16, 16))
        model_of("z_image").levels((16, 16))  # adds guidance on top, so that 0 switches it off


def test_weights_flags_and_modes_are_as_before_and_get_no_gradient() -> None:
    pipe = build("sd3")
    pipe.transformer.train()
    model, media = model_of("sd3", pipe), media_of(1).requires_grad_()
    score, _ = probe(
        *(model.denoiser(["red cube"], (16, 16)), model.levels((16, 16)), model.clean(media), [["red cube"]]),
        *(Probes(**FEW), lambda e: e[0].mean(0)),
    )
    score.sum().backward()
    assert media.grad is not None
    assert media.grad.abs().sum() > 0
    assert pipe.transformer.training
    assert all(p.requires_grad and p.grad is None for p in pipe.transformer.parameters())
    assert all(p.requires_grad and p.grad is None for p in pipe.vae.parameters())
    assert "decode" not in vars(pipe.vae)


def test_pictures_are_resized_to_the_size_that_the_call_asks_for() -> None:
    model = LatentModel(build("sd3"), {"height": 16, "width": 16, "max_sequence_length": 32})
    assert model.fitted(media_of(2, 40)).shape == (2, 3, 16, 16)
    assert model_of("sd3").fitted(media_of(2, 40)).shape == (2, 3, 40, 40)


@pytest.mark.parametrize("name", ["sd_img2img", "sd_controlnet", "sdxl_inpaint", "instruct_pix2pix"])
def test_a_pipeline_that_needs_a_picture_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="does not run on a prompt and a size alone"):
        model_of(name).levels((16, 16))


def test_a_pipeline_without_a_prompt_is_refused() -> None:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = diffusers.UNet2DModel(sample_size=8, norm_num_groups=4, layers_per_block=1, **blocks)
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    with pytest.raises(ModelError, match="takes no prompt"):
        LatentModel(pipe).levels((8, 8))


def test_guidance_that_the_call_insists_on_is_refused() -> None:
    with pytest.raises(ModelError, match="runs 2 rows for one picture"):
        LatentModel(build("sd15"), {"guidance_scale": 5.0}).levels((16, 16))


def test_a_picture_of_another_size_than_the_pipeline_draws_is_refused() -> None:
    model = LatentModel(build("sd3"), {"height": 32, "width": 32, "max_sequence_length": 32})
    with pytest.raises(ModelError, match=r"16 x 16 pixels are encoded as .* Give a height and width in `call`"):
        model.clean(media_of(1))


class Bending:
    """A scaling factor that bends what is divided by it."""

    def __rtruediv__(self, latents: Tensor) -> Tensor:
        return latents.tanh()


def test_a_decoding_that_is_more_than_scaling_is_refused() -> None:
    pipe = build("sd15")
    pipe.vae.register_to_config(scaling_factor=Bending())
    with pytest.raises(ModelError, match="does more than scale, shift and arrange"):
        model_of("sd15", pipe).clean(media_of(1))
