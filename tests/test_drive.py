"""The seam in detail: true indices, restoring, counting, remembering, selecting, gradients."""

import functools
import gc
import inspect
import subprocess
import sys
import weakref

import pytest
import torch

from diffalign.borrowed import temporary_lora
from diffalign.budget import Budget
from diffalign.cases import Case
from diffalign.drive import Driver, grad_call, undecorated
from diffalign.errors import ConfigError, ModelError, SeamError
from diffalign.metering import metered
from diffalign.noise import cps, ddim, flow_sde
from diffalign.recording import difference
from diffalign.restore import frozen
from diffalign.snapshot import differences, snapshot
from tests.tiny import build, call

GUIDED = [
    ("sd_controlnet", {"control_guidance_start": 0.3, "control_guidance_end": 0.8}),
    ("sd3_controlnet", {"control_guidance_start": 0.3, "control_guidance_end": 0.8}),
    ("sd3", {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.6}),
    ("z_image", {"cfg_truncation": 0.5}),
]


def recorded(pipe, seed=3, **arguments):
    """What the stock scheduler was handed, step by step, and the stock media."""
    steps, native = [], pipe.scheduler.step

    @functools.wraps(native)
    def step(*args, **kwargs):
        given = inspect.signature(native).bind(*args, **kwargs).arguments
        steps.append((given["sample"].clone(), given["model_output"].clone()))
        return native(*args, **kwargs)

    pipe.scheduler.__dict__["step"] = step
    torch.manual_seed(5)
    media = pipe(**arguments, generator=torch.Generator().manual_seed(seed), output_type="pt", return_dict=False)[0]
    del pipe.scheduler.__dict__["step"]
    return steps, media


def driver_of(name, pipe=None, seed=3, **extra):
    torch.manual_seed(5)
    return Driver(pipe or build(name), **{**call(name), **extra}, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("hidden", [False, True], ids=["enumerate", "blank-iterations"])
@pytest.mark.parametrize(("name", "extra"), GUIDED, ids=[n for n, _ in GUIDED])
def test_guidance_that_depends_on_the_index_is_predicted_at_the_true_index(name, extra, hidden):
    pipe = build(name)
    steps, _ = recorded(pipe, **{**call(name), **extra})
    driver = driver_of(name, pipe, **extra)
    driver._hides_index = hidden
    for i in reversed(range(len(steps))):
        assert difference(driver.predict(steps[i][0], i), steps[i][1]) == 0.0


def test_guidance_by_index_is_seen_by_this_test_at_all():
    name, extra = GUIDED[2]
    driver = driver_of(name, **extra)
    x = driver.start()
    inside, outside = driver.predict(x, 1), driver_of(name).predict(x, 1)
    assert difference(inside, outside) > 0


@pytest.mark.parametrize("name", ["sd15_ddim", "sd3", "flux", "sd_inpaint", "ltx_image2video"])
def test_replay_returns_the_recorded_densities_to_the_bit_with_gradients_to_the_weights(name):
    driver = driver_of(name)
    walk = driver.rollout(ddim(0.7), quiet=True)
    module = driver.modules[driver.denoiser]
    with frozen(driver.modules.values()):
        weight = next(p for p in module.parameters() if p.ndim > 1).requires_grad_(True)
        seen = []

        def learn(i, prediction, transition, log_prob):
            seen.append(i)
            if log_prob.requires_grad:
                log_prob.sum().backward()

        replayed = driver.replay(walk, ddim(0.7), on_step=learn)
        assert weight.grad is not None
        assert weight.grad.isfinite().all()
        weight.grad = None
    assert seen == list(range(driver.length))
    assert torch.allclose(replayed, walk.log_probs, rtol=1e-4)
    assert torch.equal(driver.replay(walk, ddim(0.7), grad=False), walk.log_probs)


@pytest.mark.parametrize("kernel", [ddim(0.5), cps(0.6), flow_sde(0.7)], ids=["ddim", "cps", "flow_sde"])
def test_a_walk_resumed_in_the_middle_ends_where_the_whole_walk_ends(kernel):
    driver = driver_of("sd3")
    whole = driver.rollout(kernel, quiet=True)
    tail = driver.rollout(kernel, x=whole.latents[2], start=2, quiet=True)
    assert difference(whole.media, tail.media) == 0.0
    assert torch.equal(whole.log_probs[2:], tail.log_probs)


@pytest.mark.parametrize("name", ["sd15", "sd_pag", "sd3_controlnet", "wan22"])
def test_a_pipeline_is_as_it_was_also_after_a_call_that_raised(name):
    pipe = build(name)
    pipe(**call(name), generator=torch.Generator().manual_seed(1), output_type="pt")
    before, scheduler, cls = snapshot(pipe), pipe.scheduler, type(pipe)
    driver = driver_of(name, pipe)
    x = driver.start()
    driver.predict(x, 1)
    driver.rollout(ddim(0.3), quiet=True)
    with pytest.raises(ModelError, match="NaN"):
        driver.predict(torch.full_like(x, float("nan")), 1)

    def explode(*_):
        raise RuntimeError("out of memory")

    handle = driver.modules[driver.denoiser].register_forward_hook(explode)
    with pytest.raises(RuntimeError, match="out of memory"):
        driver.rollout(quiet=True)
    handle.remove()
    assert differences(before, snapshot(pipe)) == []
    assert pipe.scheduler is scheduler
    assert type(pipe) is cls


def test_counting_charges_every_guidance_branch_and_two_more_for_a_backward_pass():
    driver = driver_of("sd3")
    x = driver.start().requires_grad_()
    assert driver.budget.nfe == 0
    driver.predict(x, 0, grad=True).sum().backward()
    assert driver.budget.nfe == 2 + 4
    single = driver_of("sd3", guidance_scale=1.0)
    single.predict(single.start(), 0)
    assert single.budget.nfe == 1


@pytest.mark.parametrize(
    ("name", "rows"),
    [("sd3", 2), ("flux", 2), ("instruct_pix2pix", 3), ("sd_controlnet", 2), ("z_image", 2), ("wan22", 2)],
)
def test_a_metered_stock_call_is_untouched_and_counts_every_row(name, rows):
    pipe, budget = build(name), Budget()
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(**call(name), generator=torch.Generator().manual_seed(1), output_type="pt", return_dict=False)[0]
    before = snapshot(pipe)
    with metered(pipe, budget):
        counted = pipe(**call(name), generator=torch.Generator().manual_seed(1), output_type="pt", return_dict=False)[0]
    assert difference(plain, counted) == 0.0
    assert budget.nfe == rows * 4
    assert differences(before, snapshot(pipe)) == []


@pytest.mark.parametrize("name", ["sd15", "sd3", "qwen_image_edit", "hunyuan_video"])
def test_conditioning_is_computed_once_however_many_predictions_follow(name):
    pipe = build(name)
    counts = {k: 0 for k in pipe.components if k.startswith(("text_encoder", "vae"))}
    handles = [
        module.register_forward_pre_hook(lambda *_, k=k: counts.__setitem__(k, counts[k] + 1))
        for k, module in pipe.components.items()
        if k.startswith("text_encoder") and module is not None
    ]
    driver = driver_of(name, pipe)
    x = driver.start()
    first = dict(counts)
    for i in (0, 2, 1):
        driver.predict(x, i)
    assert counts == first
    assert sum(first.values()) > 0
    for handle in handles:
        handle.remove()


def test_selected_rows_are_the_cases_they_name():
    driver = Driver(build("sd3"), **call("sd3", 2), generator=[torch.Generator().manual_seed(s) for s in (3, 17)])
    both, second = driver.start(), driver.select([1])
    assert torch.equal(second.start()[0], both[1])
    assert second.cases[0].prompt == driver.cases[1].prompt
    thrice = driver.select([1, 0, 1])
    assert torch.equal(thrice.start(), both[[1, 0, 1]])
    predictions = thrice.predict(thrice.start(), 0)
    assert torch.allclose(predictions[0], driver.predict(both, 0)[1], atol=1e-4)
    assert thrice.budget is driver.budget


def test_cases_carry_prompts_seeds_and_source_images():
    picture = call("instruct_pix2pix")["image"][0]
    cases = [Case(prompt="red cube", seed=4, source=picture), Case(prompt="blue ball", seed=9, source=picture)]
    rest = {k: v for k, v in call("instruct_pix2pix", 2).items() if k not in ("prompt", "image")}
    driver = Driver(build("instruct_pix2pix"), cases, **rest)
    assert driver.start().shape[0] == 2
    assert driver.predict(driver.start(), 0).isfinite().all()


def test_the_base_model_is_seen_with_adapters_off_and_the_adapter_comes_back():
    driver = driver_of("sd3")
    x = driver.start()
    base = driver.predict(x, 0)
    with temporary_lora(driver.modules["transformer"]):
        flags = {n: p.requires_grad for n, p in driver.modules["transformer"].named_parameters()}
        adapted = driver.predict(x, 0)
        with driver.reference():
            assert torch.equal(driver.predict(x, 0), base)
        assert torch.equal(driver.predict(x, 0), adapted)
        assert not torch.equal(adapted, base)
        assert flags == {n: p.requires_grad for n, p in driver.modules["transformer"].named_parameters()}


def test_noise_of_our_own_starts_where_the_stock_call_would():
    for name in ("sd3", "sd15_euler", "flux"):
        driver = driver_of(name)
        scale = float(driver.start().std())
        noise = torch.randn(driver.start().shape, generator=torch.Generator().manual_seed(0))
        assert float(driver.from_noise(noise).std()) == pytest.approx(scale * float(noise.std()), rel=0.4)
    edit = driver_of("sd_img2img")
    noise = torch.zeros_like(edit.start())
    with pytest.raises(SeamError, match="starts from an image"):
        edit.from_noise(noise)


def test_the_undecorated_call_gives_the_stock_image_and_a_gradient():
    pipe = build("sd3")
    stock = pipe(**call("sd3"), generator=torch.Generator().manual_seed(1), output_type="pt").images
    latents = driver_of("sd3", pipe, seed=1).start().requires_grad_()
    with frozen([m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]):
        image = grad_call(pipe, **call("sd3"), latents=latents, output_type="pt").images
    assert torch.allclose(image.detach(), stock, atol=1e-5)
    image.mean().backward()
    assert latents.grad.isfinite().all()
    assert latents.grad.any()
    assert inspect.unwrap(undecorated(pipe)).__func__ is not type(pipe).__call__


def test_the_callers_callback_still_runs_in_a_rollout():
    seen = []

    def note(pipe, i, t, kwargs):
        seen.append((i, float(t)))
        return kwargs

    driver = driver_of("sd3")
    driver.rollout(ddim(0.2), callback=note, quiet=True)
    assert [i for i, _ in seen] == [0, 1, 2, 3]


def test_a_misspelt_argument_is_named_before_anything_runs():
    with pytest.raises(ConfigError, match="guidence_scale"):
        driver_of("sd3", guidence_scale=3.0)


def test_several_images_of_one_prompt_are_refused_because_they_share_a_seed():
    with pytest.raises(ConfigError, match="own case"):
        driver_of("sd3", num_images_per_prompt=2)


def test_a_walk_from_the_middle_without_latents_says_what_is_missing():
    with pytest.raises(SeamError, match="x="):
        driver_of("sd3").rollout(ddim(), start=2)


@pytest.mark.slow
def test_the_same_case_walks_the_same_in_two_processes():
    script = (
        "import torch, hashlib; torch.set_num_threads(1)\n"
        "from tests.tiny import build, call; from diffalign.drive import Driver; from diffalign.noise import ddim\n"
        "d = Driver(build('sd3'), **call('sd3'), generator=torch.Generator().manual_seed(17))\n"
        "m = d.rollout(ddim(0.5), quiet=True).media; print(hashlib.sha256(m.numpy().tobytes()).hexdigest())\n"
    )
    runs = [
        subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == 64


def test_a_driver_of_low_precision_keeps_latents_in_the_loops_own_dtype():
    pipe = build("sd3").to(dtype=torch.bfloat16)
    driver = driver_of("sd3", pipe)
    walk = driver.rollout(ddim(0.5), quiet=True)
    assert {x.dtype for x in walk.latents} == {driver.start().dtype}
    assert walk.log_probs.dtype == torch.float32
    assert torch.equal(driver.replay(walk, ddim(0.5), grad=False), walk.log_probs)


@pytest.mark.parametrize(
    "name", ["sd15", "sdxl", "sd3", "flux", "sd_inpaint", "z_image", "qwen_image", "ltx_video", "wan21"]
)
def test_the_cost_of_every_level_is_known_before_anything_is_spent(name):
    driver = driver_of(name)
    costs = driver.costs
    assert len(costs) == driver.length
    assert driver.budget.nfe == 0
    driver.rollout(output_type="latent")
    assert driver.budget.nfe == sum(costs) * driver.batch


def test_guidance_that_ends_early_makes_later_levels_cheaper():
    driver = driver_of("sd3", skip_guidance_layers=[0], skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.6)
    costs = driver.costs
    assert len(set(costs)) > 1
    for i in range(driver.length):
        before = driver.budget.nfe
        driver.predict(driver.start(), i)
        assert driver.budget.nfe - before == costs[i]


@pytest.mark.parametrize("name", ["sd3", "sd15", "flux", "sd_inpaint"])
def test_a_reseeded_driver_draws_what_a_driver_of_that_seed_draws(name):
    pipe = build(name)
    ours, theirs = driver_of(name, pipe).reseeded([11]), driver_of(name, pipe, seed=11)
    assert torch.equal(ours.start(), theirs.start())
    assert torch.equal(ours.rollout().media, theirs.rollout().media)


class Kept:
    """What a graph keeps of a tensor."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan21"])
def test_a_graph_that_nobody_goes_back_through_is_freed_at_once(name):
    """While the driver lives, and without the collector, which cannot see through a graph."""
    driver, kept, kernel = driver_of(name), [], ddim(1.0)

    def keep(tensor):
        found = Kept(tensor)
        kept.append(weakref.ref(found))
        return found

    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda found: found.tensor):
            driver.predict(driver.start(), 0, grad=True)
            with torch.no_grad():
                walk = driver.rollout(kernel, quiet=True, tracked=range(1))
            driver.replay(walk, kernel)
        assert kept
        assert not [each for each in kept if each() is not None]
    finally:
        gc.enable()
